"""`steepest reproduce edge-of-stability`, as it was in version 0.1; it stays for one version."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from steepest.commands.places import folder, page, report_room
from steepest.lab.studies.edge_of_stability import EdgeConfig, edge_of_stability
from steepest.lab.terminal import bars, edge_table, say, screen

OLD_CLAIM = "edge-of-stability"


@dataclass(frozen=True, kw_only=True)
class ReproduceEdge(EdgeConfig):
    """Measure where curvature settles under each optimizer, and write a report.

    edge-of-stability: full-batch training of a small network on digits. Gradient descent sharpens
    until its largest Hessian eigenvalue is 2 / lr; every other optimizer is measured against its
    own threshold. Stopped at any moment, the same command goes on with the runs that are missing.
    For instance:
      steepest reproduce edge-of-stability --optimizers gd adam muon
    """

    claim: tyro.conf.Positional[Literal["edge-of-stability"]]
    """Which claim."""
    out: Path | None = None
    """Folder of the runs; by default one under runs/ that is named after the settings."""

    def run(self) -> None:
        """Run the command."""
        room = report_room()
        settings = asdict(self)
        for name in ("out", "claim"):
            del settings[name]
        config = EdgeConfig(**settings)
        named = {key: value for key, value in settings.items() if key != "workers"}
        out = self.out or folder(self.claim, named)
        with bars() as shown:
            bar = shown.add_task("runs", total=None, detail="")

            def on_run(done: int, of: int, message: str) -> None:
                shown.update(bar, completed=done, total=of, detail=message)
                if message and not screen.is_terminal:
                    say(f"{done} of {of} runs  {message}")

            summary = edge_of_stability(config, out, on_run)
        path = page(room, summary, out)
        Console().print(edge_table(summary))
        print(f"report: {path.resolve().as_uri()}")
