"""The settings of a study."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from steepest.lab.errors import InputError
from steepest.lab.models import GPTConfig
from steepest.lab.train import TrainConfig, named_optimizer
from steepest.lab.train.optimizers import starting_rates

MOST_SEEDS = 10_000


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Compare optimizers on one text, each at its own best learning rate."""

    optimizers: tuple[str, ...] = ("adamw", "signum", "spectral-descent", "muon")
    """What to compare; the first is what the others are compared with. The names of `train`,
    also with options such as teon:length=muon, and your own by import path, such as
    my_package:MyOptimizer:lr=0.01, where lr is the middle of its grid."""
    minutes: float = 4.0
    """Time for everything; the number of steps, and if need be the model, follow from it."""
    steps: int | None = None
    """Updates in each run; by default as many as the time allows. If given, time is no limit."""
    seeds: int = 4
    """Fresh seeds for each optimizer at its best rate."""
    data: str = "stdlib"
    """"stdlib", the source code of Python's standard library; "reference", Python's language
    reference as prose; or a path to a text file, a folder or a .bin file of tokens."""
    model: GPTConfig = field(default_factory=lambda: GPTConfig(width=64))
    """The model's sizes."""
    batch: int = 8
    """Sequences in each update."""
    momentum: float = 0.9
    """How much of the past an update averages over, the same for all that have a memory."""
    adamw_lr: float = 4e-3
    """Learning rate of AdamW for embeddings, head and vectors, the same for every optimizer."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""
    sharpness: bool = False
    """Whether to measure sharpness along the first of an optimizer's fresh seeds; costs time."""
    workers: int | None = None
    """Runs at the same time, one thread each; by default one for each core, or one on a GPU."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": the accelerator if there is one."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise InputError(f"got minutes={self.minutes}, expected more than 0")
        for name in ("seeds", "batch", "steps", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"got {name}={value}, expected at least 1")
        if self.seeds > MOST_SEEDS:
            raise InputError(f"got seeds={self.seeds}, expected at most {MOST_SEEDS}")
        if not self.optimizers:
            raise InputError("got no optimizers, expected at least one after --optimizers")
        if len({named_optimizer(name).name for name in self.optimizers}) < len(self.optimizers):
            raise InputError(f"got optimizers {self.optimizers}, expected each of them once")
        for name in self.optimizers:
            starting_rates(name)

    @property
    def first_run(self) -> TrainConfig:
        """A run of this study; the others change optimizer, rate, seed, and what is planned."""
        return TrainConfig(
            optimizer=self.optimizers[0],
            momentum=self.momentum,
            adamw_lr=self.adamw_lr,
            weight_decay=self.weight_decay,
            data=self.data,
            model=self.model,
            batch=self.batch,
            device=self.device,
            threads=1,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that every run shares; all others may change when a study goes on."""
        free = ("optimizers", "minutes", "seeds", "workers")
        return {key: value for key, value in asdict(self).items() if key not in free}
