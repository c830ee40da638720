"""A GPT: in GPT-2's form, or as they are made now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steepest.lab.data.shapes import TextShape
from steepest.lab.models.model_record import ModelRecord
from steepest.lab.models.transformer import Transformer, TransformerParts


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes and variants of the model; `GPT2` has those of GPT-2."""

    context: int = 128
    """Longest sequence, in tokens."""
    width: int = 128
    """Size of the residual stream."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads; they divide the width into parts of even size."""
    mlp: Literal["relu2", "gelu", "gelu-tanh", "swiglu"] = "relu2"
    """Nonlinearity of the MLP, of width 4 D (8/3 D for swiglu, which has three matrices);
    "gelu-tanh" is GPT-2's approximation of "gelu"."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How a token knows where it is."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias."""
    tied: bool = False
    """Whether the head is the embedding table."""
    bias: bool = False
    """Whether linear layers have biases."""

    def __post_init__(self) -> None:
        _ = self.parts  # which refuses sizes that cannot be

    def count(self, shape: TextShape) -> tuple[int, int]:
        """Return the numbers of parameters, and of constants such as tables of angles.

        Nothing is made for it, so the sizes may be those of a model that no memory can hold.

        >>> GPTConfig(width=16, depth=2, heads=2, context=8).count(TextShape(10, 8))
        (6544, 128)
        """
        return self.parts.count(shape.vocabulary)

    @property
    def inner(self) -> int:
        """Units of the MLP."""
        return 8 * self.width // 3 if self.mlp == "swiglu" else 4 * self.width

    @property
    def parts(self) -> TransformerParts:
        """All that the blocks must know."""
        return TransformerParts(
            context=self.context,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            kv_heads=self.heads,
            inner=self.inner,
            mlp=self.mlp,
            positions=self.positions,
            norm=self.norm,
            eps=None,
            tied=self.tied,
            bias=self.bias,
        )


GPT2 = GPTConfig(
    context=1024,
    width=768,
    depth=12,
    heads=12,
    mlp="gelu-tanh",
    positions="learned",
    norm="layer",
    tied=True,
    bias=True,
)
"""The smallest GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, a tied head."""


class GPT(Transformer):
    """Map tokens `(B, T)` to logits `(B, T, vocabulary)`.

    >>> import torch
    >>> model = GPT(GPTConfig(width=16, depth=2, heads=2, context=8), vocabulary=10)
    >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
    torch.Size([3, 8, 10])
    """

    records = (
        ModelRecord(
            name="gpt",
            label="GPT",
            sizes=GPTConfig(),
            takes=TextShape,
            build=lambda sizes, shape: GPT(sizes, shape.vocabulary),
        ),
    )

    def __init__(self, config: GPTConfig, vocabulary: int):
        super().__init__(config.parts, vocabulary)
        self.config = config
