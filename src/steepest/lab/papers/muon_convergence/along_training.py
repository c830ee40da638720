"""J, L and condition (4) along training by GD and by Muon without momentum (Fig. 2).

All matrices are trained; J and L are those of one of them, as in the paper of the second one.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from steepest import SpectralDescent
from steepest.curvature import Hessian, muon_conditions
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.muon_convergence.few_images import (
    bias_free_mlp,
    cross_entropy_of,
    few_images,
)


def curvature_along_training(
    seed: int,
    data: str,
    images: int,
    hidden: tuple[int, ...],
    rate: float,
    steps: dict[str, int],
    every: dict[str, int],
) -> Numbers:
    """Train by GD and by Muon without momentum; measure J, L and the norms of the gradient.

    Args:
        seed: of the weights.
        data: images, as `--data` takes them.
        images: how many.
        hidden: widths of the hidden layers; the matrix between the first two is measured.
        rate: of both.
        steps: by "GD" and "Muon".
        every: steps between two measurements, likewise.
    """
    source = few_images(data, images)
    numbers: dict[str, Any] = {"curves": []}
    for name, last in steps.items():
        torch.manual_seed(seed)
        model = bias_free_mlp(source, hidden)
        optimizer = (
            torch.optim.SGD(model.parameters(), rate)
            if name == "GD"
            else SpectralDescent(list(model.parameters()), rate, scale="none", method="svd")
        )
        rows: dict[str, list[float]] = {key: [] for key in ("step", "J", "L", "nuclear", "norm")}
        for step in range(last + 1):
            if step % every[name] == 0:
                H = Hessian(model, cross_entropy_of, source.batch, ["3.weight"])
                [row] = muon_conditions(H, tolerance=1e-3, max_products=300)
                rows["step"].append(step)
                rows["J"].append(row.polar_curvature)
                rows["L"].append(row.smoothness)
                rows["nuclear"].append(row.nuclear_norm**2)
                rows["norm"].append(row.frobenius_norm**2)
            optimizer.zero_grad()
            cross_entropy_of(model, source.batch).backward()
            optimizer.step()
        numbers[name] = rows
        numbers[f"{name}, loss"] = float(cross_entropy_of(model, source.batch).detach())
        ratios = {
            "J / L": _quotients(rows, "J", "L"), "nuclear rank": _quotients(rows, "nuclear", "norm")
        }  # fmt: skip
        numbers["curves"].append(
            curve(f"Both sides of condition (4), {name}", rows["step"], ratios,
                  across="step", up="ratio")
        )  # fmt: skip
    return numbers


def _quotients(rows: dict[str, list[float]], above: str, below: str) -> list[float]:
    return [a / b for a, b in zip(rows[above], rows[below], strict=True)]


_BOTH = {"GD": 46, "Muon": 10}

MNIST = Experiment(
    name="mnist-curvature",
    title="J, L and condition (4) on 60 digits of MNIST",
    kind="real data",
    measure=curvature_along_training,
    scales={
        "quick": Setting(
            sizes={
                "images": 40, "hidden": (32, 16), "rate": 0.1, "steps": _BOTH,
                "every": {"GD": 15, "Muon": 3},
            },
            seeds=2,
            data="digits",
            minutes=0.1,
        ),
        "cpu": Setting(
            sizes={
                "images": 60, "hidden": (128, 64), "rate": 0.1, "steps": _BOTH,
                "every": {"GD": 2, "Muon": 1},
            },
            seeds=5,
            data="mnist",
            minutes=3,
        ),
        "gpu": Setting(
            sizes={
                "images": 6000, "hidden": (1024, 1024, 1024), "rate": 0.02,
                "steps": {"GD": 200, "Muon": 50}, "every": {"GD": 10, "Muon": 2},
            },
            seeds=3,
            data="mnist",
            minutes=10,
            gigabytes=4,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={
                "images": 60, "hidden": (128, 64), "rate": 0.1, "steps": _BOTH,
                "every": {"GD": 1, "Muon": 1},
            },
            seeds=10,
            data="mnist",
            minutes=12,
        ),
    },
)  # fmt: skip

CIFAR = Experiment(
    name="cifar-curvature",
    title="J, L and condition (4) on 100 images of CIFAR-10",
    kind="real data",
    measure=curvature_along_training,
    scales={
        "quick": Setting(
            sizes={
                "images": 60, "hidden": (32, 16, 16), "rate": 0.05, "steps": {"GD": 20, "Muon": 10},
                "every": {"GD": 10, "Muon": 5},
            },
            seeds=2,
            data="digits",
            minutes=0.1,
        ),
        "cpu": Setting(
            sizes={
                "images": 100, "hidden": (512, 256, 64), "rate": 0.05,
                "steps": {"GD": 45, "Muon": 15}, "every": {"GD": 5, "Muon": 1},
            },
            seeds=3,
            data="cifar10",
            minutes=3,
            gigabytes=1,
        ),
        "paper": Setting(
            sizes={
                "images": 100, "hidden": (512, 256, 64), "rate": 0.05,
                "steps": {"GD": 45, "Muon": 15}, "every": {"GD": 1, "Muon": 1},
            },
            seeds=5,
            data="cifar10",
            minutes=20,
            gigabytes=1,
        ),
    },
)  # fmt: skip


def _share_that_holds(numbers: Numbers) -> float:
    """Of both runs, over the measurements where the loss curves upwards along the step."""
    holds = [
        nuclear / norm >= J / L
        for rows in (numbers["GD"], numbers["Muon"])
        for J, L, nuclear, norm in zip(
            rows["J"], rows["L"], rows["nuclear"], rows["norm"], strict=True
        )
        if J > 0
    ]
    return sum(holds) / len(holds)


def _start(numbers: Numbers) -> float:
    return float(_quotients(numbers["Muon"], "J", "L")[0])


def _second_half(numbers: Numbers) -> float:
    ratios = _quotients(numbers["Muon"], "J", "L")
    return fmean(ratios[len(ratios) // 2 :])


_SHARE = "share of measurements with J > 0 where J / L is at most the nuclear rank"

CLAIMS = (
    Claim(
        name="condition-four-on-mnist",
        sentence="Condition (4) holds all along training on MNIST, by GD and by Muon.",
        place="Fig. 2",
        source="first-hand",
        experiment=MNIST,
        quantity=_SHARE,
        value=_share_that_holds,
        low=1.0,
        judged="every seed",
        paper="at every plotted step",
        checks=("B7",),
    ),
    Claim(
        name="curvature-starts-below",
        sentence="At the start of training J is below L.",
        place="Fig. 2, p. 8",
        source="first-hand",
        experiment=MNIST,
        quantity="J / L at the start",
        value=_start,
        high=1.0,
        paper="about 0.6",
        checks=("B7",),
    ),
    Claim(
        name="curvature-ends-above",
        sentence="Later in training J is at least L.",
        place="Fig. 2, p. 8",
        source="first-hand",
        experiment=MNIST,
        quantity="mean of J / L over the second half of Muon's run",
        value=_second_half,
        low=1.0,
        paper="about 1.9",
        checks=("B7",),
    ),
    Claim(
        name="condition-four-on-cifar",
        sentence="Condition (4) holds all along training on CIFAR-10 too.",
        place="Fig. 1 and 2",
        source="ours",
        experiment=CIFAR,
        quantity=_SHARE,
        value=_share_that_holds,
        low=1.0,
        judged="every seed",
    ),
)
