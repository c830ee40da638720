"""The bounds on the loss of star-convex problems, Theorems 4.11, C.1 and C.2.

D is the largest ‖W_t - W*‖_op along the run, so that assumption 4.10 holds with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.muon_convergence.known_constants import (
    CONVEX,
    KnownConstants,
    Trajectory,
    adaptive_rate,
    gaussian_weight,
    muon_trajectory,
    random_problem,
)
from steepest.lab.papers.muon_convergence.nonconvex_rates import HOLDS

_RATES = (0.003, 0.03, 0.3)
"""Constant rates, in units of the distance to the optimum."""
_ROUNDING = 1e-24
"""Of the gap at the start: what is no loss any more."""


def _largest_ratio(run: Trajectory, bound: Tensor) -> float:
    """Of a loss over its bound, behind the start, where both are Δ."""
    return float(((run.losses - _ROUNDING * run.gap) / bound)[1:].max())


def _constant_rate(run: Trajectory, rates: Tensor, smoothness: float) -> Tensor:
    """Theorem 4.11: (1 - η / D)^t Δ + L_* D η / 2."""
    D, t = run.distances.amax(0), torch.arange(len(run.losses))[:, None]
    return (1 - rates / D) ** t * run.gap + smoothness * D * rates / 2


def _adaptive_rate(run: Trajectory, smoothness: float) -> Tensor:
    """Theorem 4.11: 2 L_* Δ D² / (2 L_* D² + t Δ)."""
    reach = 2 * smoothness * run.distances.max() ** 2
    return reach * run.gap / (reach + torch.arange(len(run.losses)) * run.gap)


def _by_curvature(problem: KnownConstants, run: Trajectory, rates: Tensor) -> Tensor:
    """Theorem C.1: (1 - η / D)^t Δ + η² t Ĵ / 2 + s η² D r^(3/2) / 6, with the mean Ĵ of |J|."""
    D, t = run.distances.amax(0), torch.arange(len(run.losses))[:, None]
    curvature = torch.cat([torch.zeros_like(run.gap)[None], run.curvatures.abs().cumsum(0)])
    third = problem.third_derivative * rates**2 * D * problem.rank**1.5 / 6
    return (1 - rates / D) ** t * run.gap + rates**2 * curvature / 2 + third


def star_convex_losses(seed: int, shapes: tuple[tuple[int, int], ...], steps: int) -> Numbers:
    """Run Muon with constant and adaptive rates, and hold every loss against its bounds.

    Args:
        seed: of problems and starts.
        shapes: of W.
        steps: T.
    """
    ratios: dict[str, list[float]] = {
        name: [] for name in ("constant", "adaptive", "r L", "J", *CONVEX)
    }
    lines: dict[str, list[float]] = {}
    for shape in shapes:
        for loss, residual in CONVEX.items():
            problem = random_problem(residual, shape, 0.7)
            W = problem.optimum + gaussian_weight(*shape)
            spectral = problem.spectral_smoothness
            frobenius = problem.rank * problem.frobenius_smoothness
            start = torch.linalg.matrix_norm(W - problem.optimum, 2)
            rates = start * torch.tensor(_RATES, dtype=W.dtype)
            constant = muon_trajectory(problem, W.expand(len(rates), *shape), steps, rates)
            adaptive = muon_trajectory(problem, W, steps, adaptive_rate(spectral))
            slower = muon_trajectory(problem, W, steps, adaptive_rate(frobenius))
            for name, run, bound in (
                ("constant", constant, _constant_rate(constant, rates, spectral)),
                ("r L", constant, _constant_rate(constant, rates, frobenius)),
                ("J", constant, _by_curvature(problem, constant, rates)),
                ("adaptive", adaptive, _adaptive_rate(adaptive, spectral)),
                ("r L", slower, _adaptive_rate(slower, frobenius)),
            ):
                ratios[name].append(_largest_ratio(run, bound))
            for run in (constant, adaptive):
                ratios[loss].append(float((run.distances / start).max()))
            lines = {
                "loss": adaptive.losses.tolist(),
                "bound": _adaptive_rate(adaptive, spectral).tolist(),
            }
    every = max(1, steps // 80)
    figure = curve(
        "Loss with the adaptive rate, and its bound",
        range(0, steps + 1, every),
        {key: values[::every] for key, values in lines.items()},
        across="step", up="loss", log=True,
    )  # fmt: skip
    return {"ratios": {key: max(values) for key, values in ratios.items()}, "curves": [figure]}


STAR_CONVEX = Experiment(
    name="star-convex",
    title="The loss of convex problems against its bounds",
    kind="theory",
    measure=star_convex_losses,
    scales={
        "quick": Setting(
            sizes={"shapes": ((8, 8), (20, 15)), "steps": 100}, seeds=2, minutes=0.1
        ),
        "cpu": Setting(
            sizes={"shapes": ((8, 8), (20, 15), (15, 20), (32, 32)), "steps": 2000},
            seeds=5,
            minutes=1,
        ),
        "gpu": Setting(
            sizes={"shapes": ((128, 128), (128, 256)), "steps": 2000},
            seeds=3,
            minutes=10,
            on_gpu=True,
        ),
    },
)  # fmt: skip

_RATIO = "largest ratio of the loss over its bound, at any step"
_DISTANCE = "largest distance to the optimum, over the distance at the start"


def _ratio(key: str) -> Callable[[Numbers], float]:
    return lambda numbers: float(numbers["ratios"][key])


CLAIMS = (
    Claim(
        name="star-convex-constant-rate",
        sentence="On star-convex problems a constant rate keeps the loss below its bound from L_*.",
        place="Theorem 4.11",
        source="first-hand",
        experiment=STAR_CONVEX,
        quantity=_RATIO,
        value=_ratio("constant"),
        high=HOLDS,
        judged="every seed",
        paper="at most 1",
        checks=("B4",),
    ),
    Claim(
        name="star-convex-adaptive-rate",
        sentence="On star-convex problems the rate ‖G‖_* / L_* keeps the loss below its bound.",
        place="Theorem 4.11",
        source="first-hand",
        experiment=STAR_CONVEX,
        quantity=_RATIO,
        value=_ratio("adaptive"),
        high=HOLDS,
        judged="every seed",
        paper="at most 1",
        checks=("B4",),
    ),
    Claim(
        name="star-convex-by-frobenius",
        sentence="Both bounds on star-convex problems hold with r L in the place of L_*.",
        place="Theorem C.2",
        source="first-hand",
        experiment=STAR_CONVEX,
        quantity=_RATIO,
        value=_ratio("r L"),
        high=HOLDS,
        judged="every seed",
        paper="at most 1",
        checks=("B4",),
    ),
    Claim(
        name="star-convex-by-curvature",
        sentence="On star-convex problems the mean curvature |J| along the steps bounds the loss.",
        place="Theorem C.1",
        source="first-hand",
        experiment=STAR_CONVEX,
        quantity=_RATIO,
        value=_ratio("J"),
        high=HOLDS,
        judged="every seed",
        paper="at most 1",
        checks=("B4",),
    ),
    Claim(
        name="distance-on-quadratics",
        sentence="On quadratics Muon stays as near to the optimum, in the spectral norm, as it "
        "began.",
        place="Assumption 4.10",
        source="ours",
        experiment=STAR_CONVEX,
        quantity=_DISTANCE,
        value=_ratio("square"),
        high=HOLDS,
        judged="every seed",
        checks=("B4",),
    ),
    Claim(
        name="distance-with-log-cosh",
        sentence="So it does on another convex loss, log cosh of residuals.",
        place="Assumption 4.10",
        source="ours",
        experiment=STAR_CONVEX,
        quantity=_DISTANCE,
        value=_ratio("log-cosh"),
        high=HOLDS,
        judged="every seed",
        checks=("B4",),
    ),
)
