"""From what was measured to a verdict, by the criterion of the claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, get_args

from steepest.lab.papers.claim import Claim
from steepest.statistics import Interval, mean_interval, student

_CONFIDENCE = 0.95
_MOST_ADVISED = 200  # more are no advice

ClaimVerdict = Literal["reproduced", "not reproduced", "inconclusive", "not testable here"]
VERDICTS: tuple[str, ...] = get_args(ClaimVerdict)


@dataclass(frozen=True)
class Judgement:
    """The verdict on a claim.

    Attributes:
        verdict: one of four.
        values: the quantity for each seed.
        interval: their mean with its 95% interval; None for fewer than two seeds.
        reason: why, and for "inconclusive" what would decide it.
    """

    verdict: ClaimVerdict
    values: tuple[float, ...]
    interval: Interval | None
    reason: str


def judge_claim(claim: Claim, values: Sequence[float]) -> Judgement:
    """Return the verdict on a claim from its quantity, one value for each seed.

    >>> from steepest.lab.papers import claim_of
    >>> judge_claim(claim_of("relu-features"), [3.08, 3.09, 3.1]).verdict
    'reproduced'
    """
    values = tuple(map(float, values))
    interval = mean_interval(values, _CONFIDENCE) if all(map(math.isfinite, values)) else None
    if not values or any(map(math.isnan, values)):
        seeds = [str(i) for i, value in enumerate(values) if math.isnan(value)]
        return Judgement("inconclusive", values, None, f"no number with seed {', '.join(seeds)}")
    inside = [claim.low <= value <= claim.high for value in values]
    if claim.judged == "every seed":
        verdict: ClaimVerdict = "reproduced" if all(inside) else "not reproduced"
        return Judgement(verdict, values, interval, f"{sum(inside)} of {len(values)} seeds hold")
    if interval is None:
        if len(values) > 1:  # some are infinite
            return Judgement(
                "reproduced" if all(inside) else "not reproduced", values, None, "a run diverged"
            )
        return Judgement("inconclusive", values, None, "one seed has no interval; give it more")
    if claim.low <= interval.low and interval.high <= claim.high:
        return Judgement("reproduced", values, interval, "the interval lies inside")
    if interval.high < claim.low or claim.high < interval.low:
        return Judgement("not reproduced", values, interval, "the interval lies outside")
    limit = min((claim.low, claim.high), key=lambda end: abs(end - interval.value))
    return Judgement("inconclusive", values, interval, _what_decides(values, limit))


def _what_decides(values: Sequence[float], limit: float) -> str:
    """How many seeds would take the limit out of the interval, if mean and spread stay."""
    mean, spread = fmean(values), stdev(values)
    for n in range(len(values) + 1, _MOST_ADVISED + 1):
        expected = student(mean, spread / math.sqrt(n), n - 1, _CONFIDENCE)
        if expected is not None and not expected.low <= limit <= expected.high:
            return f"{limit:.4g} lies in the interval; about {n} seeds would decide it"
    return (
        f"{limit:.4g} lies in the interval, and close to the mean: more than {_MOST_ADVISED} seeds "
        "would be needed, so a larger scale decides it sooner"
    )
