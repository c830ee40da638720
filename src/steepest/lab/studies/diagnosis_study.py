"""A diagnosis of a user's own model, with what their optimizer does and what was monitored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from steepest.curvature.loss_function import LossFunction
from steepest.diagnosis import Audit, Diagnosis, Level, audit
from steepest.diagnosis.progress import OnProgress, Work
from steepest.diagnosis.verdicts import check_request, judged, started
from steepest.diagnosis.warmup import Steps
from steepest.files import DamagedFile, read_lines
from steepest.lab.errors import InputError
from steepest.lab.files import read_json, write_json
from steepest.lab.studies.finished import FinishedParts, fingerprint
from steepest.lab.train.run_folder import environment, opened, sentences_for_os_errors
from steepest.lab.user_code import sentences_for_errors
from steepest.random_numbers import seeded


def diagnosis_study(
    model: nn.Module,
    loss: Callable[[Any, Any], Any],
    batches: Sequence[Any],
    *,
    others: Iterable[Any] = (),
    level: Level,
    parameters: Sequence[str] | None,
    warmup_steps: Steps = "auto",
    optimizer: Callable[[nn.Module], Any] | None,
    clip: float | None,
    monitored: Path | None,
    out: Path,
    settings: dict[str, Any],
    on_progress: OnProgress = lambda done, total, message: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> tuple[Diagnosis, Audit | None, dict[str, Any]]:
    """Diagnose a model, in a folder, and return what was found, the audit and the summary.

    Args:
        model, loss, batches, level, parameters, warmup_steps, on_progress: as for `diagnose`.
        others: more batches, which only a warm-up takes.
        optimizer: from the model to what is audited, if anything.
        clip: the norm that gradients are clipped to, for the audit.
        monitored: what a `Monitor` wrote.
        out: the folder: `diagnosis.json`, `plan.toml`. A plan that was edited there stays. While it
            goes on, `finished.jsonl` has the matrices that are finished: the next start goes on.
            A diagnosis that is finished there, of the same weights, batches and losses, is returned
            as it is; the audit is made again, as it takes one step.
        settings: what was asked for, which the folder is bound to.
        say: takes what is worth saying before it starts.

    Raises:
        InputError: for a file that holds no records, a folder of other settings or with an edited
            plan, and what `diagnose` and `audit` raise for bad input.
    """
    records = _records(monitored)
    with sentences_for_os_errors(out), opened(out, settings) as check_folder:
        _unedited(out / "plan.toml")

        def progressed(done: int, total: int, message: str) -> None:
            check_folder()
            on_progress(done, total, message)

        with sentences_for_errors():
            audited = None
            if optimizer is not None:
                audited = audit(model, optimizer(model), loss, batches[:1], clip_norm=clip)
            check_request(model, batches, level, parameters)
            function = LossFunction(model, loss)
            judged_on = _fingerprint(function, batches)
            stored = _stored(out / "diagnosis.json")
            if stored.get("fingerprint") == judged_on:
                say(
                    f"{out} is finished already, with the same weights and batches; this is its "
                    "result. Choose another --out to diagnose again"
                )
                diagnosis = Diagnosis.load(out / "diagnosis.json")
            else:
                if stored:
                    say(
                        f"the result in {out} is of other weights, batches or losses, or of an "
                        "older version; it is made again"
                    )
                kept = FinishedParts(out / "finished.jsonl", judged_on)
                if len(kept):
                    say(f"goes on with {len(kept)} parts that are finished in {out}")
                work = Work(progressed)
                start = started(
                    function, list(batches), level, parameters, warmup_steps, work, others
                )
                diagnosis = judged(start, level, parameters, kept)
                stored = {
                    "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "environment": environment(),
                }
        diagnosis.plan().save(out / "plan.toml")
        summary = {
            **diagnosis.as_dict(),
            "audit": None if audited is None else audited.as_dict(),
            "monitored": records,
            "title": f"Which norm does each matrix of {settings['model']} want?",
            "created": stored["created"],
            "settings": settings,
            "environment": stored["environment"],
            "fingerprint": judged_on,
            "plan_sha256": _sha256(out / "plan.toml"),
        }
        write_json(out / "diagnosis.json", summary)
        (out / "finished.jsonl").unlink(missing_ok=True)
    return diagnosis, audited, summary


def _fingerprint(function: LossFunction, batches: Sequence[Any]) -> str:
    with seeded(0):
        losses = [function(batch).item() for batch in batches[:2]]
    return fingerprint(function.model, batches, losses)


def _stored(path: Path) -> dict[str, Any]:
    """What an earlier diagnosis wrote, if there is one."""
    return read_json(path, f"Delete {path} to diagnose again") if path.exists() else {}


def _unedited(plan: Path) -> None:
    """Refuse to go on where a diagnosis would overwrite what somebody edited."""
    if not plan.exists():
        return
    known = plan.with_name("diagnosis.json")
    remedy = f"Move {plan} if it was edited, then delete {known}"
    before = read_json(known, remedy) if known.exists() else {}
    if before.get("plan_sha256") != _sha256(plan):
        raise InputError(
            f"got {plan}, which was edited after the diagnosis that wrote it; move it to another "
            "place, or choose another --out"
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _records(monitored: Path | None) -> list[dict[str, Any]]:
    if monitored is None:
        return []
    try:
        rows, damaged = read_lines(monitored)
        if rows and damaged:
            raise InputError(
                f"got {monitored}, which is damaged in line {', '.join(map(str, damaged))}; delete "
                "these lines to go on without them"
            )
        if damaged or not rows:
            raise ValueError("no line is a record")
        return [row for row in rows if row["kind"] == "condition"]
    except OSError as error:
        raise InputError(
            f"got {monitored}, which cannot be read ({error.strerror}); expected the path= of a "
            "steepest.Monitor"
        ) from error
    except DamagedFile as error:
        raise InputError(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"got {monitored}, which holds no records; expected the path= of a steepest.Monitor"
        ) from error
