"""Ctrl-C and SIGTERM: both end a command with a sentence, and a run saves itself before."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SENTENCE = "interrupted; run the same command to go on: only what was not saved is done again"
SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides

Handler = Callable[[int, FrameType | None], None]


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated as Ctrl-C is."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise at the first SIGINT or SIGTERM; end the process at the second, whatever it is doing.

    The first one raises `KeyboardInterrupt` or `Terminated`. Workers end with their parent, so the
    second one leaves nothing behind.
    """

    def first(number: int, frame: FrameType | None) -> None:
        for interrupt in (signal.SIGINT, signal.SIGTERM):
            signal.signal(interrupt, _leave)
        _raise(number)

    with _handled_by(lambda previous: first):
        yield


@contextmanager
def deferred() -> Iterator[list[int]]:
    """Note the first SIGINT or SIGTERM in the list that is yielded, so that a step can be finished.

    A second one does what it did before.

    >>> with deferred() as signals:
    ...     signal.raise_signal(signal.SIGINT)
    ...     signals
    [2]
    """
    signals: list[int] = []

    def noting(previous: Handler) -> Handler:
        def note(number: int, frame: FrameType | None) -> None:
            if signals:
                previous(number, frame)
            signals.append(number)

        return note

    with _handled_by(noting):
        yield signals


def raise_for(signals: list[int]) -> None:
    """Raise for the first of the signals that `deferred` noted, if there is one."""
    if signals:
        _raise(signals[0])


@contextmanager
def _handled_by(handler_after: Callable[[Handler], Handler]) -> Iterator[None]:
    """Handle both signals, in the main thread and where they are not ignored; then as before."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.getsignal(number)
            if previous in (signal.SIG_IGN, None):  # as with nohup, or not ours to set
                continue
            before[number] = previous
            raising = previous if callable(previous) else lambda number, frame: _raise(number)
            signal.signal(number, handler_after(raising))
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _raise(number: int) -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + f"\n{SENTENCE}\n".encode())
    finally:
        os._exit(128 + number)
