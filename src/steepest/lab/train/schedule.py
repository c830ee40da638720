"""The learning rate over a run, as a factor on the rate that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple

Schedule = Literal["constant", "linear", "cosine", "wsd", "teon", "galore"]

DECAY: Final = 0.4
"""Share of all steps in which "wsd" decays, unless another is asked for."""

_TEON_HELD, _GALORE_WARMUP = 0.4, 0.1


def factor(
    step: int, steps: int, warmup: int, schedule: Schedule, final: float, decay: float = DECAY
) -> float:
    """Return the factor on the learning rate in a step: a linear warm-up, then the schedule.

    In the warm-up it is (t + 1) / w in step t. After it, with T steps and p = (t - w) / (T - w):

    | schedule | factor                                                                    |
    |----------|---------------------------------------------------------------------------|
    | constant | 1                                                                         |
    | linear   | 1 - (1 - f) p                                                             |
    | cosine   | f + (1 - f) (1 + cos π p) / 2                                             |
    | wsd      | 1 up to step h = T - dT, then 1 - (1 - f) (t - h) / (T - h)               |
    | teon     | 1 up to step h = 0.4 T, then 1 - (t - h) / (T - h), but at least f        |
    | galore   | as cosine                                                                 |

    "wsd" stands for warm-up, stable, decay. "teon" is "constant-linear" in the code of Muon+
    (K1seki221/MuonPlus), which comes from the group of TEON: no warm-up, and f = 0.1. "galore" is
    that of GaLore (jiaweizzhao/GaLore): a warm-up over a tenth of all steps, and f = 0.1. Its
    first step has the factor 0, where ours has 1/w. `default_warmup` and `default_final` give these
    numbers.

    Args:
        step: t, from 0 to T - 1.
        steps: T.
        warmup: w, the number of steps in which the rate rises.
        schedule: the name of the schedule.
        final: f, the factor that is reached after the last step.
        decay: d, the share of all steps in which "wsd" decays; dT is rounded to a whole number.

    >>> [round(factor(t, 8, 2, "linear", 0.0), 2) for t in range(8)]
    [0.5, 1.0, 1.0, 0.83, 0.67, 0.5, 0.33, 0.17]
    >>> [factor(t, 8, 2, "wsd", 0.0, decay=0.5) for t in range(8)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    curve = RATE_CURVES[schedule]
    held = curve.held(steps, decay)
    return curve.shape(_progress(step, max(warmup, held), steps), final)


def _progress(step: int, start: int, steps: int) -> float:
    """From 0 up to the step `start`, then linearly to 1."""
    return max(0, step - start) / max(1, steps - start)


def _constant(progress: float, final: float) -> float:
    return 1.0


def _linear(progress: float, final: float) -> float:
    return 1 - (1 - final) * progress


def _cosine(progress: float, final: float) -> float:
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def _floored(progress: float, final: float) -> float:
    return max(final, 1 - progress)


class RateCurve(NamedTuple):
    """A schedule.

    Attributes:
        shape: from the progress of the decay, from 0 to 1, and the final factor to the factor.
        held: from the number of steps and the share of the decay to the step where it begins.
        goes_on: whether the steps before that are the same in a longer run.
        warmup: share of all steps in which the rate rises; None for the default of the lab.
        final: the final factor that the schedule has by default.
    """

    shape: Callable[[float, float], float]
    held: Callable[[int, float], int] = lambda steps, decay: 0
    goes_on: bool = False
    warmup: float | None = None
    final: float = 0.0


RATE_CURVES: Mapping[Schedule, RateCurve] = {
    "constant": RateCurve(_constant, lambda steps, decay: steps, goes_on=True),
    "linear": RateCurve(_linear),
    "cosine": RateCurve(_cosine),
    "wsd": RateCurve(_linear, lambda steps, decay: steps - round(decay * steps), goes_on=True),
    "teon": RateCurve(
        _floored, lambda steps, decay: int(_TEON_HELD * steps), goes_on=True, warmup=0.0, final=0.1
    ),
    "galore": RateCurve(_cosine, warmup=_GALORE_WARMUP, final=0.1),
}
"""From a name to what it stands for."""


def default_warmup(schedule: Schedule, steps: int) -> int:
    """Return the number of steps in which the rate rises, where nobody asks for another.

    It is 20, or a fifth of fewer than 100; of "teon" 0, and of "galore" a tenth of all.

    >>> default_warmup("linear", 300), default_warmup("linear", 40), default_warmup("galore", 300)
    (20, 8, 30)
    """
    share = RATE_CURVES[schedule].warmup
    return min(20, steps // 5) if share is None else int(share * steps)


def default_final(schedule: Schedule) -> float:
    """Return the final factor that a schedule has where nobody asks for another.

    >>> default_final("cosine"), default_final("galore")
    (0.0, 0.1)
    """
    return RATE_CURVES[schedule].final


def can_go_on(schedule: Schedule, steps: int, more: int, decay: float = DECAY) -> int | None:
    """Return the step from which a finished run can go on to more steps, or None.

    From there the result is that of a run that was planned longer at once, bit for bit, because all
    factors before it are the same. The warm-up has to be of the same number of steps. The step is
    the last one for "constant", and the one where the decay begins for "wsd" and "teon". The run
    needs its checkpoint of that step. "linear", "cosine" and "galore" decay from the end of the
    warm-up on, at a speed that depends on the number of steps, so they give None.

    Args:
        schedule: of both runs.
        steps: of the finished run.
        more: of the longer one; with fewer steps than the run had the answer is None.
        decay: the share of "wsd", the same for both.

    >>> can_go_on("constant", 100, 200), can_go_on("wsd", 100, 200), can_go_on("cosine", 100, 200)
    (100, 60, None)
    """
    curve = RATE_CURVES[schedule]
    return curve.held(steps, decay) if curve.goes_on and more >= steps else None
