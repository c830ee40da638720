"""A finished run that is to have more steps: from where it may go on, if its schedule allows it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from steepest.lab.errors import InputError
from steepest.lab.files import write_json
from steepest.lab.train.checkpoint import steps_of
from steepest.lab.train.config import TrainConfig, settled
from steepest.lab.train.run_folder import stored_settings
from steepest.lab.train.schedule import can_go_on
from steepest.lab.train.setup import RunSetup

FREE = ("steps", "tokens", "warmup")
"""Settings that may differ from those of the folder, if the rates before do not."""


@dataclass(frozen=True)
class LongerRun:
    """What a longer run begins with. The folder is as it was until `begin`.

    Attributes:
        said: what is done, in a sentence.
        last: the newest checkpoint that it may go on from is at or before this step.
        out: the folder.
        settings: of the longer run.
    """

    said: str
    last: int
    out: Path
    settings: dict[str, Any]

    def begin(self) -> None:
        """Make the folder that of the longer run: without its result and later checkpoints."""
        write_json(self.out / "config.json", self.settings)
        (self.out / "result.json").unlink(missing_ok=True)
        for step in steps_of(self.out / "checkpoints"):
            if step > self.last:
                shutil.rmtree(self.out / "checkpoints" / f"step-{step:08d}")


GoOn = Callable[[RunSetup], LongerRun]


def checked_to_go_on(config: TrainConfig, settings: dict[str, Any], out: Path) -> GoOn | None:
    """Return what checks that a longer run may go on, if other steps were asked for before.

    The returned function takes the set-up of the run, and changes nothing.
    """
    before = stored_settings(out, settings)
    if all(before.get(name) == settings[name] for name in FREE):
        return None
    known = {field.name for field in fields(TrainConfig) if field.init}

    def go_on(setup: RunSetup) -> LongerRun:
        unit, per_pass = setup.data.unit, setup.per_pass
        kept = {name: value for name, value in before.items() if name in known}
        kept["model_options"] = tuple(kept.get("model_options") or ())
        kept["track"] = tuple(kept.get("track") or ())
        earlier = settled(TrainConfig(**kept), unit, per_pass)
        steps, more = earlier.steps, setup.config.steps
        if more < steps:
            raise InputError(
                f"{out} holds a run of {steps} steps, and got {more}; give at least as many, or "
                "another --out"
            )
        begin = steps if more == steps else can_go_on(config.schedule, steps, more)
        if begin is None:
            raise InputError(
                f"{out} holds a run of {steps} steps, and got {more}: its schedule "
                f"({config.schedule}) would have given other rates from the start with {more} "
                "steps. Choose another --out; schedules that go on are constant, wsd and teon"
            )
        if earlier.warmup_steps != setup.config.warmup_steps:
            raise InputError(
                f"{out} holds a run with a warm-up of {earlier.warmup_steps} steps, now "
                f"{setup.config.warmup_steps}; add --warmup {earlier.warmup_steps} to go on, or "
                "choose another --out"
            )
        places = steps_of(out / "checkpoints")
        usable = [step for step in places if step <= begin]
        if not usable and places:
            raise InputError(
                f"{out} has no checkpoint at or before step {begin}, from which a longer run could "
                "go on; choose another --out"
            )
        said = f"{more} steps in place of {steps}: going on from step {max(usable, default=0)}"
        if more == steps:
            said = f"{steps} steps, as before"
        return LongerRun(said, begin, out, settings)

    return go_on


def kept_step(config: TrainConfig) -> int | None:
    """Return the step whose checkpoint a longer run would go on from, if it is not the last one."""
    step = can_go_on(config.schedule, config.steps, config.steps + 1)
    return step if step is not None and 0 < step < config.steps else None
