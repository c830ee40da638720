"""What an interval says of a limit: yes, no, or None, where it cannot tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from steepest.diagnosis.intervals import Interval

Outcome = bool | None


def within(interval: Interval | None, low: float, high: float) -> Outcome:
    """Whether a value lies within limits; None where its interval crosses one, or is missing.

    >>> within(Interval(0.0, -0.5, 0.5), -1, 1), within(Interval(0.0, -3.0, 3.0), -1, 1)
    (True, None)
    >>> within(Interval(2.0, 1.5, 2.5), -1, 1), within(None, -1, 1)
    (False, None)
    """
    if interval is None:
        return None
    if low <= interval.low and interval.high <= high:
        return True
    return False if interval.high < low or interval.low > high else None


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """False if one is false, else None if one is not known, else True."""
    kept = list(outcomes)
    return False if False in kept else None if None in kept else True


CONFIDENCE = 0.8


def around(value: float, variance: float, freedom: int) -> Interval | None:
    """Return the 80% interval of an estimate, Student's t; None without a degree of freedom."""
    from scipy.special import stdtrit

    if freedom < 1 or not math.isfinite(value) or not math.isfinite(variance):
        return None
    half = float(stdtrit(freedom, 0.5 + CONFIDENCE / 2)) * math.sqrt(variance)
    return Interval(value, value - half, value + half)


def slope_interval(x: Sequence[float], runs: Sequence[Sequence[float]]) -> Interval | None:
    """Return the slope of a line through several runs, a value of each at each x.

    The interval is that of least squares, every value a point: what bends is in it as noise.
    """
    middle, level = fmean(x), fmean(value for run in runs for value in run)
    spread = len(runs) * sum((a - middle) ** 2 for a in x)
    points = [(a - middle, value - level) for run in runs for a, value in zip(x, run, strict=True)]
    slope = sum(a * b for a, b in points) / spread
    freedom = len(points) - 2
    left = sum((b - slope * a) ** 2 for a, b in points)
    return around(slope, left / max(1, freedom) / spread, freedom)


def difference_interval(
    high: Sequence[float], low: Sequence[float], groups: Iterable[Sequence[float]]
) -> Interval | None:
    """Return the difference of two means; the variance is that within all groups together."""
    kept = list(groups)
    freedom = sum(len(group) - 1 for group in kept)
    within_groups = sum((value - fmean(group)) ** 2 for group in kept for value in group)
    variance = within_groups / max(1, freedom) * (1 / len(high) + 1 / len(low))
    return around(fmean(high) - fmean(low), variance, freedom)


def span(
    low: float, high: float, tried: Iterable[float], form: Callable[[float], str] = "{:.3g}".format
) -> str:
    """Return an interval of rates as text; beyond those that were tried only the side is known.

    >>> span(0.01, 0.2, [0.02, 0.04, 0.08, 0.16, 0.32])
    'below 0.02 to 0.2'
    """
    first, last = min(rates := list(tried)), max(rates)
    lower = f"below {form(first)}" if low < first else form(low)
    return f"{lower} to {f'above {form(last)}' if high > last else form(high)}"
