"""What a study found, as plain numbers: the report is made from this and nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np

from steepest.lab.data import Data
from steepest.lab.errors import InputError
from steepest.lab.models import sizes_of
from steepest.lab.studies.statistics import first_reach, interval
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.sweep import Run
from steepest.lab.train import TrainConfig, named_optimizer
from steepest.lab.train.run_folder import read_metrics


def summarize(
    *,
    config: StudyConfig,
    steps: int,
    data: Data,
    environment: dict[str, Any],
    tuning: Mapping[str, Mapping[float, Run]],
    varied: Mapping[str, list[dict[str, Any]]],
    verdicts: Mapping[str, tuple[str, str]],
    fresh: Mapping[str, list[Run]],
    plan: dict[str, Any],
) -> dict[str, Any]:
    """Return the summary; losses in nats per token, and in bits per byte where these are known."""
    baseline = config.optimizers[0]
    to_bits = 1 / math.log(2) / data.bytes_per_token if data.bytes_per_token else None
    losses = {name: _losses(runs) for name, runs in fresh.items()}
    level = interval(list(losses.get(baseline, {}).values()))
    sample = next(run for rates in tuning.values() for run in rates.values())
    all_runs = {run.out for rates in tuning.values() for run in rates.values()}
    all_runs |= {run.out for runs in fresh.values() for run in runs}
    return {
        "kind": "study",
        "title": "Which optimizer, at its own best learning rate?",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "settings": {
            **{k: v for k, v in asdict(sample.config).items() if k in _SHOWN},
            "warmup": sample.config.warmup_steps,
            **_sizes(sample.config, data),
            "steps": steps,
            f"{data.unit} in each run": sample.result.get("tokens"),
            "seed for tuning": 0,
            "fresh seeds": list(range(1, config.seeds + 1)),
        },
        "environment": environment,
        "data": {
            "name": data.name,
            "description": data.description,
            "sha256": data.sha256,
            "unit": data.unit,
            "bytes_per_token": data.bytes_per_token,
        },
        "plan": {**plan, "runs_finished": len(all_runs)},
        "baseline": baseline,
        "optimizers": [
            _optimizer(
                name,
                tuning[name],
                fresh.get(name, []),
                verdicts[name],
                losses.get(name, {}),
                losses.get(baseline, {}) if name != baseline else {},
                level["mean"] if level else None,
                to_bits,
                varied.get(name, []),
            )
            for name in config.optimizers
        ],
    }


def _sizes(config: TrainConfig, data: Data) -> dict[str, Any]:
    """All sizes of an own model."""
    shape = data.shape(config.context)
    sizes = sizes_of(
        config.model, shape, width=config.width, depth=config.depth, options=config.model_options
    )
    return {} if sizes is None else {f"model {k}": v for k, v in asdict(sizes).items()}


_SHOWN = (
    "momentum",
    "adamw_lr",
    "weight_decay",
    "model",
    "width",
    "depth",
    "model_options",
    "loss",
    "tokenizer",
    "context",
    "batch",
    "accumulate",
    "schedule",
    "final_lr",
    "clip",
    "precision",
)


def _losses(runs: list[Run]) -> dict[int, float]:
    """Final validation loss by seed, of the runs that did not diverge."""
    results = {run.config.seed: run.result["validation_loss"] for run in runs}
    return {seed: loss for seed, loss in results.items() if loss is not None}


def _optimizer(
    name: str,
    tuning: Mapping[float, Run],
    fresh: list[Run],
    verdict: tuple[str, str],
    losses: dict[int, float],
    baseline: dict[int, float],
    level: float | None,
    to_bits: float | None,
    varied: list[dict[str, Any]],
) -> dict[str, Any]:
    record = named_optimizer(name)
    unit = to_bits or 1.0
    gaps = [(losses[seed] - baseline[seed]) * unit for seed in losses if seed in baseline]
    values = list(losses.values())
    finished = [run for run in fresh if run.config.seed in losses]
    results = [run.result for run in finished]
    # The least disturbed seed tells what a step costs; the others had more company.
    steps = [run.result for run in finished if run.result.get("step_seconds")]
    accuracies = [r["validation_accuracy"] for r in results if "validation_accuracy" in r]
    cost = min(steps, key=lambda result: result["step_seconds"], default={})
    curves = _curves(finished, cost.get("step_seconds"))
    reached = _reached(curves, level)
    if len(losses) < len(fresh):
        verdict = "inconclusive", f"{len(fresh) - len(losses)} of {len(fresh)} fresh seeds diverged"

    def median(key: str) -> float | None:
        numbers = [run.result[key] for run in finished if run.result.get(key) is not None]
        return statistics.median(numbers) if numbers else None

    return {
        "name": name,
        "label": record.label,
        "geometry": record.geometry,
        "memory": record.memory,
        "verdict": verdict[0],
        "reason": verdict[1],
        "rates": [
            {
                "lr": rate,
                "runs": [
                    _point(run, "tuning" if run is first else "seed", to_bits)
                    for run in [first, *(r for r in fresh if r.config.lr == rate)]
                ],
            }
            for rate, first in sorted(tuning.items())
        ],
        "best_lr": fresh[0].config.lr if fresh else None,
        "validation_loss": interval(values),
        "bits_per_byte": interval([v * to_bits for v in values]) if to_bits else None,
        "validation_accuracy": interval(accuracies) if accuracies else None,
        "gap_to_baseline": interval(gaps),
        "varied": varied,
        "tokens_to_baseline": reached[0],
        "seconds_to_baseline": reached[1],
        "step_seconds": cost.get("step_seconds"),
        "optimizer_share": cost.get("optimizer_share"),
        "peak_memory_bytes": median("peak_memory_bytes"),
        "optimizer_state_bytes": median("optimizer_state_bytes"),
        "curves": curves,
        "conditions": [row for run in finished for row in _conditions(run)],
        "sharpness": [row for run in finished for row in _sharpness(run)],
    }


def _point(run: Run, purpose: str, to_bits: float | None) -> dict[str, Any]:
    result = run.result
    loss = result["validation_loss"]
    return {
        "seed": run.config.seed,
        "purpose": purpose,
        "validation_accuracy": result.get("validation_accuracy"),
        "status": result["status"],
        "validation_loss": loss,
        "bits_per_byte": loss * to_bits if to_bits and loss is not None else None,
    }


def _curves(runs: list[Run], step_seconds: float | None) -> list[dict[str, Any]]:
    """Validation curves, which are averaged point by point and so must have the same points."""
    curves = [_curve(run, step_seconds) for run in runs]
    points: list[int] = max((curve["tokens"] for curve in curves), key=len, default=[])
    for run, curve in zip(runs, curves, strict=True):
        if curve["tokens"] != points:
            raise InputError(
                f"{run.out / 'metrics.jsonl'} has {len(curve['tokens'])} validation losses, "
                f"expected {len(points)} as in the other seeds. Delete {run.out} and run the same "
                "command to make this run again"
            )
    return curves


def _curve(run: Run, step_seconds: float | None) -> dict[str, Any]:
    """The validation losses of a run; seconds are steps times what a step costs."""
    rows = [row for row in _measured(run) if row["kind"] == "validation"]
    return {
        "seed": run.config.seed,
        "tokens": [row["tokens"] for row in rows],
        "seconds": [row["step"] * step_seconds if step_seconds else None for row in rows],
        "validation_loss": [row["loss"] for row in rows],
    }


def _measured(run: Run) -> list[dict[str, Any]]:
    """The measurements of a finished run, which end with its last validation loss."""
    path, rows = run.out / "metrics.jsonl", read_metrics(run.out)
    ends = rows and (rows[-1]["kind"], rows[-1]["step"]) == ("validation", run.config.steps)
    if path.exists() and not ends:
        raise InputError(
            f"{path} is cut off: it does not end with the validation loss "
            f"after step {run.config.steps}. Delete {run.out} and run the same command to make "
            "this run again"
        )
    return rows


def _reached(
    curves: list[dict[str, Any]], level: float | None
) -> tuple[float | None, float | None]:
    """Tokens and seconds at which the mean curve first reaches the level."""
    if not curves or level is None:
        return None, None
    losses = zip(*(curve["validation_loss"] for curve in curves), strict=True)
    # means as in `interval`, to the last bit: the first optimizer must reach its own level
    loss = [float(np.mean(point)) for point in losses]
    tokens, seconds = curves[0]["tokens"], curves[0]["seconds"]
    known = None not in seconds
    return first_reach(tokens, loss, level), first_reach(seconds, loss, level) if known else None


def _conditions(run: Run) -> list[dict[str, Any]]:
    keys = ("step", "matrix", "role", "nuclear_rank", "stable_rank", "stable_rank_output")
    rows = (row for row in _measured(run) if row["kind"] == "condition")
    return [{key: row[key] for key in keys} for row in rows]


def _sharpness(run: Run) -> list[dict[str, Any]]:
    """Sharpness, and the ratio to the threshold for each part of the optimizer."""
    rows = (row for row in _measured(run) if row["kind"] == "sharpness")
    return [
        {
            "step": row["step"],
            "sharpness": row["sharpness"],
            "stability": [
                {"measure": part["measure"], "ratio": part["ratio"]} for part in row["stability"]
            ],
        }
        for row in rows
    ]
