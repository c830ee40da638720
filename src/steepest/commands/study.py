"""`steepest study`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console

from steepest.commands.places import folder, page, report_room
from steepest.lab.studies.optimizer_study import study as conducted
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.terminal import StudyProgress, bars, optimizer_table


@dataclass(frozen=True, kw_only=True)
class Study(StudyConfig):
    """Compare optimizers, each at its own best learning rate, and write a report.

    Every optimizer gets a grid of rates of its own, then fresh seeds at its best rate. A study that
    was stopped goes on with the same command; finished runs are kept. For instance:
      steepest study --data my_texts/ --minutes 20 --optimizers adamw muon
      steepest study --model my_package:build --batches my_package:data --optimizers adamw
        muon my_package:MyOptimizer:lr=0.01
    """

    config: Path | None = None
    """A TOML file of settings, such as the config.toml of a study. Options that are typed take
    precedence over it."""
    out: Path | None = None
    """Folder of the study; by default one under runs/ whose name depends on the settings."""

    def run(self) -> None:
        """Run the command."""
        room = report_room()
        names = [field.name for field in fields(StudyConfig)]
        config = StudyConfig(**{name: getattr(self, name) for name in names})
        # the length of the runs follows from the minutes, so other minutes are another study
        out = self.out or folder("study", config.identity | {"minutes": config.minutes})
        with bars() as shown:
            summary = conducted(config, out, StudyProgress(shown))
        path = page(room, summary, out)
        Console().print(optimizer_table(summary))
        for entry in summary["optimizers"]:
            if entry["verdict"] != "tuned":
                print(f"{entry['label']}: inconclusive, because {entry['reason']}")
        print(f"report: {path.resolve().as_uri()}")
