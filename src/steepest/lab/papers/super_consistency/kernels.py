"""The tangent kernel along training over widths: how far it moves, and its largest eigenvalue.

In this kernel every parameter is weighted by its own rate under the rule. So it is the same however
multipliers are folded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import fmean

import torch
from torch.optim.lr_scheduler import LambdaLR

from steepest.curvature import NTK, sharpness
from steepest.lab.losses import loss_of
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.super_consistency.digits_networks import (
    BASE_WIDTH,
    LARGE_READOUT,
    LabelledBatch,
    digit_images,
    normal_mlp,
    reseeded,
    spread_of,
    widths_of,
)
from steepest.lab.papers.super_consistency.width_sharpness import MUP_RATE, NTP_RATE
from steepest.parametrize import Parametrized, parametrize
from steepest.transfer import super_consistency

_MOVING = 20  # steps
_KERNEL_EXAMPLES = 128
SNAPSHOTS_OF_RUN = 12


def top_of_kernel(made: Parametrized, batch: LabelledBatch) -> float:
    """Return λ_max of the kernel of all outputs, every parameter weighted by its rate."""
    names: dict[float, list[str]] = {}
    for row in made.rows:
        names.setdefault(row.lr, []).append(row.name)
    kernel = sum(rate * NTK(made.model, loss_of, batch, names[rate]) for rate in names)
    return sharpness(kernel, tolerance=0.01).value  # type: ignore[arg-type]


def kernel_tops(
    made: Parametrized, lr: float, batches: Callable[[int], LabelledBatch], steps: int
) -> list[float]:
    """λ_max of the kernel of some examples at the start of a run, and twelve times in it."""
    optimizer = made.optimizer(lr)
    schedule = LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / max(1, steps // 10)))
    images, classes = batches(0)
    some = images[:_KERNEL_EXAMPLES], classes[:_KERNEL_EXAMPLES]
    tops = []
    for step in range(steps + 1):
        if step % (steps // SNAPSHOTS_OF_RUN) == 0:
            tops.append(top_of_kernel(made, some))
        optimizer.zero_grad()
        loss_of(made.model, batches(step)).backward()
        optimizer.step()
        schedule.step()
    return tops


def late_spread(tops: list[list[float]]) -> float:
    """Return the largest over the smallest of all sizes, the mean of the last three snapshots."""
    return fmean(spread_of([line[i] for line in tops]) for i in (-3, -2, -1))


def kernel_movement(seed: int, widths: tuple[int, ...]) -> Numbers:
    """How far the kernel moves in a few steps at every width, with muP and in the NTK one."""
    digits = digit_images()
    follow = partial(
        super_consistency, sizes=widths_of(widths), batches=lambda i: digits, loss=loss_of,
        optimizer=torch.optim.SGD, steps=_MOVING, every=5, seeds=1,
    )  # fmt: skip
    ntp_mlp = partial(normal_mlp, readout=LARGE_READOUT)
    mup = follow(reseeded(normal_mlp, seed), lr=MUP_RATE)
    ntp = follow(reseeded(ntp_mlp, seed), lr=NTP_RATE, rule="ntp")
    moved = {
        name: [row.movement[0] for row in followed.rows]
        for name, followed in (("muP", mup), ("NTK parametrization", ntp))
    }
    figure = curve(
        f"Movement of the tangent kernel in {_MOVING} steps", list(map(float, widths)), moved,
        across="width", up="relative change", log=True, log_across=True,
    )  # fmt: skip
    return {"mup": mup.movement, "ntp": ntp.movement, "moved": moved, "curves": [figure]}


def kernel_eigenvalues(seed: int, widths: tuple[int, ...], steps: int) -> Numbers:
    """Largest eigenvalue of the kernel along training at every width, under muP."""
    digits, base = digit_images(), {"width": BASE_WIDTH}
    tops = []
    for size in widths_of(widths):
        made = parametrize(reseeded(normal_mlp, seed), base, size, optimizer=torch.optim.SGD)
        tops.append(kernel_tops(made, MUP_RATE, lambda i: digits, steps))
    every = steps // SNAPSHOTS_OF_RUN
    figure = curve(
        "Largest eigenvalue of the tangent kernel under muP",
        [float(every * i) for i in range(len(tops[0]))],
        {f"width {width}": line for width, line in zip(widths, tops, strict=True)},
        across="step", up="λ_max, weighted by the rates", log=True,
    )  # fmt: skip
    return {"tops": tops, "spread": late_spread(tops), "curves": [figure]}


KERNEL_MOVEMENT = Experiment(
    name="kernel-movement",
    title="Movement of the tangent kernel over widths, on digits",
    kind="training",
    measure=kernel_movement,
    scales={
        "cpu": Setting(sizes={"widths": (64, 128, 256, 512, 1024)}, seeds=4, minutes=1.1),
        "gpu": Setting(
            sizes={"widths": (64, 256, 1024, 4096)}, seeds=5, minutes=2, gigabytes=8, on_gpu=True
        ),
        "paper": Setting(sizes={"widths": (64, 256, 1024, 2048)}, seeds=5, minutes=20),
    },
)
KERNEL_EIGENVALUES = Experiment(
    name="kernel-eigenvalues",
    title="Largest eigenvalue of the tangent kernel along training over widths, on digits",
    kind="training",
    measure=kernel_eigenvalues,
    scales={
        "cpu": Setting(sizes={"widths": (32, 128, 512), "steps": 120}, seeds=4, minutes=0.3),
        "gpu": Setting(
            sizes={"widths": (32, 256, 2048), "steps": 1200}, seeds=5, minutes=3, on_gpu=True
        ),
        "paper": Setting(sizes={"widths": (32, 256, 2048), "steps": 1200}, seeds=5, minutes=60),
    },
)

_SLOPE = f"slope of the movement in {_MOVING} steps against the width, both as logarithms"

CLAIMS = (
    Claim(
        name="mup-kernel-moves",
        sentence="Under muP the tangent kernel moves as far at every width.",
        place="abstract, feature learning",
        source="second-hand",
        experiment=KERNEL_MOVEMENT,
        quantity=_SLOPE,
        value=lambda numbers: float(numbers["mup"]),
        low=-0.2,
        high=0.2,
        paper="0",
        checks=("C5",),
    ),
    Claim(
        name="ntp-kernel-stays",
        sentence="In the NTK parametrization the kernel moves less the wider the network is.",
        place="abstract, feature learning",
        source="second-hand",
        experiment=KERNEL_MOVEMENT,
        quantity=_SLOPE,
        value=lambda numbers: float(numbers["ntp"]),
        high=-0.4,
        paper="-1/2",
        checks=("C5",),
    ),
    Claim(
        name="kernel-eigenvalue-differs",
        sentence="Under muP the largest eigenvalue of the tangent kernel depends on the width, as "
        "sharpness does not.",
        place="notebook plot_results_2",
        source="first-hand",
        experiment=KERNEL_EIGENVALUES,
        quantity="largest over smallest eigenvalue of all widths, mean of the last three snapshots",
        value=lambda numbers: float(numbers["spread"]),
        low=2.0,
        paper="4, widths 32 to 2048, on CIFAR-10",
        checks=("C9",),
    ),
)
