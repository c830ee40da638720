"""The command line: parses, calls the lab, prints."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIG_IGN, SIGINT, SIGTERM, signal
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import TaskID

from steepest.diagnosis import Level
from steepest.diagnosis.warmup import WARMUP_STEPS
from steepest.lab.arguments import parsed
from steepest.lab.errors import InputError
from steepest.lab.imports import (
    imported_batches,
    imported_function,
    imported_loss,
    imported_model,
    imported_optimizer,
    imported_stream,
    taken,
    that_fit,
    with_known_generators,
)
from steepest.lab.interruption import SENTENCE, Terminated, interruptible
from steepest.lab.studies.diagnosis_study import diagnosis_study
from steepest.lab.studies.edge_of_stability import EdgeConfig, edge_of_stability
from steepest.lab.studies.optimizer_study import study
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.studies.transfer_study import transfer_study
from steepest.lab.terminal import (
    Countdown,
    StudyProgress,
    bars,
    edge_table,
    optimizer_table,
    say,
    screen,
)
from steepest.lab.train import TrainConfig, train
from steepest.lab.train.config import check_clip
from steepest.lab.train.run_folder import removed, sentences_for_os_errors
from steepest.lab.user_code import UserCodeError, user_code_error
from steepest.lab.weights import load_weights
from steepest.parametrize.rules import Rule


@dataclass(frozen=True, kw_only=True)
class Train(TrainConfig):
    """Train a GPT once. Stopped at any moment, the same command goes on where it was.

    Ctrl-C and SIGTERM finish the step and save it first; a second one ends at once, without that.
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
    """Batches that judge: 3 at least, 4 for "standard", 8 for "thorough"; more make intervals
    narrower. A warm-up takes those after them, one for each step if there are so many."""
    checkpoint: Path | None = None
    """Weights to load first: a state dict, from torch.save or safetensors."""
    warmup_steps: int | Literal["auto"] = "auto"
    """Steps of Muon that a copy is trained for before it is judged: auto is 60 where the weights
    look untrained. 0 takes the weights as they are."""
    level: Level = "standard"
    """quick: a gradient for each batch. standard: real steps in each geometry, and curvature.
    thorough: a race of more real steps too."""
    optimizer: str | None = None
    """A function of the model that returns your optimizer, or several: its first step is audited
    for what it does to each parameter, and for common mistakes."""
    clip: float | None = None
    """The norm that your loop clips gradients to, above 0; for the audit of --optimizer."""
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

    Exit codes: 0 the rate transfers over all sizes, 4 it does not, 3 cannot tell, 2 bad input.
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
    optimizer: str = "adamw"
    """Which one will train the model."""
    settings: tuple[str, ...] = ()
    """Of that optimizer, such as momentum=0.9; for shampoo and kl-shampoo block=32, the base width
    or less, as the rate depends on the size of their blocks; for soap length=spectral
    scale=spectral max_side=None, whose rate drifts least."""
    branches: tuple[str, ...] = ()
    """For rules of depth, the last layer of every residual branch, such as blocks.*.mlp.down; known
    for blocks of GPT-2, LLaMA, ViT and alike."""
    lr: float = 0.01
    """Where to look first; the grid grows from there."""
    steps: int = 120
    """Of each run; best rates are compared after half of them too. As many batches are kept."""
    seeds: int = 2
    """Runs for each rate."""
    grid_only: bool = False
    """Train at rates by factors of 2 alone, for models so large that every run counts: fewer runs
    of the largest, and the advice is given, not tested."""
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
    """Write the report of a run or a study, compare several, or export their numbers.

    For instance: steepest report runs/a runs/b --out numbers.csv
    """

    path: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs or studies, or earlier reports; several are compared."""
    out: Path | None = None
    """Where to write: a page, or a table if it ends with .csv or .parquet. By default report.html
    in that folder, or over the earlier report; of a comparison, a page under runs/."""


COMMANDS = {
    "study": Study,
    "train": Train,
    "diagnose": Diagnose,
    "transfer": Transfer,
    "reproduce": Reproduce,
    "report": Report,
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 bad input (with a sentence), 130 interrupted."""
    with interruptible():
        try:
            _run(sys.argv[1:] if arguments is None else arguments)
        except KeyboardInterrupt as stopped:
            say(SENTENCE)
            sys.exit(128 + (SIGTERM if isinstance(stopped, Terminated) else SIGINT))
        except BrokenPipeError:  # `steepest train --help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except BaseException as error:
            refused = user_code_error(error) or error
            if not isinstance(refused, InputError):
                raise
            screen.print("[bold red]error:[/] ", end="")
            say(str(refused))
            if isinstance(refused, UserCodeError) and refused.traceback:
                say(f"\nIn your code:\n{refused.traceback.rstrip()}")
            sys.exit(2)
        finally:
            if arguments is None:  # the process ends; Ctrl-C has nothing left to stop
                signal(SIGINT, SIG_IGN)


def _run(arguments: list[str]) -> None:
    command = parsed(arguments, COMMANDS, "In which norm should each weight matrix descend?")
    with sentences_for_os_errors(command.out or Path("runs")):
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
            _report(command)


def _train(command: Train) -> None:
    settings = asdict(command)
    del settings["out"]
    config = TrainConfig(**{**settings, "model": command.model})
    out = command.out or _folder(f"train-{config.optimizer}", settings)
    with bars() as shown:
        bar = shown.add_task("training", total=config.steps, detail="")
        began = time.monotonic()

        def on_step(step: int, values: dict[str, Any]) -> None:
            speed = config.tokens_per_step / (values["step_seconds"] or 1e9)
            detail = f"loss {values['loss']:.3f}  {speed:,.0f} tokens/s"
            shown.update(bar, completed=step, detail=detail)
            if not screen.is_terminal and (step % max(1, config.steps // 10) == 0 or step == 1):
                spent = time.monotonic() - began
                screen.print(f"step {step} of {config.steps}  {detail}  {spent:.0f} s")

        result = train(config, out, on_step=on_step, say=say)
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
    with bars() as shown:
        summary = study(config, out, StudyProgress(shown))
    page = _page(report, summary, out)
    Console().print(optimizer_table(summary))
    for entry in summary["optimizers"]:
        if entry["verdict"] != "tuned":
            print(f"{entry['label']}: inconclusive, because {entry['reason']}")
    print(f"report: {page.resolve().as_uri()}")


def _diagnose(command: Diagnose) -> None:
    report = _report_room()
    check_clip(command.clip)
    if command.clip is not None and command.optimizer is None:
        raise InputError("got --clip without --optimizer, whose audit it is for; give both")
    with_known_generators()
    model, stream = imported_model(command.model), imported_stream(command.batches)
    if command.checkpoint is not None:
        load_weights(model, command.checkpoint)
    settings = {key: value for key, value in asdict(command).items() if key not in ("out", "json")}
    for key in ("monitored", "checkpoint"):
        settings[key] = settings[key] and str(settings[key])
    out = command.out or _folder("diagnosis", settings)
    steps = WARMUP_STEPS if command.warmup_steps == "auto" else command.warmup_steps
    with bars() as shown:
        diagnosis, audited, summary = diagnosis_study(
            model,
            imported_loss(command.loss),
            taken(command.batches, stream, command.count),
            others=that_fit(command.batches, stream, max(0, steps)),
            level=command.level,
            parameters=command.parameters or None,
            warmup_steps=command.warmup_steps,
            optimizer=imported_optimizer(command.optimizer),
            clip=command.clip,
            monitored=command.monitored,
            out=out,
            settings=settings,
            on_progress=Countdown(shown, "diagnosing", "gradients"),
            say=say,
        )
    page = _page(report, summary, out)
    if command.json:
        print(json.dumps(summary))
    else:
        Console().print(diagnosis.table())
        for warning in () if audited is None else audited.warnings:
            print(f"audit: {warning}")
        print(f"plan: {out / 'plan.toml'}")
        print(f"report: {page.resolve().as_uri()}")
    if all(row.verdict == "cannot tell" for row in diagnosis):
        sys.exit(3)
    if audited is not None and not audited.ok:
        sys.exit(4)


def _transfer(command: Transfer) -> None:
    report = _report_room()
    build = imported_function(command.build, "build(width=...), which returns the model")
    batches = imported_batches(command.batches, command.steps)
    if len(batches) < command.steps:
        raise InputError(
            f"got {len(batches)} batches, expected one for each of {command.steps} steps"
        )
    loss = imported_loss(command.loss)
    settings = {key: value for key, value in asdict(command).items() if key not in ("out", "json")}
    out = command.out or _folder("transfer", settings)
    if (earlier := out / "runs.jsonl").is_file():
        say(f"goes on with the runs in {earlier}; if your code has changed, take another --out")
    with bars(counted=False) as shown:
        tasks: dict[str, TaskID] = {}

        def on_run(phase: str, said: str, done: float) -> None:
            if phase not in tasks:
                for ended in tasks.values():  # whose ends were estimates
                    shown.update(ended, completed=1.0)
                tasks[phase] = shown.add_task(phase, total=1.0, detail="")
                if not screen.is_terminal:
                    say(phase)
            shown.update(tasks[phase], completed=done, detail=said)

        check, summary = transfer_study(
            build, command.sizes, batches, loss, target=command.target, lr=command.lr,
            rule=command.rule, optimizer=command.optimizer, options=command.settings,
            branches=command.branches, seeds=command.seeds, grid_only=command.grid_only,
            out=out, settings=settings, on_run=on_run,
        )  # fmt: skip
    page = _page(report, summary, out)
    if command.json:
        print(json.dumps(summary))
    else:
        Console().print(check)
        print(f"report: {page.resolve().as_uri()}")
    if check.passed is None:
        sys.exit(3)
    if not check.passed:
        sys.exit(4)


def _reproduce(command: Reproduce) -> None:
    report = _report_room()
    settings = asdict(command)
    for name in ("out", "claim"):
        del settings[name]
    config = EdgeConfig(**settings)
    named = {key: value for key, value in settings.items() if key != "workers"}
    out = command.out or _folder(command.claim, named)
    with bars() as shown:
        bar = shown.add_task("runs", total=None, detail="")

        def on_run(done: int, of: int, message: str) -> None:
            shown.update(bar, completed=done, total=of, detail=message)
            if message and not screen.is_terminal:
                say(f"{done} of {of} runs  {message}")

        summary = edge_of_stability(config, out, on_run)
    page = _page(report, summary, out)
    Console().print(edge_table(summary))
    print(f"report: {page.resolve().as_uri()}")


def _report(command: Report) -> None:
    report = _report_room()
    summary, place = report.find_all(command.path)
    out = command.out or place
    if out is None:
        out = _folder("comparison", {"paths": command.path}).with_suffix(".html")
    page = report.write_to(summary, out)
    print(f"report: {page.resolve().as_uri()}")


def _page(report: Any, summary: dict[str, Any], out: Path) -> Path:
    """Write the report into the folder of what it is about."""
    if not out.is_dir():
        raise removed(out)
    path: Path = report.write(summary, out / "report.html")
    return path


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


if __name__ == "__main__":
    main()
