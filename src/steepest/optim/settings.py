"""What all optimizers of this package take beside their own settings."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, TypedDict, get_type_hints

from steepest.model.parameter_roles import Role
from steepest.optim.checks import (
    OF_GROUPS,
    Betas,
    Checks,
    MemoryType,
    NonNegative,
    RateOrNone,
    check_of,
    choice,
)
from steepest.optim.momentum import Momentum
from steepest.optim.rates import callers_level

OnNonfinite = Literal["raise", "skip"]
Decay = Literal["decoupled", "independent", "cautious"]
Rounding = Literal["nearest", "stochastic"]


class Settings(TypedDict, total=False):
    """What all optimizers of this package take beside their own settings; all by keyword.

    Attributes:
        weight_decay: λ of the matrices, 0 by default.
        decay: "decoupled" (default), W <- (1 - lr λ) W; "independent", W <- (1 - λ lr/lr₀) W with
            lr₀ the rate the group was made with (its key "base_lr"), so that λ means the same at
            any rate; "cautious", decoupled, but only for the entries that the update shrinks too
            (Chen et al., arXiv 2510.12402).
        heavy_ball: remember M <- β M + G instead of the average β M + (1 - β) G. Directions that do
            not depend on the scale of a gradient are the same.
        maximize: ascend.
        roles: settings of the group of a role of a model, such as `{"conv": {"lr": 0.01},
            "embedding": {"lr": 3e-3, "weight_decay": 0.1}, "qkv": {"geometry": "adamw"}}`.
        adamw_lr: rate of AdamW for all parameters of a model that are no matrices.
        adamw_betas, adamw_eps, adamw_weight_decay: its other settings; (0.9, 0.95), 1e-8, 0.
        nonfinite: what a NaN or infinite gradient does: "raise" (default), or "skip" the step.
        state_dtype: precision of the memory, `torch.float32` for instance; by default that of the
            parameter, and float32 for float16 (see `steepest.optim.precision`). With it bfloat16
            parameters forget no small gradient.
        rounding: how half-precision parameters take a step: to the "nearest" number (default), or
            "stochastic", which makes steps too small for their precision right on average. The same
            seed every time, so a run can be repeated and resumed bit for bit.
    """

    weight_decay: NonNegative
    decay: Decay
    heavy_ball: bool
    maximize: bool
    roles: Mapping[Role, Mapping[str, Any]]
    adamw_lr: RateOrNone
    adamw_betas: Betas
    adamw_eps: NonNegative
    adamw_weight_decay: NonNegative
    nonfinite: OnNonfinite
    state_dtype: MemoryType
    rounding: Rounding


def checks_of(optimizer: type) -> Checks:
    """Return the check of each setting that an optimizer's signature declares, or that groups have.

    A setting is declared once: by the type of an argument of `__init__`, in the class or in one
    that it inherits from. `Literal` and `bool` need no check of their own.
    """
    declared = [vars(kind).get("__init__") for kind in reversed(optimizer.__mro__)]
    hints = {**_hints(Momentum), **_hints(Settings)}
    for function in declared:
        hints |= _hints(function) if inspect.isfunction(function) else {}
    declared_checks = {key: check for key, kind in hints.items() if (check := check_of(kind))}
    return {**OF_GROUPS, **declared_checks, **getattr(optimizer, "fixed", {})}


def _hints(declaration: Any) -> dict[str, Any]:
    """The types of the arguments of a function, as far as their names can be looked up."""
    try:
        return get_type_hints(declaration, include_extras=True)
    except NameError:  # a type that is imported for a type checker only
        names = {**getattr(declaration, "__globals__", {}), **globals()}
        known = {}
        for key, text in declaration.__annotations__.items():
            with suppress(NameError):
                known[key] = eval(text, names) if isinstance(text, str) else text
        return known


_RENAMED: Mapping[str, Mapping[Any, str]] = {
    "graft": {"adam": "adam", "muon": "muon", "none": "own"},
    "normalize": {"spectral": "spectral", "none": "own"},
    "compensate": {True: "muon", False: "own"},
}
"""Names that the option `length` had before, and what their values are called now."""


def has_old_names(settings: Mapping[str, Any]) -> bool:
    """Return whether there is a setting by a name of version 0.1, or with a value of it."""
    return not _RENAMED.keys().isdisjoint(settings) or settings.get("length") == "constant"


def modern(settings: Mapping[str, Any], warn: bool = True) -> dict[str, Any]:
    """Return settings, or those of a group, with the names and values of this version.

    Raises:
        ValueError: for a value that the old name did not have.
    """
    modern = dict(settings)
    for old, values in _RENAMED.items():
        if old not in modern:
            continue
        value = modern.pop(old)
        if type(value) not in (str, bool) or value not in values:
            raise ValueError(f"got {old}={value!r}, expected {choice(*values).expected}")
        modern["length"] = values[value]
        _warn(f"{old}={value!r}", modern["length"], warn)
    if modern.get("length") == "constant":
        modern["length"] = "own"
        _warn('length="constant"', "own", warn)
    return modern


def _warn(old: str, new: str, warn: bool) -> None:
    if warn:
        warnings.warn(
            f'{old} is called length="{new}" now; the old name goes with the next version',
            DeprecationWarning,
            stacklevel=callers_level(),
        )
