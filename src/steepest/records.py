"""Measurements along a run, as lines of JSON that survive being stopped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from steepest.files import json_line, read_lines, write_lines


class Records:
    """A list of records with a "step", and the file that each is appended to.

    Args:
        path: of the file; None for none. Each line has a "checksum" besides the record.

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
            file.write("".join(map(json_line, rows)))

    def rewind(self, step: int) -> None:
        """Go on from a step: what the file has beyond it is dropped, as it will come again.

        Damaged lines are dropped with a warning; a last line that was cut off needs none.

        Raises:
            ValueError: for a file of something else, which stays as it is.
        """
        self.rows, self._is_ours = [], True
        if self._path is None or not self._path.exists():
            return
        rows, damaged = read_lines(self._path)
        if any(not isinstance(row, dict) or "step" not in row for row in rows) or (
            damaged and not rows
        ):
            self._is_ours = False
            raise ValueError(
                f"got the path {self._path}, which has lines that are no records; expected the "
                "file of the run that goes on, or the path of no file"
            )
        if damaged:
            lines = ", ".join(map(str, damaged))
            warnings.warn(
                f"{self._path} is damaged in line {lines}: these records are lost, the others stay",
                stacklevel=3,
            )
        self.rows = [row for row in rows if row["step"] <= step]
        write_lines(self._path, self.rows)
