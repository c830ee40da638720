"""Sparse regression with mixed blocks: a network of four matrices learns y = x1 x2 x3.

As in Fig. 1 and 4: no biases, ReLU², full batch. A is what a matrix multiplies in this step. GD
steps by n / ‖A‖_op² times the gradient. SpecGD does so in the first and the last matrix. In the two
inner ones it steps by ‖G‖_* n / ‖A‖_F² times the polar factor. The multipliers of the two are those
that the paper's code has tuned.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.spectral_condition.least_squares import gd_step, spectral_step
from steepest.linalg import stable_rank

_RATES = {"gd": 0.081, "spectral": 0.1}
_SPECTRAL = (1, 2)
"""Which of the four matrices are stepped spectrally."""


class _Network(nn.Module):
    """Four matrices with ReLU² between them; it remembers what each one multiplied."""

    def __init__(self, inputs: int, width: int, dtype: torch.dtype):
        super().__init__()
        sizes = [inputs, width, width, width, 1]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=False, dtype=dtype) for a, b in pairwise(sizes)
        )
        self.entering: list[Tensor] = []

    def forward(self, X: Tensor) -> Tensor:
        self.entering = []
        for i, layer in enumerate(self.layers):
            self.entering.append(X.detach())
            X = layer(X) if i == len(self.layers) - 1 else F.relu(layer(X)).square()
        return X.squeeze(1)


def _step(network: _Network, kind: str) -> None:
    with torch.no_grad():
        for i, (layer, A) in enumerate(zip(network.layers, network.entering, strict=True)):
            W = layer.weight
            assert isinstance(W, Tensor)
            assert W.grad is not None
            if kind == "spectral" and i in _SPECTRAL:
                step = spectral_step(W.grad, float(A.square().sum() / len(A)))
            else:
                step = gd_step(W.grad, float(torch.linalg.matrix_norm(A, 2) ** 2 / len(A)))
            W += _RATES[kind] * step


def sparse_regression(
    seed: int, inputs: int, examples: int, width: int, steps: int, double: bool
) -> Numbers:
    """Losses of both from the same initialization, and stable ranks at the start."""
    dtype = torch.float64 if double else torch.float32
    X = torch.randn(examples, inputs, dtype=dtype)
    y = X[:, 0] * X[:, 1] * X[:, 2]
    start = _Network(inputs, width, dtype).state_dict()
    losses: dict[str, list[float]] = {}
    ranks: list[float] = []
    for kind in _RATES:
        network = _Network(inputs, width, dtype)
        network.load_state_dict(start)
        losses[kind] = []
        for _ in range(steps):
            loss = F.mse_loss(network(X), y)
            losses[kind].append(loss.item())
            network.zero_grad()
            loss.backward()
            ranks = ranks or [float(stable_rank(A)) for A in network.entering]
            _step(network, kind)
    every = max(1, steps // 100)
    figure = curve(
        "Loss on y = x1 x2 x3", list(range(0, steps, every)),
        {"GD": losses["gd"][::every], "SpecGD on the inner matrices": losses["spectral"][::every]},
        across="step", up="mean squared error", log=True,
    )  # fmt: skip
    return {"losses": losses, "ranks": ranks, "curves": [figure]}


_SMALL = {"inputs": 64, "examples": 256, "width": 256, "steps": 25, "double": False}
_FULL = {"inputs": 128, "examples": 512, "width": 512, "double": True}

SPARSE = Experiment(
    name="sparse-regression",
    title="Sparse regression with mixed blocks (Fig. 1 and 4)",
    kind="training",
    measure=sparse_regression,
    scales={
        "quick": Setting(sizes=_SMALL, seeds=3, minutes=0.2),
        "cpu": Setting(sizes=_FULL | {"steps": 200}, seeds=3, minutes=8),
        "gpu": Setting(sizes=_FULL | {"steps": 2000}, seeds=5, minutes=30, on_gpu=True),
        "paper": Setting(sizes=_FULL | {"steps": 2000}, seeds=3, minutes=80),
    },
)

CLAIMS = (
    Claim(
        name="spectral-wins-on-sparse-regression",
        sentence="With spectral steps on the two inner matrices the loss falls much faster.",
        place="Fig. 1",
        source="first-hand",
        experiment=SPARSE,
        quantity="log10 of GD's loss over SpecGD's, at step 20",
        value=lambda numbers: math.log10(
            numbers["losses"]["gd"][20] / numbers["losses"]["spectral"][20]
        ),
        low=math.log10(3),
        paper="about 3 at step 2000",
        checks=("A10",),
    ),
    Claim(
        name="sparse-regression-ranks",
        sentence="At the start the inputs of the two inner matrices have stable ranks of 4 to 6.",
        place="Fig. 4",
        source="first-hand",
        experiment=SPARSE,
        quantity="larger stable rank of the inputs of the two inner matrices",
        value=lambda numbers: max(numbers["ranks"][i] for i in _SPECTRAL),
        high=7.0,
        paper="5.8 and about 4",
        checks=("A10",),
    ),
)
