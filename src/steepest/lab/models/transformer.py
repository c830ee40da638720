"""Pre-norm blocks of causal attention and an MLP, which GPT and LLaMA are made of.

Query, key and value are matrices of their own, so that each gets its own norm. Shapes in comments:
B batch, T positions, D width, H heads, G heads of keys and values, E = D / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab.errors import InputError
from steepest.lab.models.model_record import check_at_least_one


@dataclass(frozen=True, kw_only=True)
class TransformerParts:
    """All that the blocks must know; `GPTConfig` and `LlamaConfig` say it in fewer words."""

    context: int
    """Longest sequence, in tokens."""
    width: int
    """Size of the residual stream."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads."""
    kv_heads: int
    """Heads of keys and values; each serves heads / kv_heads heads of queries."""
    inner: int
    """Units of the MLP."""
    mlp: Literal["relu2", "gelu", "gelu-tanh", "swiglu"]
    """Nonlinearity of the MLP; "gelu-tanh" is GPT-2's approximation of "gelu"."""
    positions: Literal["rotary", "learned"]
    """How a token knows where it is."""
    norm: Literal["rms", "layer"]
    """RMSNorm, or LayerNorm with a bias."""
    eps: float | None
    """What norms add to the mean square; by default what PyTorch adds."""
    base: float = 10_000.0
    """The slowest rotary angle is nearly 1 / base a position."""
    reciprocal: bool = False
    """Whether angles are 1 / base^x, as Hugging Face rounds them, and not base^-x."""
    tied: bool
    """Whether the head is the embedding table."""
    bias: bool
    """Whether linear layers have biases."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "context", "width", "depth", "heads", "kv_heads", "inner")
        if self.width % self.heads:
            raise InputError(
                f"got width={self.width} and heads={self.heads}, expected heads to divide the width"
            )
        if self.positions == "rotary" and self.head % 2:
            raise InputError(
                f"got heads of size {self.head}, expected an even size for rotary positions"
            )
        if self.heads % self.kv_heads:
            raise InputError(
                f"got heads={self.heads} and kv_heads={self.kv_heads}, expected kv_heads to divide "
                "the heads"
            )

    @property
    def head(self) -> int:
        """Size of a head."""
        return self.width // self.heads

    def count(self, vocabulary: int) -> tuple[int, int]:
        """Return the numbers of parameters, and of constants such as tables of angles."""
        width, inner, bias = self.width, self.inner, int(self.bias)
        gates = 2 if self.mlp == "swiglu" else 1
        keys = self.kv_heads * self.head
        attention = 2 * width * (width + bias) + 2 * keys * (width + bias)
        mlp = gates * inner * (width + bias) + width * (inner + bias)
        norm = width * (2 if self.norm == "layer" else 1)
        tables = vocabulary * (1 if self.tied else 2)
        tables += self.context if self.positions == "learned" else 0
        parameters = width * tables + self.depth * (attention + mlp + 2 * norm) + norm
        angles = self.context * (self.head // 2) if self.positions == "rotary" else 0
        return parameters, 2 * angles * self.depth


class Transformer(nn.Module):
    """Map tokens `(B, T)` to logits `(B, T, vocabulary)`."""

    def __init__(self, parts: TransformerParts, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, parts.width)
        self.position = None
        if parts.positions == "learned":
            self.position = nn.Embedding(parts.context, parts.width)
        blocks = [Block(parts) for _ in range(parts.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = _norm(parts)
        self.head = nn.Linear(parts.width, vocabulary, bias=False)
        self.apply(self._initialize)
        for block in blocks:  # so that the residual stream does not grow with depth
            for output in (block.attention.output, block.mlp.down):
                output.weight.data /= math.sqrt(2 * parts.depth)
        if parts.tied:
            self.head.weight = self.embedding.weight

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        """Every linear layer keeps the size of its input; logits start small."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits for the next token at every position."""
        x = self.embedding(tokens)  # (B, T, D)
        if self.position is not None:
            x = x + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats per token."""
        logits = self(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Block(nn.Module):
    """Attention and MLP, each on a normalized copy and added to the stream."""

    def __init__(self, parts: TransformerParts):
        super().__init__()
        self.norm_attention = _norm(parts)
        self.attention = Attention(parts)
        self.norm_mlp = _norm(parts)
        self.mlp = FeedForward(parts)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.norm_attention(x))
        x = x + self.mlp(self.norm_mlp(x))
        return x


class Attention(nn.Module):
    """Causal attention; several heads of queries may share keys and values (arXiv 2305.13245)."""

    def __init__(self, parts: TransformerParts):
        super().__init__()
        self.heads, self.kv_heads = parts.heads, parts.kv_heads
        keys = parts.kv_heads * parts.head
        self.rotary = Rotary(parts) if parts.positions == "rotary" else None
        self.query = nn.Linear(parts.width, parts.width, bias=parts.bias)
        self.key = nn.Linear(parts.width, keys, bias=parts.bias)
        self.value = nn.Linear(parts.width, keys, bias=parts.bias)
        self.output = nn.Linear(parts.width, parts.width, bias=parts.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, E)
        k, v = (
            projection(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # (B, G, T, E)
            for projection in (self.key, self.value)
        )
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        shared = self.kv_heads < self.heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        out: Tensor = self.output(y.transpose(1, 2).flatten(-2))
        return out


class Rotary(nn.Module):
    """Rotate pairs of coordinates by angles that grow with the position (arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, parts: TransformerParts):
        super().__init__()
        half = parts.head // 2
        power = torch.arange(half) / half
        frequency = 1.0 / parts.base**power if parts.reciprocal else parts.base ** (-power)
        angle = torch.outer(torch.arange(parts.context), frequency)  # (T, E/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, T, E) -> (B, H, T, E)."""
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class FeedForward(nn.Module):
    """Two matrices around a nonlinearity, or three for the gated one."""

    def __init__(self, parts: TransformerParts):
        super().__init__()
        self.kind = parts.mlp
        self.up = nn.Linear(parts.width, parts.inner, bias=parts.bias)
        self.gate = None
        if parts.mlp == "swiglu":
            self.gate = nn.Linear(parts.width, parts.inner, bias=parts.bias)
        self.down = nn.Linear(parts.inner, parts.width, bias=parts.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        h = self.up(x)
        if self.gate is not None:
            h = h * F.silu(self.gate(x))
        elif self.kind == "relu2":
            h = F.relu(h).square()
        else:
            h = F.gelu(h, approximate="tanh" if self.kind == "gelu-tanh" else "none")
        out: Tensor = self.down(h)
        return out


def _norm(parts: TransformerParts) -> nn.Module:
    if parts.norm == "layer":
        return nn.LayerNorm(parts.width, eps=1e-5 if parts.eps is None else parts.eps)
    return nn.RMSNorm(parts.width, eps=parts.eps)
