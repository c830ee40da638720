"""The command line: parses, calls the lab, prints."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import nn

from steepest import __version__
from steepest.diagnosis import Audit, Level, audit, diagnose
from steepest.lab.errors import InputError
from steepest.lab.files import read_json, write_json
from steepest.lab.imports import default_loss, imported
from steepest.lab.studies.edge_of_stability import EdgeConfig, edge_of_stability
from steepest.lab.studies.optimizer_study import study
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.studies.transfer_study import transfer_study
from steepest.lab.sweep import Run
from steepest.lab.train import TrainConfig, train
from steepest.lab.train.run_folder import environment, sentences_for_os_errors
from steepest.transfer.rules import OptimizerName, Rule

screen = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Train(TrainConfig):
    """Train a GPT once. Stopped at any moment, the same command goes on where it was.

    For instance: steepest train --optimizer muon --lr 0.02 --data my_texts/ --model.width 128
    """

    out: Path | None = None
    """Folder of the run; by default one under runs/ that is named after the settings."""


@dataclass(frozen=True, kw_only=True)
class Study(StudyConfig):
    """Compare optimizers, each at its own best learning rate, and write a report.

    Stopped at any moment, the same command goes on where it was; what is finished is not run again.
    For instance: steepest study --minutes 20 --data my_texts/ --optimizers adamw muon
    """

    out: Path | None = None
    """Folder of the study; by default one under runs/ that is named after the settings."""


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Say for each matrix of your model which norm it wants to descend in, and write a report.

    What is yours is named by import path, module:name, as seen from the current folder.
    For instance: steepest diagnose my_package.models:build --batches my_package.data:batches

    Exit codes: 0 some matrix has a verdict, 3 none has, 4 the audit has warnings, 2 bad input.
    """

    model: tyro.conf.Positional[str]
    """A function that returns the model, or the model itself."""
    batches: str
    """A function that returns batches, or the batches; an iterable of what the loss takes."""
    loss: str | None = None
    """A function loss(model, batch) -> scalar. By default model(**batch).loss where a batch is a
    mapping, and else the cross entropy of model(inputs) for batches (inputs, classes)."""
    count: int = 8
    """Batches to take: 3 at least, 4 for "standard", 8 for "thorough"; more make intervals
    narrower."""
    level: Level = "standard"
    """quick: a gradient for each batch. standard: curvature too. thorough: real steps too."""
    optimizer: str | None = None
    """A function of the model that returns your optimizer, or several: its first step is audited
    for what it does to each parameter, and for common mistakes."""
    clip: float | None = None
    """The norm that your loop clips gradients to; for the audit."""
    monitored: Path | None = None
    """A file that steepest.Monitor wrote during training: for a map over the steps."""
    parameters: tuple[str, ...] = ()
    """Names or patterns of the parameters to look at; by default all matrices."""
    json: bool = False
    """Print JSON in place of the table."""
    out: Path | None = None
    """Folder for diagnosis.json, plan.toml and report.html; by default one under runs/."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Say whether the learning rate of a small model is that of larger ones, why, and which to use.

    Your function from sizes to a model is parametrized by a rule; every size is trained at rates by
    factors of 2, every layer checked for outputs that grow or freeze with the size, and the
    sharpness followed along training. Stopped at any moment, the same command goes on where it was.
    For instance: steepest transfer my_package.models:build --batches my_package.data:batches
    --sizes width=64,depth=2 width=128 width=256 depth=8 depth=32 --optimizer muon --lr 0.02
    --target width=1024,depth=16

    Exit codes: 0 the rate transfers over all sizes, 4 it does not, 2 bad input.
    """

    build: tyro.conf.Positional[str]
    """A function that takes the sizes by name and returns the model."""
    batches: str
    """A function that returns batches, or the batches; an iterable of what the loss takes."""
    sizes: tuple[str, ...]
    """The base first, which names every size, such as width=64,depth=2; then what to grow, each
    from the base on: width=128 width=256 depth=8, or together: width=128,heads=4."""
    target: str | None = None
    """What you want to train in the end, such as width=1024,depth=16; by default the largest of
    the sizes."""
    loss: str | None = None
    """A function loss(model, batch) -> scalar; by default as for steepest diagnose."""
    rule: Rule = "mup"
    """Parametrization: mup for the width, completep (or depth-mup, for blocks of one layer) for
    the depth too; sp and ntp are controls."""
    optimizer: OptimizerName = "adam"
    """Which one will train the model."""
    settings: tuple[str, ...] = ()
    """Of that optimizer, such as momentum=0.9; for shampoo and kl-shampoo block=32, the base width
    or less, as the rate depends on the size of their blocks."""
    branches: tuple[str, ...] = ()
    """For rules of depth, the last layer of every residual branch, such as blocks.*.mlp.down; known
    for blocks of GPT-2, LLaMA, ViT and alike."""
    lr: float = 0.01
    """Where to look first; the grid grows from there."""
    steps: int = 120
    """Of each run; best rates are compared after half of them too. As many batches are kept."""
    seeds: int = 2
    """Runs for each rate."""
    json: bool = False
    """Print JSON in place of tables."""
    out: Path | None = None
    """Folder for summary.json, report.html and finished runs; by default one under runs/."""


@dataclass(frozen=True, kw_only=True)
class Reproduce(EdgeConfig):
    """Measure what a paper claims, and write a report with the verdict.

    edge-of-stability: full-batch training of a small network on digits. Gradient descent sharpens
    until its largest Hessian eigenvalue is 2 / lr; every other optimizer is measured against its
    own threshold. Stopped at any moment, the same command goes on with the runs that are missing.
    For instance: steepest reproduce edge-of-stability --optimizers gd adam muon
    """

    claim: tyro.conf.Positional[Literal["edge-of-stability"]]
    """Which claim."""
    out: Path | None = None
    """Folder of the runs; by default one under runs/ that is named after the settings."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the report of a study again, from its folder or from an earlier report."""

    path: tyro.conf.Positional[Path]
    """Folder of a study, or a report.html."""
    out: Path | None = None
    """Where to write; by default report.html in that folder, or over the earlier report."""


Command = (
    Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Transfer, tyro.conf.subcommand("transfer")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 bad input (with a sentence), 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"steepest {__version__}")
        return
    try:
        command = tyro.cli(
            Command,
            prog="steepest",
            description="In which norm should each weight matrix descend?",
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        if isinstance(command, Study):
            _study(command)
        elif isinstance(command, Train):
            _train(command)
        elif isinstance(command, Diagnose):
            _diagnose(command)
        elif isinstance(command, Transfer):
            _transfer(command)
        elif isinstance(command, Reproduce):
            _reproduce(command)
        else:
            with sentences_for_os_errors(command.path):
                _report(command)
    except InputError as error:
        screen.print("[bold red]error:[/] ", end="")
        screen.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        screen.print("interrupted; run the same command to go on from the last checkpoint")
        sys.exit(130)


def _train(command: Train) -> None:
    settings = asdict(command)
    del settings["out"]
    config = TrainConfig(**{**settings, "model": command.model})
    out = command.out or _folder(f"train-{config.optimizer}", settings)
    with _bars() as bars:
        bar = bars.add_task("training", total=config.steps, detail="")
        began = time.monotonic()

        def on_step(step: int, values: dict[str, Any]) -> None:
            speed = config.tokens_per_step / (values["step_seconds"] or 1e9)
            detail = f"loss {values['loss']:.3f}  {speed:,.0f} tokens/s"
            bars.update(bar, completed=step, detail=detail)
            if not screen.is_terminal and (step % max(1, config.steps // 10) == 0 or step == 1):
                spent = time.monotonic() - began
                screen.print(f"step {step} of {config.steps}  {detail}  {spent:.0f} s")

        result = train(config, out, on_step=on_step, say=_say)
    if result["status"] != "finished":
        raise InputError(f"{out} is a run that diverged: {result.get('reason')}")
    loss = result["validation_loss"]
    print(
        f"validation loss {loss:.4f} nats per token after {result['tokens']:,} tokens; run: {out}"
    )


def _study(command: Study) -> None:
    report = _report_room()
    settings = asdict(command)
    del settings["out"]
    config = StudyConfig(**{**settings, "model": command.model})
    # the length of the runs follows from the minutes, so other minutes are another study
    out = command.out or _folder("study", config.identity | {"minutes": config.minutes})
    with _bars() as bars:
        summary = study(config, out, _StudyProgress(bars))
    with sentences_for_os_errors(out):
        page = report.write(summary, out / "report.html")
    Console().print(_results(summary))
    for entry in summary["optimizers"]:
        if entry["verdict"] != "tuned":
            print(f"{entry['label']}: inconclusive, because {entry['reason']}")
    print(f"report: {page.resolve().as_uri()}")


def _diagnose(command: Diagnose) -> None:
    report = _report_room()
    model, batches = imported(command.model), imported(command.batches)
    model = model if isinstance(model, nn.Module) else model()
    given = list(itertools.islice(iter(batches() if callable(batches) else batches), command.count))
    loss = default_loss if command.loss is None else imported(command.loss)
    settings = {key: value for key, value in asdict(command).items() if key not in ("out", "json")}
    settings["monitored"] = command.monitored and str(command.monitored)
    out = command.out or _folder("diagnosis", settings)
    with _bars() as bars:
        bar = bars.add_task("diagnosing", total=None, detail="gradients and products")
        try:
            found = diagnose(
                model,
                loss,
                given,
                level=command.level,
                parameters=command.parameters or None,
                on_progress=lambda done: bars.update(bar, completed=done),
            )
            audited = _audit(command, model, loss, given[:1])
        except (ValueError, TypeError, FloatingPointError, NotImplementedError) as error:
            raise InputError(str(error)) from error
    summary = {
        **found.as_dict(),
        "audit": None if audited is None else audited.as_dict(),
        "monitored": _monitored(command.monitored),
        "title": f"Which norm does each matrix of {command.model} want?",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "settings": settings,
        "environment": environment(),
        "command": f"steepest diagnose {command.model} --batches {command.batches}",
    }
    with sentences_for_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "diagnosis.json", summary)
        found.plan().save(out / "plan.toml")
        page = report.write(summary, out / "report.html")
    if command.json:
        print(json.dumps(summary))
    else:
        Console().print(found.table())
        for warning in () if audited is None else audited.warnings:
            print(f"audit: {warning}")
        print(f"plan: {out / 'plan.toml'}")
        print(f"report: {page.resolve().as_uri()}")
    if all(row.verdict == "cannot tell" for row in found):
        sys.exit(3)
    if audited is not None and not audited.ok:
        sys.exit(4)


def _audit(command: Diagnose, model: Any, loss: Any, batches: list[Any]) -> Audit | None:
    if command.optimizer is None:
        return None
    optimizer = imported(command.optimizer)(model)
    return audit(model, optimizer, loss, batches, clip_norm=command.clip)


def _monitored(path: Path | None) -> list[dict[str, Any]]:
    """The records of a Monitor."""
    if path is None:
        return []
    with sentences_for_os_errors(path):
        lines = path.read_text().splitlines()
    try:
        return [row for row in map(json.loads, lines) if row["kind"] == "condition"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"got {path}, which holds no records; expected the path= of a steepest.Monitor"
        ) from error


def _transfer(command: Transfer) -> None:
    report = _report_room()
    build, batches = imported(command.build), imported(command.batches)
    given = list(itertools.islice(iter(batches() if callable(batches) else batches), command.steps))
    if len(given) < command.steps:
        raise InputError(
            f"got {len(given)} batches, expected one for each of {command.steps} steps"
        )
    loss = default_loss if command.loss is None else imported(command.loss)
    settings = {key: value for key, value in asdict(command).items() if key not in ("out", "json")}
    out = command.out or _folder("transfer", settings)
    with _bars(counted=False) as bars:
        tasks: dict[str, TaskID] = {}

        def on_run(phase: str, said: str, done: float) -> None:
            if phase not in tasks:
                for ended in tasks.values():  # whose ends were estimates
                    bars.update(ended, completed=1.0)
                tasks[phase] = bars.add_task(phase, total=1.0, detail="")
                if not screen.is_terminal:
                    _say(phase)
            bars.update(tasks[phase], completed=done, detail=said)

        found, summary = transfer_study(
            build, command.sizes, given, loss, target=command.target, lr=command.lr,
            rule=command.rule, optimizer=command.optimizer, options=command.settings,
            branches=command.branches, seeds=command.seeds, out=out, settings=settings,
            on_run=on_run,
        )  # fmt: skip
    with sentences_for_os_errors(out):
        page = report.write(summary, out / "report.html")
    if command.json:
        print(json.dumps(summary))
    else:
        Console().print(found)
        print(f"report: {page.resolve().as_uri()}")
    if not found.passed:
        sys.exit(4)


def _reproduce(command: Reproduce) -> None:
    report = _report_room()
    settings = asdict(command)
    for name in ("out", "claim"):
        del settings[name]
    config = EdgeConfig(**settings)
    named = {key: value for key, value in settings.items() if key != "workers"}
    out = command.out or _folder(command.claim, named)
    with _bars() as bars:
        bar = bars.add_task("runs", total=None, detail="")

        def on_run(done: int, of: int, found: str) -> None:
            bars.update(bar, completed=done, total=of, detail=found)
            if found and not screen.is_terminal:
                _say(f"{done} of {of} runs  {found}")

        summary = edge_of_stability(config, out, on_run)
    with sentences_for_os_errors(out):
        page = report.write(summary, out / "report.html")
    Console().print(_edges(summary))
    print(f"report: {page.resolve().as_uri()}")


def _edges(summary: dict[str, Any]) -> Table:
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


def _report(command: Report) -> None:
    report = _report_room()
    path = command.path
    if not path.exists():
        raise InputError(f"{path} does not exist; give the folder of a study or a report.html")
    if path.is_dir():
        if not (path / "summary.json").exists():
            raise InputError(
                f"{path} has no summary.json, so no study was finished there; run the same "
                "`steepest study` command to finish it"
            )
        remedy = "Run the same `steepest study` command to write it again; no run is lost"
        summary, out = read_json(path / "summary.json", remedy), path / "report.html"
    else:
        try:
            summary, out = report.read(path), path
        except ValueError as error:
            raise InputError(str(error)) from error
    page = report.write(summary, command.out or out)
    print(f"report: {page.resolve().as_uri()}")


def _report_room() -> Any:
    try:
        import scipy  # noqa: F401

        from steepest.lab import report
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("jinja2", "plotly", "scipy"):
            raise
        raise InputError(
            f"the report needs {error.name}, which is not installed; "
            "run: pip install 'steepest[report]'"
        ) from error
    return report


def _folder(name: str, settings: dict[str, Any]) -> Path:
    text = json.dumps(settings, sort_keys=True, default=str)
    return Path("runs") / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _say(sentence: str) -> None:
    screen.print(sentence, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bars(counted: bool = True) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if counted else TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bars:
        yield bars


class _StudyProgress:
    """One bar for a phase of a study, counting the steps of all its runs."""

    def __init__(self, bars: Progress):
        self.bars = bars
        self.runs: list[Run] = []
        self.bar = self.bars.add_task("", total=None, detail="")

    def say(self, sentence: str) -> None:
        _say(sentence)

    def phase(self, name: str, runs: list[Run]) -> None:
        self.runs = runs
        total = sum(run.config.steps for run in runs)
        self.bars.remove_task(self.bar)
        self.bar = self.bars.add_task(name, total=total, detail="steps")
        waiting = sum(not run.finished for run in runs)
        if waiting and not screen.is_terminal:
            _say(f"{name}: {waiting} of {len(runs)} runs to do")

    def steps(self, running: dict[Path, int]) -> None:
        done = sum(run.config.steps for run in self.runs if run.finished)
        names = ", ".join(path.name for path in running)
        done += sum(running.values())
        self.bars.update(self.bar, completed=done, detail=f"steps  {names}")


def _results(summary: dict[str, Any]) -> Group:
    """One column for each optimizer, five in a table, so that it fits a narrow terminal."""
    entries = summary["optimizers"]
    baseline = next(e["label"] for e in entries if e["name"] == summary["baseline"])
    unit = "bits/byte" if any(e["bits_per_byte"] for e in entries) else "nats/token"
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "best rate": lambda e: _number(e["best_lr"], "g"),
        "nats/token": lambda e: _with_half(e["validation_loss"]),
        "bits/byte": lambda e: _with_half(e["bits_per_byte"]),
        f"gap to {baseline}": lambda e: _with_half(e["gap_to_baseline"], "+.3f"),
        "tokens to reach": lambda e: _number(e["tokens_to_baseline"], ",.0f"),
        "seconds to reach": lambda e: _number(e["seconds_to_baseline"], ".1f"),
        "ms per step": lambda e: _number(e["step_seconds"], ".1f", 1e3),
        "optimizer share": lambda e: _number(e["optimizer_share"], ".0%"),
        "peak MB": lambda e: _number(e["peak_memory_bytes"], ".0f", 1e-6),
        "verdict": lambda e: str(e["verdict"]),
    }
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
    tables[-1].caption = f"± is half a 95% interval over fresh seeds; the gap is in {unit}"
    return Group(*tables)


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value * unit, form)


def _with_half(value: dict[str, Any] | None, form: str = ".3f") -> str:
    if value is None:
        return "-"
    mean = format(value["mean"], form)
    return mean if value["low"] is None else f"{mean}±{value['mean'] - value['low']:.3f}"


if __name__ == "__main__":
    main()
