"""The two spiked models: the nuclear rank of GD's gradient, from the closed form of its path.

Features A (k, n) behind ReLU have a second moment B = A Aᵀ / n with one large eigenvalue and a
bulk. Model I learns a linear map of these features: G_t = -W (I - η B)^t B. Model II learns a
teacher on features of its own: G_t = -W B' (I - η B)^t with B' = A' Aᵀ / n (Lemma 3.10). Both start
at zero, with η = 1 / λ_1(B). Figures 14 and 15 show them over the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.spectral_condition.least_squares import DTYPE
from steepest.linalg import nuclear_rank
from steepest.statistics import log_slope


def spiked_ranks(seed: int, widths: tuple[int, ...], times: tuple[int, ...]) -> Numbers:
    """Nuclear ranks of both models by width and time; the last time is the width itself."""
    ranks: dict[str, list[list[float]]] = {"I": [], "II": []}
    for k in widths:
        d, n = k // 2, 2 * k
        X = torch.randn(d, n, dtype=DTYPE)
        A, teacher = (F.relu(torch.randn(k, d, dtype=DTYPE) / math.sqrt(d) @ X) for _ in range(2))
        W = torch.randn(k, k, dtype=DTYPE) / math.sqrt(k)
        eigenvalues, Q = torch.linalg.eigh(A @ A.T / n)
        kept = (1 - eigenvalues / eigenvalues[-1]).clamp(min=0)
        first = {"I": W @ (A @ A.T / n) @ Q, "II": W @ (teacher @ A.T / n) @ Q}
        for model, start in first.items():
            gradients = (start * kept**t for t in (*times, k))
            ranks[model].append([float(nuclear_rank(G)) for G in gradients])
    figures = [
        curve(
            f"Nuclear rank in Model {model}", list(widths),
            {f"step {t}": [row[i] for row in rows] for i, t in enumerate((*times, "k"))},
            across="width k", up="nuclear rank of the gradient", log=True, log_across=True,
        )
        for model, rows in ranks.items()
    ]  # fmt: skip
    return {"widths": list(widths), "times": list(times), "ranks": ranks, "curves": figures}


_TIMES = (0, 1, 10, 100)

SPIKED = Experiment(
    name="spiked-models",
    title="Nuclear rank of the gradient over the width, in both spiked models",
    kind="theory",
    measure=spiked_ranks,
    scales={
        "quick": Setting(sizes={"widths": (64, 128, 256), "times": _TIMES}, seeds=3, minutes=0.1),
        "cpu": Setting(sizes={"widths": (64, 128, 256, 512), "times": _TIMES}, seeds=5, minutes=1),
        "gpu": Setting(
            sizes={"widths": (64, 128, 256, 512, 1024, 2048), "times": _TIMES},
            seeds=5,
            minutes=5,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={"widths": (64, 128, 256, 512), "times": _TIMES}, seeds=3, minutes=1
        ),
    },
)


def _largest_at_start(model: str) -> Callable[[Numbers], float]:
    return lambda numbers: max(row[0] for row in numbers["ranks"][model])


def _slope_at(model: str, t: int) -> Callable[[Numbers], float]:
    """The slope of log nuclear rank over log width."""

    def slope(numbers: Numbers) -> float:
        i = numbers["times"].index(t)
        return log_slope(numbers["widths"], [row[i] for row in numbers["ranks"][model]])

    return slope


def _claims_of(model: str, learns: str, theorem: str, peak: str) -> tuple[Claim, ...]:
    name = f"model-{len(model)}"
    return (
        Claim(
            name=f"{name}-small-at-start",
            sentence=f"In Model {model}, {learns}, the first gradient has a bounded nuclear rank.",
            place="Section 3, p. 39; Fig. 14, 15",
            source="first-hand",
            experiment=SPIKED,
            quantity="nuclear rank of the first gradient, the largest over widths",
            value=_largest_at_start(model),
            high=10.0,
            paper=peak,
            checks=("A5",),
        ),
        Claim(
            name=f"{name}-linear-after-one-step",
            sentence=f"In Model {model} the nuclear rank grows in proportion to the width.",
            place=theorem,
            source="first-hand",
            experiment=SPIKED,
            quantity="slope of log nuclear rank over log width after one step",
            value=_slope_at(model, 1),
            low=0.9,
            high=1.1,
            paper="1",
            checks=("A5",),
        ),
        Claim(
            name=f"{name}-linear-after-burn-in",
            sentence=f"In Model {model} it still grows so after a burn-in of 100 steps.",
            place=theorem,
            source="first-hand",
            experiment=SPIKED,
            quantity="slope of log nuclear rank over log width after 100 steps",
            value=_slope_at(model, 100),
            low=0.9,
            high=1.1,
            paper="1",
            checks=("A5",),
        ),
    )


CLAIMS = (
    *_claims_of("I", "whose targets are linear in the features", "Theorem 3.6", "6.7 to 8.6"),
    *_claims_of("II", "whose teacher has features of its own", "Theorem 3.9", "5.2 to 6.4"),
)
