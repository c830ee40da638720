"""Depth: residual networks on digits with branches over the root of the depth, and without.

Blocks are x + W tanh(x), or have a second layer inside. Depth-muP multiplies branches by 1 / √L.
"""

from __future__ import annotations

from functools import partial

import torch

from steepest.lab.losses import loss_of
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting
from steepest.lab.papers.super_consistency.best_rates import drift_of, rate_curves
from steepest.lab.papers.super_consistency.digits_networks import (
    digit_images,
    reseeded,
    residual_mlp,
)
from steepest.lab.papers.super_consistency.width_sharpness import (
    RUNS_OF_SIZE,
    sharpness_curves,
    sharpness_numbers,
)
from steepest.transfer import rate_transfer, super_consistency

_RATE = 32.0  # 0.5 N at the width 64
_BRANCHES = ("1.*.last",)


def depth_sharpness(seed: int, depths: tuple[int, ...], steps: int) -> Numbers:
    """Follow every depth: one layer in a block, two, and branches that are not scaled."""
    digits = digit_images()
    follow = partial(
        super_consistency, sizes=[{"depth": depth} for depth in depths],
        batches=lambda i: digits, loss=loss_of, lr=_RATE, optimizer=torch.optim.SGD, steps=steps,
        seeds=RUNS_OF_SIZE,
    )  # fmt: skip
    one, two = (reseeded(partial(residual_mlp, layers=k), seed) for k in (1, 2))
    scaled = follow(one, rule="depth-mup", branches=_BRANCHES)
    unscaled = follow(one)
    deeper = follow(two, rule="depth-mup", branches=_BRANCHES)
    return {
        "scaled": sharpness_numbers(scaled),
        "unscaled": sharpness_numbers(unscaled),
        "two_layers": sharpness_numbers(deeper),
        "curves": [
            sharpness_curves("Sharpness along training under depth-muP", scaled),
            sharpness_curves("Sharpness along training, branches not scaled", unscaled),
        ],
    }


def depth_rates(seed: int, depths: tuple[int, ...], steps: int) -> Numbers:
    """Drifts of the best rate over depths, with one layer in a block and with two."""
    digits = digit_images()
    transfers = {
        name: rate_transfer(
            reseeded(partial(residual_mlp, layers=layers), seed),
            [{"depth": depth} for depth in depths], lambda i: digits, loss_of, lr=_RATE,
            rule="depth-mup", optimizer=torch.optim.SGD, steps=steps, seeds=1, grid_only=True,
            branches=_BRANCHES,
        )
        for name, layers in (("one", 1), ("two", 2))
    }  # fmt: skip
    return {
        **{name: drift_of(transfer) for name, transfer in transfers.items()},
        "curves": [rate_curves(f"Best rate by depth, {n} layers", t) for n, t in transfers.items()],
    }


DEPTH_SHARPNESS = Experiment(
    name="depth-sharpness",
    title="Sharpness along training over depths, on digits",
    kind="training",
    measure=depth_sharpness,
    scales={
        "cpu": Setting(sizes={"depths": (2, 8, 32), "steps": 120}, seeds=4, minutes=3),
        "gpu": Setting(
            sizes={"depths": (2, 8, 32, 128), "steps": 240}, seeds=5, minutes=10, on_gpu=True
        ),
        "paper": Setting(
            sizes={"depths": (3, 6, 12, 24, 48, 96, 192), "steps": 240}, seeds=5, minutes=120
        ),
    },
)
DEPTH_RATES = Experiment(
    name="depth-rates",
    title="Best rates over depths, on digits",
    kind="training",
    measure=depth_rates,
    scales={
        "cpu": Setting(sizes={"depths": (2, 8, 32), "steps": 60}, seeds=4, minutes=1.2),
        "gpu": Setting(
            sizes={"depths": (2, 8, 32, 128), "steps": 120}, seeds=5, minutes=10, on_gpu=True
        ),
        "paper": Setting(
            sizes={"depths": (3, 6, 12, 24, 48, 96, 192), "steps": 120}, seeds=5, minutes=120
        ),
    },
)

_SPREAD = "largest over smallest sharpness of all depths, at the snapshot with the most"
_DRIFT = "drift of the best rate over depths, octaves"

CLAIMS = (
    Claim(
        name="depth-mup-sharpness-consistent",
        sentence="Under depth-muP with one layer in a block all depths have the same sharpness.",
        place="Section 3, depth",
        source="first-hand",
        experiment=DEPTH_SHARPNESS,
        quantity=_SPREAD,
        value=lambda numbers: float(numbers["scaled"]["worst_spread"]),
        high=1.4,
        paper="curves of depths 3 to 48 overlap",
        checks=("C7",),
    ),
    Claim(
        name="unscaled-depth-sharpness-differs",
        sentence="Where branches are not scaled, sharpness depends on the depth.",
        place="Section 3, depth",
        source="ours",
        experiment=DEPTH_SHARPNESS,
        quantity=_SPREAD,
        value=lambda numbers: float(numbers["unscaled"]["worst_spread"]),
        low=4.0,
        checks=("C7",),
    ),
    Claim(
        name="two-layer-blocks-differ",
        sentence="With two layers in a block sharpness depends on the depth, depth-muP or not.",
        place="Section 3, k = 2",
        source="first-hand",
        experiment=DEPTH_SHARPNESS,
        quantity=_SPREAD,
        value=lambda numbers: float(numbers["two_layers"]["worst_spread"]),
        low=1.4,
        paper="shallow networks have the largest",
        checks=("C7b",),
    ),
    Claim(
        name="depth-mup-rate-transfers",
        sentence="Under depth-muP with one layer in a block the best rate is the same at all "
        "depths.",
        place="Section 3, depth",
        source="first-hand",
        experiment=DEPTH_RATES,
        quantity=_DRIFT,
        value=lambda numbers: float(numbers["one"]),
        low=-1.0,
        high=1.0,
        paper="0.35 to 0.5, depths 3 to 48",
        checks=("C7",),
    ),
    Claim(
        name="two-layer-blocks-rate-moves",
        sentence="With two layers in a block the best rate grows with the depth.",
        place="Section 3, k = 2",
        source="first-hand",
        experiment=DEPTH_RATES,
        quantity=_DRIFT,
        value=lambda numbers: float(numbers["two"]),
        low=1.0,
        paper="from 0.25 to 1.2, depths 3 to 192",
        checks=("C7b",),
    ),
)
