"""A diagnosis of a user's own model, with what their optimizer does and what was monitored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from steepest.diagnosis import Audit, Diagnosis, Level, audit, diagnose
from steepest.lab.errors import InputError
from steepest.lab.files import write_json
from steepest.lab.train.run_folder import environment, sentences_for_os_errors


def diagnosis_study(
    model: nn.Module,
    loss: Callable[[Any, Any], Any],
    batches: Sequence[Any],
    *,
    level: Level,
    parameters: Sequence[str] | None,
    optimizer: Callable[[nn.Module], Any] | None,
    clip: float | None,
    monitored: Path | None,
    out: Path,
    settings: dict[str, Any],
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[Diagnosis, Audit | None, dict[str, Any]]:
    """Diagnose a model, in a folder, and return what was found, the audit and the summary.

    Args:
        model, loss, batches, level, parameters, on_progress: as for `diagnose`.
        optimizer: from the model to what is audited, if anything.
        clip: the norm that gradients are clipped to, for the audit.
        monitored: what a `Monitor` wrote.
        out: the folder: `diagnosis.json`, `plan.toml`.
        settings: what was asked for.

    Raises:
        InputError: for a file that holds no records, and what `diagnose` and `audit` raise for bad
            input.
    """
    records = _records(monitored)
    try:
        found = diagnose(
            model, loss, batches, level=level, parameters=parameters, on_progress=on_progress
        )
        audited = None
        if optimizer is not None:
            audited = audit(model, optimizer(model), loss, batches[:1], clip_norm=clip)
    except (ValueError, TypeError, FloatingPointError, NotImplementedError) as error:
        raise InputError(str(error)) from error
    summary = {
        **found.as_dict(),
        "audit": None if audited is None else audited.as_dict(),
        "monitored": records,
        "title": f"Which norm does each matrix of {settings['model']} want?",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "settings": settings,
        "environment": environment(),
        "command": f"steepest diagnose {settings['model']} --batches {settings['batches']}",
    }
    with sentences_for_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "diagnosis.json", summary)
        found.plan().save(out / "plan.toml")
    return found, audited, summary


def _records(monitored: Path | None) -> list[dict[str, Any]]:
    if monitored is None:
        return []
    with sentences_for_os_errors(monitored):
        lines = monitored.read_text().splitlines()
    try:
        return [row for row in map(json.loads, lines) if row["kind"] == "condition"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"got {monitored}, which holds no records; expected the path= of a steepest.Monitor"
        ) from error
