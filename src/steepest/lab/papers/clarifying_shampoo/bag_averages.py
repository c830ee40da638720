"""Preconditioned gradients on average over time, and over a fixed bag of gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steepest import Shampoo
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.clarifying_shampoo.updates import (
    BARE,
    DOUBLE,
    gaussian_gradient,
    semi_orthogonality,
    update_from,
    zero_weight,
)
from steepest.linalg import polar
from steepest.optim.reference import inverse_root

_BETA = 0.9


def bag_averages(seed: int, out: int, in_: int, gradients: int, sweeps: int) -> Numbers:
    """Semi-orthogonality on average, by optimizer, and what KL-Shampoo's factors do."""
    bag = gradient_bag(out, in_, gradients)
    L, R = (bag @ bag.mT).mean(0), (bag.mT @ bag).mean(0)
    fit = kl_factors(bag, sweeps)
    maps = {
        "gradient": bag,
        "spectral descent": polar(bag, "svd"),
        "Shampoo 1/4": root(L, 1 / 4) @ bag @ root(R, 1 / 4),
        "Shampoo 1/2": root(L, 1 / 2) @ bag @ root(R, 1 / 2),
        "one-sided Shampoo": root(L, 1 / 2) @ bag,
        "KL-Shampoo": root(fit.left, 1 / 2) @ bag @ root(fit.right, 1 / 2),
    }
    A, B = (torch.randn(n, n, dtype=DOUBLE) + 2 * torch.eye(n, dtype=DOUBLE) for n in (out, in_))
    other, moved = kl_factors(A @ bag @ B, sweeps), A @ bag[0] @ B
    before = torch.linalg.svdvals(maps["KL-Shampoo"][0])
    after = torch.linalg.svdvals(root(other.left, 1 / 2) @ moved @ root(other.right, 1 / 2))
    descent = curve(
        "Divergence of KL-Shampoo's factors on a bag of gradients",
        [float(k) for k in range(1, len(fit.divergences))],
        {"above its end": [d - fit.divergences[-1] for d in fit.divergences[:-1]]},
        across="half sweep", up="nats", log=True,
    )  # fmt: skip
    return {
        "distances": {
            name: semi_orthogonality((U @ U.mT).mean(0), (U.mT @ U).mean(0))
            for name, U in maps.items()
        },
        "largest rise": max(
            b - a for a, b in zip(fit.divergences, fit.divergences[1:], strict=False)
        ),
        "change of singular values": float((after / after.norm() - before / before.norm()).norm()),
        "errors over time": _over_time(bag),
        "curves": [_thinned(descent)],
    }


class KLFactors(NamedTuple):
    """The factors (out, out) and (in, in), and the divergence after every half sweep, in nats."""

    left: Tensor
    right: Tensor
    divergences: list[float]


def gradient_bag(out: int, in_: int, gradients: int) -> Tensor:
    """Return gradients (gradients, out, in): a mean gradient and noise of about its length.

    The second moment of noise P Z Q alone is a Kronecker product, which Shampoo 1/2 whitens too.
    """
    S = gaussian_gradient(out, in_)
    P, Q = (
        polar(torch.randn(n, n, dtype=DOUBLE), "svd") * torch.logspace(0, -1, n, dtype=DOUBLE)
        for n in (out, in_)
    )
    noise = P @ torch.randn(gradients, out, in_, dtype=DOUBLE) @ Q.mT
    return S + noise * (S.norm() / noise[0].norm())


def root(A: Tensor, p: float) -> Tensor:
    """A^-p of a factor (n, n)."""
    return inverse_root(A, p, 0.0)


def kl_factors(bag: Tensor, sweeps: int) -> KLFactors:
    """Fit L and R to a bag (gradients, out, in), each exactly with the other one fixed.

    The divergence is that of a Gaussian of covariance R ⊗ L from the bag, but for a constant
    (arXiv 2509.03378). The fixed point is KL-Shampoo's.
    """
    out, in_ = bag.shape[1:]
    L, R = torch.eye(out, dtype=DOUBLE), torch.eye(in_, dtype=DOUBLE)
    divergences = []
    for _ in range(sweeps):
        R = (bag.mT @ torch.linalg.solve(L, bag)).mean(0) / out
        divergences.append(_divergence(bag, L, R))
        L = (bag @ torch.linalg.solve(R, bag.mT)).mean(0) / in_
        divergences.append(_divergence(bag, L, R))
    return KLFactors(L, R, divergences)


def _divergence(bag: Tensor, L: Tensor, R: Tensor) -> float:
    out, in_ = bag.shape[1:]
    inner = torch.linalg.solve(L, bag) @ torch.linalg.inv(R)
    quadratic = (inner * bag).sum((-2, -1)).mean()
    return float(in_ * torch.logdet(L) + out * torch.logdet(R) + quadratic) / 2


def _over_time(bag: Tensor) -> float:
    """Error of two averages with the weights of an optimizer: Σ w U Uᵀ = 1, and Adam's Σ w g²/v."""
    W, V = (zero_weight(*bag.shape[1:]) for _ in range(2))
    settings = {**BARE, "momentum": 0.0, "beta2": _BETA, "sides": "left"}
    shampoo = Shampoo([W], 1.0, exponent=1 / 2, **settings)
    adam = torch.optim.Adam([V], 1.0, betas=(0.0, _BETA), eps=0.0)
    for G in bag:
        update_from(shampoo, W, G)
        update_from(adam, V, G)
    steps = len(bag)
    ages = torch.arange(steps - 1, -1, -1, dtype=DOUBLE)
    weights = ((1 - _BETA) * _BETA**ages / (1 - _BETA**steps))[:, None, None]
    U = shampoo.state[W]["left_root.0"] @ bag
    v = adam.state[V]["exp_avg_sq"] / (1 - _BETA**steps)
    products = (weights * (U @ U.mT)).sum(0)
    squares = (weights * bag**2 / v).sum(0)
    return max(float((products - torch.eye(len(products))).abs().max()),
               float((squares - 1).abs().max()))  # fmt: skip


def _thinned(figure: Numbers) -> Numbers:
    """The part of a curve that is above rounding, at most the first hundred points."""
    ((name, line),) = figure["lines"].items()
    kept = [i for i, value in enumerate(line) if value > 1e-12][:100]
    return {**figure, "x": [figure["x"][i] for i in kept], "lines": {name: [line[i] for i in kept]}}


_SIZES = {"out": 12, "in_": 20, "gradients": 400, "sweeps": 300}
BAG_AVERAGES = Experiment(
    name="bag-averages",
    title="Preconditioned gradients on average, over a fixed bag",
    kind="identity",
    measure=bag_averages,
    scales={
        "quick": Setting(sizes={**_SIZES, "gradients": 80, "sweeps": 200}, seeds=2, minutes=0.05),
        "cpu": Setting(sizes=_SIZES, seeds=5, minutes=0.3),
        "gpu": Setting(sizes=_SIZES, seeds=5, minutes=0.3),
        "paper": Setting(sizes=_SIZES, seeds=5, minutes=0.3),
    },
)
_FARTHEST = "distance from semi-orthogonal on average, the larger of both sides"

CLAIMS = (
    Claim(
        name="averages-over-time",
        sentence="Over time Σ w U Uᵀ of one-sided Shampoo is 1, as Adam's Σ w g²/v is.",
        place="Section 2",
        source="ours",
        experiment=BAG_AVERAGES,
        quantity="largest error of an entry of the two averages",
        value=lambda numbers: float(numbers["errors over time"]),
        high=1e-10,
        judged="every seed",
        checks=("D1.4",),
    ),
    Claim(
        name="kl-is-semi-orthogonal-on-average",
        sentence="KL-Shampoo's preconditioned gradients are semi-orthogonal on average, from both "
        "sides.",
        place="Abstract",
        source="ours",
        experiment=BAG_AVERAGES,
        quantity=_FARTHEST,
        value=lambda numbers: max(numbers["distances"]["KL-Shampoo"]),
        high=1e-10,
        judged="every seed",
        paper="semi-orthogonal in expectation",
        checks=("D1.5",),
    ),
    Claim(
        name="shampoo-is-not-semi-orthogonal-on-average",
        sentence="Shampoo's preconditioned gradients, with p = 1/4 or 1/2, are so only roughly.",
        place="Abstract",
        source="ours",
        experiment=BAG_AVERAGES,
        quantity="least distance from semi-orthogonal on average, of both exponents and sides",
        value=lambda numbers: min(
            *numbers["distances"]["Shampoo 1/4"], *numbers["distances"]["Shampoo 1/2"]
        ),
        low=0.1,
        judged="every seed",
        paper="semi-orthogonal in expectation",
        checks=("D1.5",),
    ),
    Claim(
        name="spectral-descent-is-semi-orthogonal-on-average",
        sentence="False on purpose: semi-orthogonal at every step means so on average from both "
        "sides.",
        place="control",
        source="ours",
        experiment=BAG_AVERAGES,
        quantity=_FARTHEST + ", of spectral descent",
        value=lambda numbers: max(numbers["distances"]["spectral descent"]),
        high=0.01,
        judged="every seed",
        control=True,
    ),
    Claim(
        name="kl-divergence-falls",
        sentence="Each fit of one of KL-Shampoo's factors lowers the divergence; singular values "
        "survive invertible A G B.",
        place="arXiv 2509.03378",
        source="ours",
        experiment=BAG_AVERAGES,
        quantity="largest rise of the divergence (nats), or change of singular values",
        value=lambda n: max(n["largest rise"], n["change of singular values"]),
        high=1e-9,
        judged="every seed",
        checks=("D1.7",),
    ),
)
