"""The stable rank of features, by activation and width, as random layers make them."""

from __future__ import annotations

import math
from collections.abc import Callable

from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.spectral_condition.least_squares import ACTIVATIONS, GATED, features
from steepest.linalg import stable_rank


def feature_ranks(seed: int, widths: tuple[int, ...]) -> Numbers:
    """Stable ranks for every activation; half as many inputs as features, twice the samples."""
    ranks = {
        name: [float(stable_rank(features(name, k, k // 2, 2 * k))) for k in widths]
        for name in (*ACTIVATIONS, GATED)
    }
    figure = curve(
        "Stable rank of features by width", list(widths), ranks,
        across="width", up="stable rank", log=True,
    )  # fmt: skip
    return {"ranks": ranks, "curves": [figure]}


FEATURES = Experiment(
    name="features",
    title="Stable rank of random features by activation and width",
    kind="theory",
    measure=feature_ranks,
    scales={
        "quick": Setting(sizes={"widths": (64, 128, 256)}, seeds=6, minutes=0.1),
        "cpu": Setting(sizes={"widths": (64, 128, 256, 512, 1024)}, seeds=5, minutes=1),
        "gpu": Setting(sizes={"widths": (64, 256, 1024, 2048)}, seeds=5, minutes=1, on_gpu=True),
        "paper": Setting(sizes={"widths": (64, 128, 256, 512)}, seeds=3, minutes=1),
    },
)

_WIDEST = "stable rank of the features at the largest width"
_GROWTH = "growth of the stable rank from the width before the largest to the largest, twice it"


def _last(activation: str) -> Callable[[Numbers], float]:
    return lambda numbers: numbers["ranks"][activation][-1]


def _growth(activation: str) -> Callable[[Numbers], float]:
    return lambda numbers: numbers["ranks"][activation][-1] / numbers["ranks"][activation][-2]


CLAIMS = (
    Claim(
        name="relu-features",
        sentence="Features behind ReLU have a stable rank of about π, at any width.",
        place="Theorem 2.6, Fig. 12",
        source="first-hand",
        experiment=FEATURES,
        quantity=_WIDEST,
        value=_last("relu"),
        high=1.05 * math.pi,
        paper="at most 3.14",
        checks=("A1",),
    ),
    Claim(
        name="absolute-features",
        sentence="Features behind the absolute value have a stable rank of about π / 2.",
        place="Fig. 12",
        source="first-hand",
        experiment=FEATURES,
        quantity=_WIDEST,
        value=_last("abs"),
        high=1.05 * math.pi / 2,
        paper="at most 1.57",
        checks=("A1",),
    ),
    Claim(
        name="squared-relu-features",
        sentence="Features behind ReLU² have a stable rank of about 6.",
        place="Fig. 12",
        source="first-hand",
        experiment=FEATURES,
        quantity=_WIDEST,
        value=_last("relu-squared"),
        high=1.05 * 6,
        paper="at most 6",
        checks=("A1",),
    ),
    Claim(
        name="leaky-relu-features",
        sentence="Features behind a leaky ReLU of slope 0.1 have a stable rank of about 3.92.",
        place="Fig. 12",
        source="first-hand",
        experiment=FEATURES,
        quantity=_WIDEST,
        value=_last("leaky-relu"),
        high=1.05 * math.pi * (1 + 0.1**2) / (1 - 0.1) ** 2,
        paper="at most 3.92",
        checks=("A1",),
    ),
    Claim(
        name="gated-features-grow",
        sentence="The stable rank of SwiGLU's features grows with the width.",
        place="Section 2, p. 14",
        source="first-hand",
        experiment=FEATURES,
        quantity=_GROWTH,
        value=_growth(GATED),
        low=1.7,
        paper="grows with the width",
        checks=("A1",),
    ),
    Claim(
        name="gated-features-bounded",
        sentence="False on purpose: SwiGLU's features keep ReLU's stable rank of π.",
        place="control",
        source="ours",
        experiment=FEATURES,
        quantity=_WIDEST,
        value=_last(GATED),
        high=1.05 * math.pi,
        control=True,
    ),
)
