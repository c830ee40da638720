"""Many runs on one machine: a process for each, a few at a time, nothing finished run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest.lab.errors import Diverged
from steepest.lab.files import read_json
from steepest.lab.processes import in_processes
from steepest.lab.train import TrainConfig, train
from steepest.lab.train.run_folder import removed


@dataclass(frozen=True)
class Run:
    """A run to be made: its settings and its folder, whose name says what it is."""

    config: TrainConfig
    out: Path

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.out / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """The result; "status" is "finished" or "diverged"."""
        return read_json(self.out / "result.json")


OnSteps = Callable[[dict[Path, int]], None]


def run_all(runs: Sequence[Run], workers: int, on_progress: OnSteps = lambda steps: None) -> None:
    """Bring every run to its result, `workers` of them at a time, each in a process of its own.

    A run that diverges gets a result that says so. Interrupting ends all processes; their
    checkpoints let the next call go on. `on_progress` is called a few times a second with the
    steps that the running ones have done.

    Raises:
        InputError: what a run raised; the others are stopped.
    """
    waiting = {str(run.out): run for run in runs if not run.finished}
    for run in waiting.values():
        run.out.parent.mkdir(parents=True, exist_ok=True)
    steps: dict[Path, int] = {}
    for name, step in in_processes(_work, waiting, workers):
        if step is None:
            steps.pop(Path(name), None)
        else:
            steps[Path(name)] = step
        on_progress(steps)


def _work(run: Run, send: Callable[[int], None]) -> None:
    latest = 0.0

    def report(step: int, _: dict[str, Any]) -> None:
        nonlocal latest
        if time.monotonic() - latest > 0.25:
            latest = time.monotonic()
            send(step)

    if not run.out.parent.is_dir():
        raise removed(run.out.parent)
    with suppress(Diverged):  # its result says so
        train(run.config, run.out, on_step=report)
