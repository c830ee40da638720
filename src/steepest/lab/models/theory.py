"""The models of the theory, on flattened images: random features, and deep linear networks.

Random features are layers that are drawn once and never trained; only the matrix behind them is.
The theory of spectral descent is about them (arXiv 2512.04299), and starts that matrix at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab.data.shapes import ImageShape
from steepest.lab.models.model_record import ModelRecord, check_at_least_one


@dataclass(frozen=True, kw_only=True)
class RandomFeaturesConfig:
    """Sizes and variants of the model."""

    width: int = 256
    """Number of features."""
    depth: int = 1
    """Layers that are drawn and not trained."""
    features: Literal["relu", "swiglu"] = "relu"
    """Nonlinearity of these layers; swiglu has two matrices a layer."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "width", "depth")

    def count(self, shape: ImageShape) -> tuple[int, int]:
        """Return the numbers of parameters, and of constants: the matrices of the features.

        >>> RandomFeaturesConfig(width=10).count(ImageShape(channels=1, side=8, classes=3))
        (30, 640)
        """
        inputs = shape.channels * shape.side**2 + (self.depth - 1) * self.width
        matrices = 2 if self.features == "swiglu" else 1
        return self.width * shape.classes, matrices * inputs * self.width


class RandomFeatures(nn.Module):
    """Map images `(B, channels, side, side)` to logits `(B, classes)` by one trained matrix.

    >>> model = RandomFeatures(RandomFeaturesConfig(), ImageShape(channels=1, side=8, classes=3))
    >>> [name for name, _ in model.named_parameters()]
    ['head.weight']
    """

    records = (
        ModelRecord(
            name="random-features",
            label="random features",
            sizes=RandomFeaturesConfig(),
            takes=ImageShape,
            build=lambda sizes, shape: RandomFeatures(sizes, shape),
        ),
    )

    def __init__(self, config: RandomFeaturesConfig, shape: ImageShape):
        super().__init__()
        self.config = config
        inputs = shape.channels * shape.side**2
        matrices = 2 if config.features == "swiglu" else 1
        for i in range(config.depth):
            fan_in = config.width if i else inputs
            drawn = torch.randn(matrices, config.width, fan_in) * fan_in**-0.5
            self.register_buffer(f"features{i}", drawn)
        self.head = nn.Linear(config.width, shape.classes, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = images.flatten(1)
        for i in range(self.config.depth):
            first, *gate = (F.linear(x, matrix) for matrix in self.get_buffer(f"features{i}"))
            x = F.silu(first) * gate[0] if gate else F.relu(first)
        logits: Tensor = self.head(x)
        return logits


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Sizes of the model."""

    width: int = 128
    """Units of each layer but the last."""
    depth: int = 2
    """Number of matrices; 1 is a linear classifier, without a width."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "width", "depth")

    def count(self, shape: ImageShape) -> tuple[int, int]:
        """Return the numbers of parameters, and of constants.

        >>> LinearConfig(width=10, depth=2).count(ImageShape(channels=1, side=8, classes=3))
        (670, 0)
        """
        units = self.units(shape)
        return sum(a * b for a, b in pairwise(units)), 0

    def units(self, shape: ImageShape) -> list[int]:
        """Return the numbers of units, from the inputs to the classes."""
        hidden = [self.width] * (self.depth - 1)
        return [shape.channels * shape.side**2, *hidden, shape.classes]


class Linear(nn.Module):
    """Map images `(B, channels, side, side)` to logits `(B, classes)` by a product of matrices.

    >>> model = Linear(LinearConfig(width=10), ImageShape(channels=1, side=8, classes=3))
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """

    records = (
        ModelRecord(
            name="linear",
            label="deep linear network",
            sizes=LinearConfig(),
            takes=ImageShape,
            build=lambda sizes, shape: Linear(sizes, shape),
        ),
    )

    def __init__(self, config: LinearConfig, shape: ImageShape):
        super().__init__()
        self.config = config
        pairs = pairwise(config.units(shape))
        *layers, self.head = (nn.Linear(inputs, outputs, bias=False) for inputs, outputs in pairs)
        self.layers = nn.ModuleList(layers)
        for layer in (*self.layers, self.head):
            nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = images.flatten(1)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits
