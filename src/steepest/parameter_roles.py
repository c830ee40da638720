"""The old place of `steepest.model.parameter_roles`: its names work for one version, and warn."""

from __future__ import annotations

import warnings
from typing import Any

from steepest.model import parameter_roles as _moved


def __getattr__(name: str) -> Any:
    value = getattr(_moved, name)
    if not name.startswith("__"):
        warnings.warn(
            f"steepest.parameter_roles.{name} has moved to steepest.model.parameter_roles",
            DeprecationWarning,
            stacklevel=2,
        )
    return value
