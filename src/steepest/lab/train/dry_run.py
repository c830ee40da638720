"""What a run would take, before it starts: parameters, rates, memory, time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import RenderableType

from steepest.lab.memory import readable
from steepest.lab.train.config import TrainConfig
from steepest.lab.train.cost import peak_memory, state_bytes
from steepest.lab.train.loop import Training
from steepest.lab.train.setup import data_of, set_up
from steepest.lab.user_code import sentences_for_errors
from steepest.printing import rough_duration
from steepest.results import Column, Result, ResultTable

FEWEST, MOST = 2, 20
"""Steps that are timed: two at least, and more while they take less than `SECONDS` together."""
SECONDS = 2.0


@dataclass(frozen=True)
class RateGroup:
    """Parameters that share an update and a rate."""

    update: str
    parameters: int
    tensors: int
    lr: float
    weight_decay: float


@dataclass(frozen=True, repr=False)
class DryRun(Result):
    """What a run would take.

    Attributes:
        groups: the parameters by update and rate.
        state_bytes: what the optimizer keeps between steps.
        peak_bytes: most memory at a time, above what the process had before.
        step_seconds: the median of the steps that were timed.
        seconds: of the whole run, with its validations.
        steps, per_step, unit: how much is trained on.
        timed: how many steps were timed.
    """

    groups: tuple[RateGroup, ...]
    state_bytes: int
    peak_bytes: int
    step_seconds: float
    seconds: float
    steps: int
    per_step: int
    unit: str
    timed: int

    @property
    def parameters(self) -> int:
        """Number of parameters that are trained."""
        return sum(group.parameters for group in self.groups)

    def table(self) -> ResultTable:
        """A row for each group of parameters."""
        columns: list[str | Column] = [
            "update",
            Column("parameters", form=",d"),
            "tensors",
            Column("lr", form="g"),
            Column("weight_decay", form="g"),
        ]
        return ResultTable.of(self.groups, columns)

    def shown(self) -> Sequence[RenderableType]:
        """The table, and below it sentences on size, memory and time."""
        per_second = self.per_step / self.step_seconds
        return (
            self.table(),
            f"{self.parameters:,} parameters; {self.steps:,} steps of {self.per_step:,} "
            f"{self.unit}, {self.steps * self.per_step:,} in all",
            f"memory: about {readable(self.peak_bytes)} above the program itself at the peak, of "
            f"which the optimizer keeps {readable(self.state_bytes)} between steps",
            f"time: about {rough_duration(self.seconds)}, {1000 * self.step_seconds:,.1f} ms a "
            f"step, {per_second:,.0f} {self.unit} a second; measured on {self.timed} steps here, "
            "and nothing was kept of them",
        )


def dry_run(config: TrainConfig, say: Callable[[str], None] = lambda sentence: None) -> DryRun:
    """Make everything that a run needs, time a few steps and one validation, and keep nothing.

    Memory is counted from what the process had before it loads the data.

    Raises:
        InputError: for what a run could not begin with.
    """
    before = peak_memory(torch.device("cpu")) if not torch.cuda.is_available() else 0
    with sentences_for_errors():
        setup = set_up(config, data_of(config))
    config = setup.config
    with tempfile.TemporaryDirectory() as folder, sentences_for_errors():
        training = Training(setup, Path(folder), say, time.perf_counter())
        say("timing a few steps")
        training.update(0)  # takes what is done once
        times: list[float] = []
        while len(times) < min(FEWEST, config.steps) or (
            sum(times) < SECONDS and len(times) < min(MOST, config.steps - 1)
        ):
            began = time.perf_counter()
            training.update(len(times) + 1)[0].item()
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        training.evaluate(training.judged)
        validation_seconds = time.perf_counter() - began
    step_seconds = sorted(times)[len(times) // 2]
    ends = config.steps % config.validate_every != 0
    validations = 2 + config.steps // config.validate_every + ends
    groups: dict[tuple[str, float, float], list[int]] = {}
    for group in training.optimizer.param_groups:
        key = group.get("geometry", "own"), group["initial_lr"], group.get("weight_decay", 0.0)
        groups.setdefault(key, []).extend(p.numel() for p in group["params"])
    return DryRun(
        groups=tuple(
            RateGroup(update, sum(sizes), len(sizes), lr, decay)
            for (update, lr, decay), sizes in groups.items()
        ),
        state_bytes=state_bytes(training.optimizer),
        peak_bytes=peak_memory(setup.device) - before,
        step_seconds=step_seconds,
        seconds=config.steps * step_seconds + validations * validation_seconds,
        steps=config.steps,
        per_step=training.per_step,
        unit=setup.data.unit,
        timed=len(times),
    )
