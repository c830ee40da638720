"""What the command line shows: bars of work under way, and tables of what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from steepest.lab.papers.claim import Paper, ScaleName
from steepest.lab.papers.reproduction import ReproductionPlan
from steepest.lab.studies.stored import loss_unit, unit_of
from steepest.lab.sweep import Run
from steepest.printing import rough_duration

screen = Console(stderr=True)


def say(sentence: str) -> None:
    """Show a sentence as it is."""
    screen.print(sentence, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def bars(counted: bool = True) -> Iterator[Progress]:
    """Show bars with time left, counted or in percent; tasks need a `detail`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if counted else TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as shown:
        yield shown


class Countdown:
    """Takes the progress of work whose amount is an estimate: what is left, in a bar or in lines.

    After the first few units it says how long the whole will take. Where there is no terminal a
    line follows every `every` seconds.
    """

    FIRST = 4

    def __init__(
        self,
        bars: Progress,
        name: str,
        unit: str,
        every: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._bars, self._unit, self._every, self._clock = bars, unit, every, clock
        self._bar = bars.add_task(name, total=None, detail="")
        self._began: float | None = None  # with the first unit, which has what is done once in it
        self._said = 0.0

    def __call__(self, done: int, total: int, message: str) -> None:
        """Show that so many of about so many units are done."""
        self._bars.update(
            self._bar, completed=done, total=total, detail=escape(f"{self._unit}  {message}")
        )
        now = self._clock()
        if self._began is None:
            self._began = now
            return
        seconds = (now - self._began) / (done - 1)
        left = rough_duration(seconds * (total - done))
        if done == self.FIRST:
            say(f"about {total:,} {self._unit} of {1000 * seconds:.0f} ms: {left} left")
            self._said = now
        elif done > self.FIRST and not screen.is_terminal and now - self._said >= self._every:
            say(f"{done:,} of about {total:,} {self._unit}, {left} left: {message}")
            self._said = now


class StudyProgress:
    """One bar for a phase of a study, counting the steps of all its runs."""

    def __init__(self, bars: Progress):
        self.bars = bars
        self.runs: list[Run] = []
        self.bar = self.bars.add_task("", total=None, detail="")

    def say(self, sentence: str) -> None:
        """Show a sentence."""
        say(sentence)

    def phase(self, name: str, runs: list[Run]) -> None:
        """Begin with these runs."""
        self.runs = runs
        total = sum(run.config.steps for run in runs)
        self.bars.remove_task(self.bar)
        self.bar = self.bars.add_task(name, total=total, detail="steps")
        waiting = sum(not run.finished for run in runs)
        if waiting and not screen.is_terminal:
            say(f"{name}: {waiting} of {len(runs)} runs to do")

    def steps(self, running: dict[Path, int]) -> None:
        """Show how far the running ones are."""
        done = sum(run.config.steps for run in self.runs if run.finished)
        names = ", ".join(path.name for path in running)
        done += sum(running.values())
        self.bars.update(self.bar, completed=done, detail=f"steps  {names}")


def optimizer_table(summary: dict[str, Any]) -> Group:
    """One column for each optimizer, five in a table, so that it fits a narrow terminal."""
    entries = summary["optimizers"]
    baseline = next(e["label"] for e in entries if e["name"] == summary["baseline"])
    unit = unit_of(summary)
    nats = loss_unit(unit).replace(" per ", "/")
    gap = "bits/byte" if any(e["bits_per_byte"] for e in entries) else nats
    optional = {"accuracy": "validation_accuracy", "bits/byte": "bits_per_byte"}
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "best rate": lambda e: _number(e["best_lr"], "g"),
        **_tuned_beside_the_rate(entries),
        nats: lambda e: _with_half(e["validation_loss"]),
        "accuracy": lambda e: _with_half(e.get("validation_accuracy"), ".1%"),
        "bits/byte": lambda e: _with_half(e["bits_per_byte"]),
        f"gap to {baseline}": lambda e: _with_half(e["gap_to_baseline"], "+.3f"),
        f"{unit} to reach": lambda e: _number(e["tokens_to_baseline"], ",.0f"),
        "seconds to reach": lambda e: _number(e["seconds_to_baseline"], ".1f"),
        "ms per step": lambda e: _number(e["step_seconds"], ".1f", 1e3),
        "optimizer share": lambda e: _number(e["optimizer_share"], ".0%"),
        "peak MB": lambda e: _number(e["peak_memory_bytes"], ".0f", 1e-6),
        "verdict": lambda e: str(e["verdict"]),
    }
    for title, key in optional.items():
        if not any(e.get(key) for e in entries):
            del rows[title]
    tables = []
    for start in range(0, len(entries), 5):
        part = entries[start : start + 5]
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        for e in part:
            table.add_column(e["label"], justify="right")
        for title, show in rows.items():
            table.add_row(title, *map(show, part))
        tables.append(table)
    tables[0].title = summary["title"]
    tables[-1].caption = f"± is half a 95% interval over fresh seeds; the gap is in {gap}"
    return Group(*tables)


def _tuned_beside_the_rate(
    entries: list[dict[str, Any]],
) -> dict[str, Callable[[dict[str, Any]], str]]:
    """A row for the second number of a study, if there is one: the value of the best run."""
    variants = next((entry["varied"] for entry in entries if entry.get("varied")), None)
    if variants is None:
        return {}
    name = next(key for key in variants[0] if key not in ("best_lr", "validation_loss"))

    def best(entry: dict[str, Any]) -> str:
        known = [row for row in entry["varied"] if row["validation_loss"] is not None]
        if not known:
            return _number(None, "g")
        return _number(min(known, key=lambda row: row["validation_loss"])[name], "g")

    return {f"best {name.replace('_', ' ')}": best}


def edge_table(summary: dict[str, Any]) -> Table:
    """A row for each optimizer and rate: measured over threshold at the end, for each seed."""
    table = Table(title=summary["title"], box=SIMPLE_HEAD)
    table.add_column("optimizer")
    table.add_column("rate", justify="right")
    table.add_column("ratio at the end", justify="right")
    table.add_column("verdict")
    table.caption = "measured / threshold, mean over the last fifth of each run; 1 is the edge"
    for entry in summary["entries"]:
        ratios = ", ".join(_number(run["ratio"], ".2f") for run in entry["runs"])
        verdicts = ", ".join(dict.fromkeys(run["verdict"] for run in entry["runs"]))
        table.add_row(entry["label"], f"{entry['lr']:g}", ratios, verdicts)
    return table


def claims_table(summary: dict[str, Any]) -> Table:
    """A row for each claim of a paper: its figure, ours with its interval, and the verdict."""
    table = Table(title=summary["title"], box=SIMPLE_HEAD)
    table.add_column("claim", no_wrap=True)
    table.add_column("paper")
    table.add_column("here", no_wrap=True)
    table.add_column("verdict")
    table.caption = "± is half a 95% interval of the mean over seeds"
    for claim in summary["claims"]:
        interval, values = claim["interval"], [v for v in claim["values"] if v is not None]
        here = f"{fmean(values):.4g}" if values else "-"
        if interval:
            here += f"±{interval['high'] - interval['value']:.2g}"
        table.add_row(claim["name"], claim["paper"] or "-", here, claim["verdict"])
    return table


def list_of_claims(paper: Paper, scale: ScaleName) -> Table:
    """A row for each claim of a paper, with the time and memory of its experiment at a scale."""
    table = Table(title=f"{paper.title} arXiv {paper.arxiv}", box=SIMPLE_HEAD)
    table.add_column("claim", no_wrap=True)
    for title in ("sentence", "experiment", "minutes", "GB"):
        table.add_column(title)
    table.caption = f"at the scale {scale}; claims of one experiment share its time"
    for claim in paper.claims:
        setting = claim.experiment.scales.get(scale)
        cost = (f"{setting.minutes:g}", f"{setting.gigabytes:g}") if setting else ("-", "-")
        table.add_row(claim.name, claim.sentence, claim.experiment.name, *cost)
    return table


def experiments_table(plan: ReproductionPlan) -> Group:
    """A row for each experiment of a plan: its size, its cost, and what hinders it."""
    table = Table(title=f"experiments at the scale {plan.scale}", box=SIMPLE_HEAD)
    table.add_column("experiment", no_wrap=True)
    for title in ("seeds", "sizes", "minutes", "GB", "state"):
        table.add_column(title)
    minutes = 0.0
    for experiment in plan.experiments:
        setting = experiment.scales.get(plan.scale)
        obstacle = plan.obstacle(experiment)
        if setting is None:
            table.add_row(experiment.name, "-", "-", "-", "-", obstacle)
            continue
        done = plan.measured(experiment)
        minutes += setting.minutes * (1 - done / setting.seeds) if not obstacle else 0
        sizes = ", ".join(
            [*(f"{name} {_said(value)}" for name, value in setting.sizes.items())]
            + ([f"data {setting.data}"] if setting.data else [])
        )
        table.add_row(
            experiment.name, str(setting.seeds), sizes,
            f"{setting.minutes:g}", f"{setting.gigabytes:g}", obstacle or f"{done} done",
        )  # fmt: skip
    hours = rough_duration(60 * minutes / plan.workers)
    return Group(table, f"about {hours} are left with {plan.workers} at a time, in {plan.out}")


def _said(value: Any) -> str:
    """A size as a reader writes it, without brackets and quotes."""
    if isinstance(value, dict):
        return " ".join(f"{name} {_said(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_said, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value * unit, form)


def _with_half(value: dict[str, Any] | None, form: str = ".3f") -> str:
    if value is None:
        return "-"
    mean = format(value["mean"], form)
    if value["low"] is None:
        return mean
    return f"{mean}±{format(value['mean'] - value['low'], form.strip('+'))}"
