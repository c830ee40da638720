"""The settings of one training run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from steepest.lab.errors import InputError
from steepest.lab.train.optimizers import named_optimizer
from steepest.lab.train.problem import Problem, check_rate
from steepest.lab.train.schedule import default_final, default_warmup

MOST_THREADS = 4096
AT_LEAST_ONE = (
    "steps",
    "tokens",
    "batch_tokens",
    "validate_every",
    "validate_windows",
    "log_every",
    "threads",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Problem):
    """One training run; equal settings give equal results, bit for bit, on the same machine."""

    optimizer: str = "muon"
    """What updates the matrices; everything else gets AdamW. One of adamw, signsgd, signum,
    spectral-descent, muon, teon, shampoo-quarter, shampoo, kl-shampoo, soap, also with options,
    such as teon:length=muon,stack=4. Or by import path a class of your own, such as
    my_package:MyOptimizer, or a function build(model, lr), which decides about all parameters."""
    lr: float | None = None
    """Learning rate of the matrices; by default the middle of the grid of `steepest study`."""
    steps: int = 300
    """Number of updates. A finished run goes on with more of them, with the same --out, where its
    schedule allows it: constant, wsd and teon."""
    tokens: int | None = None
    """Tokens, images or examples to train on, such as 1.1B, in place of --steps."""
    batch_tokens: int | None = None
    """Tokens, images or examples in each update, such as 500k, in place of --accumulate."""
    warmup: int | None = None
    """Updates over which the learning rate rises linearly. By default 20, or a fifth of fewer than
    100 steps; for teon none, and for galore a tenth of all."""
    final_lr: float | None = None
    """What the learning rate falls to, as a fraction of its peak. By default 0, and 0.1 for teon
    and galore."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.999. The average is judged
    in place of the weights. By default there is none."""
    seed: int = 0
    """Seed of initialization and data order."""
    threads: int | None = None
    """Threads on the CPU; by default as many as PyTorch takes."""
    validate_every: int = 50
    """Updates between two measurements of the validation loss."""
    validate_windows: int = 64
    """How much is judged in each of these measurements, always the same: so many windows of text,
    hundreds of images, or batches of your own."""
    samples: int = 0
    """Texts that the model continues at every measurement of the validation loss."""
    conditions_every: int = 0
    """Updates between two measurements of the layerwise condition: the nuclear rank of each
    gradient and the stable rank of what its matrix multiplies. 0 for none."""
    sharpness_every: int = 0
    """Updates between two measurements of sharpness, the largest eigenvalue of the Hessian, on the
    first batch. 0 for none."""
    checkpoint_every: int = 100
    """Updates between two checkpoints; 0 for one at the end only."""
    log_every: int = 10
    """Updates between two lines of metrics about training."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get the metrics too; each needs its library, such as steepest[tensorboard]."""
    profile: bool = False
    """Whether to trace three steps into profile.json, and to list the operations that take the most
    time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_lr is None:
            object.__setattr__(self, "final_lr", default_final(self.schedule))
        if not named_optimizer(self.optimizer).rates and self.lr is None:
            raise InputError(
                f"got the optimizer {self.optimizer!r}, which has no rates to start from, without "
                "a learning rate; pass --lr"
            )
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"got {name}={value}, expected at least 1")
        if (self.threads or 1) > MOST_THREADS:
            raise InputError(f"got threads={self.threads}, expected at most {MOST_THREADS}")
        check_warmup(self.warmup, None if self.tokens else self.steps)
        for name in ("conditions_every", "sharpness_every", "checkpoint_every", "seed", "samples"):
            if getattr(self, name) < 0:
                raise InputError(f"got {name}={getattr(self, name)}, expected at least 0")
        if self.recompute and self.sharpness_every:
            raise InputError(
                "got recompute and sharpness_every, expected one of them: sharpness is measured by "
                "products that go through the backward pass twice, and blocks that are computed "
                "again do not allow it"
            )
        if self.seed >= 2**63:
            raise InputError(f"got seed={self.seed}, expected less than 2**63")
        if not 0 <= self.final <= 1:
            raise InputError(f"got final_lr={self.final_lr}, expected a fraction from 0 to 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"got ema={self.ema}, expected more than 0 and less than 1")
        check_rate("lr", self.lr)

    @property
    def rate(self) -> float:
        """The learning rate of the matrices."""
        if self.lr is not None:
            return self.lr
        rates = named_optimizer(self.optimizer).rates
        return rates[len(rates) // 2]

    @property
    def final(self) -> float:
        """What the learning rate falls to, as a fraction of its peak."""
        assert self.final_lr is not None
        return self.final_lr

    @property
    def warmup_steps(self) -> int:
        """Updates over which the learning rate rises."""
        if self.warmup is not None:
            return self.warmup
        return default_warmup(self.schedule, self.steps)


def check_warmup(warmup: int | None, steps: int | None) -> None:
    """Refuse a warm-up of fewer than 0 steps, or of all of them where their number is known.

    Raises:
        InputError: with both numbers.
    """
    if warmup is None or (warmup >= 0 and (steps is None or warmup < steps)):
        return
    of_all = "" if steps is None else f" of {steps} steps"
    raise InputError(f"got warmup={warmup}{of_all}, expected at least 0 and fewer than all")


def settled(config: TrainConfig, unit: str, per_pass: int) -> TrainConfig:
    """Return the settings with `steps` and `accumulate` that follow from tokens.

    Args:
        config: the settings.
        unit: what is counted: "tokens", "images" or "examples".
        per_pass: how many of them are in a forward pass.

    Raises:
        InputError: if a forward pass has more of them than an update is to have, and for a warm-up
            of as many steps as all or more.
    """
    accumulate = config.accumulate
    if config.batch_tokens is not None:
        if config.batch_tokens < per_pass:
            raise InputError(
                f"got batch_tokens={config.batch_tokens}, expected at least the {per_pass} {unit} "
                "of one forward pass; choose a smaller --batch or --context"
            )
        accumulate = round(config.batch_tokens / per_pass)
    steps = config.steps
    if config.tokens is not None:
        steps = -(-config.tokens // (per_pass * accumulate))
        check_warmup(config.warmup, steps)
    return replace(config, steps=steps, accumulate=accumulate)


def reasons(config: TrainConfig, unit: str, per_pass: int) -> list[str]:
    """Say what follows from what, for every default that is not a constant.

    Args:
        config: the settings, settled.
        unit: what is counted: "tokens", "images" or "examples".
        per_pass: how many of them are in a forward pass.
    """
    per_step = per_pass * config.accumulate
    sentences = []
    if config.batch_tokens is not None:
        near = config.batch_tokens != per_step
        asked = f", the nearest to {config.batch_tokens:,}" if near else ""
        sentences.append(
            f"accumulate {config.accumulate}: {per_step:,} {unit} an update{asked}, "
            f"{per_pass:,} in a forward pass"
        )
    if config.tokens is not None:
        sentences.append(f"steps {config.steps:,}: {config.tokens:,} {unit}, {per_step:,} a step")
    if config.lr is None:
        rates = ", ".join(f"{rate:g}" for rate in named_optimizer(config.optimizer).rates)
        sentences.append(f"lr {config.rate:g}: the middle of this optimizer's grid ({rates})")
    if config.warmup is None:
        sentences.append(f"warmup {config.warmup_steps}: the default of {config.schedule}")
    if config.final == default_final(config.schedule) != 0:
        sentences.append(f"final_lr {config.final:g}: the default of {config.schedule}")
    return sentences
