"""Networks and data of `transfer.py`: a language model, residual networks, digits."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab.data import Sampler, load
from steepest.lab.models import GPT, GPTConfig

CONTEXT, BATCH = 4, 128


class LanguageModel(nn.Module):
    """Four bytes -> embeddings, side by side -> two hidden layers -> the next byte."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.mix = nn.Linear(CONTEXT * width, width, bias=False)
        self.hidden = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.mix.weight, std=(CONTEXT * width) ** -0.5)
        nn.init.normal_(self.hidden.weight, std=(2 / width) ** 0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embedding(tokens).flatten(1)).relu()
        logits: Tensor = self.head(self.hidden(x).relu())
        return logits


class Branch(nn.Module):
    """x + W tanh(x), or with a second layer inside."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False) if layers == 2 else None
        self.last = nn.Linear(width, width, bias=False)
        for layer in (self.inner, self.last):
            if layer is not None:
                nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.tanh()
        h = h if self.inner is None else self.inner(h).tanh()
        out: Tensor = x + self.last(h)
        return out


class Residual(nn.Module):
    """The same language model with residual blocks of one layer in place of hidden layers."""

    def __init__(self, depth: int, width: int = 64, layers: int = 1):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.mix = nn.Linear(CONTEXT * width, width, bias=False)
        nn.init.normal_(self.mix.weight, std=(CONTEXT * width) ** -0.5)
        self.blocks = nn.ModuleList(Branch(width, layers) for _ in range(depth))
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embedding(tokens).flatten(1))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def gpt(width: int) -> nn.Module:
    model = GPT(GPTConfig(width=width, depth=2, heads=2, context=32), vocabulary=256)
    nn.init.zeros_(model.get_parameter("head.weight"))
    return model


@cache
def _sampler(batch: int, context: int) -> Sampler:
    return Sampler(load("reference").train, batch, context, seed=0)


def next_byte(i: int) -> tuple[Tensor, Tensor]:
    """Batch i: four bytes each, and the one that follows."""
    inputs, targets = _sampler(BATCH, CONTEXT).batch(i)
    return inputs, targets[:, -1]


def many_next_bytes(i: int) -> tuple[Tensor, Tensor]:
    """The same with eight times as many."""
    inputs, targets = _sampler(8 * BATCH, CONTEXT).batch(i)
    return inputs, targets[:, -1]


def sequences(i: int) -> tuple[Tensor, Tensor]:
    return _sampler(16, 32).batch(i)


def many_sequences(i: int) -> tuple[Tensor, Tensor]:
    """The same with twice as many."""
    return _sampler(32, 32).batch(i)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits: Tensor = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


# Digits, as in the pilot of super consistency: standard normal weights behind fixed multipliers,
# the fans of which are those of the base; the rule has all the dependence on the size.


class Scaled(nn.Module):
    """64 -> N -> N -> 10 with ReLU; `readout` is what its output is multiplied with."""

    def __init__(self, width: int, readout: float):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(*fans, bias=False) for fans in ((64, width), (width, width), (width, 10))
        )
        for layer in self.layers:
            nn.init.normal_(layer.weight)
        self.scales = (1 / 8, (2 / 32) ** 0.5, readout)

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = layer(x) * scale
            x = x if layer is self.layers[-1] else x.relu()
        return x


def small_readout(width: int) -> nn.Module:
    return Scaled(width, 1 / 32)


def large_readout(width: int) -> nn.Module:
    """As the official code has NTP: no further factor at the readout."""
    return Scaled(width, 32**-0.5)


def random_features(width: int) -> nn.Module:
    model = Scaled(width, 1 / 32)
    for layer in list(model.layers)[:2]:
        layer.weight.requires_grad_(False)
    return model


def plain(width: int) -> nn.Module:
    """The same without multipliers, and with a small readout."""
    model = nn.Sequential(
        nn.Linear(64, width, bias=False), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, 10, bias=False),
    )  # fmt: skip
    for k, std in ((0, 1 / 8), (2, (2 / width) ** 0.5), (4, 0.5 / width)):
        nn.init.normal_(model.get_parameter(f"{k}.weight"), std=std)
    return model


class Times(nn.Linear):
    """Standard normal weights behind a fixed multiplier."""

    def __init__(self, inputs: int, outputs: int, scale: float):
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class TimesBranch(nn.Module):
    """x + W tanh(x), or with a second layer inside; over sqrt(2), the depth of the base."""

    def __init__(self, layers: int):
        super().__init__()
        self.inner = Times(64, 64, 1 / 8) if layers == 2 else None
        self.last = Times(64, 64, 1 / 8 / 2**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.tanh()
        h = h if self.inner is None else self.inner(h).tanh()
        out: Tensor = x + self.last(h)
        return out


class DeepDigits(nn.Module):
    """64 -> 64 -> residual tanh blocks -> 10."""

    def __init__(self, depth: int, layers: int = 1):
        super().__init__()
        self.input = Times(64, 64, 1 / 8)
        self.blocks = nn.ModuleList(TimesBranch(layers) for _ in range(depth))
        self.head = Times(64, 10, 1 / 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def deep_digits(depth: int) -> nn.Module:
    return DeepDigits(depth)


def deeper_digits(depth: int) -> nn.Module:
    return DeepDigits(depth, layers=2)


class Attention(nn.Module):
    """Digits as eight rows of eight: two layers of attention, mean, readout; for TEON's stacks."""

    def __init__(self, width: int):
        super().__init__()
        self.input = nn.Linear(8, width, bias=False)
        self.position = nn.Parameter(torch.randn(8, width))
        self.blocks = nn.ModuleList(_Heads(width) for _ in range(2))
        self.head = nn.Linear(width, 10, bias=False)
        nn.init.normal_(self.input.weight, std=8**-0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.input(x.unflatten(1, (8, 8))) + self.position
        for block in self.blocks:
            h = h + block(h)
        logits: Tensor = self.head(h.mean(1))
        return logits


class _Heads(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.normal_(layer.weight, std=width**-0.5)
        self.heads = 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.output(y.transpose(1, 2).flatten(-2))
        return out


@cache
def digits() -> tuple[Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[:512], dtype=torch.float32) / 8 - 1, torch.tensor(y[:512])


def all_digits(i: int) -> tuple[Tensor, Tensor]:
    return digits()


def some_digits() -> tuple[Tensor, Tensor]:
    X, y = digits()
    return X[:128], y[:128]


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - F.one_hot(batch[1], 10)).square().sum(1).mean()
