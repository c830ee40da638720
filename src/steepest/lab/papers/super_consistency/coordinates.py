"""Coordinate checks: how far every layer's output moves in a few steps, over widths, on digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from steepest.lab.losses import loss_of
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.super_consistency.digits_networks import (
    LARGE_READOUT,
    digit_images,
    normal_mlp,
    plain_mlp,
    reseeded,
    widths_of,
)
from steepest.transfer import coordinate_check

_STEPS = 5
_LAYERS = {"first layer": "0", "second layer": "2", "logits": "4"}
_RUNS: dict[str, tuple[Callable[..., nn.Module], float, dict[str, Any]]] = {
    "mup": (normal_mlp, 16.0, {}),
    "ntp": (partial(normal_mlp, readout=LARGE_READOUT), 0.5, {"rule": "ntp"}),
    "sp": (partial(plain_mlp, large_readout=True), 0.05, {"rule": "sp"}),
}
"""For each rule the network, its rate at the base, and the rule."""


def coordinate_slopes(seed: int, widths: tuple[int, ...]) -> Numbers:
    """The slope of RMS(h_t - h_0) against the width for every layer and rule, from three runs."""
    batch = digit_images()
    slopes, figures = {}, []
    for name, (build, lr, rule) in _RUNS.items():
        check = coordinate_check(
            reseeded(build, seed), widths_of(widths), batch, loss_of, lr=lr,
            optimizer=torch.optim.SGD, base={"width": 32}, steps=(_STEPS,), seeds=3, **rule,
        )  # fmt: skip
        slopes[name] = {layer: check[key, _STEPS].slope for layer, key in _LAYERS.items()}
        changes = {layer: list(check[key, _STEPS].changes) for layer, key in _LAYERS.items()}
        figures.append(
            curve(
                f"Change of outputs in {_STEPS} steps, {name}",
                list(map(float, widths)),
                changes,
                across="width",
                up="RMS of the change",
                log=True,
                log_across=True,
            )
        )
    return {**slopes, "curves": figures}


WIDTH_COORDINATES = Experiment(
    name="coordinates",
    title="Coordinate checks over widths, on digits",
    kind="training",
    measure=coordinate_slopes,
    scales={
        "quick": Setting(sizes={"widths": (64, 512)}, seeds=2, minutes=0.1),
        "cpu": Setting(sizes={"widths": (64, 128, 256, 512, 1024)}, seeds=5, minutes=0.5),
        "gpu": Setting(sizes={"widths": (64, 512, 4096)}, seeds=5, minutes=1, on_gpu=True),
        "paper": Setting(sizes={"widths": (64, 256, 1024, 4096)}, seeds=5, minutes=5),
    },
)

_SLOPE = f"slope of the change in {_STEPS} steps against the width, both as logarithms"

CLAIMS = (
    Claim(
        name="mup-layers-move",
        sentence="Under muP the outputs of every layer move as far at every width.",
        place="Section 2; coordinate checks of the official code",
        source="first-hand",
        experiment=WIDTH_COORDINATES,
        quantity=f"{_SLOPE}, the steepest of three layers",
        value=lambda numbers: max(map(abs, numbers["mup"].values())),
        high=0.1,
        paper="0",
        checks=("C2",),
    ),
    Claim(
        name="ntp-features-freeze",
        sentence="In the NTK parametrization hidden layers freeze as the width grows.",
        place="Section 2",
        source="second-hand",
        experiment=WIDTH_COORDINATES,
        quantity=f"{_SLOPE}, the flatter of two hidden layers",
        value=lambda numbers: max(numbers["ntp"]["first layer"], numbers["ntp"]["second layer"]),
        high=-0.4,
        paper="-1/2",
        checks=("C2",),
    ),
    Claim(
        name="standard-logits-grow",
        sentence="With standard parametrization the change of the logits grows with the width.",
        place="Section 2",
        source="second-hand",
        experiment=WIDTH_COORDINATES,
        quantity=f"{_SLOPE}, of the logits",
        value=lambda numbers: float(numbers["sp"]["logits"]),
        low=0.25,
        checks=("C2",),
    ),
    Claim(
        name="standard-logits-stay",
        sentence="False on purpose: with standard parametrization the logits move as far at every "
        "width.",
        place="control",
        source="ours",
        experiment=WIDTH_COORDINATES,
        quantity=f"{_SLOPE}, of the logits",
        value=lambda numbers: float(numbers["sp"]["logits"]),
        low=-0.1,
        high=0.1,
        control=True,
    ),
)
