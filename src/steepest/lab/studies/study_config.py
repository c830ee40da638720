"""The settings of a study."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from steepest.lab.arguments import did_you_mean
from steepest.lab.errors import InputError
from steepest.lab.train import TrainConfig, named_optimizer
from steepest.lab.train.optimizers import starting_rates
from steepest.lab.train.problem import Problem

MOST_SEEDS = 10_000
VARIED = ("momentum", "weight_decay", "adamw_lr")
"""Settings that a study can vary beside the learning rate."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Problem):
    """Compare optimizers on one model and its data, each at its own best learning rate."""

    optimizers: tuple[str, ...] = ("adamw", "signum", "spectral-descent", "muon")
    """What to compare; the first is what the others are compared with. The names are those of
    `steepest train --optimizer`, also with options such as teon:length=muon. Your own go by import
    path, such as my_package:MyOptimizer:lr=0.01; lr is the middle of its first grid."""
    vary: str | None = None
    """A second number to tune for every optimizer beside its rate, and its values, such as
    weight_decay=0,0.01,0.1. The number is momentum, weight_decay or adamw_lr."""
    minutes: float = 4.0
    """Time for everything. The number of steps follows from it. If there would be too few of them,
    the model is made smaller, and the plan says so."""
    steps: int | None = None
    """Updates in each run, in place of --minutes; then time is no limit."""
    seeds: int = 4
    """Fresh seeds for each optimizer at its best rate."""
    sharpness: bool = False
    """Whether to measure sharpness along the first fresh seed of every optimizer, which takes
    time."""
    workers: int | None = None
    """Runs at the same time, with one thread each. By default one a core, or one on a GPU."""

    def __post_init__(self) -> None:
        if self.model == "gpt" and self.width is None:  # one that learns something in minutes
            object.__setattr__(self, "width", 64)
            if not any(option.startswith("heads=") for option in self.model_options):
                object.__setattr__(self, "model_options", ("heads=4", *self.model_options))
        super().__post_init__()
        if not 0 < self.minutes < math.inf:
            raise InputError(f"got minutes={self.minutes}, expected more than 0")
        for name in ("seeds", "steps", "workers"):
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
        for changes in self.variants:
            self.run_of(self.optimizers[0], **changes)  # which checks the values

    @property
    def variants(self) -> tuple[dict[str, float], ...]:
        """Changes of the settings that each optimizer is tuned with; one without any by default."""
        if self.vary is None:
            return ({},)
        name, equals, texts = self.vary.partition("=")
        name = name.replace("-", "_")
        if name not in VARIED or not equals:
            raise InputError(
                f"got vary={self.vary!r}{did_you_mean(name, VARIED)}, expected one of "
                f"{', '.join(VARIED)} with its values, such as weight_decay=0,0.01,0.1"
            )
        try:
            values = [float(text) for text in texts.split(",")]
        except ValueError as error:
            raise InputError(
                f"got vary={self.vary!r}, expected numbers with commas between them, such as "
                f"{name}=0,0.01,0.1"
            ) from error
        if len(set(values)) < max(2, len(values)):
            raise InputError(f"got vary={self.vary!r}, expected at least two different values")
        return tuple({name: value} for value in sorted(values))

    def variants_of(self, optimizer: str) -> tuple[dict[str, float], ...]:
        """Return the changes that an optimizer is tuned with; one without any if it ignores them.

        An optimizer without memory, for instance, ignores the momentum.
        """
        takes = named_optimizer(optimizer).takes
        return self.variants if all(map(takes, self.variants[0])) else ({},)

    def run_of(self, optimizer: str, **changes: Any) -> TrainConfig:
        """Return a run of this study; others change rate, seed, and what is planned."""
        shared = {field.name: getattr(self, field.name) for field in fields(Problem)}
        return TrainConfig(**{**shared, "threads": 1, "optimizer": optimizer, **changes})

    @property
    def first_run(self) -> TrainConfig:
        """A run with the first optimizer."""
        return self.run_of(self.optimizers[0])

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that every run shares; all others may change when a study goes on."""
        free = ("optimizers", "minutes", "seeds", "workers")
        return {key: value for key, value in asdict(self).items() if key not in free}
