"""Sharpness along training over widths: muP, the NTK parametrization, and random features.

Gradient descent on digits with the cross entropy. Sharpness is λ_max of the Hessian, rescaled by
the rates of the rule, over 2 / lr, so that 1 is the edge of stability at every width. At the end
means the mean of the last three of twelve snapshots. A measurement is the mean of two runs of every
size, as in the pilot.
"""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import Any

import torch

from steepest.lab.losses import loss_of
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.super_consistency.digits_networks import (
    LARGE_READOUT,
    digit_images,
    drawn_batches,
    normal_mlp,
    random_feature_mlp,
    reseeded,
    widths_of,
)
from steepest.transfer import SuperConsistency, super_consistency

RUNS_OF_SIZE = 2
MUP_RATE, NTP_RATE = 16.0, 0.5
"""0.5 N under muP and 0.5 in the NTK parametrization, at the base of width 32."""


def sharpness_numbers(followed: SuperConsistency) -> Numbers:
    """Return what claims need of sharpness over sizes."""
    return {
        "ratios": [list(row.ratios) for row in followed.rows],
        "ending": [fmean(row.ending) for row in followed.rows],
        "growth": [fmean(row.ending) / row.ratios[0] for row in followed.rows],
        "spread": followed.spread,
        "worst_spread": max(
            max(ratios) / min(ratios)
            for ratios in zip(*(row.ratios for row in followed.rows), strict=True)
        ),
        "loss_spread": followed.loss_spread,
        "movement_slope": followed.movement,
    }


def sharpness_curves(name: str, followed: SuperConsistency) -> dict[str, Any]:
    """Return the figure of sharpness over sizes along training."""
    lines = {
        f"{followed.against} {value:g}": list(row.ratios)
        for value, row in zip(followed.values, followed.rows, strict=True)
    }
    steps = list(map(float, followed.rows[0].steps))
    return curve(name, steps, lines, across="step", up="sharpness / threshold", log=True)


def width_sharpness(seed: int, widths: tuple[int, ...], steps: int) -> Numbers:
    """Follow every width with muP, in the NTK parametrization, and with features that stay."""
    digits = digit_images()
    follow = partial(
        super_consistency, sizes=widths_of(widths), batches=lambda i: digits, loss=loss_of,
        optimizer=torch.optim.SGD, steps=steps, seeds=RUNS_OF_SIZE,
    )  # fmt: skip
    ntp_mlp = partial(normal_mlp, readout=LARGE_READOUT)
    mup = follow(reseeded(normal_mlp, seed), lr=MUP_RATE)
    ntp = follow(reseeded(ntp_mlp, seed), lr=NTP_RATE, rule="ntp")
    features = follow(reseeded(random_feature_mlp, seed), lr=MUP_RATE)
    return {
        "mup": sharpness_numbers(mup),
        "ntp": sharpness_numbers(ntp),
        "random_features": sharpness_numbers(features),
        "curves": [
            sharpness_curves("Sharpness along training under muP", mup),
            sharpness_curves("Sharpness along training in the NTK parametrization", ntp),
        ],
    }


def batch_sharpness(seed: int, widths: tuple[int, ...], steps: int, batch: int) -> Numbers:
    """Follow every width under muP on random batches; sharpness is that of all images."""
    batches = drawn_batches(digit_images(), batch, seed)
    followed = super_consistency(
        reseeded(normal_mlp, seed), widths_of(widths), batches, loss_of, lr=MUP_RATE,
        optimizer=torch.optim.SGD, steps=steps, seeds=RUNS_OF_SIZE,
    )  # fmt: skip
    return sharpness_numbers(followed)


WIDTH_SHARPNESS = Experiment(
    name="width-sharpness",
    title="Sharpness along training over widths, on digits",
    kind="training",
    measure=width_sharpness,
    scales={
        "quick": Setting(sizes={"widths": (32, 128), "steps": 60}, seeds=2, minutes=0.1),
        "cpu": Setting(sizes={"widths": (32, 64, 128, 256, 512), "steps": 120}, seeds=4, minutes=4),
        "gpu": Setting(
            sizes={"widths": (64, 256, 1024, 4096), "steps": 400}, seeds=5, minutes=4, on_gpu=True
        ),
        "paper": Setting(sizes={"widths": (32, 128, 512, 2048), "steps": 400}, seeds=5, minutes=60),
    },
)
BATCH_SHARPNESS = Experiment(
    name="batch-sharpness",
    title="Sharpness over widths with small batches, on digits",
    kind="training",
    measure=batch_sharpness,
    scales={
        "cpu": Setting(
            sizes={"widths": (32, 128, 512), "steps": 240, "batch": 64}, seeds=4, minutes=1.5
        ),
        "gpu": Setting(
            sizes={"widths": (64, 256, 1024, 4096), "steps": 800, "batch": 64},
            seeds=5,
            minutes=4,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={"widths": (32, 128, 512, 2048), "steps": 800, "batch": 64}, seeds=5, minutes=60
        ),
    },
)

_SPREAD = "largest over smallest sharpness of all widths at the end"

CLAIMS = (
    Claim(
        name="mup-sharpness-consistent",
        sentence="Under muP networks of all widths have the same sharpness late in training.",
        place="Figs. 1 and 2, Section 3",
        source="first-hand",
        experiment=WIDTH_SHARPNESS,
        quantity=_SPREAD,
        value=lambda numbers: float(numbers["mup"]["spread"]),
        high=1.25,
        paper="curves of widths 32 to 2048 overlap",
        checks=("C1",),
    ),
    Claim(
        name="mup-reaches-edge",
        sentence="Under muP sharpness grows to the edge of stability at every width.",
        place="Figs. 1 and 2",
        source="first-hand",
        experiment=WIDTH_SHARPNESS,
        quantity="sharpness at the end over its threshold, mean over widths",
        value=lambda numbers: sum(numbers["mup"]["ending"]) / len(numbers["mup"]["ending"]),
        low=0.8,
        high=1.1,
        paper="about 1",
        checks=("C1",),
    ),
    Claim(
        name="losses-not-consistent",
        sentence="Under muP losses of different widths differ by more than sharpness does.",
        place="Fig. 2",
        source="first-hand",
        experiment=WIDTH_SHARPNESS,
        quantity="largest over smallest loss of all widths at the end, over that of the sharpness",
        value=lambda numbers: numbers["mup"]["loss_spread"] / numbers["mup"]["spread"],
        low=1.0,
        paper="loss 1.2 at width 128, 0.75 at 2048",
        checks=("C1",),
    ),
    Claim(
        name="ntp-sharpness-differs",
        sentence="In the NTK parametrization sharpness depends on the width.",
        place="Fig. 1",
        source="second-hand",
        experiment=WIDTH_SHARPNESS,
        quantity=_SPREAD,
        value=lambda numbers: float(numbers["ntp"]["spread"]),
        low=2.0,
        checks=("C1b",),
    ),
    Claim(
        name="ntp-does-not-sharpen",
        sentence="In the NTK parametrization wide networks do not sharpen.",
        place="Fig. 1",
        source="second-hand",
        experiment=WIDTH_SHARPNESS,
        quantity="sharpness at the end over that at the start, at the largest width",
        value=lambda numbers: float(numbers["ntp"]["growth"][-1]),
        high=1.0,
        checks=("C1b",),
    ),
    Claim(
        name="random-features-do-not-sharpen",
        sentence="Where the readout alone is trained there is no progressive sharpening.",
        place="Section 4, random features",
        source="second-hand",
        experiment=WIDTH_SHARPNESS,
        quantity="sharpness at the end over that at the start, the largest over widths",
        value=lambda numbers: max(numbers["random_features"]["growth"]),
        high=1.6,
        checks=("C8",),
    ),
    Claim(
        name="features-sharpen",
        sentence="Where all layers are trained, sharpness grows more than tenfold at every width.",
        place="Section 4",
        source="ours",
        experiment=WIDTH_SHARPNESS,
        quantity="sharpness at the end over that at the start, the smallest over widths",
        value=lambda numbers: min(numbers["mup"]["growth"]),
        low=10.0,
        checks=("C8",),
    ),
    Claim(
        name="consistent-with-small-batches",
        sentence="Sharpness is the same at all widths with small batches, too.",
        place="Section 3, batch size",
        source="second-hand",
        experiment=BATCH_SHARPNESS,
        quantity=_SPREAD,
        value=lambda numbers: float(numbers["spread"]),
        high=1.25,
        checks=("batch-size",),
    ),
)
