"""A GPT: pre-norm blocks of causal attention and an MLP, in plain PyTorch.

Query, key and value are matrices of their own, so that each gets its own norm. Shapes in comments:
B batch, T positions, D width, H heads, E = D / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes and variants of the model."""

    context: int = 128
    """Longest sequence, in tokens."""
    width: int = 128
    """Size of the residual stream."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads; they divide the width into parts of even size."""
    mlp: Literal["relu2", "gelu", "swiglu"] = "relu2"
    """Nonlinearity of the MLP, of width 4 D (8/3 D for swiglu, which has three matrices)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How a token knows where it is."""
    tied: bool = False
    """Whether the head is the embedding table."""
    bias: bool = False
    """Whether linear layers have biases."""

    def __post_init__(self) -> None:
        for name in ("context", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"got {name}={getattr(self, name)}, expected at least 1")
        if self.width % self.heads:
            raise InputError(
                f"got width={self.width} and heads={self.heads}, expected heads to divide the width"
            )
        if self.positions == "rotary" and (self.width // self.heads) % 2:
            raise InputError(
                f"got heads of size {self.width // self.heads}, expected an even size for rotary "
                "positions"
            )

    def count(self, vocabulary: int) -> tuple[int, int]:
        """Return the numbers of parameters, and of constants such as tables of angles.

        Nothing is made for it, so the sizes may be those of a model that no memory can hold.
        """
        width, inner, bias = self.width, self.inner, int(self.bias)
        gates = 2 if self.mlp == "swiglu" else 1
        attention = 4 * width * (width + bias)
        mlp = gates * inner * (width + bias) + width * (inner + bias)
        tables = vocabulary * (1 if self.tied else 2)
        tables += self.context if self.positions == "learned" else 0
        parameters = width * tables + self.depth * (attention + mlp + 2 * width) + width
        angles = self.context * (width // self.heads // 2) if self.positions == "rotary" else 0
        return parameters, 2 * angles * self.depth

    @property
    def inner(self) -> int:
        """Units of the MLP."""
        return 8 * self.width // 3 if self.mlp == "swiglu" else 4 * self.width


class GPT(nn.Module):
    """Map tokens `(B, T)` to logits `(B, T, vocabulary)`.

    >>> model = GPT(GPTConfig(width=16, depth=2, heads=2, context=8), vocabulary=10)
    >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
    torch.Size([3, 8, 10])
    """

    def __init__(self, config: GPTConfig, vocabulary: int):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.position = None
        if config.positions == "learned":
            self.position = nn.Embedding(config.context, config.width)
        blocks = [Block(config) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        self.apply(self._initialize)
        for block in blocks:  # so that the residual stream does not grow with depth
            for output in (block.attention.output, block.mlp.down):
                output.weight.data /= math.sqrt(2 * config.depth)
        if config.tied:
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

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.norm_mlp = nn.RMSNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.norm_attention(x))
        x = x + self.mlp(self.norm_mlp(x))
        return x


class Attention(nn.Module):
    """Causal attention with `heads` heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.rotary = Rotary(config) if config.positions == "rotary" else None
        self.query = nn.Linear(config.width, config.width, bias=config.bias)
        self.key = nn.Linear(config.width, config.width, bias=config.bias)
        self.value = nn.Linear(config.width, config.width, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, E)
            for projection in (self.query, self.key, self.value)
        )
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.output(y.transpose(1, 2).flatten(-2))
        return out


class Rotary(nn.Module):
    """Rotate pairs of coordinates by angles that grow with the position (arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        half = config.width // config.heads // 2
        frequency = 10_000.0 ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(config.context), frequency)  # (T, E/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, T, E) -> (B, H, T, E)."""
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class MLP(nn.Module):
    """Two matrices around a nonlinearity, or three for the gated one."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.width, config.inner, bias=config.bias)
        self.gate = None
        if config.mlp == "swiglu":
            self.gate = nn.Linear(config.width, config.inner, bias=config.bias)
        self.down = nn.Linear(config.inner, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        h = self.up(x)
        if self.gate is not None:
            h = h * F.silu(self.gate(x))
        elif self.kind == "gelu":
            h = F.gelu(h)
        else:
            h = F.relu(h).square()
        out: Tensor = self.down(h)
        return out
