"""How much work a diagnosis is, as it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

OnProgress = Callable[[int, int, str], None]
"""Called with the gradients done, how many there will be by an estimate, and what they are for."""


@dataclass
class _Part:
    kind: str
    expected: float
    done: int = 0
    ended: bool = False


class Work:
    """Counts gradients in named parts, and estimates those to come.

    Parts of one kind are expected to cost what those before them did.

    >>> work = Work(lambda done, total, message: print(done, total, message))
    >>> work.expect("first", "matrix", 3)
    >>> work.expect("second", "matrix", 3)
    >>> work.begin("first")
    >>> work.tick()
    1 6 first
    >>> work.begin("second")
    >>> work.tick()
    2 2 second
    """

    def __init__(self, on_progress: OnProgress):
        self._report = on_progress
        self._parts: dict[str, _Part] = {}
        self._current = ""
        self._done = 0

    def expect(self, name: str, kind: str, count: float) -> None:
        """Add a part of about so many gradients."""
        self._parts[name] = _Part(kind, count)

    def begin(self, name: str) -> None:
        """End the part before and go on with this one."""
        if self._current in self._parts:
            self._end(self._parts[self._current])
        self._current = name

    def skip(self, name: str) -> None:
        """Leave out a part, unless it has begun."""
        if name in self._parts and not self._parts[name].done:
            del self._parts[name]

    def tick(self) -> None:
        """Count a gradient of the current part."""
        self._done += 1
        self._parts[self._current].done += 1
        self._report(self._done, self.total(), self._current)

    def total(self) -> int:
        """Return how many gradients there will be, by an estimate."""
        return round(sum(max(part.expected, part.done) for part in self._parts.values()))

    def _end(self, part: _Part) -> None:
        part.expected, part.ended = part.done, True
        alike = [other for other in self._parts.values() if other.kind == part.kind]
        mean = fmean(other.done for other in alike if other.ended)
        for other in alike:
            if not other.ended:
                other.expected = mean
