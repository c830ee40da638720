"""Sentences about long work, for whoever shows them: the command line does, workers do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHOW: ContextVar[Callable[[str], None] | None] = ContextVar("show", default=None)


def announce(sentence: str) -> None:
    """Say that work begins which takes more than a moment."""
    if (show := _SHOW.get()) is not None:
        show(sentence)


@contextmanager
def announced_by(show: Callable[[str], None]) -> Iterator[None]:
    """Pass the sentences of this block on.

    >>> with announced_by(print):
    ...     announce("reading 3 GB")
    reading 3 GB
    >>> announce("reading 3 GB")
    """
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)
