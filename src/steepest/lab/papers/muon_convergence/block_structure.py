"""How blockwise diagonal the Hessian is, as the abstract of version 1 has it; version 2 does not.

Shares are of ‖H‖_F², the sum of squares over all pairs of weights. They are measured at the
start of a run of Muon without momentum, half-way and at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from steepest import SpectralDescent
from steepest.curvature import Hessian, blockwise_diagonal
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.muon_convergence.few_images import (
    bias_free_mlp,
    cross_entropy_of,
    few_images,
)


def hessian_blocks_along(
    seed: int, data: str, images: int, hidden: tuple[int, ...], rate: float, steps: int
) -> Numbers:
    """Train by Muon without momentum; measure the share of diagonal blocks at three moments.

    Args:
        seed: of the weights.
        data: images, as `--data` takes them.
        images: how many.
        hidden: widths of the hidden layers.
        rate: of Muon.
        steps: how many.
    """
    source = few_images(data, images)
    model = bias_free_mlp(source, hidden)
    optimizer = SpectralDescent(list(model.parameters()), rate, scale="none", method="svd")
    at, matrices, rows, even = [0, steps // 2, steps], [], [], 0.0
    for step in range(steps + 1):
        if step in at:
            shares = blockwise_diagonal(Hessian(model, cross_entropy_of, source.batch))
            matrices.append(float(shares.across_matrices))
            rows.append(fmean(map(float, shares.across_rows.values())))
            even = shares.across_matrices.even
        optimizer.zero_grad()
        cross_entropy_of(model, source.batch).backward()
        optimizer.step()
    figure = curve(
        "Share of diagonal blocks in the squared Hessian", at,
        {"matrices": matrices, "rows, mean over matrices": rows, "matrices, without structure":
         [even] * len(at)},
        across="step", up="share",
    )  # fmt: skip
    return {"matrices": matrices, "rows": rows, "even": even, "curves": [figure]}


HESSIAN_BLOCKS = Experiment(
    name="hessian-blocks",
    title="The share of diagonal blocks in the Hessian on 60 digits of MNIST",
    kind="real data",
    measure=hessian_blocks_along,
    scales={
        "quick": Setting(
            sizes={"images": 40, "hidden": (32, 16), "rate": 0.1, "steps": 10},
            seeds=2,
            data="digits",
            minutes=0.1,
        ),
        "cpu": Setting(
            sizes={"images": 60, "hidden": (128, 64), "rate": 0.1, "steps": 10},
            seeds=5,
            data="mnist",
            minutes=2,
        ),
        "gpu": Setting(
            sizes={"images": 6000, "hidden": (1024, 1024), "rate": 0.02, "steps": 50},
            seeds=5,
            data="mnist",
            minutes=10,
            gigabytes=4,
            on_gpu=True,
        ),
    },
)


def _mean(name: str) -> Callable[[Numbers], float]:
    return lambda numbers: fmean(numbers[name])


CLAIMS = (
    Claim(
        name="hessian-blocks-of-matrices",
        sentence="The Hessian is nearly block diagonal over the matrices of a network.",
        place="abstract of version 1",
        source="first-hand",
        experiment=HESSIAN_BLOCKS,
        quantity="share of the squared Hessian in the blocks of the matrices, mean of the run",
        value=_mean("matrices"),
        low=0.5,
        paper="approximately",
    ),
    Claim(
        name="hessian-blocks-of-rows",
        sentence="The Hessian of a matrix is nearly block diagonal over its rows.",
        place="abstract of version 1; assumption 4.5",
        source="first-hand",
        experiment=HESSIAN_BLOCKS,
        quantity="share of the squared Hessian of a matrix in the blocks of its rows, mean of all",
        value=_mean("rows"),
        low=0.5,
        paper="approximately",
    ),
)
