"""An MLP on flattened images, plain or residual.

The residual one is the form in which learning rates transfer over depth (arXiv 2402.17457): each
branch is ReLU, then a linear layer, and is multiplied by 1 / sqrt(L) for L branches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab.data.shapes import ImageShape
from steepest.lab.errors import InputError
from steepest.lab.models.model_record import ModelRecord, check_at_least_one


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Sizes and variants of the model."""

    width: int = 128
    """Units of each hidden layer."""
    depth: int = 3
    """Hidden layers of the plain MLP behind its first; residual branches of the other."""
    residual: bool = False
    """Whether hidden layers are added to what goes into them."""
    layers_per_block: int = 1
    """Layers in each branch of the residual MLP."""
    bias: bool = True
    """Whether layers have biases."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "width", "depth", "layers_per_block")
        if self.layers_per_block > 1 and not self.residual:
            raise InputError(
                f"got layers_per_block={self.layers_per_block} for the plain MLP, which has no "
                "branches; expected 1, or the residual one"
            )

    def count(self, shape: ImageShape) -> tuple[int, int]:
        """Return the numbers of parameters, and of constants.

        >>> MLPConfig(width=10, depth=2).count(ImageShape(channels=1, side=8, classes=3))
        (903, 0)
        """
        inputs, bias = shape.channels * shape.side**2, int(self.bias)
        hidden = self.depth * self.layers_per_block * self.width * (self.width + bias)
        return self.width * (inputs + bias) + hidden + shape.classes * (self.width + bias), 0


class MLP(nn.Module):
    """Map images `(B, channels, side, side)` to logits `(B, classes)`.

    >>> import torch
    >>> model = MLP(MLPConfig(width=10), ImageShape(channels=1, side=8, classes=3))
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """

    records = (
        ModelRecord(
            name="mlp",
            label="MLP",
            sizes=MLPConfig(),
            takes=ImageShape,
            build=lambda sizes, shape: MLP(sizes, shape),
        ),
        ModelRecord(
            name="residual-mlp",
            label="residual MLP",
            sizes=MLPConfig(residual=True),
            takes=ImageShape,
            build=lambda sizes, shape: MLP(sizes, shape),
        ),
    )

    def __init__(self, config: MLPConfig, shape: ImageShape):
        super().__init__()
        self.config = config
        self.residual, self.scale = config.residual, config.depth**-0.5
        inputs = shape.channels * shape.side**2
        self.input = nn.Linear(inputs, config.width, bias=config.bias)
        self.blocks = nn.ModuleList(_branch(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, shape.classes, bias=config.bias)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):  # the size of the signal stays, behind ReLU too
                gain = 1.0 if name in ("input", "head") else math.sqrt(2.0)
                nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.input(images.flatten(1))
        for block in self.blocks:
            x = x + self.scale * block(x) if self.residual else block(x)
        logits: Tensor = self.head(x if self.residual else F.relu(x))
        return logits


def _branch(config: MLPConfig) -> nn.Sequential:
    """ReLU, then a linear layer, as often as a branch has layers."""
    layers: list[nn.Module] = []
    for _ in range(config.layers_per_block):
        layers += [nn.ReLU(), nn.Linear(config.width, config.width, bias=config.bias)]
    return nn.Sequential(*layers)
