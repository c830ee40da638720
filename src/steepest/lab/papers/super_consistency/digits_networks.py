"""Small networks on 8 x 8 digits, as they are at the base; `parametrize` makes them grow by a rule.

As in the official code, weights are standard normal behind fixed multipliers, so that under muP
gradient descent has one rate for all of them. Multipliers are those of the base: a width of 32, or
two residual blocks. `plain_mlp` is without, for rules that say what one rate for all weights does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.random_numbers import seeded

BASE_WIDTH, BASE_DEPTH = 32, 2
SMALL_READOUT = 1 / BASE_WIDTH
"""Multiplier of the readout of muP: 1 / (γ √N) with γ = √N."""
LARGE_READOUT = BASE_WIDTH**-0.5
"""Multiplier of the readout of the NTK parametrization: 1 / √N."""

LabelledBatch = tuple[Tensor, Tensor]


class NormalLinear(nn.Linear):
    """y = scale W x, with standard normal W."""

    def __init__(self, inputs: int, outputs: int, scale: float):
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return y `(B, outputs)` of x `(B, inputs)`."""
        return self.scale * super().forward(x)


def normal_mlp(width: int, readout: float = SMALL_READOUT) -> nn.Sequential:
    """64 -> N -> N -> 10 with ReLU and standard normal weights."""
    return nn.Sequential(
        NormalLinear(64, width, 1 / 8), nn.ReLU(),
        NormalLinear(width, width, (2 / BASE_WIDTH) ** 0.5), nn.ReLU(),
        NormalLinear(width, 10, readout),
    )  # fmt: skip


def random_feature_mlp(width: int) -> nn.Sequential:
    """The same, of which the readout alone is trained."""
    model = normal_mlp(width)
    model[:-1].requires_grad_(False)
    return model


def plain_mlp(width: int, large_readout: bool = False) -> nn.Sequential:
    """The same sizes without multipliers; the readout's entries are small, or of size 1 / √N."""
    model = nn.Sequential(
        nn.Linear(64, width, bias=False), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, 10, bias=False),
    )  # fmt: skip
    readout = width**-0.5 if large_readout else 0.5 / width
    stds = 1 / 8, (2 / width) ** 0.5, readout
    for weight, std in zip(model.parameters(), stds, strict=True):
        nn.init.normal_(weight, std=std)
    return model


class TanhBlock(nn.Module):
    """x + W tanh(x) / √2, or with a second layer inside; the depth of the base is 2."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.inner = nn.Sequential(
            *(NormalLinear(width, width, width**-0.5) for _ in range(layers - 1))
        )
        self.last = NormalLinear(width, width, (width * BASE_DEPTH) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum `(B, width)` for x `(B, width)`."""
        h = x.tanh()
        for layer in self.inner:
            h = layer(h).tanh()
        branch: Tensor = self.last(h)
        return x + branch


def residual_mlp(depth: int, width: int = 64, layers: int = 1) -> nn.Sequential:
    """64 -> N -> so many residual blocks -> 10, with so many layers in each block."""
    return nn.Sequential(
        NormalLinear(64, width, 1 / 8),
        nn.Sequential(*(TanhBlock(width, layers) for _ in range(depth))),
        NormalLinear(width, 10, 1 / width),
    )


def digit_images(examples: int = 512) -> LabelledBatch:
    """Return images `(examples, 64)` with entries from -1 to 1, and their classes."""
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[:examples], dtype=torch.float32) / 8 - 1, torch.tensor(y[:examples])


def drawn_batches(batch: LabelledBatch, size: int, seed: int) -> Callable[[int], LabelledBatch]:
    """Return batches: at 0 all that is there, for curvature; from then on so many, at random."""
    images, classes = batch

    def at(i: int) -> LabelledBatch:
        if i == 0:
            return batch
        generator = torch.Generator().manual_seed(1000 * seed + i)
        chosen = torch.randint(len(images), (size,), generator=generator, device="cpu")
        return images[chosen], classes[chosen]

    return at


def half_squared_error(model: nn.Module, batch: LabelledBatch) -> Tensor:
    """Half the squared distance to the one-hot class, mean over images."""
    return 0.5 * (model(batch[0]) - F.one_hot(batch[1], 10)).square().sum(1).mean()


def reseeded(build: Callable[..., nn.Module], seed: int) -> Callable[..., nn.Module]:
    """Return the same `build` with other random numbers: the seeds of all sweeps begin at 0.

    A model that a sweep builds with its seed k has the seed 1000 `seed` + k.
    """

    @wraps(build)
    def built(*sizes: int, **named_sizes: int) -> nn.Module:
        with seeded(1000 * seed + torch.initial_seed() % 1000):
            return build(*sizes, **named_sizes)

    return built


def widths_of(widths: tuple[int, ...]) -> list[dict[str, int]]:
    """Return widths as sizes of a sweep."""
    return [{"width": width} for width in widths]


def spread_of(values: list[float]) -> float:
    """Return the largest over the smallest; infinite where one is not positive."""
    return max(values) / min(values) if min(values) > 0 else math.inf
