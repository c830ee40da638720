"""`steepest reproduce`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from steepest.commands.places import page, report_room
from steepest.lab.errors import InputError
from steepest.lab.papers import PAPERS, claim_of, paper_of
from steepest.lab.papers.claim import Paper, ScaleName
from steepest.lab.papers.reproduction import ReproductionPlan, reproduce
from steepest.lab.terminal import (
    StudyProgress,
    bars,
    claims_table,
    experiments_table,
    list_of_claims,
    say,
    screen,
)


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Measure what papers claim, and write a report with a verdict on every claim.

    A verdict follows from a criterion that was fixed before. Stopped at any moment, the same
    command goes on with what is missing. For instance:
      steepest reproduce --list
      steepest reproduce spectral-condition
      steepest reproduce --scale cpu --data my_data/ --claim relu-features
    """

    papers: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which papers; all of them by default."""
    claim: tuple[str, ...] = ()
    """Only these claims."""
    scale: ScaleName = "quick"
    """How large: quick takes minutes on two cores, cpu hours; gpu takes hours on one GPU; paper has
    the sizes of the papers."""
    list: bool = False
    """Print the claims with their time and memory, and stop."""
    dry_run: bool = False
    """Print what would be measured, and stop."""
    out: Path | None = None
    """Folder of the measurements; by default runs/reproduce- and the scale."""
    data: Path | None = None
    """Folder of real data, with a subfolder for each set, such as wikitext2; by default what the
    variable STEEPEST_DATA says."""
    workers: int | None = None
    """Measurements at a time; by default one for each core."""

    def run(self) -> None:
        """Run the command."""
        papers = tuple(map(paper_of, dict.fromkeys(self.papers or PAPERS)))
        self._check_claims(papers)
        plan = ReproductionPlan(
            papers=papers,
            scale=self.scale,
            out=self.out or Path("runs") / f"reproduce-{self.scale}",
            data=self._folder_of_data(),
            workers=self._workers(),
            only=tuple(dict.fromkeys(self.claim)),
        )
        if self.list:
            for paper in papers:
                Console().print(list_of_claims(paper, self.scale))
            return
        if self.dry_run:
            Console().print(experiments_table(plan))
            return
        room = report_room()
        with bars() as shown:
            bar = shown.add_task("measurements", total=None, detail="")

            def on_measurement(done: int, of: int, message: str) -> None:
                shown.update(bar, completed=done, total=of, detail=message)
                if message and not screen.is_terminal:
                    say(f"{done} of {of} measurements  {message}")

            summaries = reproduce(plan, on_measurement, StudyProgress(shown))
        for summary in summaries:
            Console().print(claims_table(summary))
        for summary in summaries:
            path = page(room, summary, plan.report_of(summary["paper"]["name"]))
            print(f"report: {path.resolve().as_uri()}")

    def _check_claims(self, papers: tuple[Paper, ...]) -> None:
        made = {claim.name for paper in papers for claim in paper.claims}
        for name in self.claim:
            if claim_of(name).name not in made:
                raise InputError(
                    f"got the claim {name!r}, which none of {', '.join(self.papers)} makes; leave "
                    "the papers out"
                )

    def _folder_of_data(self) -> Path | None:
        given = self.data or Path(os.environ.get("STEEPEST_DATA") or "")
        if self.data is None and given == Path():
            return None
        if not given.is_dir():
            raise InputError(
                f"got {given} as the folder of data, which is no folder; give one with --data, or "
                "in the variable STEEPEST_DATA"
            )
        return given

    def _workers(self) -> int:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"got workers={self.workers}, expected at least 1")
        return self.workers or os.cpu_count() or 1
