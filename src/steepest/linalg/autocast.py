"""Computing inside `torch.autocast` as outside of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function with autocast off, on the CPU and the accelerator.

    Autocast rounds the factors of a product to half precision. That suits the layers of a model,
    not the sums and decompositions of this package.

    >>> @without_autocast
    ... def square(A):
    ...     return A @ A
    >>> A = torch.tensor([[1 + 2**-10]])
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     float(A @ A), float(square(A))
    (1.0, 1.0019540786743164)
    """

    @wraps(function)
    def without(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not any(map(torch.is_autocast_enabled, _device_types())):
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for kind in filter(torch.is_autocast_enabled, _device_types()):
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return without


@cache
def _device_types() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
