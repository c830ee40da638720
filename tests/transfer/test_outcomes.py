"""A verdict follows its interval: where the limit lies inside, it cannot be told, and why not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steepest.statistics import Interval
from steepest.transfer import CoordinateCheck, Horizon, RateTransfer, SizeOptimum, SuperConsistency
from steepest.transfer.advice import Advice
from steepest.transfer.check import Axis, TransferCheck
from steepest.transfer.consistency import SizeCurve, _spread_interval
from steepest.transfer.coordinates import LayerSlope, _row
from steepest.transfer.optima import horizon, optimum
from steepest.transfer.outcomes import span, together, within


def _optimum(size: int, vertices: tuple[float, ...]) -> SizeOptimum:
    """A grid from 2^-4 to 2^4 with the parabola of each seed; the base's loss is 3."""
    grid = {k: tuple(3 + 0.1 * (k - v) ** 2 for v in vertices) for k in range(-4, 5)}
    best = min(range(-3, 4), key=lambda k: sum(grid[k]))
    return optimum(1.0, {"width": size}, best, grid)


def _horizon(*vertices: tuple[float, ...], carried: tuple[float, ...] | None = None) -> Horizon:
    rows = tuple(_optimum(64 * 2**i, each) for i, each in enumerate(vertices))
    own = rows[-1].scores[rows[-1].lr]
    limit = (9.0,) * len(own)
    return horizon(60, rows, carried or own, own, None, None, limit)


CASES: dict[str, tuple[Horizon, bool | None, str]] = {
    "stays": (_horizon((0.0, 0.1), (0.2, 0.25)), True, "transfers over 60 steps"),
    "moves": (_horizon((0.0, 0.1), (2.0, 2.1)), False, "does not transfer over 60 steps"),
    "moves down": (_horizon((0.0, 0.1), (-2.0, -2.1)), False, "does not transfer"),
    "maybe": (_horizon((0.0, 0.1), (0.4, 1.2)), None, "at width 128 it moves by -0.33 to +1.83"),
    "one of the middle": (
        _horizon((0.0, 0.1), (0.0, 0.8), (0.1, 0.2)), None, "at width 128 it moves by",
    ),
    "one seed": (_horizon((0.0,), (0.2,)), None, "a single seed has no interval: take two"),
    "cost": (
        _horizon((0.0, 0.1), (0.2, 0.25), carried=(3.5, 3.5)), False, "does not transfer",
    ),
    "cost maybe": (
        _horizon((0.0, 0.1), (0.2, 0.25), carried=(3.0, 3.2)), None, "the cost is not known",
    ),
    "seeds disagree": (
        _horizon((0.0, 0.1), (0.0, 4.0)), None, "seeds disagree on the best rate of width 128",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_interval_decides(name: str) -> None:
    found, passed, said = CASES[name]
    assert found.passed is passed, found.verdict
    assert said in found.verdict
    assert found.verdict.startswith("cannot tell") == (passed is None)
    assert bool(found.unknown) == (passed is None)
    if passed is None:
        assert "take" in found.verdict  # what to do
    assert ("costs the last one nothing, as both have the same" in found.verdict) == (
        "cost" not in name
    )
    whole = RateTransfer("mup", "adamw", (found,))
    assert whole.as_dict()["passed"] is passed
    assert json.loads(json.dumps(whole.as_dict()))["horizons"][0]["passed"] is passed
    assert found.verdict[:20] in " ".join(str(whole).split())


def test_a_cost_where_runs_diverge_is_a_lower_bound() -> None:
    found = _horizon((0.0, 0.1), (0.2, 0.25), carried=(9.0, 9.0))
    assert found.diverged
    assert "costs the last one at least 199" in found.verdict
    assert "at least" not in _horizon((0.0, 0.1), (0.2, 0.25), carried=(3.5, 3.5)).verdict
    zero = replace(found, penalty=math.inf, penalty_interval=None)
    assert "more than a share can say" in zero.verdict
    assert "inf" not in zero.verdict


def test_a_seed_with_its_best_rate_at_an_end_of_the_grid_has_no_optimum() -> None:
    row = _optimum(64, (0.0, 4.0))
    assert math.isnan(row.vertex([1]))
    assert row.vertex([0]) == pytest.approx(0.0)
    assert row.interval is None
    assert _optimum(64, (0.0, 2.0)).vertex([1]) == pytest.approx(2.0)  # found beyond the neighbour


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(0.1, 0.2, "0.1 to 0.2"), (0.001, 0.2, "below 0.01 to 0.2"), (0.1, 9.0, "0.1 to above 1")],
)
def test_an_interval_beyond_the_rates_tried_says_only_the_side(
    low: float, high: float, text: str
) -> None:
    assert span(low, high, [0.01, 0.1, 1.0]) == text


def test_outcomes() -> None:
    assert within(Interval(0, -1, 1), -1, 1) is True
    assert within(Interval(5, -9, 9), -1, 1) is None
    assert within(Interval(5, 4, 6), -1, 1) is False
    assert within(None, -1, 1) is None
    assert together([True, True]) is True
    assert together([True, None]) is None
    assert together([None, False, True]) is False


def _checked(slope: float, noise: float, seeds: int = 3) -> CoordinateCheck:
    rng = np.random.default_rng(0)
    values = (64.0, 256.0, 1024.0)
    changes = [
        [value**slope * 2 ** (noise * rng.normal()) for value in values] for _ in range(seeds)
    ]
    still = LayerSlope("frozen", 5, math.nan, math.nan, 0.0, (0.0,) * 3)
    rows = (_row("0", 5, values, changes, changes), still)
    return CoordinateCheck("mup", "sgd", 0.1, "width", values, seeds, rows)


@pytest.mark.parametrize(
    ("slope", "noise", "seeds", "passed", "said"),
    [
        (0.0, 0.01, 3, True, "passed, every |slope|"),
        (0.3, 0.01, 3, False, "failed, expected |slope|"),
        (-0.3, 0.01, 2, False, "failed, expected |slope|"),
        (0.0, 0.8, 3, None, "cannot tell whether every |slope| is at most 0.1"),
        (0.1, 0.05, 3, None, "take more seeds, or sizes of a wider range"),
    ],
)
def test_a_slope_is_judged_by_its_interval(
    slope: float, noise: float, seeds: int, passed: Any, said: str
) -> None:
    found = _checked(slope, noise, seeds)
    assert found.passed is passed, found.verdict
    assert said in found.verdict
    assert found.worst.layer == "frozen" or found.worst.layer == "0"
    assert [row["passed"] for row in found.as_dict()["rows"]] == [passed, True]


def _consistent(*endings: tuple[float, ...]) -> SuperConsistency:
    rows = tuple(
        SizeCurve({"width": 64 * 2**i}, (0, 1, 2), (0.1,) * 3, (1.0,) * 3, each, (0.0,) * len(each))
        for i, each in enumerate(endings)
    )
    means = [sum(each) / len(each) for each in endings]
    spread = max(means) / min(means) if min(means) > 0 else math.inf
    return SuperConsistency(
        "mup", "sgd", 0.1, "Hessian", "width", (64.0, 128.0), rows, spread, 1.0, math.nan, None,
        _spread_interval(rows),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("endings", "passed", "said"),
    [
        (((0.9, 0.91), (0.95, 0.96)), True, "super consistent: over"),
        (((0.9, 0.91), (0.45, 0.46)), False, "not super consistent: over"),
        (((0.9, 0.7), (0.8, 0.6)), None, "take more seeds, or longer runs"),
        (((0.9,), (0.95,)), None, "a single seed has no interval"),
        (((0.9, -0.1), (0.9, -0.9)), None, "is not positive at every size"),
    ],
)
def test_the_spread_of_the_sharpness_is_judged_by_its_interval(
    endings: Any, passed: Any, said: str
) -> None:
    found = _consistent(*endings)
    assert found.passed is passed, found.verdict
    assert said in found.verdict
    assert "inf" not in found.verdict


@pytest.mark.parametrize(
    ("movement", "interval", "lazy"),
    [
        (-0.5, Interval(-0.5, -0.55, -0.45), True),
        (-0.1, Interval(-0.1, -0.2, 0.0), False),
        (-0.5, Interval(-0.5, -0.9, -0.1), None),
        (-0.5, None, None),
    ],
)
def test_a_lazy_limit_needs_an_interval_too(movement: float, interval: Any, lazy: Any) -> None:
    found = _consistent((0.9, 0.91), (0.95, 0.96))
    found = replace(found, movement=movement, movement_interval=interval)
    assert found.is_lazy is lazy
    assert ("as in the lazy limit" in found.verdict) == (lazy is True)


def _whole(*names: str) -> TransferCheck:
    axes = (
        Axis(f"size{i}", RateTransfer("mup", "adamw", (CASES[name][0],) * 2), None, None, (), False)
        for i, name in enumerate(names)
    )
    return TransferCheck(tuple(axes), None)


@pytest.mark.parametrize(
    ("names", "passed", "verdict"),
    [
        (("stays",), True, "transfers over size0"),
        (("stays", "stays"), True, "transfers over size0 and size1"),
        (("stays", "moves"), False, "transfers over size0 only"),
        (("moves", "moves"), False, "does not transfer"),
        (("maybe",), None, "cannot tell over size0"),
        (("stays", "maybe"), None, "transfers over size0, cannot tell over size1"),
        (("moves", "maybe"), False, "does not transfer over size0, cannot tell over size1"),
        (
            ("stays", "moves", "cost maybe"), False,
            "transfers over size0, not over size1, cannot tell over size2",
        ),
    ],
)  # fmt: skip
def test_the_verdict_of_all(names: tuple[str, ...], passed: Any, verdict: str) -> None:
    found = _whole(*names)
    assert (found.passed, found.verdict) == (passed, verdict)
    content = json.loads(json.dumps(found.as_dict()))
    assert (content["passed"], content["verdict"]) == (passed, verdict)
    assert verdict in str(found)
    assert "no learning rate is advised" in str(found)


def test_what_cannot_be_told_is_what_to_do() -> None:
    [said, *_] = [line for line in _whole("maybe").retune if "learning rate" in line]
    assert "which cannot tell: at width 128 it moves by" in said
    assert "take more seeds, or longer runs" in said


def test_a_longer_run_is_spoken_of_as_far_as_it_is_known() -> None:
    def steps(half: tuple[float, ...], full: tuple[float, ...]) -> str:
        horizons = (_horizon(half, half), _horizon(full, full))
        axis = Axis("width", RateTransfer("mup", "adamw", horizons), None, None, (), False)
        return " ".join(s for s in TransferCheck((axis,), None).retune if "number of steps" in s)

    assert steps((0.0, 0.1), (0.1, 0.2)) == ""
    assert "expect another one for a longer run" in steps((0.0, 0.1), (1.0, 1.1))
    assert "cannot be told whether a longer run" in steps((0.0, 0.1), (0.2, 1.2))
    assert "cannot be told whether a longer run" in steps((0.0,), (1.0,))


def test_an_advice_that_is_not_known_to_an_octave_is_none() -> None:
    known = Advice({"width": 512}, 0.02, 0.015, 0.03, {"width": (0.1, 0.02)}, 6)
    assert "learning rate for width 512: 0.02 (80% interval 0.015 to 0.03)" in str(known)
    wide = replace(known, low=0.001, high=0.4)
    assert not wide.is_known
    assert "learning rate for width 512: cannot tell to an octave" in str(wide)
    assert "0.001 to 0.4" in str(wide)
