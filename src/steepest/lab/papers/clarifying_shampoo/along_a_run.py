"""A small GPT in training: how far Shampoo is from Muon, and how semi-orthogonal on average.

What is averaged are the last gradients, all preconditioned by the factors of the last step, with
the weights of the optimizer's own average: Σ w U Uᵀ and Σ w Uᵀ U.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.clarifying_shampoo.updates import semi_orthogonality, sine
from steepest.lab.train import TrainConfig
from steepest.lab.train.optimizers import build
from steepest.lab.train.schedule import factor
from steepest.lab.train.setup import data_of, set_up
from steepest.linalg import nuclear_rank, polar
from steepest.model.parameter_roles import roles
from steepest.optim import Shampoo, SteepestDescent

_BETA2 = 0.95
_KEPT = 64  # gradients of each matrix: the weight of the oldest is 4% of that of the newest
_EVERY = 5  # steps between two measurements
_FAMILY = "length=muon,scale=spectral,interval=1,block=none"
_SPECS = {
    "Muon": ("muon:nesterov=false", 0.04),
    "Shampoo 1/4": (f"shampoo-quarter:{_FAMILY}", 0.04),
    "Shampoo 1/2": (f"shampoo:{_FAMILY}", 0.04),
    "one-sided Shampoo": (f"shampoo:{_FAMILY},sides=left", 0.04),
    "KL-Shampoo": (f"kl-shampoo:{_FAMILY}", 0.04),
}
"""What is trained with, and its rate."""


def along_a_run(
    seed: int, data: str, width: int, depth: int, context: int, batch: int, steps: int
) -> Numbers:
    """For every optimizer a run of its own, and what is measured along it from a fifth on."""
    problem: dict[str, Any] = {
        "data": data, "width": width, "depth": depth, "context": context, "batch": batch,
    }  # fmt: skip
    runs = {
        name: _run(TrainConfig(
            model="gpt", model_options=("heads=4",), optimizer=spec, lr=lr, steps=steps,
            momentum=0.9, seed=seed, threads=1, **problem,
        ))
        for name, (spec, lr) in _SPECS.items()
    }  # fmt: skip
    measured = {name: {key: fmean(line) for key, line in run.items()} for name, run in runs.items()}
    times = [float(t) for t in _times(steps)]
    return {
        "means": measured,
        "curves": [
            _figure("Distance from semi-orthogonal on average", times, {
                f"{name}, {side}": runs[name][side]
                for name in ("Muon", "Shampoo 1/4", "Shampoo 1/2", "KL-Shampoo")
                for side in ("left", "right")
            }, up="distance (0: semi-orthogonal)"),
            _figure("How far Shampoo 1/2 is from Muon", times, {
                side: runs["Shampoo 1/2"][side]
                for side in ("left adaptation", "right adaptation", "both adaptations")
            }, up="sine of the angle to Muon's update"),
        ],
    }  # fmt: skip


def _times(steps: int) -> range:
    """The steps after which is measured: from a fifth on."""
    return range(steps // 5, steps, _EVERY)


def _figure(name: str, x: list[float], lines: dict[str, list[float]], up: str) -> dict[str, Any]:
    return curve(name, x, lines, across="step", up=up)


def _run(config: TrainConfig) -> dict[str, list[float]]:
    """Train, and return what is measured on the way, the mean over matrices."""
    assert config.lr is not None
    setup = set_up(config, data_of(config))
    optimizer = build(
        config.optimizer, setup.model, config.lr, momentum=config.momentum,
        weight_decay=config.weight_decay, adamw_lr=config.adamw_lr,
    )  # fmt: skip
    assert isinstance(optimizer, SteepestDescent)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    matrices = [row.parameter for row in roles(setup.model).matrices]
    kept: list[deque[Tensor]] = [deque(maxlen=_KEPT) for _ in matrices]
    lines: dict[str, list[float]] = defaultdict(list)
    for step in range(config.steps):
        share = factor(step, config.steps, config.warmup_steps, config.schedule, config.final)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        optimizer.zero_grad()
        setup.loss(setup.model, setup.batch(step)).backward()
        before = [W.detach().clone() for W in matrices]
        optimizer.step()
        for W, gradients in zip(matrices, kept, strict=True):
            assert W.grad is not None
            gradients.append(W.grad.clone())
        if step not in _times(config.steps):
            continue
        sides = [
            distances(optimizer, W, gradients) for W, gradients in zip(matrices, kept, strict=True)
        ]
        lines["left"].append(fmean(left for left, _ in sides))
        lines["right"].append(fmean(right for _, right in sides))
        lines["rank"].append(fmean(map(_rank, before, matrices)))
        if isinstance(optimizer, Shampoo):
            for key, angles in _angles(optimizer, matrices).items():
                lines[key].append(fmean(angles))
    return lines


def distances(
    optimizer: SteepestDescent, W: Tensor, gradients: Sequence[Tensor]
) -> tuple[float, float]:
    """Return how far averages of U Uᵀ and Uᵀ U are from multiples of the identity.

    U is L^-p G R^-p with the factors of the last step, or polar(G) of an optimizer without factors.

    Args:
        optimizer: its matrices are not cut.
        W: a matrix (out, in) of it.
        gradients: the last ones of W (out, in), the newest last.
    """
    G, state = torch.stack(list(gradients)), optimizer.state[W]
    left, right = state.get("left_root.0"), state.get("right_root.0")
    U = polar(G, "svd") if left is None and right is None else G
    U = U if left is None else left @ U
    U = U if right is None else U @ right
    weights = _BETA2 ** torch.arange(len(G) - 1, -1, -1, dtype=G.dtype)[:, None, None]
    return semi_orthogonality((weights * (U @ U.mT)).sum(0), (weights * (U.mT @ U)).sum(0))


def _rank(before: Tensor, W: Tensor) -> float:
    """The nuclear rank of the update over the largest that it can be: 1 if semi-orthogonal."""
    return float(nuclear_rank(before - W.detach())) / min(W.shape)


def _angles(optimizer: Shampoo, matrices: list[Tensor]) -> dict[str, list[float]]:
    """Sines of the angles by which adaptation turns Muon's update: from one side, and from both."""
    parts = [optimizer.adaptation(W) for W in matrices]
    return {
        "left adaptation": [sine(left @ muon, muon) for left, muon, _ in parts],
        "right adaptation": [sine(muon @ right, muon) for _, muon, right in parts],
        "both adaptations": [sine(left @ muon @ right, muon) for left, muon, right in parts],
    }


_SIZES = {"width": 48, "depth": 2, "context": 64, "batch": 8}
ALONG_A_RUN = Experiment(
    name="along-a-run",
    title="Adaptations and averages of updates along runs of a small GPT",
    kind="real data",
    measure=along_a_run,
    scales={
        "quick": Setting(
            sizes={"width": 16, "depth": 1, "context": 32, "batch": 4, "steps": 25},
            seeds=2, data="stdlib", minutes=0.1,
        ),
        "cpu": Setting(sizes={**_SIZES, "steps": 200}, seeds=3, data="wikitext2", minutes=3),
        "gpu": Setting(
            sizes={"width": 256, "depth": 6, "context": 256, "batch": 32, "steps": 1000},
            seeds=3, data="wikitext2", minutes=60, gigabytes=8, on_gpu=True,
        ),
        "paper": Setting(
            sizes={"width": 768, "depth": 18, "context": 2048, "batch": 64, "steps": 6104},
            seeds=3, data="c4", minutes=30_000, gigabytes=70, on_gpu=True,
        ),
    },
)  # fmt: skip


def _mean(name: str, key: str) -> Callable[[Numbers], float]:
    return lambda numbers: float(numbers["means"][name][key])


def _farther(name: str) -> Callable[[Numbers], float]:
    """The larger distance of both sides."""
    return lambda numbers: max(_mean(name, "left")(numbers), _mean(name, "right")(numbers))


def _lead(numbers: Numbers) -> float:
    others = (_farther(name)(numbers) for name in ("Muon", "Shampoo 1/4", "Shampoo 1/2"))
    return min(others) - _farther("KL-Shampoo")(numbers)


_HALF = "Shampoo 1/2"
CLAIMS = (
    Claim(
        name="adapted-from-both-sides",
        sentence="In training Shampoo 1/2 adapts Muon's update clearly, from the left and from the "
        "right.",
        place="Section 2",
        source="second-hand",
        experiment=ALONG_A_RUN,
        quantity="sine of the angle by which one side turns Muon's update, of the lesser side",
        value=lambda n: min(_mean(_HALF, f"{side} adaptation")(n) for side in ("left", "right")),
        low=0.1,
        checks=("D2.d",),
    ),
    Claim(
        name="kl-shampoo-is-most-semi-orthogonal",
        sentence="In training KL-Shampoo is the nearest to semi-orthogonal on average.",
        place="Abstract",
        source="ours",
        experiment=ALONG_A_RUN,
        quantity="least distance of Muon and both Shampoos less that of KL-Shampoo, farther side",
        value=_lead,
        low=0.0,
        paper="semi-orthogonal in expectation",
        checks=("D2.d",),
    ),
    Claim(
        name="kl-more-semi-orthogonal-than-shampoo",
        sentence="In training KL-Shampoo is nearer to semi-orthogonal on average than Shampoo 1/2.",
        place="Abstract",
        source="ours",
        experiment=ALONG_A_RUN,
        quantity="distance of Shampoo 1/2 less that of KL-Shampoo, of the farther side",
        value=lambda numbers: _farther(_HALF)(numbers) - _farther("KL-Shampoo")(numbers),
        low=0.0,
        checks=("D2.d",),
    ),
    Claim(
        name="shampoo-more-semi-orthogonal-than-muon",
        sentence="In training Shampoo 1/2 is nearer to semi-orthogonal on average than spectral "
        "descent.",
        place="Abstract",
        source="ours",
        experiment=ALONG_A_RUN,
        quantity="distance of the polar factor less that of Shampoo 1/2, of the farther side",
        value=lambda numbers: _farther("Muon")(numbers) - _farther(_HALF)(numbers),
        low=0.0,
        paper="semi-orthogonal in expectation",
        checks=("D2.d",),
    ),
    Claim(
        name="shampoo-updates-are-not-orthogonal",
        sentence="No single update of Shampoo 1/2 is nearly semi-orthogonal, whatever its average.",
        place="Abstract",
        source="first-hand",
        experiment=ALONG_A_RUN,
        quantity="nuclear rank of an update over the largest possible",
        value=_mean(_HALF, "rank"),
        high=0.9,
        paper="not enforced",
        checks=("D2.d",),
    ),
)
