"""Two readings of Shampoo: it adapts to variance, or it whitens. Where they predict otherwise.

Gradients are a fixed mean and noise of a size. Whitening makes the average of all updates
semi-orthogonal, whatever the noise. Adaptation to variance shortens what noise dominates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steepest import KLShampoo, Muon, Shampoo
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.clarifying_shampoo.updates import (
    DOUBLE,
    gaussian_gradient,
    update_from,
    zero_weight,
)
from steepest.linalg import nuclear_rank

_ROOTS: dict[str, Any] = {"interval": 1, "length": "muon", "momentum": 0.9, "beta2": 0.95}
_KINDS: dict[str, Callable[..., Any]] = {
    "Muon": lambda W: Muon([W], 1.0, momentum=0.9, nesterov=False, scale="none", method="svd"),
    "Shampoo 1/4": lambda W: Shampoo([W], 1.0, exponent=1 / 4, **_ROOTS),
    "Shampoo 1/2": lambda W: Shampoo([W], 1.0, exponent=1 / 2, **_ROOTS),
    "KL-Shampoo": lambda W: KLShampoo([W], 1.0, **_ROOTS),
}


def updates_by_noise(
    seed: int, out: int, in_: int, steps: int, noises: tuple[float, ...]
) -> Numbers:
    """Cosine to the mean gradient, and nuclear rank over the largest, by optimizer and noise."""
    S = gaussian_gradient(out, in_)
    aligned: dict[str, list[float]] = {name: [] for name in _KINDS}
    ranks: dict[str, list[float]] = {name: [] for name in _KINDS}
    for noise in noises:
        Z = torch.randn(steps, out, in_, dtype=DOUBLE)
        gradients = S + noise * S.norm() * Z / (out * in_) ** 0.5
        for name, build in _KINDS.items():
            W = zero_weight(out, in_)
            optimizer = build(W)
            D = [update_from(optimizer, W, G) for G in gradients][-1]
            aligned[name].append(_cosine(D, S))
            ranks[name].append(float(nuclear_rank(D)) / min(out, in_))
    figure = curve(
        "Update and mean gradient by noise", list(noises), aligned,
        across="length of the noise over that of the mean gradient", up="cosine", log_across=True,
    )  # fmt: skip
    return {"aligned": aligned, "ranks": ranks, "curves": [figure]}


def _cosine(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum() / (A.norm() * B.norm()))


_NOISES = (0.1, 0.3, 1.0, 3.0, 10.0)
UPDATES_BY_NOISE = Experiment(
    name="updates-by-noise",
    title="Updates for a mean gradient with even noise",
    kind="theory",
    measure=updates_by_noise,
    scales={
        "quick": Setting(
            sizes={"out": 12, "in_": 16, "steps": 60, "noises": (0.1, 1.0, 10.0)},
            seeds=8, minutes=0.15,
        ),
        "cpu": Setting(
            sizes={"out": 32, "in_": 48, "steps": 150, "noises": _NOISES}, seeds=5, minutes=0.5
        ),
        "gpu": Setting(
            sizes={"out": 128, "in_": 192, "steps": 300, "noises": _NOISES}, seeds=5, minutes=5
        ),
        "paper": Setting(
            sizes={"out": 128, "in_": 192, "steps": 300, "noises": _NOISES}, seeds=5, minutes=5
        ),
    },
)  # fmt: skip

CLAIMS = (
    Claim(
        name="variance-reading-of-noise",
        sentence="Under even noise Shampoo 1/2 shortens noisy directions: its update is nearer to "
        "the mean gradient than Muon's.",
        place="Section 2 against whitening",
        source="ours",
        experiment=UPDATES_BY_NOISE,
        quantity="cosine to the mean gradient less that of Muon, at a noise of 10",
        value=lambda numbers: (
            numbers["aligned"]["Shampoo 1/2"][-1] - numbers["aligned"]["Muon"][-1]
        ),
        low=0.0,
        checks=("D2.a",),
    ),
    Claim(
        name="whitening-reading-of-updates",
        sentence="False on purpose: Shampoo 1/2 whitens each update, whatever the noise.",
        place="control",
        source="ours",
        experiment=UPDATES_BY_NOISE,
        quantity="nuclear rank of the update over the largest possible, at a noise of 10",
        value=lambda numbers: float(numbers["ranks"]["Shampoo 1/2"][-1]),
        low=0.95,
        control=True,
    ),
)
