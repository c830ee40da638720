"""The settings that docs/adoption.md gives for other libraries' Muon are those libraries' Muon."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from steepest import Muon

PAGE = Path(__file__).parents[2] / "docs" / "adoption.md"
SHAPES = [(32, 32), (64, 16), (16, 64), (50, 30), (32, 32)]
# Batched products may be summed in another order: a unit of bfloat16 in an update of length lr.
ROUNDING = 2e-2


@pytest.fixture(scope="module")
def settings():
    """What the page defines: `like_torch`, `like_keller_jordan`, `like_moonlight`."""
    block = re.search(r"```python\n(jordan = .*?)^for ", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = {"torch": torch}
    exec(block.group(1), names)
    return {name: value for name, value in names.items() if name.startswith("like_")}


def newton_schulz(G):
    """K. Jordan's quintic iteration, five steps in bfloat16."""
    X = G.bfloat16()
    X = X.mT if G.shape[0] > G.shape[1] else X
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if G.shape[0] > G.shape[1] else X


class KellerJordan:
    """https://github.com/KellerJordan/Muon: an average of gradients, sqrt(max(1, out / in))."""

    def __init__(self, matrices, others, lr=0.02, weight_decay=0.0, adam_lr=3e-4, adam_eps=1e-10):
        self.matrices = [(p, torch.zeros_like(p)) for p in matrices]
        self.others = torch.optim.AdamW(
            others, lr=adam_lr, betas=(0.9, 0.95), eps=adam_eps, weight_decay=0.0
        )
        self.lr, self.weight_decay = lr, weight_decay

    @torch.no_grad()
    def step(self):
        for p, M in self.matrices:
            M.lerp_(p.grad, 0.05)
            update = newton_schulz(p.grad.lerp(M, 0.95)).float()
            p.mul_(1 - self.lr * self.weight_decay)
            p.sub_(self.lr * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update)
        self.others.step()


class Moonlight:
    """https://github.com/MoonshotAI/Moonlight: a sum of gradients, 0.2 sqrt(max(out, in))."""

    def __init__(self, matrices, others, lr=1e-3, weight_decay=0.1):
        self.matrices = [(p, torch.zeros_like(p)) for p in matrices]
        self.others = torch.optim.AdamW(
            others, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay
        )
        self.lr, self.weight_decay = lr, weight_decay

    @torch.no_grad()
    def step(self):
        for p, M in self.matrices:
            M.mul_(0.95).add_(p.grad)
            update = newton_schulz(p.grad + 0.95 * M).float()
            p.mul_(1 - self.lr * self.weight_decay)
            p.sub_(self.lr * 0.2 * math.sqrt(max(p.shape)) * update)
        self.others.step()


class Torchs:
    """torch.optim.Muon as it comes, for the matrices; it takes nothing else."""

    def __init__(self, matrices, others):
        self.matrices = torch.optim.Muon(matrices)
        self.others = torch.optim.AdamW(others, lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self):
        self.matrices.step()
        self.others.step()


REFERENCES = {
    "like_torch": Torchs,
    "like_keller_jordan": KellerJordan,
    "like_moonlight": Moonlight,
}


def test_the_page_names_each_of_them(settings):
    assert {name for name in settings if name.startswith("like_")} == set(REFERENCES)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_settings_of_the_page_take_the_steps_of_the_other_library(name, settings):
    def params():
        torch.manual_seed(2)
        return [[nn.Parameter(torch.randn(s)) for s in SHAPES], [nn.Parameter(torch.randn(9))]]

    ours, theirs = params(), params()
    mine = Muon(
        [{"params": ours[0]}, {"params": ours[1], "geometry": "adamw"}], **settings[name]
    )  # fmt: skip
    reference = REFERENCES[name](*theirs)
    start = [p.detach().clone() for p in theirs[0] + theirs[1]]
    for _ in range(10):
        for p, q in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
    for p, q, W in zip(ours[0] + ours[1], theirs[0] + theirs[1], start, strict=True):
        difference, moved = (p - q).norm(), (q - W).norm()
        assert difference < ROUNDING * moved, tuple(p.shape)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("wrong", ["scale", "weight_decay", "lr"])
def test_other_settings_would_be_noticed(name, wrong, settings):
    changed = {
        "scale": {"scale": "none" if name == "like_moonlight" else "spectral"},
        "weight_decay": {"weight_decay": settings[name].get("weight_decay", 0.0) + 1.0},
        "lr": {"lr": 1.1 * settings[name]["lr"]},
    }[wrong]
    settings = {**settings, name: {**settings[name], **changed}}
    with pytest.raises(AssertionError):
        test_the_settings_of_the_page_take_the_steps_of_the_other_library(name, settings)
