"""Intervals and slopes from few measurements, used everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.8
"""Of an interval, unless said otherwise."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its interval."""

    value: float
    low: float
    high: float


def student(
    value: float, error: float, freedom: int, confidence: float = CONFIDENCE
) -> Interval | None:
    """Return Student's t-interval of an estimate.

    Args:
        value: the estimate.
        error: its standard error, in the same unit.
        freedom: degrees of freedom of the standard error.
        confidence: the share of such intervals that hold the true value.

    Returns:
        The interval; None without a degree of freedom, and where a number is not finite.

    >>> interval = student(2.0, 1.0, 1000, confidence=0.95)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.038, 3.962)
    """
    from scipy.special import stdtrit  # of Student's t; `scipy.stats` takes longer to import

    if freedom < 1 or not math.isfinite(value) or not math.isfinite(error):
        return None
    half = float(stdtrit(freedom, 0.5 + confidence / 2)) * error
    return Interval(value, value - half, value + half)


def jackknife(
    estimate: Callable[[Sequence[int]], float], count: int, confidence: float = CONFIDENCE
) -> Interval | None:
    """Return an estimate with its interval, by leaving out one measurement at a time.

    Student's t with count - 1 degrees of freedom (Tukey, 1958). None for a single measurement, and
    if the estimate is not a number on all, or on all but one.

    Args:
        estimate: from the indices of the measurements that are kept to a number.
        count: of the measurements.
        confidence: as for `student`.

    >>> values = [1.0, 2.0, 3.0, 4.0]
    >>> mean = jackknife(lambda kept: fmean(values[i] for i in kept), 4, confidence=0.95)
    >>> round(mean.value, 2), round(mean.low, 2), round(mean.high, 2)
    (2.5, 0.45, 4.55)
    """
    if count < 2:
        return None
    whole = estimate(range(count))
    parts = [estimate([i for i in range(count) if i != out]) for out in range(count)]
    if not all(map(math.isfinite, (whole, *parts))):
        return None
    mean = fmean(parts)
    error = math.sqrt((count - 1) / count * sum((part - mean) ** 2 for part in parts))
    return student(whole, error, count - 1, confidence)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Return the mean of independent values with its interval; None for fewer than two.

    >>> interval = mean_interval([1.0, 2.0, 3.0], confidence=0.95)
    >>> round(interval.low, 3), round(interval.high, 3)
    (-0.484, 4.484)
    """
    n = len(values)
    if n < 2:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return student(float(np.mean(values)), error, n - 1, confidence)


def difference_interval(
    high: Sequence[float], low: Sequence[float], groups: Iterable[Sequence[float]]
) -> Interval | None:
    """Return the difference of two means; the variance is that within all groups together."""
    kept = list(groups)
    freedom = sum(len(group) - 1 for group in kept)
    within_groups = sum((value - fmean(group)) ** 2 for group in kept for value in group)
    variance = within_groups / max(1, freedom) * (1 / len(high) + 1 / len(low))
    return student(fmean(high) - fmean(low), math.sqrt(variance), freedom)


@dataclass(frozen=True)
class Line:
    """A line through points, by least squares.

    Attributes:
        coefficients: its value at the origin, and its slope along each axis: `(1 + axes,)`.
        covariance: of their errors, `(1 + axes, 1 + axes)`.
        freedom: degrees of freedom, the number of points less that of the coefficients.
    """

    coefficients: NDArray[np.float64]
    covariance: NDArray[np.float64]
    freedom: int

    @property
    def slopes(self) -> tuple[tuple[float, float], ...]:
        """The slope along each axis, with its standard error."""
        errors = np.sqrt(np.diag(self.covariance))
        return tuple(
            (float(a), float(b)) for a, b in zip(self.coefficients[1:], errors[1:], strict=True)
        )

    def at(self, place: Sequence[float]) -> Interval | None:
        """Return its value somewhere with the 80% interval; None without degrees of freedom."""
        there = np.array([1.0, *place])
        error = math.sqrt(there @ self.covariance @ there)
        return student(float(self.coefficients @ there), error, self.freedom)


def fit(places: Sequence[Sequence[float]], values: Sequence[float]) -> Line:
    """Return the line through values at some places, a list of coordinates for each value.

    >>> line = fit([[0], [0], [1], [1]], [0.1, -0.1, 1.1, 0.9])
    >>> round(line.at([3]).value, 6), round(line.slopes[0][0], 6)
    (3.0, 1.0)
    """
    X, y = np.column_stack([np.ones(len(values)), np.array(places)]), np.array(values)
    freedom = len(y) - X.shape[1]
    coefficients, *_ = np.linalg.lstsq(X, y, rcond=None)
    variance = float(np.square(y - X @ coefficients).sum()) / max(1, freedom)
    return Line(coefficients, variance * np.linalg.inv(X.T @ X), freedom)


def slope_interval(x: Sequence[float], runs: Sequence[Sequence[float]]) -> Interval | None:
    """Return the slope of a line through several runs, a value of each at each x.

    The interval is that of least squares, every value a point: what bends is in it as noise.
    """
    line = fit([[a] for _ in runs for a in x], [value for run in runs for value in run])
    return student(*line.slopes[0], line.freedom)


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of log2 y against log2 x by least squares; NaN where some y is not positive.

    >>> round(log_slope([1, 2, 4], [3, 6, 12]), 12)
    1.0
    """
    if min(y) <= 0:
        return math.nan
    return fit([[math.log2(a)] for a in x], [math.log2(b) for b in y]).slopes[0][0]
