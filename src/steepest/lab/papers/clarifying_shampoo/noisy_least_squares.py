"""Least squares in a matrix with noise in its gradient: adaptation against noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steepest import KLShampoo, Muon, Shampoo, Signum
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.clarifying_shampoo.updates import DOUBLE, update_from, zero_weight
from steepest.linalg import polar

_ROOTS: dict[str, Any] = {"interval": 5, "length": "muon", "scale": "none"}
_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "Signum": lambda params: Signum(params, 1.0),
    "Adam": lambda params: torch.optim.Adam(params, 1.0, betas=(0.9, 0.95)),
    "Muon": lambda params: Muon(params, 1.0, momentum=0.9, nesterov=False, scale="none"),
    "Shampoo 1/4": lambda params: Shampoo(params, 1.0, exponent=1 / 4, **_ROOTS),
    "Shampoo 1/2": lambda params: Shampoo(params, 1.0, exponent=1 / 2, **_ROOTS),
    "KL-Shampoo": lambda params: KLShampoo(params, 1.0, **_ROOTS),
}
_MOST_RATES = 14


@dataclass(frozen=True)
class NoisyLeastSquares:
    """The loss ‖A (W - W*) B‖² / 2 of W (out, in), and noise P Z Q with a heavy-tailed length."""

    A: Tensor
    B: Tensor
    optimum: Tensor
    P: Tensor
    Q: Tensor

    def loss(self, W: Tensor) -> float:
        """The loss at W (out, in)."""
        return float((self.A @ (W - self.optimum) @ self.B).square().sum() / 2)

    def gradient(self, W: Tensor) -> Tensor:
        """The gradient at W, without noise."""
        return self.A.mT @ self.A @ (W - self.optimum) @ self.B @ self.B.mT

    def noise(self, size: float) -> Tensor:
        """Noise (out, in) of about the length `size` times that of the gradient at zero."""
        Z = torch.randn(self.optimum.shape, dtype=DOUBLE)
        length = math.exp(float(torch.randn(())) / 2)
        N = self.P @ Z @ self.Q
        return N * (size * length * self.gradient(torch.zeros_like(Z)).norm() / N.norm())


def noisy_problem(out: int, in_: int) -> NoisyLeastSquares:
    """Return a problem with condition 10 on each side, and noise on other axes, condition 30."""

    def factor(n: int, condition: float) -> Tensor:
        U, V = (polar(torch.randn(n, n, dtype=DOUBLE), "svd") for _ in range(2))
        return (U * torch.logspace(0, -math.log10(condition), n, dtype=DOUBLE)) @ V

    A, B, P, Q = factor(out, 10), factor(in_, 10), factor(out, 30), factor(in_, 30)
    return NoisyLeastSquares(A, B, torch.randn(out, in_, dtype=DOUBLE) / math.sqrt(in_), P, Q)


def loss_by_noise(seed: int, out: int, in_: int, steps: int, noises: tuple[float, ...]) -> Numbers:
    """Logarithms of the final loss over that at the start, each optimizer at its best rate."""
    problem = noisy_problem(out, in_)
    losses = {
        name: [_tuned_loss(problem, build, steps, noise, seed) for noise in noises]
        for name, build in _OPTIMIZERS.items()
    }
    figure = curve(
        "Loss at the best rate by noise", [max(noise, noises[1] / 10) for noise in noises],
        {name: [math.exp(loss) for loss in line] for name, line in losses.items()},
        across="length of the noise over that of the first gradient (leftmost: none)",
        up="final loss over the first", log=True, log_across=True,
    )  # fmt: skip
    return {"losses": losses, "curves": [figure]}


def _tuned_loss(
    problem: NoisyLeastSquares, build: Callable[..., Any], steps: int, noise: float, seed: int
) -> float:
    """The loss at the best rate of a grid in steps of two, which goes on until the best is inside.

    NaN where it never is.
    """
    losses: dict[int, float] = {}
    first, last = -7, -3
    while last - first < _MOST_RATES:
        for k in range(first, last + 1):
            if k not in losses:
                losses[k] = _final_loss(problem, build, steps, noise, 2.0**k, seed)
        best = min(losses, key=lambda k: losses[k])
        if first < best < last:
            return losses[best]
        first, last = (first - 1, last) if best == first else (first, last + 1)
    return math.nan


def _final_loss(
    problem: NoisyLeastSquares,
    build: Callable[..., Any],
    steps: int,
    noise: float,
    lr: float,
    seed: int,
) -> float:
    """log(final loss / first loss) with a rate that falls to zero; the same noise for all."""
    torch.manual_seed(seed)
    W = zero_weight(*problem.optimum.shape)
    optimizer = build([W])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        update_from(optimizer, W, problem.gradient(W.detach()) + problem.noise(noise))
    W_0 = torch.zeros_like(W)
    return math.log(max(problem.loss(W.detach()), 1e-300) / problem.loss(W_0))


_NOISES = (0.0, 0.3, 1.0, 3.0)
LOSS_BY_NOISE = Experiment(
    name="loss-by-noise",
    title="Noisy least squares in a matrix, each optimizer at its best rate",
    kind="training",
    measure=loss_by_noise,
    scales={
        "quick": Setting(
            sizes={"out": 8, "in_": 12, "steps": 40, "noises": (0.0, 1.0)}, seeds=2, minutes=0.15
        ),
        "cpu": Setting(
            sizes={"out": 16, "in_": 24, "steps": 150, "noises": _NOISES}, seeds=5, minutes=3
        ),
        "gpu": Setting(
            sizes={"out": 64, "in_": 96, "steps": 500, "noises": _NOISES}, seeds=5, minutes=60
        ),
        "paper": Setting(
            sizes={"out": 64, "in_": 96, "steps": 500, "noises": _NOISES}, seeds=5, minutes=60
        ),
    },
)


def _gain(plain: str, adapted: str, at: int) -> Callable[[Numbers], float]:
    """By how many nats of its logarithm adaptation lowers the loss."""
    return lambda numbers: numbers["losses"][plain][at] - numbers["losses"][adapted][at]


def _growth(plain: str, adapted: str) -> Callable[[Numbers], float]:
    most, none = _gain(plain, adapted, -1), _gain(plain, adapted, 0)
    return lambda numbers: most(numbers) - none(numbers)


_GAIN = "gain in the logarithm of the loss at the largest noise"
_MORE = "gain in the logarithm of the loss at the largest noise less that without noise"

CLAIMS = (
    Claim(
        name="shampoo-adapts-to-noise",
        sentence="Shampoo's gain over Muon comes from noise: it grows as the noise does.",
        place="Abstract",
        source="ours",
        experiment=LOSS_BY_NOISE,
        quantity=_MORE,
        value=_growth("Muon", "Shampoo 1/2"),
        low=0.0,
        paper="adapting to stochasticity",
        checks=("D2.a",),
    ),
    Claim(
        name="adam-adapts-to-noise",
        sentence="Adam's gain over Signum comes from noise in the same way.",
        place="Abstract",
        source="ours",
        experiment=LOSS_BY_NOISE,
        quantity=_MORE,
        value=_growth("Signum", "Adam"),
        low=0.0,
        paper="adapting to stochasticity",
        checks=("D2.a",),
    ),
    Claim(
        name="shampoo-adapts-to-the-trajectory",
        sentence="Without noise Shampoo 1/2 still gains on Muon, by its memory of the trajectory.",
        place="Title",
        source="ours",
        experiment=LOSS_BY_NOISE,
        quantity="gain in the logarithm of the loss without noise",
        value=_gain("Muon", "Shampoo 1/2", 0),
        low=0.0,
        paper="adapting to the parameter trajectory",
        checks=("D2.a",),
    ),
    Claim(
        name="both-adaptations-gain-under-noise",
        sentence="Under noise Shampoo is to Muon what Adam is to Signum: both adaptations lower "
        "the loss.",
        place="Abstract",
        source="first-hand",
        experiment=LOSS_BY_NOISE,
        quantity=_GAIN + ", the lesser of the two",
        value=lambda numbers: min(
            _gain("Muon", "Shampoo 1/2", -1)(numbers), _gain("Signum", "Adam", -1)(numbers)
        ),
        low=0.0,
        checks=("D2.a",),
    ),
)
