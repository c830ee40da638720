"""What each setting of an optimizer or of a group can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Rational, Real
from typing import Any, get_args

import torch
from torch import Tensor

from steepest.geometry import Spectral
from steepest.linalg.planner import METHODS
from steepest.optim.settings import Decay, OnNonfinite, Rounding

_Check = tuple[Callable[[Any], bool], str]
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


def choice(*values: Any) -> _Check:
    """Return the check for one of a few values, and how to name them."""
    shown = [f'"{value}"' if isinstance(value, str) else str(value) for value in values]
    expected = " or ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)
    return lambda value: type(value) in (str, int) and value in values, expected


_RATE = (_is_rate, "a finite number of at least 0")
_SIZE = (_is_size, "a finite number of at least 0")
_FRACTION = (_is_fraction, "0 or more and less than 1")
_BETAS = (_are_betas, "two numbers in [0, 1)")
_COUNT = (_is_count, "a whole number of at least 1")
_LIMIT = (_or_none(_is_count), "a whole number of at least 1, or None for no limit")
_BOOL = (_is_bool, "True or False")

CHECKS: dict[str, _Check] = {
    "lr": _RATE,
    "base_lr": _SIZE,
    "weight_decay": _SIZE,
    "eps": _SIZE,
    "betas": _BETAS,
    "momentum": _FRACTION,
    "beta2": _FRACTION,
    "nesterov": _BOOL,
    "heavy_ball": _BOOL,
    "maximize": _BOOL,
    "fused": (_or_none(_is_bool), "True, False or None"),
    "decay": choice(*get_args(Decay)),
    "rounding": choice(*get_args(Rounding)),
    "scale": choice("spectral", "original", "match-rms-adamw", "none"),
    "method": (
        lambda value: isinstance(value, str) and value in METHODS,
        "one of " + ", ".join(f'"{name}"' for name in METHODS),
    ),
    "steps": (_or_none(_is_count), "at least 1, a whole number, or None for the method's own"),
    "dtype": (
        _or_none(lambda value: isinstance(value, torch.dtype) and value in _PRECISIONS),
        "torch.float32, torch.float64, torch.bfloat16, torch.float16, or None for the method's own",
    ),
    "state_dtype": (
        _or_none(lambda value: isinstance(value, torch.dtype) and value in _MEMORY),
        "torch.float32 or torch.float64, or None for that of the parameter",
    ),
    "length": choice("constant", "dual"),
    "mode": choice(1, 2),
    "compensate": _BOOL,
    "exponent": (lambda value: _is_number(value) and value > 0, "a finite number above 0"),
    "sides": choice("both", "left", "right"),
    "relative_eps": _BOOL,
    "bias_correction": _BOOL,
    "sequential": _BOOL,
    "interval": _COUNT,
    "block": _LIMIT,
    "max_side": _LIMIT,
    "graft": choice("adam", "muon", "none"),
    "graft_beta2": _FRACTION,
    "graft_eps": _SIZE,
    "normalize": choice("spectral", "none"),
    "step_count": (lambda value: _is_whole(value) and value >= 0, "a whole number of at least 0"),
    # Of an optimizer as a whole.
    "stack": _COUNT,
    "nonfinite": choice(*get_args(OnNonfinite)),
    "adamw_lr": (_or_none(_is_rate), "a finite number of at least 0, or None for the default"),
    "adamw_betas": _BETAS,
    "adamw_eps": _SIZE,
    "adamw_weight_decay": _SIZE,
}
"""For each setting, whether a value is one of it, and what is expected."""


def check_setting(key: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` can be the setting `key`."""
    is_right, expected = CHECKS[key]
    if is_right(value):
        return
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"got for {key} a learning rate of shape {tuple(value.shape)}, expected one number"
            if is_right is _RATE[0]
            else f"got a tensor of shape {tuple(value.shape)} for {key}, expected {expected}"
        )
    raise ValueError(f"got {key}={value!r}, expected {expected}")


def check_settings(group: Mapping[str, Any], changed: Iterable[str] | None = None) -> None:
    """Raise a `ValueError` for the first setting of a group that is wrong, or not with the others.

    Only the settings `changed` are looked at, where it is clear which have.
    """
    changed = group.keys() if changed is None else changed
    for key in changed:
        if key in CHECKS:
            check_setting(key, group[key])
    if group["geometry"] == "adamw":
        return
    if group["heavy_ball"] and "momentum" not in group:
        raise ValueError("got heavy_ball=True for an optimizer without momentum, expected False")
    if "method" in group and not {"method", "steps", "dtype"}.isdisjoint(changed):
        spectral = Spectral(group["method"], group["steps"], group["dtype"])
        spectral.direction(torch.zeros(1, 1))  # which checks them together
