"""Means with intervals, and when a curve first reaches a level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any] | None:
    """Return the mean and Student's t-interval over independent seeds; open-ended for one value.

    >>> {k: round(v, 2) for k, v in interval([1.0, 2.0, 3.0]).items()}
    {'mean': 2.0, 'low': -0.48, 'high': 4.48, 'n': 3}
    """
    if not values:
        return None
    from scipy import stats

    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * float(np.std(values, ddof=1))
    half /= math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


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
