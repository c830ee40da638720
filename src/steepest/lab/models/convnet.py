"""A convolutional network without norms, plain or residual.

The form of the paper on learning rate transfer (arXiv 2402.17457): three stages of constant width,
a 3x3 convolution before each and 2x2 max-pooling behind each, then a linear layer. Each branch of
the residual one is ReLU, then a 3x3 convolution, and is multiplied by 1 / sqrt(L) for L branches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab.data.shapes import ImageShape
from steepest.lab.errors import InputError
from steepest.lab.models.model_record import ModelRecord, check_at_least_one

STAGES = 3
KERNEL = 3


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """Sizes and variants of the model."""

    width: int = 32
    """Channels of every convolution."""
    depth: int = 3
    """Blocks, shared out between the three stages, early ones first."""
    residual: bool = False
    """Whether blocks are added to what goes into them."""
    layers_per_block: int = 1
    """Convolutions in each block."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "width", "depth", "layers_per_block")

    @property
    def blocks(self) -> list[int]:
        """Blocks of each stage."""
        return [self.depth // STAGES + (i < self.depth % STAGES) for i in range(STAGES)]

    def count(self, shape: ImageShape) -> tuple[int, int]:
        """Return the numbers of parameters, and of constants.

        Raises:
            InputError: for images that cannot be halved three times.

        >>> ConvNetConfig(width=4).count(ImageShape(channels=1, side=8, classes=3))
        (768, 0)
        """
        area, layers = KERNEL**2, self.depth * self.layers_per_block
        convolutions = area * self.width * (shape.channels + self.width * (STAGES - 1 + layers))
        return convolutions + self.width * _last_side(shape) ** 2 * shape.classes, 0


class ConvNet(nn.Module):
    """Map images `(B, channels, side, side)` to logits `(B, classes)`.

    >>> import torch
    >>> model = ConvNet(ConvNetConfig(width=4), ImageShape(channels=1, side=8, classes=3))
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """

    records = (
        ModelRecord(
            name="convnet",
            label="ConvNet",
            sizes=ConvNetConfig(),
            takes=ImageShape,
            build=lambda sizes, shape: ConvNet(sizes, shape),
        ),
        ModelRecord(
            name="residual-convnet",
            label="residual ConvNet",
            sizes=ConvNetConfig(residual=True, depth=6),
            takes=ImageShape,
            build=lambda sizes, shape: ConvNet(sizes, shape),
        ),
    )

    def __init__(self, config: ConvNetConfig, shape: ImageShape):
        super().__init__()
        self.config = config
        self.residual, self.scale = config.residual, config.depth**-0.5
        channels = [shape.channels] + [config.width] * (STAGES - 1)
        self.entries = nn.ModuleList(_convolution(c, config.width) for c in channels)
        self.stages = nn.ModuleList(
            nn.ModuleList(_branch(config) for _ in range(blocks)) for blocks in config.blocks
        )
        self.head = nn.Linear(config.width * _last_side(shape) ** 2, shape.classes, bias=False)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):  # the size of the signal stays
                gain = math.sqrt(2.0) if name.startswith("stages") else 1.0
                nn.init.normal_(layer.weight, std=gain * layer.weight[0].numel() ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = images
        for entry, stage in zip(self.entries, self.stages, strict=True):
            x = entry(x)
            for block in stage:  # type: ignore[attr-defined]
                x = x + self.scale * block(x) if self.residual else block(x)
            x = F.max_pool2d(x, 2)
        logits: Tensor = self.head(x.flatten(1))
        return logits


def _convolution(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, KERNEL, padding=KERNEL // 2, bias=False)


def _branch(config: ConvNetConfig) -> nn.Sequential:
    """ReLU, then a convolution, as often as a block has layers."""
    layers: list[nn.Module] = []
    for _ in range(config.layers_per_block):
        layers += [nn.ReLU(), _convolution(config.width, config.width)]
    return nn.Sequential(*layers)


def _last_side(shape: ImageShape) -> int:
    side = shape.side // 2**STAGES
    if side < 1:
        raise InputError(
            f"got images of side {shape.side} for a ConvNet, which halves them {STAGES} times; "
            f"expected a side of at least {2**STAGES}"
        )
    return side
