"""The settings of one training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from steepest.lab.errors import InputError
from steepest.lab.models import GPTConfig
from steepest.lab.train.optimizers import named_optimizer
from steepest.lab.train.schedule import Schedule

MOST_THREADS = 4096


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; equal settings give equal results, bit for bit, on the same machine."""

    optimizer: str = "muon"
    """What updates the matrices; everything else gets AdamW. One of adamw, signsgd, signum,
    spectral-descent, muon, teon, shampoo-quarter, shampoo, kl-shampoo, soap, also with options,
    such as teon:length=muon,stack=4; or by import path a class of your own or a function
    build(model, lr), such as my_package:MyOptimizer."""
    lr: float | None = None
    """Learning rate of the matrices; by default the middle of the grid of `steepest study`."""
    momentum: float = 0.9
    """How much of the past the matrices' updates average over; AdamW's first beta."""
    adamw_lr: float = 4e-3
    """Learning rate of AdamW for embeddings, head and vectors, the same for every optimizer."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""
    data: str = "stdlib"
    """"stdlib", the source code of Python's standard library; "reference", Python's language
    reference as prose; or a path to a text file, a folder or a .bin file of tokens."""
    model: GPTConfig = field(default_factory=GPTConfig)
    """The model's sizes."""
    steps: int = 300
    """Number of updates."""
    batch: int = 8
    """Sequences in each forward pass."""
    accumulate: int = 1
    """Forward passes in each update."""
    warmup: int | None = None
    """Updates over which the learning rate rises linearly; by default 20, or a fifth of fewer."""
    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up."""
    final_lr: float = 0.0
    """What it falls to, as a fraction of its peak."""
    clip: float | None = None
    """Largest norm of the raw gradient over all parameters, above 0; by default none. Updates are
    never clipped."""
    seed: int = 0
    """Seed of initialization and data order."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the forward pass under autocast."""
    compile: bool = False
    """Whether to compile the model; the optimizer is not, so no step recompiles."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": the accelerator if there is one."""
    threads: int | None = None
    """Threads on the CPU; by default as many as PyTorch takes."""
    validate_every: int = 50
    """Updates between two measurements of the validation loss."""
    validate_windows: int = 64
    """Windows of the validation text in each of them, always the same."""
    conditions_every: int = 0
    """Updates between two measurements of the layerwise condition; 0 for none."""
    sharpness_every: int = 0
    """Updates between two measurements of sharpness, on the first batch; 0 for none."""
    checkpoint_every: int = 100
    """Updates between two checkpoints; 0 for one at the end only."""
    log_every: int = 10
    """Updates between two lines of metrics."""

    def __post_init__(self) -> None:
        if not named_optimizer(self.optimizer).rates and self.lr is None:
            raise InputError(
                f"got the optimizer {self.optimizer!r}, which has no rates to start from, without "
                "a learning rate; pass --lr"
            )
        counts = ("steps", "batch", "accumulate", "validate_every", "validate_windows", "log_every")
        for name in (*counts, "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"got {name}={value}, expected at least 1")
        if (self.threads or 1) > MOST_THREADS:
            raise InputError(f"got threads={self.threads}, expected at most {MOST_THREADS}")
        if self.warmup is not None and not 0 <= self.warmup < self.steps:
            raise InputError(
                f"got warmup={self.warmup} of {self.steps} steps, expected at least 0 and fewer "
                "than all"
            )
        for name in ("conditions_every", "sharpness_every", "checkpoint_every", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"got {name}={getattr(self, name)}, expected at least 0")
        if self.seed >= 2**63:
            raise InputError(f"got seed={self.seed}, expected less than 2**63")
        if not 0 <= self.final_lr <= 1:
            raise InputError(f"got final_lr={self.final_lr}, expected a fraction from 0 to 1")
        if not 0 <= self.momentum < 1:
            raise InputError(f"got momentum={self.momentum}, expected 0 or more and less than 1")
        check_clip(self.clip)
        for name in ("lr", "adamw_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"got {name}={value}, expected a finite number of at least 0")

    @property
    def rate(self) -> float:
        """The learning rate of the matrices."""
        if self.lr is not None:
            return self.lr
        rates = named_optimizer(self.optimizer).rates
        return rates[len(rates) // 2]

    @property
    def warmup_steps(self) -> int:
        """Updates over which the learning rate rises."""
        return min(20, self.steps // 5) if self.warmup is None else self.warmup

    @property
    def tokens_per_step(self) -> int:
        """Tokens in each update."""
        return self.batch * self.accumulate * self.model.context


def check_clip(clip: float | None) -> None:
    """Refuse a norm to clip at that no gradient can have: 0 means "off" in some other programs.

    Raises:
        InputError: for 0 and less, NaN and infinity.
    """
    if clip is not None and not 0 < clip < math.inf:
        raise InputError(
            f"got clip={clip}, expected a finite number above 0; leave --clip out for no clipping"
        )
