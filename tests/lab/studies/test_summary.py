from __future__ import annotations

import numpy as np
import pytest

from steepest.lab.studies.statistics import interval
from steepest.lab.studies.summary import _reached


@pytest.mark.parametrize("seeds", [1, 3, 8, 9, 20])
def test_the_first_optimizer_always_reaches_its_own_level(seeds: int) -> None:
    """However many seeds: two ways to add them would differ in the last bit."""
    for draw in range(50):
        final = np.random.default_rng(draw).normal(2.0, 0.1, seeds).tolist()
        curves = [
            {"tokens": [1, 2], "seconds": [0.1, 0.2], "validation_loss": [5.0, loss]}
            for loss in final
        ]
        level = interval(final)
        assert level is not None
        assert _reached(curves, level["mean"]) == pytest.approx((2, 0.2))
