"""What a sweep has finished, in a file, so that a stopped one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Finished:
    """Results by name, as lines of JSON that are written as they come.

    Args:
        path: of the file; `None` keeps them in memory. A last line that is cut off is dropped.

    >>> finished = Finished()
    >>> finished("two", lambda: 1 + 1), finished("two", lambda: 3)
    (2, 2)
    """

    def __init__(self, path: str | Path | None = None):
        self._path = None if path is None else Path(path)
        self._known: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            whole, _, _ = self._path.read_text().rpartition("\n")
            self._known = dict(json.loads(line) for line in whole.splitlines())
            self._path.write_text(whole + "\n" if whole else "")

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        """Return the result of that name; `run` makes it where there is none."""
        if name not in self._known:
            self._known[name] = run()
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps([name, self._known[name]]) + "\n")
        return self._known[name]


def named(kind: str, *what: Any) -> str:
    """Return a name that tells runs apart; of functions it has only their names."""
    return json.dumps([kind, *what], default=_name)


def _name(thing: Any) -> str:
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))
