"""The best rate of the first step of a deep linear network, and its limit at infinite width.

f(x) = V W_L ... W_1 W_0 x with frozen W_0 (entries of variance 1 / d) and frozen readout V; the
loss is Σ (f - y)² / (2 m) over m examples, and one step of gradient descent moves W_1 to W_L
(variance 1 / n). Under muP the readout has variance 1 / n². The rate with the lowest loss after the
step then goes to (m / L) yᵀ K y / ‖K y‖² with K = X Xᵀ / d (Hayou, arXiv 2511.01734).
"""

from __future__ import annotations

import math
from statistics import fmean, median

import torch
from torch import Tensor

from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.super_consistency.digits_networks import spread_of

_LAYERS, _EXAMPLES = 3, 500
_EXPONENTS = {"mup": 1.0, "standard": 0.5}  # the readout's entries are n to the minus this
_ZOOMS, _POINTS = 4, 41


def limit_rate(X: Tensor, y: Tensor) -> float:
    """Return the limit of the best rate for inputs `(m, d)` and targets `(m,)`."""
    Ky = X @ (X.T @ y) / X.shape[1]
    return len(y) / _LAYERS * float(y @ Ky / (Ky @ Ky))


def best_first_rate(X: Tensor, y: Tensor, width: int, exponent: float) -> float:
    """Return the rate with the lowest loss after one step from random weights.

    Args:
        X: inputs `(m, d)`.
        y: targets `(m,)`.
        width: n.
        exponent: the readout's entries have the standard deviation n^-exponent.
    """
    first = torch.randn(width, X.shape[1], dtype=X.dtype) / math.sqrt(X.shape[1])
    middle = torch.randn(_LAYERS, width, width, dtype=X.dtype) / math.sqrt(width)
    readout = torch.randn(width, dtype=X.dtype) / width**exponent
    middle.requires_grad_()

    def losses(rates: Tensor, gradient: Tensor) -> Tensor:
        """The loss after a step at each of the rates."""
        rows = readout.expand(len(rates), -1)
        for W, G in zip(middle.flip(0), gradient.flip(0), strict=True):
            rows = rows @ W - rates[:, None] * (rows @ G)
        return (rows @ first @ X.T - y).square().sum(1) / (2 * len(y))

    no_step = torch.zeros(1, dtype=X.dtype)
    (gradient,) = torch.autograd.grad(losses(no_step, middle).sum(), middle)
    centre, octaves = limit_rate(X, y), 24.0
    with torch.no_grad():
        for _ in range(_ZOOMS):
            rates = centre * 2 ** (octaves * torch.linspace(-0.5, 0.5, _POINTS, dtype=X.dtype))
            centre = float(rates[losses(rates, gradient).argmin()])
            octaves /= (_POINTS - 1) / 4
    return centre


def first_steps(seed: int, widths: tuple[int, ...], inputs: int, draws: int) -> Numbers:
    """Best first rates of every width, on targets that are linear with noise."""
    X = torch.randn(_EXAMPLES, inputs, dtype=torch.float64)
    y = X.sum(1) / math.sqrt(inputs) + 0.1 * torch.randn(_EXAMPLES, dtype=torch.float64)
    limit = limit_rate(X, y)
    rates = {
        name: [[best_first_rate(X, y, n, exponent) for _ in range(draws)] for n in widths]
        for name, exponent in _EXPONENTS.items()
    }
    means = {name: [fmean(of_width) for of_width in rates[name]] for name in rates}
    figure = curve(
        "Best rate of the first step by width", list(map(float, widths)),
        means | {"limit": [limit] * len(widths)},
        across="width", up="rate", log=True, log_across=True,
    )  # fmt: skip
    return {
        "limit": limit,
        "rates": rates,
        "error": [median(abs(r / limit - 1) for r in of_width) for of_width in rates["mup"]],
        "standard_times_width": [n * r for n, r in zip(widths, means["standard"], strict=True)],
        "curves": [figure],
    }


FIRST_STEP = Experiment(
    name="first-step",
    title="Best rate of the first step of deep linear networks",
    kind="theory",
    measure=first_steps,
    scales={
        "quick": Setting(
            sizes={"widths": (128, 512), "inputs": 1, "draws": 9}, seeds=4, minutes=0.1
        ),
        "cpu": Setting(
            sizes={"widths": (64, 128, 256, 512, 1024), "inputs": 1, "draws": 9},
            seeds=5,
            minutes=1.5,
        ),
        "gpu": Setting(
            sizes={"widths": (64, 512, 4096), "inputs": 1, "draws": 9},
            seeds=5,
            minutes=2,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={"widths": (64, 128, 256, 512, 1024), "inputs": 1, "draws": 3},
            seeds=3,
            minutes=1,
        ),
    },
)

CLAIMS = (
    Claim(
        name="first-rate-limit",
        sentence="Under muP the best rate of the first step goes to a limit with a closed form.",
        place="Hayou (arXiv 2511.01734)",
        source="second-hand",
        experiment=FIRST_STEP,
        quantity="relative distance from the limit at the largest width, the median over draws",
        value=lambda numbers: float(numbers["error"][-1]),
        high=0.25,
        checks=("C10",),
    ),
    Claim(
        name="standard-first-rate-falls",
        sentence="With a readout of standard size the best rate of the first step falls as one "
        "over the width.",
        place="Hayou (arXiv 2511.01734)",
        source="second-hand",
        experiment=FIRST_STEP,
        quantity="rate times width, largest over smallest of all widths",
        value=lambda numbers: spread_of(numbers["standard_times_width"]),
        high=2.0,
        checks=("C10",),
    ),
)
