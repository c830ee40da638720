from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.train.schedule import (
    RATE_CURVES,
    Schedule,
    can_go_on,
    default_final,
    default_warmup,
    factor,
)

NAMES = tuple(RATE_CURVES)
DECAYING = [name for name in NAMES if name != "constant"]


def before(step: int, steps: int, warmup: int, schedule: str, final: float) -> float:
    """The function as it was with three schedules, for their bits."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1 - (1 - final) * progress
    if schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    return 1.0


@given(
    steps=st.integers(1, 400),
    share=st.floats(0, 0.99),
    final=st.floats(0, 1),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_the_first_three_schedules_have_kept_their_bits(
    steps: int, share: float, final: float, schedule: Schedule
) -> None:
    warmup = int(share * steps)
    for step in range(steps):
        own = factor(step, steps, warmup, schedule, final)
        assert own == before(step, steps, warmup, schedule, final)


def test_wsd_is_its_closed_form() -> None:
    rates = [factor(t, 100, 10, "wsd", 0.2, decay=0.25) for t in range(100)]
    assert rates[:10] == [(t + 1) / 10 for t in range(10)]
    assert rates[10:76] == [1.0] * 66
    assert rates[76:] == pytest.approx([1 - 0.8 * (t - 75) / 25 for t in range(76, 100)])


def test_the_schedule_of_the_group_of_teon_is_its_closed_form() -> None:
    """It is "constant-linear" of Muon+ with warm_up_fraction 0.4, for 57 steps."""
    held = int(0.4 * 57)
    expected = [1.0 if t < held else max(0.1, 1 - (t - held) / (57 - held)) for t in range(57)]
    warmup, final = default_warmup("teon", 57), default_final("teon")
    assert [factor(t, 57, warmup, "teon", final) for t in range(57)] == expected
    assert expected[-1] == 0.1 < expected[-5]


def test_the_schedule_of_galore_is_its_closed_form() -> None:
    """A cosine with min_lr_ratio 0.1, after 1,000 of 10,000 steps of warm-up, as in its scripts."""
    warmup, final = default_warmup("galore", 10_000), default_final("galore")
    assert (warmup, final) == (1000, 0.1)
    for t in (1000, 3000, 5500, 9999):
        cosine = 0.5 * (1 + math.cos(math.pi * (t - 1000) / 9000))
        assert factor(t, 10_000, warmup, "galore", final) == pytest.approx(0.1 + 0.9 * cosine)
    assert factor(999, 10_000, warmup, "galore", final) == 1.0


@given(
    steps=st.integers(2, 500),
    share=st.floats(0, 0.9),
    final=st.floats(0, 1),
    decay=st.floats(0, 1),
    schedule=st.sampled_from(NAMES),
)
def test_rates_rise_then_never_rise_and_end_at_the_final_one(
    steps: int, share: float, final: float, decay: float, schedule: Schedule
) -> None:
    warmup = int(share * steps)
    rates = [factor(t, steps, warmup, schedule, final, decay) for t in range(steps + 1)]
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    fall = rates[max(0, warmup - 1) :]
    assert all(b <= a + 1e-12 for a, b in pairwise(fall))
    assert max(rates) == 1.0
    assert min(rates[warmup:]) >= final - 1e-12
    if schedule in DECAYING and (schedule != "wsd" or round(decay * steps) > 0):
        assert rates[-1] == pytest.approx(final, abs=1e-12)


@pytest.mark.parametrize("schedule", NAMES)
def test_no_step_of_the_rate_is_large(schedule: Schedule) -> None:
    """Continuity: in the limit of many steps neighbours are as close as the steepest slope says."""
    steps = 10_000
    rates = [factor(t, steps, 100, schedule, 0.0) for t in range(steps + 1)]
    steepest = {"constant": 0.0, "linear": 1.011, "cosine": 1.6, "wsd": 2.5, "teon": 1.67}
    slope = steepest.get(schedule, 1.6)
    for a, b in pairwise(rates[100:]):
        assert abs(b - a) <= slope / steps + 1e-12


@given(
    steps=st.integers(1, 300),
    longer=st.integers(0, 300),
    warmup=st.integers(0, 40),
    decay=st.floats(0, 1),
    schedule=st.sampled_from(NAMES),
)
def test_a_run_goes_on_from_where_a_longer_one_had_the_same_rates(
    steps: int, longer: int, warmup: int, decay: float, schedule: Schedule
) -> None:
    step = can_go_on(schedule, steps, steps + longer, decay)
    if step is None:
        assert schedule in ("linear", "cosine", "galore")
        return
    assert 0 <= step <= steps
    for t in range(step):
        short = factor(t, steps, warmup, schedule, 0.1, decay)
        assert short == factor(t, steps + longer, warmup, schedule, 0.1, decay)


def test_it_is_the_last_step_from_which_a_run_can_go_on() -> None:
    assert can_go_on("constant", 50, 80) == 50
    for schedule in ("wsd", "teon"):
        step = can_go_on(schedule, 50, 80)
        assert step is not None
        assert factor(step + 1, 50, 0, schedule, 0.1) < factor(step + 1, 80, 0, schedule, 0.1)
    assert can_go_on("constant", 50, 40) is None


def test_the_usual_warm_up_is_as_it_was() -> None:
    for schedule in ("constant", "linear", "cosine", "wsd"):
        assert [default_warmup(schedule, n) for n in (1, 9, 99, 100, 5000)] == [0, 1, 19, 20, 20]
    assert default_warmup("teon", 5000) == 0
