"""What each setting of an optimizer or of a group can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Rational, Real
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_origin

import torch
from torch import Tensor

from steepest.geometry import Spectral
from steepest.linalg.planner import METHODS
from steepest.linalg.polar_factor import PolarMethod
from steepest.optim.record import acts_on_entries

_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MEMORY = (torch.float32, torch.float64)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether it is a finite number; NumPy's are."""
    real = isinstance(value, Real) and not isinstance(value, Rational)
    return (real or _is_whole(value)) and math.isfinite(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0.0 <= value < 1.0


def _is_size(value: Any) -> bool:
    return _is_number(value) and value >= 0.0


def _is_rate(value: Any) -> bool:
    if isinstance(value, Tensor):
        real = value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
        return real and _is_size(float(value))
    return _is_size(value)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 1


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _are_betas(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_fraction, value))


class Check(NamedTuple):
    """Whether a value can be a setting, and what is expected."""

    is_right: Callable[[Any], bool]
    expected: str


def choice(*values: Any) -> Check:
    """Return the check for one of a few values, and how to name them."""
    shown = [f'"{value}"' if isinstance(value, str) else str(value) for value in values]
    expected = " or ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)
    return Check(lambda value: type(value) in (str, int) and value in values, expected)


# What a setting can be stands in the signature that declares it, as one of these types.
_RATE = Check(_is_rate, "a finite number of at least 0")
Rate = Annotated[float | Tensor, _RATE]
RateOrNone = Annotated[
    float | Tensor | None,
    Check(_or_none(_is_rate), "a finite number of at least 0, or None for the default"),
]
NonNegative = Annotated[float, Check(_is_size, "a finite number of at least 0")]
Exponent = Annotated[
    float, Check(lambda value: _is_number(value) and value > 0, "a finite number above 0")
]
Fraction = Annotated[float, Check(_is_fraction, "0 or more and less than 1")]
Betas = Annotated[tuple[float, float], Check(_are_betas, "two numbers in [0, 1)")]
Count = Annotated[int, Check(_is_count, "a whole number of at least 1")]
Limit = Annotated[
    int | None, Check(_or_none(_is_count), "a whole number of at least 1, or None for no limit")
]
PolarSteps = Annotated[
    int | None,
    Check(_or_none(_is_count), "at least 1, a whole number, or None for the method's own"),
]
Precision = Annotated[
    torch.dtype | None,
    Check(
        _or_none(lambda value: isinstance(value, torch.dtype) and value in _PRECISIONS),
        "torch.float32, torch.float64, torch.bfloat16, torch.float16, or None for the method's own",
    ),
]
MemoryType = Annotated[
    torch.dtype | None,
    Check(
        _or_none(lambda value: isinstance(value, torch.dtype) and value in _MEMORY),
        "torch.float32 or torch.float64, or None for that of the parameter",
    ),
]
_BOOL = Check(_is_bool, "True or False")
_METHOD = Check(
    lambda value: isinstance(value, str) and value in METHODS,
    "one of " + ", ".join(f'"{name}"' for name in METHODS),
)


def check_of(kind: Any) -> Check | None:
    """Return the check that a type stands for."""
    for extra in getattr(kind, "__metadata__", ()):
        if isinstance(extra, Check):
            return extra
    if kind is bool:
        return _BOOL
    if kind == PolarMethod:
        return _METHOD
    return choice(*get_args(kind)) if get_origin(kind) is Literal else None


def _declared(kind: Any) -> Check:
    return cast(Check, check_of(kind))


Checks = Mapping[str, Check]
OF_GROUPS: Checks = {
    "base_lr": Check(_is_size, "a finite number of at least 0"),
    "betas": Check(_are_betas, "two numbers in [0, 1)"),
    "eps": Check(_is_size, "a finite number of at least 0"),
    "fused": Check(_or_none(_is_bool), "True, False or None"),
    "step_count": Check(
        lambda value: _is_whole(value) and value >= 0, "a whole number of at least 0"
    ),
    "method": _METHOD,
    "steps": _declared(PolarSteps),
    "dtype": _declared(Precision),
    "exponent": _declared(Exponent),
    "sides": choice("both", "left", "right"),
    "mode": choice(1, 2),
    "length": choice("own", "muon"),
}
"""Of what each group has: of AdamW, of the geometries, and what is counted."""


def check_setting(key: str, value: Any, checks: Checks) -> None:
    """Raise a `ValueError` unless `value` can be the setting `key`."""
    is_right, expected = checks[key]
    if is_right(value):
        return
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"got for {key} a learning rate of shape {tuple(value.shape)}, expected one number"
            if is_right is _is_rate
            else f"got a tensor of shape {tuple(value.shape)} for {key}, expected {expected}"
        )
    raise ValueError(f"got {key}={value!r}, expected {expected}")


def check_settings(
    group: Mapping[str, Any], checks: Checks, changed: Iterable[str] | None = None
) -> None:
    """Raise a `ValueError` for the first setting of a group that is wrong, or not with the others.

    Only the settings `changed` are looked at, where it is clear which have.
    """
    changed = group.keys() if changed is None else changed
    for key in changed:
        if key in checks:
            check_setting(key, group[key], checks)
    if acts_on_entries(group):
        return
    if group["heavy_ball"] and "momentum" not in group:
        raise ValueError("got heavy_ball=True for an optimizer without momentum, expected False")
    if "method" in group and not {"method", "steps", "dtype"}.isdisjoint(changed):
        spectral = Spectral(group["method"], group["steps"], group["dtype"])
        spectral.direction(torch.zeros(1, 1))  # which checks them together
