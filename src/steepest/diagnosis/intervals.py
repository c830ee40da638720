"""What the interval of a ratio of decreases says of a geometry."""

from __future__ import annotations

import math

from steepest.statistics import Interval

WORTH_IT = 1.1
"""What is less simple is to decrease the loss by this factor more."""
SURE = 0.95
"""Confidence of the intervals that a plan follows; verdicts follow those of 0.8."""


def worth_it(log_ratio: Interval) -> bool | None:
    """Whether a ratio of decreases speaks for what is above; None where that cannot be told.

    Yes needs an estimate above `WORTH_IT` and an interval above 1, no an interval below `WORTH_IT`.
    """
    if log_ratio.low > 0 and log_ratio.value > math.log(WORTH_IT):
        return True
    return False if log_ratio.high < math.log(WORTH_IT) else None
