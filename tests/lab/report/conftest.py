"""A summary as a study writes it, with made-up but plausible numbers."""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steepest.files import read_json, read_lines, write_json, write_lines
from steepest.lab.train import TrainConfig, train

# name, label, geometry, memory, best rate, final loss, decay, optimizer's share of a step
KINDS = (
    ("adamw", "AdamW", "max-entry", "momentum + second moment", 3e-3, 1.952, 1.00, 0.031),
    ("muon", "Muon", "spectral", "momentum", 2e-2, 1.893, 0.78, 0.124),
    ("signum", "Signum", "max-entry", "momentum", 3e-4, 1.960, 1.02, 0.022),
    ("soap", "SOAP", "spectral", "momentum + second moment", 3e-3, 1.884, 0.76, 0.342),
    ("shampoo", "Shampoo", "spectral", "second moment", 1e-2, 1.931, 0.9, 0.287),
    ("spectral", "SpectralDescent", "spectral", "none", 4e-2, 2.061, 1.3, 0.118),
    ("sgd", "SGD with momentum", "Euclidean", "momentum", 0.5, 2.415, 2.1, 0.017),
    ("teon", "TEON", "stacked spectral", "momentum", 2e-2, 1.889, 0.77, 0.141),
)
MATRICES = tuple(
    f"blocks.{block}.{name}.weight"
    for block in range(4)
    for name in (
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.output",
        "mlp.up",
        "mlp.down",
    )
)


def make_summary(
    optimizers: int = 4, matrices: int = 24, steps: int = 13, seed: int = 0
) -> dict[str, Any]:
    """Return a summary with 1 to 8 optimizers; the third is inconclusive."""
    random = np.random.default_rng(seed)
    made = [_optimizer(random, i, matrices, steps) for i in range(optimizers)]
    return {
        "kind": "study",
        "title": "Which optimizer, at its own best learning rate?",
        "created": "2026-11-22T21:00:00Z",
        "command": "steepest study --budget 4",
        "settings": {
            "width": 128,
            "depth": 4,
            "heads": 4,
            "context": 128,
            "batch": 16,
            "steps": 600,
            "warmup": 30,
            "schedule": "linear to zero",
            "adamw_lr": 3e-3,
            "weight_decay": 0.1,
            "betas": [0.9, 0.9999],
            "seeds": [1, 2, 3],
            "compile": False,
        },
        "environment": {
            "steepest": "0.1.0",
            "torch": "2.9.1",
            "python": "3.11.9",
            "platform": "Linux x86_64",
            "processor": "a processor of two cores",
            "threads": 2,
            "device": "cpu",
        },
        "data": {
            "name": "stdlib",
            "description": "the source text of Python's standard library",
            "sha256": "9f2b5c7e" * 8,
            "train_bytes": 11_400_000,
            "validation_bytes": 598_000,
            "documents": 1421,
        },
        "plan": {
            "budget_seconds": 240,
            "spent_seconds": 231.4,
            "runs_planned": 7 * optimizers,
            "runs_finished": 7 * optimizers - (optimizers > 2),
            "notes": ["The grid of Signum was not extended: the budget was spent."],
        },
        "baseline": "adamw",
        "optimizers": made,
    }


def _optimizer(random: np.random.Generator, i: int, matrices: int, steps: int) -> dict[str, Any]:
    name, label, geometry, memory, best, loss, decay, share = KINDS[i]
    tuned = i != 2
    step_seconds = 0.028 / (1 - share)
    finals = loss + random.normal(0, 0.004, 3)
    spread = 4.303 * float(np.std(finals, ddof=1)) / math.sqrt(3)
    bits = math.log2(math.e) / 3.1

    rates = []
    for k in range(-1, 3) if tuned else range(-3, 1):
        lr = float(f"{best * 2.0**k:.3g}")
        tuning = loss + 0.02 * k**2 * (2 if k > 0 else 1) + float(random.normal(0, 0.003))
        diverged = k == 2 and i % 2 == 0
        runs = [_run(0, "tuning", None if diverged else tuning, bits)]
        if k == 0:
            runs += [_run(s + 1, "seed", float(v), bits) for s, v in enumerate(finals)]
        rates.append({"lr": lr, "runs": runs})

    curves = []
    for s, final in enumerate(finals):
        t = np.linspace(0, 1, 25)
        shape = (np.exp(-7 * t / decay) * 0.7 + 0.3 * (1 - t)) * (5.54 - final)
        noise = random.normal(0, 0.008, len(t)) * (1 - t)
        curves.append(
            {
                "seed": s + 1,
                "tokens": [int(600 * 2048 * v) for v in t],
                "seconds": [float(600 * step_seconds * v) for v in t],
                "validation_loss": [float(v) for v in final + shape + noise],
            }
        )

    gap = None
    if i:
        mean = (loss - KINDS[0][5]) * bits
        wide = 0.012 if name == "shampoo" else 0.0035
        gap = {"mean": mean, "low": mean - wide, "high": mean + wide, "n": 3}
    reached = loss < KINDS[0][5]
    return {
        "name": name,
        "label": label,
        "geometry": geometry,
        "memory": memory,
        "verdict": "tuned" if tuned else "inconclusive",
        "reason": "best of 4 rates lies inside the grid"
        if tuned
        else "best of 4 rates is the largest one tried",
        "rates": rates,
        "best_lr": float(f"{best:.3g}"),
        "validation_loss": {"mean": loss, "low": loss - spread, "high": loss + spread, "n": 3},
        "bits_per_byte": {
            "mean": loss * bits,
            "low": (loss - spread) * bits,
            "high": (loss + spread) * bits,
            "n": 3,
        },
        "gap_to_baseline": gap,
        "tokens_to_baseline": int(1_228_800 * (0.6 + 0.4 * decay)) if reached else None,
        "seconds_to_baseline": 600 * step_seconds * (0.6 + 0.4 * decay) if reached else None,
        "step_seconds": step_seconds,
        "optimizer_share": share,
        "peak_memory_bytes": 412_000_000 + 9_000_000 * i,
        "optimizer_state_bytes": 3_300_000 * (1 + i % 3),
        "curves": curves,
        "conditions": _conditions(random, matrices, steps) if i != 6 else [],
    }


def _run(seed: int, purpose: str, loss: float | None, bits: float) -> dict[str, Any]:
    return {
        "seed": seed,
        "purpose": purpose,
        "status": "diverged" if loss is None else "finished",
        "validation_loss": loss,
        "bits_per_byte": None if loss is None else loss * bits,
    }


def _conditions(random: np.random.Generator, matrices: int, steps: int) -> list[dict[str, Any]]:
    names = ["embedding.weight", *MATRICES, "head.weight"]
    names += [f"extra.{i}.weight" for i in range(60)]
    rows = []
    for k in range(steps):
        step = 1 if k == 0 else 50 * k
        for m, name in enumerate(names[:matrices]):
            role = {0: "embedding", 25: "head"}.get(m, "hidden")
            nuclear = 30 / (1 + k / 6) * (1 + 0.4 * math.sin(m)) * float(random.uniform(0.85, 1.15))
            stable = 3.0 if "down" in name else 2 + 2.2 * k / (1 + m / 8)
            stable = 26.0 if role == "embedding" else stable
            rows.append(
                {
                    "step": step,
                    "matrix": name,
                    "role": role,
                    "nuclear_rank": max(1.0, nuclear * (0.08 if role == "embedding" else 1)),
                    "stable_rank": stable,
                    "stable_rank_output": 1.6 * stable,
                }
            )
    return rows


@pytest.fixture
def summary() -> Callable[..., dict[str, Any]]:
    """The maker of summaries."""
    return make_summary


TEXT: dict[str, Any] = {"model_options": ("heads=1",), "context": 8}
IMAGES: dict[str, Any] = {"data": "digits", "model": "mlp", "model_options": (), "context": None}


class Stopped(Exception):
    """What ends a run in the middle."""


def _small_run(out: Path, stop: int | None = None, **settings: Any) -> Path:
    """Train a tiny GPT into a folder, up to a step if there is one to stop at."""

    def on_step(step: int, values: dict[str, Any]) -> None:
        if step == stop:
            raise Stopped

    config = TrainConfig(
        **{
            "width": 8, "depth": 1, "steps": 12, "batch": 2,
            "validate_every": 3, "validate_windows": 2, "log_every": 2, "checkpoint_every": 4,
            "threads": 1, **TEXT, "data": str(out.parent / "text.txt"), **settings,
        }
    )  # fmt: skip
    with contextlib.suppress(Stopped):
        train(config, out, on_step=on_step)
    return out


def _edited(folder: Path, rows: Callable[[dict[str, Any]], dict[str, Any]], **result: Any) -> None:
    """Change every line of the metrics, and add to the result."""
    write_lines(
        folder / "metrics.jsonl", [rows(row) for row in read_lines(folder / "metrics.jsonl")[0]]
    )
    if result:
        write_json(folder / "result.json", read_json(folder / "result.json") | result)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real runs: two that compare, other data, images, one that was stopped."""
    place = tmp_path_factory.mktemp("runs")
    (place / "text.txt").write_text("how vexingly quick daft zebras jump. " * 90)
    (place / "other.txt").write_text("the five boxing wizards jump quickly. " * 90)
    measured = {"conditions_every": 6, "sharpness_every": 6, "samples": 1}
    _small_run(place / "muon", optimizer="muon", **measured)
    _small_run(place / "images", optimizer="muon", **IMAGES)
    _small_run(place / "adamw", optimizer="adamw", lr=0.01)
    _small_run(place / "other", optimizer="muon", data=str(place / "other.txt"))
    _small_run(place / "stopped", stop=7, optimizer="muon")
    return place


@pytest.fixture(scope="session")
def small_run() -> Callable[..., Path]:
    """The maker of real runs."""
    return _small_run


@pytest.fixture(scope="session")
def edited() -> Callable[..., None]:
    """What changes the lines and the result of a run."""
    return _edited


def _browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no browser found: looked for chromium, chromium-browser and google-chrome")


def _dumped(path: Path, profile: Path, *flags: str) -> str:
    """The document after its scripts have run."""
    command = [
        _browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--virtual-time-budget=8000", "--window-size=1280,1000",
        *flags, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout, f"the browser gave no document: {done.stderr[-500:]}"
    return done.stdout


@pytest.fixture(scope="session")
def dumped() -> Callable[..., str]:
    """The browser."""
    return _dumped
