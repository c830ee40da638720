"""KL-Shampoo with one gradient repeated: how it becomes spectral descent."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest import KLShampoo, Muon, Shampoo, SpectralDescent
from steepest.lab.papers.claim import Claim, Experiment, Numbers, ScaleName, Setting, curve
from steepest.lab.papers.clarifying_shampoo.noisy_least_squares import noisy_problem
from steepest.lab.papers.clarifying_shampoo.updates import (
    BARE,
    DOUBLE,
    NO_MEMORY,
    gaussian_gradient,
    relative_error,
    update_from,
    zero_weight,
)
from steepest.linalg import polar
from steepest.optim.reference import inverse_root


def instantaneous_kl(seed: int, n: int, wide: int, steps: int, betas: tuple[float, ...]) -> Numbers:
    """Distances to the polar factor by β₂ and step, for an n x n matrix; the rest n x wide too."""
    G = gaussian_gradient(n, n)
    errors = {beta: kl_errors(G, beta, steps) for beta in betas}
    both = (G, gaussian_gradient(n, wide))
    lines = {f"β₂ = {beta}": error for beta, error in errors.items()}
    lines["β₂ = 0"] = kl_errors(G, 0.0, steps)
    return {
        "rates": {str(beta): local_rate(errors[beta]) - abs(2 * beta - 1) for beta in betas},
        "period": max(period_error(X) for X in both),
        "least without memory": min(min(kl_errors(X, 0.0, 20)) for X in both),
        "sequential": max(sequential_error(X) for X in both),
        "quarter": max(quarter_error(X) for X in both),
        "curves": [
            curve(
                "KL-Shampoo with one gradient repeated", [float(t) for t in range(1, steps + 1)],
                {name: [max(e, 1e-15) for e in line] for name, line in lines.items()},
                across="step", up="distance of directions to the polar factor", log=True,
            )
        ],
    }  # fmt: skip


def kl_errors(G: Tensor, beta2: float, steps: int) -> list[float]:
    """Distances of KL-Shampoo's directions to the polar factor of G (out, in), step by step."""
    W, target = zero_weight(*G.shape), polar(G, "svd")
    optimizer = KLShampoo([W], 1.0, momentum=0.0, beta2=beta2, bias_correction=False, **BARE)
    updates = (update_from(optimizer, W, G) for _ in range(steps))
    return [relative_error(D / D.norm(), target / target.norm()) for D in updates]


def local_rate(errors: list[float]) -> float:
    """By what the error is multiplied in a step, where it has just fallen below 1e-5."""
    t = next(t for t, error in enumerate(errors) if error < 1e-5)
    return errors[t] / errors[t - 1]


def period_error(G: Tensor) -> float:
    """Without memory: the change of directions over two steps, over that over one step."""
    W = zero_weight(*G.shape)
    optimizer = KLShampoo([W], 1.0, **NO_MEMORY)
    a, b, c = [(D := update_from(optimizer, W, G)) / D.norm() for _ in range(12)][-3:]
    return float((c - a).norm() / (c - b).norm())


def sequential_error(G: Tensor) -> float:
    """Distance to the polar factor after one step without memory that takes R before L."""
    W, target = zero_weight(*G.shape), polar(G, "svd")
    D = update_from(KLShampoo([W], 1.0, sequential=True, **NO_MEMORY), W, G)
    return relative_error(D / D.norm(), target / target.norm())


def quarter_error(G: Tensor) -> float:
    """With p = 1/4 in place of 1/2, inside the factors too: the distance to U S^(1/3) Vᵀ."""
    if G.shape[0] != G.shape[1]:
        return 0.0  # in plain form the root of a singular R is not there
    n, p = len(G), 1 / 4
    L = R = torch.eye(n, dtype=DOUBLE)
    for _ in range(100):
        left, right = inverse_root(L, p, 0.0), inverse_root(R, p, 0.0)
        X, Y = G @ right, left @ G
        L, R = (L + X @ X.mT) / 2, (R + Y.mT @ Y) / 2
    U, S, Vh = torch.linalg.svd(G)
    return relative_error(inverse_root(L, p, 0.0) @ G @ inverse_root(R, p, 0.0),
                          (U * S ** (1 / 3)) @ Vh)  # fmt: skip


def shared_trajectory(seed: int, out: int, in_: int, steps: int) -> Numbers:
    """The largest distance on the way between three optimizers that are one without memory."""
    weights = [zero_weight(out, in_) for _ in range(3)]
    optimizers = (
        SpectralDescent([weights[0]], 0.02, method="svd", scale="none"),
        Muon([weights[1]], 0.02, momentum=0.0, nesterov=False, method="svd", scale="none"),
        Shampoo([weights[2]], 0.02, exponent=1 / 4, **NO_MEMORY),
    )
    problem, apart = noisy_problem(out, in_), 0.0
    for _ in range(steps):
        noise = problem.noise(0.1)
        for W, optimizer in zip(weights, optimizers, strict=True):
            update_from(optimizer, W, problem.gradient(W.detach()) + noise)
        apart = max(apart, *(relative_error(W.detach(), weights[0].detach()) for W in weights[1:]))
    return {"apart": apart}


_SEEDS: dict[ScaleName, int] = {"quick": 2, "cpu": 5, "gpu": 5, "paper": 5}

INSTANTANEOUS_KL = Experiment(
    name="instantaneous-kl",
    title="KL-Shampoo with one gradient repeated",
    kind="identity",
    measure=instantaneous_kl,
    scales={
        name: Setting(
            sizes={"n": 8, "wide": 12, "steps": 100, "betas": (0.25, 0.75, 0.9)},
            seeds=seeds, minutes=0.02 * seeds,
        )
        for name, seeds in _SEEDS.items()
    },
)  # fmt: skip

SHARED_TRAJECTORY = Experiment(
    name="shared-trajectory",
    title="Spectral descent, Muon and Shampoo 1/4 without memory, on noisy least squares",
    kind="identity",
    measure=shared_trajectory,
    scales={
        name: Setting(
            sizes={"out": 8, "in_": 12, "steps": 50}, seeds=seeds, minutes=0.01 * seeds
        )
        for name, seeds in _SEEDS.items()
    },
)  # fmt: skip

CLAIMS = (
    Claim(
        name="instantaneous-kl-is-spectral-descent",
        sentence="KL-Shampoo with one gradient repeated goes to spectral descent, at rate "
        "|2 β₂ - 1| a step.",
        place="Section 2",
        source="ours",
        experiment=INSTANTANEOUS_KL,
        quantity="largest difference of the measured rate from |2 β₂ - 1|",
        value=lambda numbers: max(map(abs, numbers["rates"].values())),
        high=0.01,
        judged="every seed",
        paper="converges to spectral descent",
        checks=("D1.6",),
    ),
    Claim(
        name="kl-without-memory-oscillates",
        sentence="With β₂ = 0 and both factors at once, KL-Shampoo takes turns between two "
        "updates.",
        place="Section 2",
        source="ours",
        experiment=INSTANTANEOUS_KL,
        quantity="change over two steps over that over one",
        value=lambda numbers: float(numbers["period"]),
        high=1e-6,
        judged="every seed",
        checks=("D1.6",),
    ),
    Claim(
        name="kl-without-memory-converges",
        sentence="False on purpose: with β₂ = 0 and both factors at once, it goes to spectral "
        "descent.",
        place="control",
        source="ours",
        experiment=INSTANTANEOUS_KL,
        quantity="least distance to the polar factor over 20 steps",
        value=lambda numbers: float(numbers["least without memory"]),
        high=0.01,
        judged="every seed",
        control=True,
    ),
    Claim(
        name="one-sequential-sweep-is-enough",
        sentence="With β₂ = 0 and one factor after the other, one step is spectral descent.",
        place="Section 2",
        source="ours",
        experiment=INSTANTANEOUS_KL,
        quantity="distance of directions to the polar factor",
        value=lambda numbers: float(numbers["sequential"]),
        high=1e-12,
        judged="every seed",
        checks=("D1.6",),
    ),
    Claim(
        name="kl-with-a-quarter",
        sentence="With p = 1/4 inside the factors, KL-Shampoo goes to U S^(1/3) Vᵀ instead.",
        place="Code of the authors",
        source="ours",
        experiment=INSTANTANEOUS_KL,
        quantity="relative distance to U S^(1/3) Vᵀ",
        value=lambda numbers: float(numbers["quarter"]),
        high=1e-10,
        judged="every seed",
        checks=("D1.6",),
    ),
    Claim(
        name="one-trajectory-of-three",
        sentence="Spectral descent, Muon and Shampoo 1/4 without memory take the same 50 steps.",
        place="Fig. 1",
        source="second-hand",
        experiment=SHARED_TRAJECTORY,
        quantity="largest relative distance of weights",
        value=lambda numbers: float(numbers["apart"]),
        high=1e-6,
        judged="every seed",
        paper="equal",
        checks=("D2.g",),
    ),
)
