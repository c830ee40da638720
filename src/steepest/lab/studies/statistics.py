"""Means with intervals, and when a curve first reaches a level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from steepest.statistics import mean_interval


def interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any] | None:
    """Return the mean and Student's t-interval over independent seeds; open-ended for one value.

    >>> {k: round(v, 2) for k, v in interval([1.0, 2.0, 3.0]).items()}
    {'mean': 2.0, 'low': -0.48, 'high': 4.48, 'n': 3}
    """
    if not values:
        return None
    ends = mean_interval(values, confidence)
    low, high = (None, None) if ends is None else (ends.low, ends.high)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def first_reach(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Return where the curve y(x) first falls to `level`, between points by a straight line.

    >>> first_reach([0, 10, 20], [3.0, 2.0, 1.0], 1.5)
    15.0
    >>> first_reach([0, 10], [3.0, 2.0], 1.5) is None
    True
    """
    for i in range(len(y)):
        if y[i] <= level:
            if i == 0:
                return float(x[0])
            part = (y[i - 1] - level) / (y[i - 1] - y[i])
            return float(x[i - 1] + part * (x[i] - x[i - 1]))
    return None
