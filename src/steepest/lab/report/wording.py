"""Numbers and sentences of the page: rounding, units, intervals, and the headline.

A number that is None, NaN or infinite was not measured, and every function here says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NOT_MEASURED = "not measured"


def finite(value: Any) -> float | None:
    """Return `value` as a float, or None for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def fixed(value: float, decimals: int) -> str:
    """`value` with so many decimals and a real minus sign; a rounded zero has no sign.

    >>> fixed(-0.0521, 3), fixed(-0.0001, 2)
    ('−0.052', '0.00')
    """
    text = f"{value:.{decimals}f}"
    if text.startswith("-"):
        text = "−" + text[1:] if text.strip("-0.") else text[1:]
    return text


def decimals(values: Sequence[float], digits: int) -> int:
    """How many decimals give the largest of `values` so many significant digits (at most 8)."""
    largest = max((abs(value) for value in values), default=0.0)
    rounded = float(f"{largest:.{digits - 1}e}")  # 0.9997 is 1.00
    exponent = math.floor(math.log10(rounded)) if rounded > 0 else 0
    return min(8, max(0, digits - 1 - exponent))


def number(value: Any, digits: int = 3) -> str:
    """`value` to so many significant digits.

    >>> number(0.081234), number(31.26), number(None)
    ('0.0812', '31.3', 'not measured')
    """
    known = finite(value)
    return NOT_MEASURED if known is None else fixed(known, decimals([known], digits))


def rate(value: Any) -> str:
    """A learning rate or another setting: three significant digits, no trailing zeros.

    >>> rate(0.02), rate(3e-5)
    ('0.02', '3e-5')
    """
    known = finite(value)
    return NOT_MEASURED if known is None else f"{known:.3g}".replace("e-0", "e-")


def count(value: Any, unit: str = "") -> str:
    """A large number with k, M or G, to three significant digits.

    >>> count(123456), count(999_700), count(950), count(5_240_000, "B")
    ('123k', '1.00M', '950', '5.24 MB')
    """
    known = finite(value)
    if known is None:
        return NOT_MEASURED
    space = " " if unit else ""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(known) >= 0.9995 * size:
            return f"{number(known / size)}{space}{prefix}{unit}"
    return f"{known:.0f}{space}{unit}"


def percent(value: Any, digits: int = 3) -> str:
    """A fraction in percent, to so many significant digits.

    >>> percent(0.93141, 4), percent(None)
    ('93.14%', 'not measured')
    """
    known = finite(value)
    return NOT_MEASURED if known is None else f"{number(100 * known, digits)}%"


def megabytes(value: Any) -> str:
    """Bytes as a number of MB."""
    known = finite(value)
    return NOT_MEASURED if known is None else number(known / 1e6)


def duration(value: Any) -> str:
    """Seconds for a reader: `8.1 s`, `4 min 05 s`, `1 h 12 min`."""
    known = finite(value)
    if known is None:
        return NOT_MEASURED
    if known < 60:
        return f"{number(known, 2 if known < 10 else 3)} s"
    minutes, seconds = divmod(round(known), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def whole(interval: dict[str, Any] | None) -> dict[str, float] | None:
    """An interval whose three numbers are all measured, otherwise None.

    >>> whole({"value": 0.1, "low": 0, "high": 1}), whole({"value": 0.1, "low": 0, "high": None})
    ({'value': 0.1, 'low': 0, 'high': 1}, None)
    """
    measured = interval is not None and all(
        finite(interval[key]) is not None for key in ("value", "low", "high")
    )
    return interval if measured else None


def plural(n: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def estimate(
    value: Any, digits: int, signed: bool = False, places: int | None = None
) -> tuple[str, str]:
    """A mean and its interval, both with the same decimals, as two short texts.

    Args:
        value: {"mean", "low", "high", "n"}, or None.
        digits: significant digits of the largest of the three numbers.
        signed: write a plus sign before a positive mean.
        places: so many decimals instead, for a column that shares them.

    >>> estimate({"mean": -0.0521, "low": -0.0612, "high": -0.043, "n": 3}, 3, signed=True)
    ('−0.0521', '−0.0612 to −0.0430')
    """
    value = value or {}
    mean, low, high = (finite(value.get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return NOT_MEASURED, ""
    if low is None or high is None:
        places = decimals([mean], digits) if places is None else places
        spread = f"no interval ({seeds(value)})"
    else:
        places = decimals([mean, low, high], digits) if places is None else places
        spread = f"{fixed(low, places)} to {fixed(high, places)}"
    text = fixed(mean, places)
    return ("+" if signed and mean > 0 and text.strip("0.") else "") + text, spread


def accuracy(optimizer: dict[str, Any]) -> tuple[str, str]:
    """The mean accuracy of an optimizer and its interval, in percent.

    >>> accuracy({"validation_accuracy": {"mean": 0.9314, "low": 0.92, "high": 0.94, "n": 3}})
    ('93.14%', '92.00 to 94.00')
    """
    mean = optimizer.get("validation_accuracy") or {}
    known = {key: finite(mean.get(key)) for key in ("mean", "low", "high")}
    scaled = {key: None if value is None else 100 * value for key, value in known.items()}
    text, spread = estimate({**scaled, "n": mean.get("n")}, 4)
    return (text if text == NOT_MEASURED else f"{text}%"), spread


def seeds(value: Any) -> str:
    """How many fresh seeds an estimate rests on."""
    n = finite((value or {}).get("n"))
    return "number of seeds unknown" if n is None else plural(int(n), "fresh seed")


def is_baseline(summary: dict[str, Any], optimizer: dict[str, Any]) -> bool:
    """Whether this is the optimizer that the others are compared with."""
    return optimizer.get("name") == summary.get("baseline")


def label(optimizer: dict[str, Any]) -> str:
    """What the page calls an optimizer."""
    return str(optimizer.get("label") or optimizer.get("name") or "unnamed")


def baseline_label(summary: dict[str, Any]) -> str:
    """What the page calls the baseline, also where it was not run."""
    baselines = [o for o in summary.get("optimizers") or [] if is_baseline(summary, o)]
    return label(baselines[0]) if baselines else str(summary.get("baseline") or "the baseline")


def gap_unit(summary: dict[str, Any]) -> str:
    """The unit of the gap: bits per byte where the data has bytes, else the validation loss."""
    has_bytes = any(o.get("bits_per_byte") for o in summary.get("optimizers") or [])
    return "bits per byte" if has_bytes else "of validation loss"


def sign_of_gap(optimizer: dict[str, Any]) -> int | None:
    """-1 or 1 for an interval below or above zero, 0 for one that includes it, None for none."""
    gap = optimizer.get("gap_to_baseline") or {}
    low, high = finite(gap.get("low")), finite(gap.get("high"))
    if low is None or high is None or finite(gap.get("mean")) is None:
        return None
    return -1 if high < 0 else 1 if low > 0 else 0


def headline(summary: dict[str, Any]) -> str:
    """A few sentences: the best tuned optimizer against the baseline, with interval and doubts."""
    base = baseline_label(summary)
    optimizers = summary.get("optimizers") or []
    others = [o for o in optimizers if not is_baseline(summary, o)]
    if not others:
        return f"Only {base} was run, so there is nothing to compare it with."
    measured = [
        o for o in others if finite((o.get("gap_to_baseline") or {}).get("mean")) is not None
    ]
    tuned = [o for o in measured if o.get("verdict") == "tuned"]
    sentences = [_comparison(summary, tuned, base)]
    for own in (o for o in optimizers if is_baseline(summary, o) and o.get("verdict") != "tuned"):
        doubt = f"The learning rate of {base} itself is inconclusive{_reason(own)}"
        stands = "So no comparison with it stands yet; this is only what was measured"
        sentences = [doubt, stands, *sentences]
    if open_ones := [label(o) + _reason(o) for o in others if o.get("verdict") != "tuned"]:
        are = "is" if len(open_ones) == 1 else "are"
        sentences.append(f"{phrase(open_ones)} {are} inconclusive, and not counted here")
    missing = [label(o) for o in others if o.get("verdict") == "tuned" and o not in measured]
    if missing:
        have = "has" if len(missing) == 1 else "have"
        sentences.append(f"{phrase(missing)} {have} no measured difference")
    return ". ".join(sentences) + "."


def _comparison(summary: dict[str, Any], tuned: list[dict[str, Any]], base: str) -> str:
    """The comparison itself, without its full stop."""
    if not tuned:
        return f"No other optimizer has a tuned learning rate and a measured difference to {base}"
    ranked = sorted(tuned, key=lambda o: o["gap_to_baseline"]["mean"])
    clear = [o for o in ranked if sign_of_gap(o) == -1]
    best = clear[0] if clear else ranked[0]
    gap, name, unit = best["gap_to_baseline"], label(best), gap_unit(summary)
    mean, sign = gap["mean"], sign_of_gap(best)
    text, spread = estimate(gap, 3)
    evidence = f"(95% interval of the difference {spread}, {seeds(gap)})"
    if sign is None:
        where = "below" if mean < 0 else "above"
        return (
            f"{name} ended {text.lstrip('−')} {unit} {where} {base}, but without an interval "
            f"({seeds(gap)}) this is a single observation, not a result"
        )
    if sign == 0:
        rank = "had the lowest mean" if mean < 0 else "came closest"
        return (
            f"No optimizer is distinguishable from {base} on the better side: {name} {rank}, but "
            f"its difference of {text} {unit} has an interval that includes zero {evidence}"
        )
    if sign == 1:
        return (
            f"No optimizer ended below {base}: the closest, {name}, ended {text} {unit} above it "
            f"{evidence}"
        )
    sentence = (
        f"Each at its own best learning rate, {name} ended {text.lstrip('−')} {unit} below {base} "
        f"{evidence}"
    )
    lower = [label(o) for o in ranked[: ranked.index(best)]]
    if lower:
        doubt = "its interval includes zero" if len(lower) == 1 else "their intervals include zero"
        sentence += f". {phrase(lower)} had a lower mean, but {doubt} or is missing"
    return sentence


def _reason(optimizer: dict[str, Any]) -> str:
    return f" ({optimizer['reason']})" if optimizer.get("reason") else ""


def phrase(items: list[str]) -> str:
    """Items as a phrase: `a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
