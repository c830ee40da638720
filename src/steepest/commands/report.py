"""`steepest report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from steepest.commands.places import report_room


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the report of a study again, from its folder or from an earlier report."""

    path: tyro.conf.Positional[Path]
    """Folder of a study, or a report.html."""
    out: Path | None = None
    """Where to write; by default report.html in that folder, or over the earlier report."""


def report(command: Report) -> None:
    """Run the command."""
    room = report_room()
    summary, out = room.find(command.path)
    path = room.write(summary, command.out or out)
    print(f"report: {path.resolve().as_uri()}")
