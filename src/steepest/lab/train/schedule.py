"""The learning rate over a run, as a factor on the rate that was asked for."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def factor(step: int, steps: int, warmup: int, schedule: Schedule, final: float) -> float:
    """Return the factor for `step` of `steps`: a linear warm-up, then the decay to `final`.

    >>> [round(factor(t, 8, 2, "linear", 0.0), 2) for t in range(8)]
    [0.5, 1.0, 1.0, 0.83, 0.67, 0.5, 0.33, 0.17]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1 - (1 - final) * progress
    if schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    return 1.0
