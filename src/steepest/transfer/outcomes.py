"""What an interval says of a limit: yes, no, or None, where it cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from steepest.statistics import Interval

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
