"""Intervals and slopes against SciPy and the textbook."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from steepest.statistics import (
    difference_interval,
    fit,
    jackknife,
    log_slope,
    mean_interval,
    slope_interval,
    student,
)


def test_intervals_are_those_of_the_textbook() -> None:
    rng = np.random.default_rng(0)
    x, runs = [0.0, 1.0, 3.0], rng.normal(size=(4, 3))
    line = stats.linregress(np.tile(x, 4), runs.ravel())
    slope = slope_interval(x, runs.tolist())
    assert slope is not None
    assert slope.value == pytest.approx(line.slope, abs=1e-12)
    half = stats.t.ppf(0.9, 10) * line.stderr
    assert slope.high - slope.value == pytest.approx(half, abs=1e-12)
    a, b = rng.normal(size=3), rng.normal(size=3)
    both = difference_interval(a.tolist(), b.tolist(), [a.tolist(), b.tolist()])
    ends = stats.ttest_ind(a, b).confidence_interval(0.8)
    assert both is not None
    assert (both.low, both.high) == pytest.approx((ends.low, ends.high), abs=1e-12)
    mean = mean_interval(a.tolist())
    ends = stats.t.interval(0.8, 2, np.mean(a), stats.sem(a))
    assert mean is not None
    assert (mean.low, mean.high) == pytest.approx(ends, abs=1e-12)


def test_an_interval_needs_a_degree_of_freedom_and_numbers() -> None:
    assert slope_interval([0.0, 1.0], [[1.0, 2.0]]) is None  # two points have no noise
    assert difference_interval([1.0], [2.0], [[1.0], [2.0]]) is None
    assert mean_interval([1.0]) is None
    assert jackknife(lambda kept: fmean(kept), 1) is None
    assert jackknife(lambda kept: math.nan, 5) is None
    assert fit([[0], [1]], [1, 2]).at([2]) is None
    for value, error in ((math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)):
        assert student(value, error, 3) is None


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 400 slopes of no drift about 80% of the intervals hold zero, with two seeds and three."""
    rng = np.random.default_rng(1)
    for seeds in (2, 3):
        held = 0
        for _ in range(400):
            slope = slope_interval([0.0, 1.0, 2.0], rng.normal(size=(seeds, 3)).tolist())
            assert slope is not None
            held += slope.low <= 0 <= slope.high
        assert 0.74 <= held / 400 <= 0.86


def test_jackknife_is_the_standard_error_of_a_mean() -> None:
    values = [1.0, 4.0, 2.0, 7.0, 3.0]
    mean = jackknife(lambda kept: fmean(values[i] for i in kept), 5, 0.95)
    assert mean is not None
    half = stats.t.ppf(0.975, 4) * stats.sem(values)
    assert mean.high - mean.value == pytest.approx(half, abs=1e-12)


def test_a_slope_in_logarithms_is_that_of_scipy() -> None:
    rng = np.random.default_rng(2)
    for n in (2, 3, 6):
        x, y = np.cumsum(rng.uniform(1, 4, n)), rng.uniform(0.1, 10, n)
        line = stats.linregress(np.log2(x), np.log2(y))
        assert log_slope(x.tolist(), y.tolist()) == pytest.approx(line.slope, abs=1e-12)
    assert log_slope([1, 2, 4], [3, 3, 3]) == pytest.approx(0, abs=1e-12)
    assert math.isnan(log_slope([1, 2], [0, 1]))


def test_a_line_along_two_axes_has_the_errors_of_least_squares() -> None:
    """y = 1 + 2 a - b with noise, against the formula (XᵀX)⁻¹ σ² of the textbook."""
    rng = np.random.default_rng(3)
    places = [[0, 0], [1, 0], [2, 0], [0, 1], [0, 2], [1, 1]]
    X = np.column_stack([np.ones(6), np.array(places)])
    y = X @ [1, 2, -1] + 0.1 * rng.normal(size=6)
    line = fit(places, y.tolist())
    best = np.linalg.solve(X.T @ X, X.T @ y)
    variance = np.square(y - X @ best).sum() / 3
    errors = np.sqrt(variance * np.diag(np.linalg.inv(X.T @ X)))
    assert [slope for slope, _ in line.slopes] == pytest.approx(best[1:], abs=1e-12)
    assert [error for _, error in line.slopes] == pytest.approx(errors[1:], abs=1e-12)
    there = line.at([3, 3])
    assert there is not None
    assert there.value == pytest.approx(best @ [1, 3, 3], abs=1e-12)
