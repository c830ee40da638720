"""TEON against Muon with every way to compute a polar factor, each at its best rate."""

from __future__ import annotations

from steepest.lab.papers.claim import Claim, Comparison, Numbers, Setting
from steepest.lab.papers.teon.against_muon import TEON_GPU_SIZES, TEON_PAPER_SIZES, losses_apart

_POLAR_METHODS = ("svd", "jordan", "you", "polar-express")
_MUONS = {method: f"muon:lr=0.04,method={method}" for method in _POLAR_METHODS}
_TEONS = {method: f"teon:lr=0.04,method={method}" for method in _POLAR_METHODS}
_OPTIMIZERS = (*_MUONS.values(), *_TEONS.values())

TEON_POLAR_METHODS = Comparison(
    name="teon-polar-methods",
    title="TEON and Muon with four polar methods on text",
    kind="real data",
    scales={
        "cpu": Setting(
            sizes={
                "optimizers": _OPTIMIZERS,
                "width": 64, "depth": 4, "context": 64, "batch": 8, "steps": 100,
            },
            seeds=4, data="wikitext2", minutes=8,
        ),
        "gpu": Setting(
            sizes={"optimizers": _OPTIMIZERS, **TEON_GPU_SIZES, "width": 256},
            seeds=3, data="gutenberg", minutes=400, gigabytes=16, on_gpu=True,
        ),
        "paper": Setting(
            sizes={"optimizers": _OPTIMIZERS, **TEON_PAPER_SIZES, "steps": 4000},
            seeds=3, data="fineweb", minutes=20000, gigabytes=70, on_gpu=True,
        ),
    },
)  # fmt: skip


def _least_gain(numbers: Numbers) -> float:
    return min(losses_apart(_MUONS[method], _TEONS[method])(numbers) for method in _POLAR_METHODS)


def _second_best(numbers: Numbers) -> float:
    """The best loss of TEON with another method, minus that with Polar Express."""
    *others, express = (numbers[_TEONS[method]] for method in _POLAR_METHODS)
    return float(min(others) - express)


CLAIMS = (
    Claim(
        name="teon-gain-every-method",
        sentence="TEON is at least as good as Muon with every polar method.",
        place="ablation of polar methods",
        source="second-hand",
        experiment=TEON_POLAR_METHODS,
        quantity="loss of Muon minus that of TEON with the method where it is least, in nats per "
        "token",
        value=_least_gain,
        low=0.0,
        paper="above 0 with all",
        checks=("D2.f",),
    ),
    Claim(
        name="teon-polar-express-best",
        sentence="Polar Express is the best polar method for TEON.",
        place="ablation of polar methods",
        source="second-hand",
        experiment=TEON_POLAR_METHODS,
        quantity="loss with the best other method minus that with Polar Express, in nats per token",
        value=_second_best,
        low=0.0,
        paper="Polar Express, then SVD, then Jordan and You",
        checks=("D2.f",),
    ),
    Claim(
        name="teon-polar-methods-level",
        sentence="At this size the least exact method, Jordan's, is level with the exact one.",
        place="expected here of small models",
        source="ours",
        experiment=TEON_POLAR_METHODS,
        quantity="loss of TEON with Jordan's method minus that with the SVD, in nats per token",
        value=losses_apart(_TEONS["jordan"], _TEONS["svd"]),
        low=-0.03,
        high=0.03,
        checks=("D2.f",),
    ),
)
