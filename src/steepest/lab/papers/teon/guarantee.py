"""What TEON's theorem promises: its rate on problems with known constants, and its constants.

L is the smoothness in a norm, and Δ the loss above its least value. After T steps of the length
sqrt(2 Δ / (L T)), some gradient had a dual norm of at most sqrt(2 L Δ / T) (theorem 4.5). TEON's L
is said to be from 1 / K to 1 times Muon's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

import torch
from torch import Tensor

from steepest.curvature import stack_conditions
from steepest.curvature.teon_theory import StackCondition
from steepest.geometry import Geometry, LayerwiseSpectral, Spectral, StackedSpectral
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.teon.training import run_of_muon, stopped_steps

_LAYERS = 2
_GEOMETRIES: dict[str, Geometry] = {
    "stacked": StackedSpectral(1, Spectral("svd")),
    "layerwise": LayerwiseSpectral(Spectral("svd")),
}


def rates_on_least_squares(seed: int, size: int, samples: int, lengths: tuple[int, ...]) -> Numbers:
    """The least dual norm of a run over the theorem's bound, in both geometries.

    The loss is ‖W A - Y‖² / 2. W (size, K size) is K square layers side by side. Their inputs
    A (K size, samples) are alike, as in a residual network. The Hessian is E A Aᵀ. So L is the sum
    of the `size` largest σ²(A) in TEON's norm, and at most K times that in Muon's.
    """
    shared, own = torch.randn(size, samples), torch.randn(_LAYERS, size, samples)
    A = ((shared + own) / math.sqrt(samples)).flatten(0, 1).double()
    Y = torch.randn(size, samples).double()
    best = torch.linalg.lstsq(A.T, Y.T).solution.T
    smoothness = float(torch.linalg.svdvals(A)[:size].square().sum())
    ratios: dict[str, list[float]] = {name: [] for name in _GEOMETRIES}
    for name, geometry in _GEOMETRIES.items():
        L = smoothness if name == "stacked" else _LAYERS * smoothness
        for T in lengths:
            W = torch.zeros_like(best)
            above = float(((W @ A - Y).square().sum() - (best @ A - Y).square().sum()) / 2)
            norms = []
            for _ in range(T):
                G = _layers((W @ A - Y) @ A.T)
                norms.append(float(geometry.dual_norm(G)))
                step = math.sqrt(2 * above / (L * T)) * geometry.direction(G)
                W = W - StackedSpectral(1).matrix(step)
            ratios[name].append(min(norms) / math.sqrt(2 * L * above / T))
    figure = curve(
        "The least dual norm of a gradient over the theorem's bound",
        list(map(float, lengths)),
        ratios,
        across="steps",
        up="share of the bound",
        log_across=True,
    )
    return {"ratios": ratios, "curves": [figure]}


def _layers(G: Tensor) -> Tensor:
    """Layers side by side (m, K n) as (K, m, n)."""
    return G.unflatten(1, (_LAYERS, -1)).movedim(1, 0)


def smoothness_in_training(
    seed: int, data: str, every: int, products: int,
    width: int, depth: int, context: int, batch: int, steps: int,
) -> Numbers:  # fmt: skip
    """Smoothness of stacks in Muon's norm over that in TEON's, and what both norms guarantee.

    Args:
        seed: of the model and the order of the data.
        data: text.
        every: steps between two measurements, from the start on.
        products: Hessian products for each search.
        width, depth, context, batch, steps: of the run.
    """
    setup, optimizer = run_of_muon(
        seed, data, width=width, depth=depth, context=context, batch=batch, steps=steps
    )
    measured: dict[int, list[dict[str, float]]] = {}
    for step in stopped_steps(setup, optimizer):
        if step % every == 0:
            rows = stack_conditions(
                setup.model, setup.loss, setup.batch(step), size=_LAYERS, max_products=products
            )
            layerwise = [row for row in rows if row.norm == "layerwise"]
            stacked = [row for row in rows if row.norm == "mode 1"]
            measured[step] = [_against(*pair) for pair in zip(stacked, layerwise, strict=True)]
    stacks = [stack for at_step in measured.values() for stack in at_step]
    lines = {
        name: [fmean(stack[name] for stack in at_step) for at_step in measured.values()]
        for name in stacks[0]
    }
    figure = curve(
        "TEON's norm and Muon's along training, means over stacks of two layers",
        list(map(float, measured)), lines, across="step", up="ratio",
    )  # fmt: skip
    smoothness = [stack["smoothness, Muon over TEON"] for stack in stacks]
    return {
        "means": {name: fmean(line) for name, line in lines.items()},
        "outside": max(max(1 - ratio, ratio - _LAYERS) for ratio in smoothness),
        "curves": [figure],
    }


def _against(stacked: StackCondition, layerwise: StackCondition) -> dict[str, float]:
    """Ratios for a stack, of constants and of what they promise for the same loss."""
    return {
        "smoothness, Muon over TEON": layerwise.smoothness_at_least / stacked.smoothness_at_least,
        "guaranteed decrease, TEON over Muon": (
            stacked.guarantee_at_most / layerwise.guarantee_at_most
        ),
        "dual norm, TEON over Muon": stacked.dual_norm / layerwise.dual_norm,
    }


TEON_RATES = Experiment(
    name="teon-rates",
    title="Theorem 4.5 on least squares with known constants",
    kind="theory",
    measure=rates_on_least_squares,
    scales={
        "quick": Setting(
            sizes={"size": 8, "samples": 32, "lengths": (1, 10, 100)}, seeds=4, minutes=0.05
        ),
        "cpu": Setting(
            sizes={"size": 16, "samples": 64, "lengths": (1, 10, 100, 1000)}, seeds=5, minutes=0.5
        ),
        "gpu": Setting(
            sizes={"size": 64, "samples": 256, "lengths": (1, 10, 100, 1000)},
            seeds=5, minutes=2, on_gpu=True,
        ),
        "paper": Setting(
            sizes={"size": 64, "samples": 256, "lengths": (1, 10, 100, 1000, 10000)},
            seeds=5, minutes=20, on_gpu=True,
        ),
    },
)  # fmt: skip
TEON_SMOOTHNESS = Experiment(
    name="teon-smoothness",
    title="Smoothness of stacks of two layers in both norms, in a GPT",
    kind="real data",
    measure=smoothness_in_training,
    scales={
        "quick": Setting(
            sizes={
                "every": 20, "products": 4,
                "width": 16, "depth": 2, "context": 16, "batch": 4, "steps": 20,
            },
            seeds=2, data="stdlib", minutes=0.15,
        ),
        "cpu": Setting(
            sizes={
                "every": 100, "products": 10,
                "width": 64, "depth": 4, "context": 64, "batch": 8, "steps": 300,
            },
            seeds=4, data="wikitext2", minutes=2.5, gigabytes=1,
        ),
        "gpu": Setting(
            sizes={
                "every": 500, "products": 30,
                "width": 512, "depth": 8, "context": 256, "batch": 16, "steps": 2000,
            },
            seeds=3, data="gutenberg", minutes=30, gigabytes=20, on_gpu=True,
        ),
        "paper": Setting(
            sizes={
                "every": 5000, "products": 30,
                "width": 768, "depth": 12, "context": 1024, "batch": 8, "steps": 20000,
            },
            seeds=1, data="fineweb", minutes=600, gigabytes=70, on_gpu=True,
        ),
    },
)  # fmt: skip


def _mean_ratio(name: str) -> Callable[[Numbers], float]:
    return lambda numbers: float(numbers["means"][name])


CLAIMS = (
    Claim(
        name="teon-rate",
        sentence="TEON's least dual norm of a gradient in T steps is at most sqrt(2 L Δ / T).",
        place="Theorem 4.5",
        source="second-hand",
        experiment=TEON_RATES,
        quantity="largest share of the bound",
        value=lambda numbers: max(numbers["ratios"]["stacked"]),
        high=1.0,
        judged="every seed",
        paper="at most 1",
        checks=("theorem-4.5",),
    ),
    Claim(
        name="teon-muon-rate",
        sentence="The same bound holds for Muon with its own norm and smoothness.",
        place="Theorem 4.5",
        source="second-hand",
        experiment=TEON_RATES,
        quantity="largest share of the bound",
        value=lambda numbers: max(numbers["ratios"]["layerwise"]),
        high=1.0,
        judged="every seed",
        paper="at most 1",
        checks=("theorem-4.5",),
    ),
    Claim(
        name="teon-smoothness-between",
        sentence="Muon's smoothness over TEON's lies between 1 and K for every stack.",
        place="Section 4",
        source="second-hand",
        experiment=TEON_SMOOTHNESS,
        quantity="how far the ratio lies outside",
        value=lambda numbers: float(numbers["outside"]),
        high=0.05,
        judged="every seed",
        paper="from 1 to K",
        checks=("theorem-4.5",),
    ),
    Claim(
        name="teon-smaller-smoothness",
        sentence="In a network in training TEON's smoothness is clearly smaller than Muon's.",
        place="Section 4",
        source="second-hand",
        experiment=TEON_SMOOTHNESS,
        quantity="Muon's smoothness over TEON's, mean over stacks and training",
        value=_mean_ratio("smoothness, Muon over TEON"),
        low=1.1,
        paper="up to K",
        checks=("theorem-4.5",),
    ),
    Claim(
        name="teon-guarantee",
        sentence="TEON's theory guarantees a larger decrease of the loss in a step than Muon's.",
        place="implied by Theorem 4.5",
        source="ours",
        experiment=TEON_SMOOTHNESS,
        quantity="decrease that TEON guarantees over that of Muon",
        value=_mean_ratio("guaranteed decrease, TEON over Muon"),
        low=1.0,
        paper="up to K times in squared gradient norm",
        checks=("theorem-4.5",),
    ),
)
