"""`steepest report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from steepest.commands.places import folder, report_room


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the report of a run or a study, compare several, or export their numbers.

    For instance:
      steepest report runs/a
      steepest report runs/a runs/b --out comparison.html
      steepest report runs/a runs/b --out numbers.csv
    """

    path: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs or studies, or earlier reports (.html). Several runs, or several studies,
    are compared."""
    out: Path | None = None
    """Where to write: a page, or a table if the name ends with .csv or .parquet. By default it is
    report.html in the folder, the earlier report itself, or, of a comparison, a page in runs/."""

    def run(self) -> None:
        """Run the command."""
        room = report_room()
        summary, place = room.find_all(self.path)
        out = self.out or place
        if out is None:
            out = folder("comparison", {"paths": self.path}).with_suffix(".html")
        path = room.write_to(summary, out)
        print(f"report: {path.resolve().as_uri()}")
