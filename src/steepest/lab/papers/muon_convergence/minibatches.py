"""Muon, Muon without momentum, AdamW and SGD on photos in batches, in a fair study (Fig. 1b).

The paper trains for five epochs of batches of 120. Here images are held out to judge by, every
optimizer has a grid of its own with the best rate inside, and AdamW takes the head in every run.
"""

from __future__ import annotations

from collections.abc import Callable

from steepest.lab.papers.claim import Claim, Comparison, Numbers, Setting

_SGD = "torch.optim:SGD:lr=0.05"
_OPTIMIZERS = ("muon", "spectral-descent", "adamw", _SGD)

MINIBATCHES = Comparison(
    name="photos-in-batches",
    title="Optimizers on CIFAR-10 in batches of 120",
    kind="real data",
    scales={
        "cpu": Setting(
            sizes={
                "model": "mlp", "width": 256, "depth": 2, "model_options": ("bias=false",),
                "batch": 120, "steps": 200, "optimizers": _OPTIMIZERS,
            },
            seeds=5,
            data="cifar10",
            minutes=8,
        ),
        "gpu": Setting(
            sizes={
                "model": "mlp", "width": 512, "depth": 2, "model_options": ("bias=false",),
                "batch": 120, "steps": 2000, "optimizers": _OPTIMIZERS,
            },
            seeds=5,
            data="cifar10",
            minutes=30,
            gigabytes=4,
            on_gpu=True,
        ),
    },
)  # fmt: skip


def _behind(other: str) -> Callable[[Numbers], float]:
    return lambda numbers: float(numbers[other] - numbers["muon"])


_GAP = "held-out loss of {} less that of Muon, nats per image"

CLAIMS = (
    Claim(
        name="muon-ahead-of-adamw-in-batches",
        sentence="In batches of 120 photos Muon ends below AdamW.",
        place="Fig. 1(b)",
        source="first-hand",
        experiment=MINIBATCHES,
        quantity=_GAP.format("AdamW"),
        value=_behind("adamw"),
        low=0.0,
        paper="0.30 against 1.15, training loss, Adam",
        checks=("G5",),
    ),
    Claim(
        name="muon-ahead-of-sgd-in-batches",
        sentence="In batches of 120 photos Muon ends below SGD.",
        place="Fig. 1(b)",
        source="first-hand",
        experiment=MINIBATCHES,
        quantity=_GAP.format("SGD"),
        value=_behind(_SGD),
        low=0.0,
        paper="0.30 against 1.22, training loss",
        checks=("G5",),
    ),
    Claim(
        name="momentum-matters-in-batches",
        sentence="In batches, unlike full batch, Muon without momentum ends above Muon.",
        place="Fig. 1(b)",
        source="first-hand",
        experiment=MINIBATCHES,
        quantity=_GAP.format("Muon without momentum"),
        value=_behind("spectral-descent"),
        low=0.0,
        paper="0.30 against 1.02, training loss",
        checks=("G5",),
    ),
)
