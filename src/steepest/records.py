"""Measurements along a run, as lines of JSON that survive being stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Records:
    """A list of records with a "step", and the file that each is appended to.

    Args:
        path: of the file; None for none.

    Raises:
        FileExistsError: at the first record, for a file with the records of another run.
    """

    def __init__(self, path: str | Path | None = None):
        self.rows: list[dict[str, Any]] = []
        """What was measured, in the order of steps."""
        self._path = None if path is None else Path(path)
        self._is_ours = False

    def append(self, *rows: dict[str, Any]) -> None:
        """Add records, and write them."""
        self.rows += rows
        if self._path is None:
            return
        if not self._is_ours and self._path.exists() and self._path.stat().st_size:
            raise FileExistsError(
                f"got the path {self._path}, which has records already; choose another one, or "
                "load the state_dict of the run that wrote it"
            )
        self._is_ours = True
        with open(self._path, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def rewind(self, step: int) -> None:
        """Go on from a step: what the file has beyond it is dropped, as it will come again."""
        self.rows, self._is_ours = [], True
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_text().splitlines():
            try:
                self.rows.append(json.loads(line))
            except ValueError:  # cut off while it was written
                break
        self.rows = [row for row in self.rows if row["step"] <= step]
        aside = self._path.with_name(f".{self._path.name}")
        aside.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        aside.replace(self._path)
