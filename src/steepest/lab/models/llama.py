"""LLaMA: RMSNorm, rotary positions, a gated MLP, and keys and values that heads may share.

Sources: arXiv 2302.13971 (LLaMA), 2305.13245 (shared keys and values).
"""

from __future__ import annotations

from dataclasses import dataclass

from steepest.lab.data.shapes import TextShape
from steepest.lab.errors import InputError
from steepest.lab.models.model_record import ModelRecord
from steepest.lab.models.transformer import Transformer, TransformerParts


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of the model."""

    context: int = 128
    """Longest sequence, in tokens."""
    width: int = 128
    """Size of the residual stream."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads; they divide the width into parts of even size."""
    kv_heads: int | None = None
    """Heads of keys and values, which divide the heads; by default as many."""
    inner: int = 344
    """Units of the MLP, usually near 8/3 of the width."""
    eps: float = 1e-6
    """What a norm adds to the mean square."""
    base: float = 10_000.0
    """The slowest rotary angle is nearly 1 / base a position."""
    tied: bool = False
    """Whether the head is the embedding table."""

    def __post_init__(self) -> None:
        for name in ("eps", "base"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"got {name}={getattr(self, name)}, expected a number above 0")
        _ = self.parts  # which refuses sizes that cannot be

    def count(self, shape: TextShape) -> tuple[int, int]:
        """Return the numbers of parameters, and of constants such as tables of angles.

        >>> LlamaConfig(width=16, depth=2, heads=2, inner=40, context=8).count(TextShape(10, 8))
        (6288, 128)
        """
        return self.parts.count(shape.vocabulary)

    @property
    def parts(self) -> TransformerParts:
        """All that the blocks must know."""
        return TransformerParts(
            context=self.context,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            kv_heads=self.heads if self.kv_heads is None else self.kv_heads,
            inner=self.inner,
            mlp="swiglu",
            positions="rotary",
            norm="rms",
            eps=self.eps,
            base=self.base,
            reciprocal=True,
            tied=self.tied,
            bias=False,
        )


class Llama(Transformer):
    """Map tokens `(B, T)` to logits `(B, T, vocabulary)`.

    >>> import torch
    >>> model = Llama(LlamaConfig(width=16, depth=2, heads=2, kv_heads=1, context=8), vocabulary=10)
    >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
    torch.Size([3, 8, 10])
    """

    records = (
        ModelRecord(
            name="llama",
            label="LLaMA",
            sizes=LlamaConfig(),
            takes=TextShape,
            build=lambda sizes, shape: Llama(sizes, shape.vocabulary),
        ),
    )

    def __init__(self, config: LlamaConfig, vocabulary: int):
        super().__init__(config.parts, vocabulary)
        self.config = config
