"""Intervals from few batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

WORTH_IT = 1.1
"""What is less simple is to decrease the loss by this factor more."""
SURE = 0.95
"""Confidence of the intervals that a plan follows; verdicts follow those of 0.8."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its interval."""

    value: float
    low: float
    high: float


def worth_it(log_ratio: Interval) -> bool | None:
    """Whether a ratio of decreases speaks for what is above; None where that cannot be told.

    Yes needs an estimate above `WORTH_IT` and an interval above 1, no an interval below `WORTH_IT`.
    """
    if log_ratio.low > 0 and log_ratio.value > math.log(WORTH_IT):
        return True
    return False if log_ratio.high < math.log(WORTH_IT) else None


def jackknife(
    estimate: Callable[[Sequence[int]], float], count: int, confidence: float = 0.8
) -> Interval | None:
    """Return an estimate with its interval, by leaving out one batch at a time.

    Student's t with count - 1 degrees of freedom (Tukey, 1958). None if the estimate is not a
    number on all, or on all but one.

    >>> values = [1.0, 2.0, 3.0, 4.0]
    >>> found = jackknife(lambda kept: fmean(values[i] for i in kept), 4, confidence=0.95)
    >>> round(found.value, 2), round(found.low, 2), round(found.high, 2)
    (2.5, 0.45, 4.55)
    """
    from scipy.special import stdtrit  # of Student's t; `scipy.stats` takes seconds to import

    whole = estimate(range(count))
    parts = [estimate([i for i in range(count) if i != out]) for out in range(count)]
    if not all(map(math.isfinite, (whole, *parts))):
        return None
    mean = fmean(parts)
    error = math.sqrt((count - 1) / count * sum((part - mean) ** 2 for part in parts))
    half = float(stdtrit(count - 1, 0.5 + confidence / 2)) * error
    return Interval(whole, whole - half, whole + half)
