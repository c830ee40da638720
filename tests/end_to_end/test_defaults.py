"""`Muon(model)` and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer

from steepest import Muon
from steepest.lab.data import Sampler, load
from steepest.lab.models import GPT, GPTConfig

STEPS = 250


def _fit(optimizer: Optimizer, loss: Callable[[int], torch.Tensor]) -> float:
    """Train with a linear decay; return the mean loss of the last ten steps."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    last = []
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        optimizer.step()
        schedule.step()
        last.append(value.item())
    return sum(last[-10:]) / 10


def _gpt(optimizer: Callable[[nn.Module], Optimizer]) -> float:
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=32, depth=2, heads=2, context=64), 256)
    sampler = Sampler(load("reference").train_tokens, 8, 64, seed=0)
    return _fit(optimizer(model), lambda step: model.loss(*sampler.batch(step)))


def _cnn(optimizer: Callable[[nn.Module], Optimizer]) -> float:
    """Tell the direction of a wave under noise, one of eight."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 8),
    )  # fmt: skip
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")

    def loss(step: int) -> torch.Tensor:
        labels = torch.randint(8, (32,))
        angle = labels[:, None, None] * math.pi / 8
        phase = 2 * math.pi * torch.rand(32, 1, 1)
        waves = torch.sin(1.2 * (x * angle.cos() + y * angle.sin()) + phase)
        return F.cross_entropy(model((waves + torch.randn_like(waves))[:, None]), labels)

    return _fit(optimizer(model), loss)


def _adamw(lr: float) -> Callable[[nn.Module], Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr)


def test_one_rate_and_nothing_else_trains_a_gpt() -> None:
    """Better than AdamW at every rate of a coarse grid around its best."""
    assert _gpt(Muon) < min(_gpt(_adamw(lr)) for lr in (3e-3, 1e-2, 3e-2))


def test_one_rate_and_nothing_else_trains_a_cnn() -> None:
    """Solves the task, where AdamW at the rate it comes with is still far from it."""
    loss = _cnn(Muon)
    assert loss < 0.15 < _cnn(_adamw(1e-3))
