"""A network with every kind of matrix, and the ways to drive an optimizer by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Convolutions (one grouped), a fused projection, experts, and what is left to AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.embedding = nn.Embedding(5, 8)
        self.qkv = nn.Linear(8, 24)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.experts = nn.Parameter(0.3 * torch.randn(3, 8, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        x = self.conv(self.stem(images).relu()).mean((-2, -1)) + self.embedding(ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + q.tanh() * k + v
        x = x + self.down(self.up(x).relu())
        x = x + torch.einsum("ti,eoi->to", x, self.experts)
        return self.head(self.norm(x))


@pytest.fixture
def network() -> Callable[[], Network]:
    """Builds the network, every time the same."""

    def build() -> Network:
        torch.manual_seed(7)
        return Network()

    return build


def _set_gradients(parameters: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        G = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = torch.empty_like(p).copy_(G * scale)


@pytest.fixture
def set_gradients() -> Callable[..., None]:
    """Gives parameters Gaussian gradients, which depend on the seed and the shapes only."""
    return _set_gradients


@pytest.fixture
def train(network: Callable[[], Network]) -> Callable[..., None]:
    """Trains the network on random images: forward, backward, step."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            images = torch.randn(6, 4, 5, 5, generator=generator)
            ids = torch.randint(5, (6,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images, ids), ids).backward()
            optimizer.step()

    return train


@pytest.fixture
def path() -> Callable[..., Tensor]:
    """Runs an algorithm of `steepest.optim.reference` on a sequence of gradients."""

    def path(algorithm: Any, start: Tensor, gradients: Any, lr: float, **options: Any) -> Tensor:
        """The weights before the first step and after each, (steps + 1, out, in)."""
        weights = []

        def gradient(W: Tensor, t: int) -> Tensor:
            weights.append(W)
            return gradients[t - 1]

        last = algorithm(start, gradient, len(gradients), lr, **options)
        return torch.stack([*weights, last])

    return path


@pytest.fixture
def average() -> Callable[..., Tensor]:
    """Sums up what the momentum is after a sequence of gradients."""

    def average(gradients: Any, momentum: float) -> Tensor:
        age = torch.arange(len(gradients) - 1, -1, -1, dtype=torch.float64)
        weights = (1 - momentum) * momentum**age
        return torch.tensordot(weights, torch.stack(list(gradients)), 1)

    return average


@pytest.fixture
def snapshot() -> Callable[[torch.optim.Optimizer], list[Tensor]]:
    """Copies every weight and every tensor of the state."""

    def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        state = [t for p in weights if p in optimizer.state for t in optimizer.state[p].values()]
        return [t.detach().clone() for t in weights + state]

    return snapshot
