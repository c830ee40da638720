"""What a run of `steepest train` found, from its folder: the report is made from this alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steepest.lab.errors import InputError
from steepest.lab.files import read_json
from steepest.lab.train.run_folder import read_metrics
from steepest.optim.family import FAMILY, modern_name

MEASURED = ("train", "validation")
"""The kinds of measurements that say how far a run is."""


def run_summary(folder: Path) -> dict[str, Any]:
    """Return the summary of a run, finished or not, as `run_schemas.RunSummary` says.

    Numbers are those of the folder's files. Two are computed where a file lacks them: units in each
    second, from units, steps and the time of a step, and the result of a run that has none, from
    its last measurements.

    Args:
        folder: the run's folder, see `steepest.lab.train.run_folder`.

    Raises:
        InputError: for a folder that is no run, or one with a damaged file.
    """
    if not all((folder / name).is_file() for name in ("config.json", "metrics.jsonl")):
        raise InputError(
            f"got {folder}, expected the folder of `steepest train`, which has a config.json and a "
            "metrics.jsonl"
        )
    config = read_json(folder / "config.json")
    if not isinstance(config.get("optimizer"), str):
        raise InputError(
            f"got {folder / 'config.json'} without an optimizer, expected the settings of "
            "`steepest train`; a report is of a run, a study, a diagnosis or a check of transfer"
        )
    metrics = [_with_throughput(row) for row in read_metrics(folder)]
    known = folder / "result.json"
    result = read_json(known) if known.exists() else {}
    environment = folder / "environment.json"
    optimizer = modern_name(config["optimizer"], warn=False)
    settings = _flat({key: value for key, value in config.items() if key != "data_sha256"})
    unit = str(result.get("unit") or config.get("unit") or "tokens")
    label, data = _label(optimizer), _data_name(config, unit)
    read_as_text = ("tokenizer",) if unit == "tokens" else ()
    return {
        "kind": "run",
        "title": f"{label} on {_short(data)}: one run",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "status": _status(result, metrics),
        "reason": result.get("reason"),
        "unit": unit,
        "model": _model(config),
        "optimizer": optimizer,
        "label": label,
        "lr": _rate(config, optimizer, metrics),
        "steps": _steps(config, result, metrics),
        "result": _result(result, metrics),
        "metrics": metrics,
        "settings": settings,
        "environment": read_json(environment) if environment.exists() else None,
        "data": {"name": data, **_known(config, *read_as_text, sha256="data_sha256")},
    }


def latest(metrics: Iterable[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    """Return the last measurement of a kind, empty if there is none."""
    return max((row for row in metrics if row["kind"] == kind), key=_step, default={})


def _step(row: Mapping[str, Any]) -> int:
    return int(row["step"])


def _with_throughput(row: dict[str, Any]) -> dict[str, Any]:
    """A measurement with its units in each second, from the median time of a step."""
    tokens, seconds = row.get("tokens"), row.get("step_seconds")
    if row["kind"] != "train" or "units_per_second" in row or not (tokens and seconds):
        return row
    return {**row, "units_per_second": tokens / row["step"] / seconds}


def _data_name(config: Mapping[str, Any], unit: str) -> str:
    """The data of a run; where they were not named, what they are by default."""
    names = (config.get(key) for key in ("data_name", "batches", "data"))
    default = {"tokens": "stdlib", "images": "digits"}.get(unit, "data without a name")
    return str(next((name for name in names if name), default))


def _steps(
    config: Mapping[str, Any], result: Mapping[str, Any], metrics: list[dict[str, Any]]
) -> int:
    """The updates that were asked for, also where tokens were asked for in place of them."""
    if result.get("steps"):
        return int(result["steps"])
    seen = latest(metrics, "train")
    if config.get("tokens") and seen.get("tokens"):
        return math.ceil(config["tokens"] * seen["step"] / seen["tokens"])
    return int(config.get("steps") or 0)


def _status(result: Mapping[str, Any], metrics: list[dict[str, Any]]) -> str:
    """What became of a run. One that stopped at NaN may have no result yet."""
    losses = [latest(metrics, kind).get("loss") for kind in MEASURED]
    if any(isinstance(loss, float) and not math.isfinite(loss) for loss in losses):
        return "diverged"
    return result["status"] if result.get("status") in ("finished", "diverged") else "unfinished"


def _result(result: Mapping[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of a run, or where it is."""
    train, validation = (latest(metrics, kind) for kind in MEASURED)
    step = max((_step(row) for row in metrics), default=0)
    now = {
        "step": step,
        "validation_loss": validation.get("loss"),
        "validation_accuracy": validation.get("accuracy"),
        "bits_per_byte": validation.get("bits_per_byte"),
        **{
            key: train.get(key)
            for key in (
                "tokens", "seconds", "step_seconds", "optimizer_share", "units_per_second", "mfu",
            )
        },
    }  # fmt: skip
    if result.get("status") == "diverged":  # a loss from before says nothing of where it ended
        now |= {"validation_loss": None, "validation_accuracy": None, "bits_per_byte": None}
    skipped = ("status", "reason", "unit")
    now |= {key: value for key, value in result.items() if key not in skipped}
    return {key: value for key, value in now.items() if key in _ALWAYS or value is not None}


_ALWAYS = ("step", "validation_loss")


def _rate(config: Mapping[str, Any], optimizer: str, metrics: list[dict[str, Any]]) -> Any:
    """The learning rate that was asked for, or the default of the optimizer's record.

    Of a class of the user's, which is not imported for a report, it is the highest rate measured.
    """
    if config.get("lr") is not None:
        return config["lr"]
    name = _named(optimizer)[0]
    if name in FAMILY and (grid := FAMILY[name].rates):
        return grid[len(grid) // 2]
    rates = [row["lr"] for row in metrics if isinstance(row.get("lr"), int | float)]
    return max((rate for rate in rates if math.isfinite(rate)), default=None)


def _named(optimizer: str) -> tuple[str, str]:
    """The name of an optimizer and its options; an import path has a colon too, and no options."""
    name, _, options = optimizer.partition(":")
    return (name, options) if "=" in options else (optimizer, "")


def _label(optimizer: str) -> str:
    """An optimizer for a reader.

    >>> _label("teon:compensate=true"), _label("my_package:MyOptimizer")
    ('TEON (compensate=true)', 'my_package:MyOptimizer')
    """
    name, options = _named(optimizer)
    label = FAMILY[name].label if name in FAMILY else name
    return label + (f" ({options})" if options else "")


def _model(config: Mapping[str, Any]) -> str:
    """A model and its sizes: `gpt, width 128, depth 4`."""
    model = config.get("model")
    name = model if isinstance(model, str) else "gpt"
    sizes = {**config, **model} if isinstance(model, dict) else config
    parts = [f"{key} {sizes[key]}" for key in ("width", "depth") if sizes.get(key) is not None]
    return ", ".join([name, *parts, *map(str, config.get("model_options") or [])])


def _known(config: Mapping[str, Any], *names: str, **renamed: str) -> dict[str, Any]:
    """The settings of these names that have a value."""
    wanted = {name: name for name in names} | renamed
    return {key: config[name] for key, name in wanted.items() if config.get(name) is not None}


def _short(data: Any) -> str:
    """Data by its name: of a path the last part."""
    return Path(str(data)).name or str(data)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without levels: `model width` for the width in `model`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= (
            _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
