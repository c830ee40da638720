"""Convolutional networks on CIFAR-10: width, depth, layers in a block, and the tangent kernel.

The lab's `ConvNet` in the form of the paper, with the readout of muP: entries of size 1 / fan_in.
Its residual branches are over √L already, which for gradient descent is depth-muP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from steepest.lab.data import ImageShape, load
from steepest.lab.losses import loss_of
from steepest.lab.models.convnet import ConvNet, ConvNetConfig
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting
from steepest.lab.papers.super_consistency.best_rates import drift_of, rate_curves
from steepest.lab.papers.super_consistency.digits_networks import LabelledBatch, reseeded, widths_of
from steepest.lab.papers.super_consistency.kernels import kernel_tops, late_spread
from steepest.lab.papers.super_consistency.width_sharpness import (
    sharpness_curves,
    sharpness_numbers,
)
from steepest.parametrize import parametrize
from steepest.transfer import rate_transfer, super_consistency

_SIDE = 32  # of CIFAR-10's images
_CLASSES = 10


def photo_batches(
    data: str, side: int, examples: int, batch: int, seed: int
) -> Callable[[int], LabelledBatch]:
    """Return batches of images that are averaged down to a side.

    LabelledBatch 0, of which curvature is taken, has `examples` images, all others `batch`.
    """
    images = load(data, augment=False)
    first, then = (
        images.training(batch=size, context=None, seed=seed) for size in (examples, batch)
    )

    def at(i: int) -> LabelledBatch:
        inputs, classes = then.batch(i) if i else first.batch(0)
        device = torch.get_default_device()
        return F.avg_pool2d(inputs, _SIDE // side).to(device), classes.to(device)

    return at


def conv_net(
    width: int = 8,
    depth: int = 3,
    *,
    side: int,
    layers: int = 1,
    residual: bool = False,
    large_readout: bool = False,
) -> ConvNet:
    """A ConvNet, its readout's entries of size 1 / fan_in or its root."""
    sizes = ConvNetConfig(width=width, depth=depth, residual=residual, layers_per_block=layers)
    model = ConvNet(sizes, ImageShape(channels=3, side=side, classes=_CLASSES))
    if not large_readout:
        with torch.no_grad():
            model.head.weight /= model.head.in_features**0.5
    return model


def conv_widths(
    seed: int,
    data: str,
    widths: tuple[int, ...],
    side: int,
    steps: int,
    rate_steps: int,
    batch: int,
    examples: int,
    lr: float,
    ntp_lr: float,
) -> Numbers:
    """Sharpness over widths with muP and in the NTK parametrization; the drift of the best rate."""
    batches = photo_batches(data, side, examples, batch, seed)
    net, ntp_net = (
        reseeded(partial(conv_net, side=side, large_readout=large), seed) for large in (False, True)
    )
    follow = partial(
        super_consistency, sizes=widths_of(widths), batches=batches, loss=loss_of,
        optimizer=torch.optim.SGD, steps=steps, seeds=1,
    )  # fmt: skip
    mup, ntp = follow(net, lr=lr), follow(ntp_net, lr=ntp_lr, rule="ntp")
    transfer = rate_transfer(
        net, widths_of(widths), batches, loss_of, lr=lr, optimizer=torch.optim.SGD,
        steps=rate_steps, seeds=1, grid_only=True,
    )  # fmt: skip
    return {
        "mup": sharpness_numbers(mup),
        "ntp": sharpness_numbers(ntp),
        "drift": drift_of(transfer),
        "curves": [
            sharpness_curves("ConvNets: sharpness along training under muP", mup),
            sharpness_curves("ConvNets: sharpness in the NTK parametrization", ntp),
            rate_curves("ConvNets: best rate by width", transfer),
        ],
    }


def conv_depths(
    seed: int,
    data: str,
    depths: tuple[int, ...],
    width: int,
    side: int,
    steps: int,
    batch: int,
    examples: int,
    lr: float,
) -> Numbers:
    """Drifts of the best rate of residual ConvNets, with one layer in a block and with two."""
    batches = photo_batches(data, side, examples, batch, seed)
    transfers = {
        name: rate_transfer(
            reseeded(partial(conv_net, width=width, side=side, layers=k, residual=True), seed),
            [{"depth": depth} for depth in depths], batches, loss_of, lr=lr,
            optimizer=torch.optim.SGD, steps=steps, seeds=1, grid_only=True,
        )
        for name, k in (("one", 1), ("two", 2))
    }  # fmt: skip
    return {
        **{name: drift_of(transfer) for name, transfer in transfers.items()},
        "curves": [
            rate_curves(f"ConvNets: best rate by depth, {name} layers in a block", transfer)
            for name, transfer in transfers.items()
        ],
    }


def conv_kernels(
    seed: int,
    data: str,
    widths: tuple[int, ...],
    side: int,
    steps: int,
    batch: int,
    examples: int,
    lr: float,
) -> Numbers:
    """Largest eigenvalue of the tangent kernel along training at every width, under muP."""
    batches = photo_batches(data, side, examples, batch, seed)
    build, base, tops = reseeded(partial(conv_net, side=side), seed), {"width": widths[0]}, []
    for size in widths_of(widths):
        made = parametrize(build, base, size, optimizer=torch.optim.SGD)
        tops.append(kernel_tops(made, lr, batches, steps))
    return {"tops": tops, "spread": late_spread(tops)}


_SMALL = {"side": 8, "batch": 32, "examples": 256, "lr": 0.125}
_LARGE = {"side": 32, "batch": 128, "examples": 1024, "lr": 0.125}

CONV_WIDTHS = Experiment(
    name="convnet-widths",
    title="ConvNets over widths, on CIFAR-10",
    kind="real data",
    measure=conv_widths,
    scales={
        "cpu": Setting(
            sizes={
                "widths": (8, 16, 32), "steps": 120, "rate_steps": 100, "ntp_lr": 0.125, **_SMALL
            },
            seeds=3,
            data="cifar10",
            minutes=1.5,
        ),
        "gpu": Setting(
            sizes={
                "widths": (16, 64, 256), "steps": 2000, "rate_steps": 400, "ntp_lr": 0.125, **_LARGE
            },
            seeds=3,
            data="cifar10",
            minutes=60,
            gigabytes=8,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={
                "widths": (32, 128, 512, 2048), "steps": 4000, "rate_steps": 4000,
                "ntp_lr": 0.125, **_LARGE,
            },
            seeds=3,
            data="cifar10",
            minutes=3000,
            gigabytes=40,
            on_gpu=True,
        ),
    },
)  # fmt: skip
CONV_DEPTHS = Experiment(
    name="convnet-depths",
    title="Residual ConvNets over depths, on CIFAR-10",
    kind="real data",
    measure=conv_depths,
    scales={
        "cpu": Setting(
            sizes={"depths": (3, 6, 12), "width": 8, "steps": 100, **_SMALL},
            seeds=3,
            data="cifar10",
            minutes=4,
        ),
        "gpu": Setting(
            sizes={"depths": (3, 12, 48), "width": 64, "steps": 1000, **_LARGE},
            seeds=3,
            data="cifar10",
            minutes=120,
            gigabytes=8,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={"depths": (3, 6, 12, 24, 48, 192), "width": 64, "steps": 8000, **_LARGE},
            seeds=3,
            data="cifar10",
            minutes=3000,
            gigabytes=20,
            on_gpu=True,
        ),
    },
)
CONV_KERNELS = Experiment(
    name="convnet-kernels",
    title="Largest eigenvalue of the tangent kernel of ConvNets, on CIFAR-10",
    kind="real data",
    measure=conv_kernels,
    scales={
        "cpu": Setting(
            sizes={"widths": (8, 16, 32), "steps": 120, **_SMALL},
            seeds=3,
            data="cifar10",
            minutes=2,
        ),
        "gpu": Setting(
            sizes={"widths": (16, 64, 256), "steps": 4000, **_LARGE},
            seeds=3,
            data="cifar10",
            minutes=30,
            gigabytes=20,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={"widths": (32, 128, 512, 2048), "steps": 4000, **_LARGE},
            seeds=3,
            data="cifar10",
            minutes=600,
            gigabytes=80,
            on_gpu=True,
        ),
    },
)

_SPREAD = "largest over smallest sharpness of all widths at the end"

CLAIMS = (
    Claim(
        name="convnet-sharpness-consistent",
        sentence="Under muP ConvNets of all widths have the same sharpness late in training on "
        "CIFAR-10.",
        place="Fig. 2; notebook plot_results_2",
        source="first-hand",
        experiment=CONV_WIDTHS,
        quantity=_SPREAD,
        value=lambda numbers: float(numbers["mup"]["spread"]),
        high=1.3,
        paper="curves of widths 32 to 2048 overlap",
        checks=("G1",),
    ),
    Claim(
        name="convnet-ntp-sharpness-differs",
        sentence="In the NTK parametrization the sharpness of ConvNets depends on the width.",
        place="Fig. 1",
        source="second-hand",
        experiment=CONV_WIDTHS,
        quantity=_SPREAD,
        value=lambda numbers: float(numbers["ntp"]["spread"]),
        low=2.0,
        checks=("G1",),
    ),
    Claim(
        name="convnet-width-rate-transfers",
        sentence="Under muP the best rate of ConvNets is the same at all widths on CIFAR-10.",
        place="Fig. 1",
        source="first-hand",
        experiment=CONV_WIDTHS,
        quantity="drift of the best rate over widths, octaves",
        value=lambda numbers: float(numbers["drift"]),
        low=-1.0,
        high=1.0,
        paper="0",
        checks=("G1",),
    ),
    Claim(
        name="convnet-depth-rate-transfers",
        sentence="With branches over √L and one layer in a block ConvNets of all depths have the "
        "same best rate.",
        place="Section 3, depth; notebook visualize",
        source="first-hand",
        experiment=CONV_DEPTHS,
        quantity="drift of the best rate over depths, octaves",
        value=lambda numbers: float(numbers["one"]),
        low=-1.0,
        high=1.0,
        paper="0.35 to 0.5, depths 3 to 48",
        checks=("G2",),
    ),
    Claim(
        name="convnet-two-layer-rate-moves",
        sentence="With two layers in a block the best rate of ConvNets grows with the depth.",
        place="Section 3, k = 2; notebook visualize",
        source="first-hand",
        experiment=CONV_DEPTHS,
        quantity="drift of the best rate over depths, octaves",
        value=lambda numbers: float(numbers["two"]),
        low=1.0,
        paper="from 0.25 to 1.2, depths 3 to 192",
        checks=("G2",),
    ),
    Claim(
        name="convnet-kernel-differs",
        sentence="Under muP the largest eigenvalue of a ConvNet's tangent kernel depends on the "
        "width.",
        place="Fig. 2; notebook plot_results_2",
        source="first-hand",
        experiment=CONV_KERNELS,
        quantity="largest over smallest eigenvalue of all widths, mean of the last three snapshots",
        value=lambda numbers: float(numbers["spread"]),
        low=2.0,
        paper="4, widths 32 to 2048",
        checks=("G3",),
    ),
)
