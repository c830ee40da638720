"""The two constants L and L_* of a quadratic, the bridge to stable ranks, and Newton-Schulz.

Λ = A Aᵀ / n is the Hessian of least squares with inputs A, for each row of the weight. With it
L = ‖Λ‖_op, L_* = ‖Λ‖_* (Lemma 4.6), and L_* / L is the stable rank of A.
"""

from __future__ import annotations

import torch
from torch import nn

from steepest.curvature import Hessian, muon_conditions
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.muon_convergence.known_constants import (
    CONVEX,
    gaussian_weight,
    random_problem,
)
from steepest.lab.papers.muon_convergence.nonconvex_rates import HOLDS
from steepest.linalg import polar, polynomials, stable_rank


def smoothness_constants(seed: int, shape: tuple[int, int], pairs: int) -> Numbers:
    """Compare changes of the gradient with changes of W, for pairs of every rank.

    Args:
        seed: of problem and pairs.
        shape: (m, k) of W.
        pairs: how many for each rank.
    """
    m, k = shape
    problem = random_problem(CONVEX["square"], shape, 0.8)
    norm = torch.linalg.matrix_norm
    changes = [
        gaussian_weight(m, rank) @ gaussian_weight(rank, k)
        for rank in (1, 2, min(shape))
        for _ in range(pairs)
    ]
    changes += [polar(D, "svd") for D in changes]
    top = torch.linalg.svd(problem.A).U[:, 0]
    changes += [torch.eye(m, k, dtype=top.dtype), gaussian_weight(m, 1) * top]
    ratios: dict[str, list[float]] = {"L": [], "L_*": [], "L_* as L": []}
    for D in changes:
        H = problem.gradient(problem.optimum + D)
        spectral = float(norm(H, "nuc") / norm(D, 2))
        ratios["L"].append(float(norm(H) / norm(D)) / problem.frobenius_smoothness)
        ratios["L_*"].append(spectral / problem.spectral_smoothness)
        ratios["L_* as L"].append(spectral / problem.frobenius_smoothness)
    return {"ratios": {name: max(values) for name, values in ratios.items()}}


def curvature_of_least_squares(
    seed: int, shapes: tuple[tuple[int, int], ...], samples: int
) -> Numbers:
    """Measure J and L of least squares as of any network, beside the stable rank of the inputs.

    Args:
        seed: of inputs and weights.
        shapes: (out, in) of W; the first ones are square.
        samples: inputs for each of `in`.
    """
    gaps, excess, agree = [], [], []
    for outputs, width in shapes:
        x = torch.relu(gaussian_weight(samples * width, width))
        y = gaussian_weight(len(x), outputs)
        model = nn.Linear(width, outputs, bias=False).double()

        def half_squares(
            model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
        ) -> torch.Tensor:
            x, y = batch
            return 0.5 * (model(x) - y).square().sum() / len(x)

        H = Hessian(model, half_squares, (x, y))
        [row] = muon_conditions(H, tolerance=1e-8, max_products=1000)
        rank = float(stable_rank(x))
        excess.append(row.ratio / rank)
        if outputs == width:
            gaps.append(abs(row.ratio - rank))
            agree.append(row.holds == (row.nuclear_rank >= rank))
    return {"gap": max(gaps), "excess": max(excess), "agree": sum(agree) / len(agree)}


def newton_schulz_values(seed: int, points: int) -> Numbers:
    """Return singular values behind five Newton-Schulz steps, for those from 0.01 to 1."""
    start = x = torch.logspace(-2, 0, points, dtype=torch.float64)
    for a, b, c in polynomials("jordan"):
        x = a * x + b * x**3 + c * x**5
    some = slice(None, None, max(1, points // 100))
    figure = curve(
        "Singular values behind five Newton-Schulz steps", start[some].tolist(),
        {"value": x[some].tolist()}, across="singular value before", up="behind", log_across=True,
    )  # fmt: skip
    return {"least": float(x.min()), "largest": float(x.max()), "curves": [figure]}


CONSTANTS = Experiment(
    name="smoothness-constants",
    title="Smoothness constants of a quadratic",
    kind="identity",
    measure=smoothness_constants,
    scales={
        "quick": Setting(sizes={"shape": (12, 12), "pairs": 30}, seeds=3, minutes=0.02),
        "cpu": Setting(sizes={"shape": (40, 40), "pairs": 1000}, seeds=5, minutes=0.4),
        "gpu": Setting(
            sizes={"shape": (512, 512), "pairs": 1000}, seeds=5, minutes=10, on_gpu=True
        ),
    },
)

BRIDGE = Experiment(
    name="curvature-of-least-squares",
    title="J and L of least squares beside the stable rank of the inputs",
    kind="identity",
    measure=curvature_of_least_squares,
    scales={
        "quick": Setting(
            sizes={"shapes": ((8, 8), (12, 12), (5, 12), (12, 8)), "samples": 3},
            seeds=4,
            minutes=0.05,
        ),
        "cpu": Setting(
            sizes={"shapes": ((16, 16), (32, 32), (64, 64), (10, 64), (64, 16)), "samples": 4},
            seeds=10,
            minutes=0.2,
        ),
        "gpu": Setting(
            sizes={"shapes": ((256, 256), (512, 512), (128, 512)), "samples": 4},
            seeds=5,
            minutes=5,
            on_gpu=True,
        ),
    },
)

NEWTON_SCHULZ = Experiment(
    name="newton-schulz-values",
    title="Five Newton-Schulz steps on singular values",
    kind="identity",
    measure=newton_schulz_values,
    scales={
        "quick": Setting(sizes={"points": 10_000}, minutes=0.01),
        "cpu": Setting(sizes={"points": 1_000_000}, minutes=0.02),
        "paper": Setting(sizes={"points": 1_000_000}, minutes=0.02),
    },
)

_LEAST, _LARGEST = 0.68, 1.135

CLAIMS = (
    Claim(
        name="smoothness-is-bounded",
        sentence="On a quadratic with Hessian Λ, L = ‖Λ‖_op and L_* = ‖Λ‖_* are never exceeded.",
        place="Lemma 4.6",
        source="first-hand",
        experiment=CONSTANTS,
        quantity="largest change of the gradient over its bound, of both norms",
        value=lambda numbers: max(numbers["ratios"]["L"], numbers["ratios"]["L_*"]),
        high=HOLDS,
        judged="every seed",
        paper="at most 1",
        checks=("B1",),
    ),
    Claim(
        name="smoothness-is-reached",
        sentence="Both constants are reached: no smaller ones would do.",
        place="Lemma 4.6",
        source="first-hand",
        experiment=CONSTANTS,
        quantity="largest change of the gradient over its bound, in the norm where that is smaller",
        value=lambda numbers: min(numbers["ratios"]["L"], numbers["ratios"]["L_*"]),
        low=1 - 1e-9,
        judged="every seed",
        paper="1",
        checks=("B1",),
    ),
    Claim(
        name="one-smoothness-for-both",
        sentence="False on purpose: ‖Λ‖_op bounds changes in the spectral norm too.",
        place="control",
        source="ours",
        experiment=CONSTANTS,
        quantity="largest change of the gradient over ‖Λ‖_op, nuclear norm over spectral",
        value=lambda numbers: float(numbers["ratios"]["L_* as L"]),
        high=HOLDS,
        judged="every seed",
        control=True,
    ),
    Claim(
        name="curvature-is-stable-rank",
        sentence="For least squares with a square weight, J / L is the stable rank of the inputs.",
        place="Section 4.2",
        source="ours",
        experiment=BRIDGE,
        quantity="largest difference of J / L and the stable rank",
        value=lambda numbers: float(numbers["gap"]),
        high=1e-6,
        judged="every seed",
        checks=("B9",),
    ),
    Claim(
        name="condition-four-is-the-spectral-condition",
        sentence="There condition (4) holds exactly where the nuclear rank is at least the stable "
        "rank.",
        place="Section 4.2, condition (4)",
        source="ours",
        experiment=BRIDGE,
        quantity="share of weights where both conditions agree",
        value=lambda numbers: float(numbers["agree"]),
        low=1.0,
        judged="every seed",
        checks=("B9",),
    ),
    Claim(
        name="curvature-at-most-stable-rank",
        sentence="For least squares of any shape, J / L is at most the stable rank of the inputs.",
        place="Section 4.2",
        source="ours",
        experiment=BRIDGE,
        quantity="largest ratio of J / L over the stable rank",
        value=lambda numbers: float(numbers["excess"]),
        high=1 + 1e-6,
        judged="every seed",
        checks=("B9",),
    ),
    Claim(
        name="newton-schulz-range",
        sentence="Five Newton-Schulz steps take singular values from 0.01 to 1 close to 1.",
        place="Appendix D, p. 23",
        source="first-hand",
        experiment=NEWTON_SCHULZ,
        quantity=f"largest distance of a value from the range [{_LEAST}, {_LARGEST}]",
        value=lambda numbers: max(_LEAST - numbers["least"], numbers["largest"] - _LARGEST),
        high=0.0,
        judged="every seed",
        paper="[0.65, 1.25]",
        checks=("B8",),
    ),
)
