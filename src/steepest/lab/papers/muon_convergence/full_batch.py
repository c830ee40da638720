"""GD, Adam, and Muon with and without momentum on a hundred images, full batch (Fig. 1a).

Each takes its best rate: of the paper's grid, and of a wider one, as a best rate at the edge of a
grid says little. Rates are chosen on other weights than those that are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.optim import Adam

from steepest import Muon
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.muon_convergence.few_images import (
    FewImages,
    bias_free_mlp,
    cross_entropy_of,
    few_images,
)

_PAPER = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1)
_BEYOND = (0.2, 0.4, 0.8, 1.6)
"""Rates behind the paper's grid."""
_OTHER = 10_000
"""Added to a seed, for the weights on which rates are chosen."""

_Weights = Iterable[nn.Parameter]
_OPTIMIZERS: dict[str, Callable[[_Weights, float], torch.optim.Optimizer]] = {
    "Muon": lambda W, lr: _muon(W, lr, 0.95, "jordan"),
    "Muon, no momentum": lambda W, lr: _muon(W, lr, 0.0, "jordan"),
    "Muon, SVD": lambda W, lr: _muon(W, lr, 0.95, "svd"),
    "Adam": lambda W, lr: Adam(W, lr),
    "GD": lambda W, lr: torch.optim.SGD(W, lr),
}


def _muon(W: _Weights, lr: float, momentum: float, method: Any) -> Muon:
    """The paper's, on every matrix: no Nesterov, no factor of the shape."""
    return Muon(list(W), lr, momentum=momentum, nesterov=False, scale="none", method=method)


def full_batch_losses(
    seed: int, data: str, images: int, hidden: tuple[int, ...], steps: int, svd: bool
) -> Numbers:
    """Train by each optimizer at its best rate; return the training loss at every step.

    Args:
        seed: of the weights.
        data: images, as `--data` takes them.
        images: how many.
        hidden: widths of the hidden layers.
        steps: how many.
        svd: whether Muon with an exact polar factor takes part, which takes longest.
    """
    source = few_images(data, images)
    numbers: dict[str, Any] = {"paper": {}, "wide": {}, "rates": {}}
    for name in _OPTIMIZERS:
        if name == "Muon, SVD" and not svd:
            continue
        tried = {
            rate: fmean(_losses(source, hidden, name, rate, steps, seed + _OTHER))
            for rate in (*_PAPER, *_BEYOND)
        }
        for grid, rates in (("paper", _PAPER), ("wide", tuple(tried))):
            best = min(rates, key=lambda rate: tried[rate])
            numbers["rates"][f"{name}, {grid}"] = best
            numbers[grid][name] = _losses(source, hidden, name, best, steps, seed)
    titles = {"paper": "the paper's rates", "wide": "a wider grid of rates"}
    numbers["curves"] = [
        curve(f"Training loss on {images} images, {title}", range(steps + 1), numbers[grid],
              across="step", up="nats per image")
        for grid, title in titles.items()
    ]  # fmt: skip
    return numbers


def _losses(
    source: FewImages, hidden: tuple[int, ...], name: str, rate: float, steps: int, seed: int
) -> list[float]:
    """The loss before every step, and behind the last."""
    torch.manual_seed(seed)
    model = bias_free_mlp(source, hidden)
    optimizer = _OPTIMIZERS[name](model.parameters(), rate)
    losses = []
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = cross_entropy_of(model, source.batch)
        losses.append(float(loss.detach()))
        if step < steps:
            loss.backward()
            optimizer.step()
    return losses


FULL_BATCH = Experiment(
    name="full-batch",
    title="Optimizers on a hundred images of CIFAR-10, full batch",
    kind="real data",
    measure=full_batch_losses,
    scales={
        "quick": Setting(
            sizes={"images": 60, "hidden": (32, 16), "steps": 10, "svd": False},
            seeds=2,
            data="digits",
            minutes=0.1,
        ),
        "cpu": Setting(
            sizes={"images": 100, "hidden": (512, 256, 64), "steps": 15, "svd": False},
            seeds=5,
            data="cifar10",
            minutes=8,
            gigabytes=1,
        ),
        "gpu": Setting(
            sizes={"images": 100, "hidden": (512, 256, 64), "steps": 15, "svd": True},
            seeds=10,
            data="cifar10",
            minutes=10,
            gigabytes=2,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={"images": 100, "hidden": (512, 256, 64), "steps": 15, "svd": True},
            seeds=5,
            data="cifar10",
            minutes=5,
            gigabytes=2,
            on_gpu=True,
        ),
    },
)


def _behind(other: str, grid: str, first: str = "Muon") -> Callable[[Numbers], float]:
    """How far one optimizer is behind another, in the mean loss over the steps."""
    return lambda numbers: fmean(numbers[grid][other]) - fmean(numbers[grid][first])


_GAP = "mean training loss over the steps, {} less Muon, nats per image"

CLAIMS = (
    Claim(
        name="muon-ahead-of-adam-full-batch",
        sentence="On 100 images, full batch, Muon trains faster than Adam.",
        place="Fig. 1(a)",
        source="first-hand",
        experiment=FULL_BATCH,
        quantity=_GAP.format("Adam"),
        value=_behind("Adam", "paper"),
        low=0.0,
        paper="near 0 by step 10, Adam by step 15",
        checks=("G5",),
    ),
    Claim(
        name="muon-ahead-of-gd-full-batch",
        sentence="On 100 images, full batch, Muon trains faster than GD.",
        place="Fig. 1(a)",
        source="first-hand",
        experiment=FULL_BATCH,
        quantity=_GAP.format("GD"),
        value=_behind("GD", "paper"),
        low=0.0,
        paper="near 0 by step 10, GD 1.8 at 15",
        checks=("G5",),
    ),
    Claim(
        name="muon-ahead-of-gd-wide",
        sentence="Muon stays ahead of GD where GD may take larger rates than the paper's.",
        place="Fig. 1(a), with a wider grid",
        source="ours",
        experiment=FULL_BATCH,
        quantity=_GAP.format("GD"),
        value=_behind("GD", "wide"),
        low=0.0,
        checks=("G5",),
    ),
    Claim(
        name="no-momentum-needed-full-batch",
        sentence="Without momentum, too, Muon brings the training loss near zero in 15 steps.",
        place="Fig. 1(a)",
        source="first-hand",
        experiment=FULL_BATCH,
        quantity="training loss behind the last step without momentum, nats per image",
        value=lambda numbers: float(numbers["paper"]["Muon, no momentum"][-1]),
        high=0.1,
        paper="near 0",
        checks=("G5",),
    ),
)
