from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from steepest.lab.studies.statistics import first_reach, interval


def test_the_interval_is_students() -> None:
    values = [2.1, 1.9, 2.4, 2.0]
    got = interval(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert got is not None
    assert (got["low"], got["high"]) == pytest.approx((low, high))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = [interval(list(rng.normal(5.0, 2.0, 3))) for _ in range(2000)]
    covered = np.mean([d is not None and d["low"] <= 5.0 <= d["high"] for d in draws])
    assert 0.93 < covered < 0.97


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert interval([1.5]) == {"mean": 1.5, "low": None, "high": None, "n": 1}
    assert interval([]) is None


def test_first_reach_interpolates_and_takes_the_first_crossing() -> None:
    assert first_reach([0, 1, 2, 3], [4.0, 2.0, 3.0, 1.0], 2.5) == 0.75
    assert first_reach([5, 6], [1.0, 0.5], 2.0) == 5.0
    assert first_reach([5, 6], [3.0, 2.5], 2.0) is None
