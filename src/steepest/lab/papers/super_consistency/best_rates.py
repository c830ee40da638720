"""The best rate over widths on digits: muP, the NTK and the standard parametrization, Adam, Muon.

A drift is by how many octaves the best rate of a width differs from that of the smallest, where it
does most. Rates are by factors of 2, on a grid that grows until the best lies inside; between them
a parabola. As in the pilot, a drift of at most one octave is transfer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from steepest.lab.losses import loss_of
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.super_consistency.digits_networks import (
    digit_images,
    drawn_batches,
    half_squared_error,
    normal_mlp,
    plain_mlp,
    reseeded,
    widths_of,
)
from steepest.transfer import RateTransfer, rate_transfer

FIRST_RATE = 32.0
"""Of muP with the cross entropy, where the search begins."""


def drift_of(transfer: RateTransfer) -> float:
    """Return the drift in octaves, after all steps."""
    return transfer.horizons[-1].drift


def rate_curves(name: str, transfer: RateTransfer) -> dict[str, Any]:
    """Return the figure of the best rate over sizes."""
    sizes = [float(next(iter(row.size.values()))) for row in transfer.rows]
    rates = {f"{transfer.rule}, {transfer.optimizer}": [2.0**row.octaves for row in transfer.rows]}
    return curve(name, sizes, rates, across="size", up="best rate", log=True, log_across=True)


def width_rates(seed: int, widths: tuple[int, ...], steps: int) -> Numbers:
    """Drifts of gradient descent: cross entropy with two rules, squared error with two."""
    digits = digit_images()
    search = partial(
        rate_transfer, sizes=widths_of(widths), batches=lambda i: digits, steps=steps, seeds=1,
        optimizer=torch.optim.SGD, grid_only=True,
    )  # fmt: skip
    normal, plain = reseeded(normal_mlp, seed), reseeded(plain_mlp, seed)
    transfers = {
        "mup": search(normal, loss=loss_of, lr=FIRST_RATE),
        "ntp": search(normal, loss=loss_of, lr=FIRST_RATE, rule="ntp"),
        "mup_squared": search(plain, loss=half_squared_error, lr=0.5),
        "sp_squared": search(plain, loss=half_squared_error, lr=0.5, rule="sp"),
    }
    scores = [row.score for row in transfers["mup"].rows]
    return {
        **{name: drift_of(transfer) for name, transfer in transfers.items()},
        "wider_is_better": scores[-1] / scores[0],
        "curves": [rate_curves(f"Best rate by width, {n}", t) for n, t in transfers.items()],
    }


def adam_rates(seed: int, widths: tuple[int, ...], steps: int) -> Numbers:
    """The drift of Adam with the cross entropy under muP."""
    digits = digit_images()
    transfer = rate_transfer(
        reseeded(plain_mlp, seed), widths_of(widths), lambda i: digits, loss_of, lr=0.01,
        optimizer=torch.optim.AdamW, steps=steps, seeds=1, grid_only=True,
    )  # fmt: skip
    return {"drift": drift_of(transfer), "curves": [rate_curves("Best rate of Adam", transfer)]}


def muon_rates(seed: int, widths: tuple[int, ...], steps: int, batch: int) -> Numbers:
    """Drifts of Muon with steps of size √(out / in), and 0.2 √max(out, in)."""
    batches = drawn_batches(digit_images(), batch, seed)
    search = partial(
        rate_transfer, reseeded(plain_mlp, seed), widths_of(widths), batches, half_squared_error,
        lr=0.03, optimizer="muon", steps=steps, seeds=1, grid_only=True,
    )  # fmt: skip
    spectral = search(settings={"scale": "spectral"})
    matched = search(rule="sp", settings={"scale": "match-rms-adamw"})
    return {
        "spectral": drift_of(spectral),
        "matched": drift_of(matched),
        "curves": [
            rate_curves("Best rate of Muon, steps √(out / in)", spectral),
            rate_curves("Best rate of Muon, steps 0.2 √max(out, in)", matched),
        ],
    }


WIDTH_RATES = Experiment(
    name="width-rates",
    title="Best rates of gradient descent over widths, on digits",
    kind="training",
    measure=width_rates,
    scales={
        "cpu": Setting(sizes={"widths": (32, 128, 512), "steps": 60}, seeds=5, minutes=1.5),
        "gpu": Setting(
            sizes={"widths": (32, 128, 512, 2048), "steps": 120}, seeds=5, minutes=6, on_gpu=True
        ),
        "paper": Setting(
            sizes={"widths": (32, 64, 128, 256, 512, 1024, 2048), "steps": 120},
            seeds=5,
            minutes=120,
        ),
    },
)
ADAM_RATES = Experiment(
    name="adam-rates",
    title="Best rates of Adam over widths, on digits",
    kind="training",
    measure=adam_rates,
    scales={
        "cpu": Setting(sizes={"widths": (32, 128, 512), "steps": 60}, seeds=5, minutes=1.5),
        "gpu": Setting(
            sizes={"widths": (32, 128, 512, 2048), "steps": 120}, seeds=5, minutes=3, on_gpu=True
        ),
        "paper": Setting(sizes={"widths": (32, 128, 512, 2048), "steps": 120}, seeds=5, minutes=60),
    },
)
MUON_RATES = Experiment(
    name="muon-rates",
    title="Best rates of Muon over widths, on digits",
    kind="training",
    measure=muon_rates,
    scales={
        "cpu": Setting(
            sizes={"widths": (32, 128, 384), "steps": 50, "batch": 128}, seeds=4, minutes=1.2
        ),
        "gpu": Setting(
            sizes={"widths": (32, 128, 512, 2048), "steps": 100, "batch": 128},
            seeds=5,
            minutes=4,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={"widths": (32, 128, 512, 2048), "steps": 100, "batch": 128},
            seeds=5,
            minutes=90,
        ),
    },
)

_DRIFT = "drift of the best rate over widths, octaves"

CLAIMS = (
    Claim(
        name="mup-rate-transfers",
        sentence="Under muP the best rate of gradient descent is the same at all widths.",
        place="Fig. 1",
        source="first-hand",
        experiment=WIDTH_RATES,
        quantity=_DRIFT,
        value=lambda numbers: float(numbers["mup"]),
        low=-1.0,
        high=1.0,
        paper="0",
        checks=("C3b",),
    ),
    Claim(
        name="wider-is-better",
        sentence="Under muP a wider network ends at a lower loss, each at its best rate.",
        place="Fig. 1",
        source="second-hand",
        experiment=WIDTH_RATES,
        quantity="loss of the largest width over that of the smallest",
        value=lambda numbers: float(numbers["wider_is_better"]),
        high=1.0,
        checks=("C3",),
    ),
    Claim(
        name="ntp-rate-moves",
        sentence="In the NTK parametrization the best rate for the cross entropy moves with the "
        "width.",
        place="Fig. 1",
        source="second-hand",
        experiment=WIDTH_RATES,
        quantity=_DRIFT,
        value=lambda numbers: float(numbers["ntp"]),
        low=2.0,
        checks=("C3b",),
    ),
    Claim(
        name="mup-rate-transfers-squared-error",
        sentence="Under muP the best rate is the same at all widths with the squared error, too.",
        place="Section 3",
        source="ours",
        experiment=WIDTH_RATES,
        quantity=_DRIFT,
        value=lambda numbers: float(numbers["mup_squared"]),
        low=-1.0,
        high=1.0,
        checks=("C3",),
    ),
    Claim(
        name="standard-rate-falls",
        sentence="With standard parametrization and squared error the best rate falls with the "
        "width.",
        place="Section 2",
        source="ours",
        experiment=WIDTH_RATES,
        quantity=_DRIFT,
        value=lambda numbers: float(numbers["sp_squared"]),
        high=-2.0,
        checks=("C3",),
    ),
    Claim(
        name="adam-rate-transfers",
        sentence="Under muP the best rate of Adam is the same at all widths, with cross entropy.",
        place="Section 3",
        source="second-hand",
        experiment=ADAM_RATES,
        quantity=_DRIFT,
        value=lambda numbers: float(numbers["drift"]),
        low=-1.0,
        high=1.0,
        checks=("C12",),
    ),
    Claim(
        name="muon-rate-transfers",
        sentence="Muon's best rate is the same at all widths, if steps have the spectral norm "
        "√(out / in).",
        place="Qiu et al., Table 1 (arXiv 2512.05620)",
        source="first-hand",
        experiment=MUON_RATES,
        quantity=_DRIFT,
        value=lambda numbers: float(numbers["spectral"]),
        low=-1.0,
        high=1.0,
        paper="0",
        checks=("C6",),
    ),
    Claim(
        name="muon-matched-rate-falls",
        sentence="Muon's best rate falls with the width, if steps match the size of AdamW's.",
        place="Qiu et al., Appendix G (arXiv 2512.05620)",
        source="first-hand",
        experiment=MUON_RATES,
        quantity=_DRIFT,
        value=lambda numbers: float(numbers["matched"]),
        high=-2.0,
        checks=("C6",),
    ),
)
