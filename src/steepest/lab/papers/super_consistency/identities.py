"""What must hold exactly: Gauss-Newton and tangent kernel, and rates under a change of scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from steepest.curvature import NTK, GaussNewton, ntk_spectrum, sharpness
from steepest.lab.losses import loss_of
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting
from steepest.lab.papers.super_consistency.digits_networks import (
    LabelledBatch,
    NormalLinear,
    digit_images,
    half_squared_error,
    normal_mlp,
)

_CONSTANT = 3.0


def kernel_error(batch: LabelledBatch, width: int) -> float:
    """Relative difference of λ_max of the Gauss-Newton matrix and of the kernel over examples."""
    model = normal_mlp(width).double()
    G = sharpness(GaussNewton(model, half_squared_error, batch), tolerance=1e-10).value
    kernel = NTK(model, half_squared_error, batch)
    top = ntk_spectrum(kernel, count=1, tolerance=1e-10).largest.values[0].item()
    return abs(top / len(batch[0]) / G - 1)


def scale_error(
    batch: LabelledBatch, width: int, optimizer: type[Optimizer], lr: float, power: int
) -> float:
    """How much logits differ after ten steps where a multiplier moved into the weights.

    Multipliers times 3 and weights over 3 are the same function. So are the next ones, if the rate
    is over 3 to the power: 2 for gradient descent, 1 for Adam, whose epsilon is times 3.
    """
    plain, moved = normal_mlp(width).double(), normal_mlp(width).double()
    moved.load_state_dict(plain.state_dict())
    for layer in moved:
        if isinstance(layer, NormalLinear):
            layer.scale *= _CONSTANT
            layer.weight.data /= _CONSTANT
    logits = []
    for model, constant in ((plain, 1.0), (moved, _CONSTANT)):
        settings: dict[str, Any] = {"lr": lr / constant**power}
        if optimizer is torch.optim.Adam:
            settings["eps"] = 1e-8 * constant
        _train(model, optimizer(model.parameters(), **settings), batch)
        logits.append(model(batch[0]).detach())
    return float((logits[0] - logits[1]).norm() / logits[0].norm())


def _train(model: nn.Module, optimizer: Optimizer, batch: LabelledBatch) -> None:
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def exact_relations(seed: int, width: int, examples: int) -> Numbers:
    """Errors of both identities."""
    X, classes = digit_images(examples)
    batch = X.double(), classes
    return {
        "kernel": kernel_error(batch, width),
        "scale": max(
            scale_error(batch, width, torch.optim.SGD, 16.0, power=2),
            scale_error(batch, width, torch.optim.Adam, 0.05, power=1),
        ),
    }


EXACT_RELATIONS = Experiment(
    name="exact-relations",
    title="Gauss-Newton matrix and tangent kernel; rates under a change of scale",
    kind="identity",
    measure=exact_relations,
    scales={
        "quick": Setting(sizes={"width": 32, "examples": 64}, seeds=3),
        "cpu": Setting(sizes={"width": 128, "examples": 256}, seeds=5, minutes=0.3),
        "gpu": Setting(sizes={"width": 512, "examples": 512}, seeds=5, on_gpu=True),
        "paper": Setting(sizes={"width": 512, "examples": 512}, seeds=5, minutes=1),
    },
)

CLAIMS = (
    Claim(
        name="gauss-newton-is-kernel",
        sentence="For squared error the Gauss-Newton matrix has the eigenvalues of the tangent "
        "kernel over the number of examples.",
        place="abstract, Section 4",
        source="first-hand",
        experiment=EXACT_RELATIONS,
        quantity="relative difference of the largest ones",
        value=lambda numbers: float(numbers["kernel"]),
        high=1e-6,
        judged="every seed",
        paper="equal",
        checks=("C11",),
    ),
    Claim(
        name="scale-symmetry",
        sentence="A multiplier can move into the weights, if the rate follows: squared for "
        "gradient descent, as it is for Adam.",
        place="Table 1; Tensor Programs V, Lemma J.1",
        source="second-hand",
        experiment=EXACT_RELATIONS,
        quantity="relative difference of the logits after ten steps",
        value=lambda numbers: float(numbers["scale"]),
        high=1e-6,
        judged="every seed",
        paper="equal",
        checks=("C11",),
    ),
)
