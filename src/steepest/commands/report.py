"""`steepest report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from steepest.commands.places import folder, report_room


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the report of a run or a study, compare several, or export their numbers.

    For instance: steepest report runs/a runs/b --out numbers.csv
    """

    path: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs or studies, or earlier reports; several are compared."""
    out: Path | None = None
    """Where to write: a page, or a table if it ends with .csv or .parquet. By default report.html
    in that folder, or over the earlier report; of a comparison, a page under runs/."""

    def run(self) -> None:
        """Run the command."""
        room = report_room()
        summary, place = room.find_all(self.path)
        out = self.out or place
        if out is None:
            out = folder("comparison", {"paths": self.path}).with_suffix(".html")
        path = room.write_to(summary, out)
        print(f"report: {path.resolve().as_uri()}")
