"""GD against SpecGD on random features: the run of Fig. 3 and Fig. 11, and its guarantees."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.spectral_condition.least_squares import (
    DTYPE,
    GATED,
    LeastSquares,
    features,
    gd_step,
    spectral_step,
    with_teacher,
)
from steepest.linalg import nuclear_rank, polar, stable_rank

_EARLY = 50
"""The step at which the facts compare the losses."""


@dataclass
class _Descent:
    """Steps of one kind from W = 0: losses and nuclear ranks before each step, and all weights."""

    losses: list[float]
    ranks: list[float]
    weights: list[Tensor]


def _descended(
    problem: LeastSquares, step: Callable[[Tensor, float], Tensor], curvature: float, steps: int
) -> _Descent:
    W = torch.zeros(len(problem.Y), len(problem.A), dtype=DTYPE)
    run = _Descent([], [], [])
    for _ in range(steps):
        G = problem.gradient(W)
        run.losses.append(problem.loss(W))
        run.ranks.append(float(nuclear_rank(G)))
        run.weights.append(W)
        W = W + step(G, curvature)
    run.losses.append(problem.loss(W))
    return run


def gd_against_spectral(
    seed: int, activation: str, width: int, inputs: int, samples: int, steps: int
) -> Numbers:
    """Both kinds of steps from W = 0, and the condition along GD."""
    problem = with_teacher(features(activation, width, inputs, samples))
    gd = _descended(problem, gd_step, problem.frobenius_curvature, steps)
    spectral = _descended(problem, spectral_step, problem.spectral_curvature, steps)
    rank = float(stable_rank(problem.A))
    every = max(1, steps // 100)
    x = list(range(0, steps, every))
    return {
        "stable_rank": rank,
        "nuclear_ranks": gd.ranks,
        "share_below": sum(nr < rank for nr in gd.ranks) / steps,
        "gd": gd.losses,
        "spectral": spectral.losses,
        "curves": [
            curve(
                "Loss", x, {"GD": gd.losses[::every][: len(x)],
                "SpecGD": spectral.losses[::every][: len(x)]},
                across="step", up="loss", log=True,
            ),
            curve(
                "The condition along GD", x,
                {"nuclear rank of the gradient": gd.ranks[::every],
                 "stable rank of the features": [rank] * len(x)},
                across="step", up="rank",
            ),
        ],
    }  # fmt: skip


def guarantees(seed: int, width: int, steps: int) -> Numbers:
    """The decrease of each step over its guarantee, from every state of both kinds of runs."""
    problem = with_teacher(features("relu", width, width // 2, 4 * width))
    lipschitz, bound = problem.frobenius_curvature, problem.spectral_curvature
    condition = float(stable_rank(problem.A))
    ratios: dict[str, list[float]] = {"gd": [], "spectral": []}
    behind = []  # SpecGD over GD where the condition holds twice, relative to the loss
    for step, curvature in ((gd_step, lipschitz), (spectral_step, bound)):
        for W in _descended(problem, step, curvature, steps).weights:
            G, before = problem.gradient(W), problem.loss(W)
            after_gd = problem.loss(W + gd_step(G, lipschitz))
            after = problem.loss(W + spectral_step(G, bound))
            nuclear = float(torch.linalg.matrix_norm(G, "nuc"))
            ratios["gd"].append((before - after_gd) / float(G.square().sum() / (2 * lipschitz)))
            ratios["spectral"].append((before - after) / (nuclear**2 / (2 * bound)))
            if nuclear_rank(G) >= 2 * condition:
                behind.append((after - after_gd) / before)
    return {
        "gd": min(ratios["gd"]),
        "spectral": min(ratios["spectral"]),
        "off_equality": max(abs(ratio - 1) for ratio in ratios["spectral"]),
        "behind": max(behind),
        "states": len(behind),
    }


def line_search(seed: int, width: int, at: int) -> Numbers:
    """What the best step along the polar factor decreases, over the best along the gradient."""
    problem = with_teacher(features("relu", width, width // 2, 2 * width))
    run = _descended(problem, gd_step, problem.frobenius_curvature, at + 1)
    G = problem.gradient(run.weights[at])
    best = {
        name: float((G * D).sum()) ** 2 / (2 * problem.curvature(D))
        for name, D in (("gradient", G), ("polar", polar(G, "svd")))
    }
    ratio = float(nuclear_rank(G) / stable_rank(problem.A))
    return {"gain": best["polar"] / best["gradient"], "predicted": ratio}


def one_spike(seed: int, width: int, spikes: tuple[float, ...], steps: int) -> Numbers:
    """Features I + λ 1 1ᵀ: the more of one direction they have, the more SpecGD gains."""
    target = torch.randn(width, width, dtype=DTYPE) / math.sqrt(width)
    rows = []
    for spike in spikes:
        A = torch.eye(width, dtype=DTYPE) + spike
        problem = LeastSquares(A, target @ A)
        gd = _descended(problem, gd_step, problem.frobenius_curvature, steps)
        spectral = _descended(problem, spectral_step, problem.spectral_curvature, steps)
        top = (1 + width * spike) ** 2
        rows.append(
            {
                "off_formula": abs(float(stable_rank(A)) / ((width - 1 + top) / top) - 1),
                "condition": gd.ranks[0] / float(stable_rank(A)),
                "first": gd.losses[1] / gd.losses[0],
                "gain": math.log10((gd.losses[-1] + 1e-30) / (spectral.losses[-1] + 1e-30)),
            }
        )
    figure = curve(
        "SpecGD against GD by the size of the spike", list(spikes),
        {"log10 of GD's loss over SpecGD's": [row["gain"] for row in rows]},
        across="λ", up=f"log10 of a ratio of losses after {steps} steps",
    )  # fmt: skip
    return {"rows": rows, "curves": [figure]}


_FIG3 = {"activation": "relu", "width": 100, "inputs": 50, "samples": 400}
_FIG11 = _FIG3 | {"activation": GATED}

RELU_RUN = Experiment(
    name="relu-run",
    title="GD against SpecGD on ReLU features (Fig. 3)",
    kind="theory",
    measure=gd_against_spectral,
    scales={
        "quick": Setting(sizes=_FIG3 | {"steps": 100}, seeds=8, minutes=0.3),
        "cpu": Setting(sizes=_FIG3 | {"steps": 1000}, seeds=5, minutes=2),
        "gpu": Setting(sizes=_FIG3 | {"steps": 1000}, seeds=10, minutes=4),
        "paper": Setting(sizes=_FIG3 | {"steps": 1000}, seeds=3, minutes=1),
    },
)
GATED_RUN = Experiment(
    name="gated-run",
    title="GD against SpecGD on SwiGLU features (Fig. 11)",
    kind="theory",
    measure=gd_against_spectral,
    scales={
        "quick": Setting(sizes=_FIG11 | {"steps": 400}, seeds=3, minutes=0.4),
        "cpu": Setting(sizes=_FIG11 | {"steps": 400}, seeds=5, minutes=0.7),
        "gpu": Setting(sizes=_FIG11 | {"steps": 400}, seeds=10, minutes=2),
        "paper": Setting(sizes=_FIG11 | {"steps": 400}, seeds=3, minutes=0.4),
    },
)
GUARANTEES = Experiment(
    name="one-step-guarantees",
    title="The guarantees of one step, from every state of both runs",
    kind="theory",
    measure=guarantees,
    scales={
        "quick": Setting(sizes={"width": 40, "steps": 60}, seeds=2, minutes=0.1),
        "cpu": Setting(sizes={"width": 100, "steps": 100}, seeds=5, minutes=0.5),
        "paper": Setting(sizes={"width": 100, "steps": 1000}, seeds=3, minutes=4),
    },
)
LINE_SEARCH = Experiment(
    name="line-search",
    title="Both directions with exact line search",
    kind="theory",
    measure=line_search,
    scales={
        "quick": Setting(sizes={"width": 64, "at": 20}, seeds=5, minutes=0.1),
        "cpu": Setting(sizes={"width": 256, "at": 20}, seeds=10, minutes=0.3),
    },
)
ONE_SPIKE = Experiment(
    name="one-spike",
    title="Features with one spike of growing size",
    kind="theory",
    measure=one_spike,
    scales={
        "quick": Setting(
            sizes={"width": 40, "spikes": (0.0, 0.03, 0.06, 0.12), "steps": 100},
            seeds=3,
            minutes=0.1,
        ),
        "cpu": Setting(
            sizes={"width": 40, "spikes": tuple(0.12 * i / 7 for i in range(8)), "steps": 400},
            seeds=5,
            minutes=0.5,
        ),
        "paper": Setting(
            sizes={"width": 200, "spikes": tuple(0.12 * i / 7 for i in range(8)), "steps": 400},
            seeds=1,
            minutes=4,
        ),
    },
)


def _lead(numbers: Numbers, at: int) -> float:
    """How many orders of magnitude GD's loss lies above SpecGD's."""
    return math.log10(max(numbers["gd"][at], 1e-40) / max(numbers["spectral"][at], 1e-40))


CLAIMS = (
    Claim(
        name="gd-guarantee",
        sentence="A step of GD decreases the loss by at least ‖G‖_F² over twice its curvature.",
        place="eq. 1.5",
        source="first-hand",
        experiment=GUARANTEES,
        quantity="smallest decrease over its guarantee",
        value=lambda numbers: float(numbers["gd"]),
        low=1 - 1e-5,
        judged="every seed",
        paper="at least 1",
        checks=("A2",),
    ),
    Claim(
        name="spectral-guarantee",
        sentence="A step of SpecGD decreases the loss by at least ‖G‖_*² over twice its curvature.",
        place="eq. 1.5",
        source="first-hand",
        experiment=GUARANTEES,
        quantity="smallest decrease over its guarantee",
        value=lambda numbers: float(numbers["spectral"]),
        low=1 - 1e-5,
        judged="every seed",
        paper="at least 1",
        checks=("A2",),
    ),
    Claim(
        name="condition-compares-outcomes",
        sentence="Where nr(G) is at least 2 st(A), a step of SpecGD ends no higher than one of GD.",
        place="Section 1, p. 6",
        source="first-hand",
        experiment=GUARANTEES,
        quantity="largest loss after SpecGD less that after GD, over the loss before",
        value=lambda numbers: float(numbers["behind"]),
        high=1e-12,
        judged="every seed",
        paper="at most 0",
        checks=("A2",),
    ),
    Claim(
        name="relu-nuclear-rank-at-start",
        sentence="On ReLU features the first gradient has a small nuclear rank.",
        place="Fig. 3",
        source="first-hand",
        experiment=RELU_RUN,
        quantity="nuclear rank of the gradient at W = 0",
        value=lambda numbers: float(numbers["nuclear_ranks"][0]),
        high=9.0,
        paper="about 6",
        checks=("A3",),
    ),
    Claim(
        name="relu-nuclear-rank-peak",
        sentence="Along GD on ReLU features the nuclear rank rises to about 62 of 100.",
        place="Fig. 3",
        source="first-hand",
        experiment=RELU_RUN,
        quantity="largest nuclear rank of the gradient",
        value=lambda numbers: float(max(numbers["nuclear_ranks"])),
        low=55.0,
        high=70.0,
        paper="about 62 at step 55",
        checks=("A3",),
    ),
    Claim(
        name="spectral-wins-on-relu",
        sentence="On ReLU features SpecGD is far ahead of GD after 50 steps.",
        place="Fig. 3",
        source="first-hand",
        experiment=RELU_RUN,
        quantity=f"log10 of GD's loss over SpecGD's at step {_EARLY}",
        value=lambda numbers: _lead(numbers, _EARLY),
        low=math.log10(50),
        paper="about 2.1",
        checks=("A3",),
    ),
    Claim(
        name="gated-condition-fails",
        sentence="On SwiGLU features the condition fails on most steps of GD.",
        place="Fig. 11",
        source="first-hand",
        experiment=GATED_RUN,
        quantity="share of steps with a nuclear rank below the stable rank",
        value=lambda numbers: float(numbers["share_below"]),
        low=0.85,
        paper="from about step 25 of 400",
        checks=("A4",),
    ),
    Claim(
        name="gd-wins-on-gated",
        sentence="On SwiGLU features GD ends far below SpecGD.",
        place="Fig. 11",
        source="first-hand",
        experiment=GATED_RUN,
        quantity="log10 of GD's loss over SpecGD's at the end",
        value=lambda numbers: _lead(numbers, -1),
        high=-4.0,
        paper="about -10",
        checks=("A4",),
    ),
    Claim(
        name="spectral-wins-on-gated",
        sentence="False on purpose: SpecGD ends below GD on SwiGLU features too.",
        place="control",
        source="ours",
        experiment=GATED_RUN,
        quantity="log10 of GD's loss over SpecGD's at the end",
        value=lambda numbers: _lead(numbers, -1),
        low=0.0,
        control=True,
    ),
    Claim(
        name="spike-formula",
        sentence="Features I + λ 1 1ᵀ have the stable rank (k - 1 + s) / s, s = (1 + k λ)².",
        place="code, sweep over λ",
        source="first-hand",
        experiment=ONE_SPIKE,
        quantity="largest relative difference from the formula",
        value=lambda numbers: float(max(row["off_formula"] for row in numbers["rows"])),
        high=1e-9,
        judged="every seed",
        checks=("A6",),
    ),
    Claim(
        name="no-spike-no-gain",
        sentence="Without a spike GD solves the problem in one step, and SpecGD is behind.",
        place="code, sweep over λ",
        source="first-hand",
        experiment=ONE_SPIKE,
        quantity="log10 of GD's last loss over SpecGD's",
        value=lambda numbers: float(numbers["rows"][0]["gain"]),
        high=0.0,
        checks=("A6",),
    ),
    Claim(
        name="spike-brings-gain",
        sentence="With a large spike SpecGD is ahead of GD.",
        place="code, sweep over λ",
        source="first-hand",
        experiment=ONE_SPIKE,
        quantity="log10 of GD's last loss over SpecGD's",
        value=lambda numbers: float(numbers["rows"][-1]["gain"]),
        low=0.0,
        checks=("A6",),
    ),
    Claim(
        name="gradient-wins-line-searches",
        sentence="With exact line search the gradient gains more, even where the condition holds.",
        place="left open by the paper",
        source="ours",
        experiment=LINE_SEARCH,
        quantity="best decrease along the polar factor over that along the gradient, at step 20",
        value=lambda numbers: float(numbers["gain"]),
        high=1.0,
        checks=("A12",),
    ),
)
