"""The old place of `steepest.model.matrix_view`: its names work for one version, and warn."""

from __future__ import annotations

import warnings
from typing import Any

from steepest.model import matrix_view as _moved


def __getattr__(name: str) -> Any:
    value = getattr(_moved, name)
    if not name.startswith("__"):
        warnings.warn(
            f"steepest.matrix_view.{name} has moved to steepest.model.matrix_view",
            DeprecationWarning,
            stacklevel=2,
        )
    return value
