"""Computing inside `torch.autocast` as outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off, on the CPU and the accelerator; also a decorator of functions.

    Autocast rounds the factors of a product to half precision. That suits the layers of a model,
    not the sums and decompositions of this package.

    >>> A = torch.tensor([[1 + 2**-10]])
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     rounded = A @ A
    ...     with without_autocast():
    ...         exact = A @ A
    >>> float(rounded), float(exact)
    (1.0, 1.0019540786743164)
    """
    with ExitStack() as stack:
        for kind in _device_types():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@cache
def _device_types() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
