"""Measure what papers claim: every experiment once for each seed, in processes; then the verdicts.

A measurement is a file, so that stopped work goes on with what is missing. A folder of an
experiment is named after its sizes: where these change, it is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from steepest.lab.errors import InputError
from steepest.lab.files import read_json, write_json
from steepest.lab.papers.claim import (
    Claim,
    Comparison,
    Experiment,
    Numbers,
    Paper,
    ScaleName,
    Setting,
)
from steepest.lab.papers.datasets import find_data, missing_data
from steepest.lab.papers.judging import Judgement, judge_claim
from steepest.lab.processes import in_processes
from steepest.lab.studies.optimizer_study import StudyListener, study
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.train.run_folder import environment, opened, sentences_for_os_errors
from steepest.random_numbers import seeded

AnyExperiment = Experiment | Comparison
OnMeasurement = Callable[[int, int, str], None]
VERSION = 1  # of the measurements; another one measures everything anew


@dataclass(frozen=True)
class ReproductionPlan:
    """What to measure, and where.

    Attributes:
        papers: whose claims are measured.
        scale: how large.
        out: folder of all measurements.
        data: folder of real data, a subfolder for each set; None for none.
        workers: measurements at a time.
        only: names of claims to measure; all by default.
    """

    papers: tuple[Paper, ...]
    scale: ScaleName
    out: Path
    data: Path | None
    workers: int
    only: tuple[str, ...] = ()

    @property
    def experiments(self) -> tuple[AnyExperiment, ...]:
        """The experiments of the claims, each once, in the order of the claims."""
        claims = [claim for paper in self.papers for claim in self.claims_of(paper)]
        return tuple({claim.experiment.name: claim.experiment for claim in claims}.values())

    def obstacle(self, experiment: AnyExperiment) -> str:
        """Why an experiment cannot be measured; empty if it can."""
        if self.scale not in experiment.scales:
            return f"only at the scales {', '.join(experiment.scales)}"
        setting = experiment.scales[self.scale]
        if setting.on_gpu and not torch.cuda.is_available():
            return "it needs a GPU"
        return missing_data(setting.data, self.data)

    def claims_of(self, paper: Paper) -> tuple[Claim, ...]:
        """The claims of a paper that are asked for."""
        return tuple(c for c in paper.claims if not self.only or c.name in self.only)

    def report_of(self, paper: str) -> Path:
        """The folder of a paper's report; that of some claims is another one than of all."""
        if not self.only:
            return self.out / "reports" / paper
        name = self.only[0] if len(self.only) == 1 else f"some-{_hash(self.only)}"
        return self.out / "reports" / f"{paper}+{name}"

    def measured(self, experiment: AnyExperiment) -> int:
        """How many measurements of an experiment are there."""
        return sum(1 for _ in self.place(experiment).glob("seed-*.json"))

    def place(self, experiment: AnyExperiment) -> Path:
        """The folder of an experiment at this scale."""
        setting = experiment.scales[self.scale]
        identity = [VERSION, dict(setting.sizes), setting.data]
        return self.out / f"{experiment.name}-{_hash(identity)}"


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class _Task:
    measure: Callable[..., Numbers]
    sizes: dict[str, Any]
    seed: int
    file: Path
    on_gpu: bool


def reproduce(
    plan: ReproductionPlan, on_measurement: OnMeasurement, listener: StudyListener
) -> list[dict[str, Any]]:
    """Measure what is missing, and return the summary of every paper.

    Args:
        plan: what to measure.
        on_measurement: is called with how many measurements are done, of how many, and the name
            of the last one.
        listener: what studies of optimizers tell.

    Raises:
        InputError: for folders or data that cannot work, or a measurement that failed.
    """
    settings = {"kind": "reproduction", "scale": plan.scale, "version": VERSION}
    with sentences_for_os_errors(plan.out), opened(plan.out, settings) as check_folder:
        within_reach = [e for e in plan.experiments if not plan.obstacle(e)]
        measured = [e for e in within_reach if isinstance(e, Experiment)]
        _measure(plan, measured, on_measurement, check_folder)
        numbers = {e.name: _measured(plan, e) for e in measured}
        for comparison in within_reach:
            if isinstance(comparison, Comparison):
                check_folder()
                numbers[comparison.name] = _compared(plan, comparison, listener)
        summaries = [
            _summary(plan, paper, numbers) for paper in plan.papers if plan.claims_of(paper)
        ]
        for summary in summaries:
            folder = plan.report_of(summary["paper"]["name"])
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "summary.json", summary)
        return summaries


# measurements


def _tasks(
    plan: ReproductionPlan, experiments: Sequence[Experiment]
) -> Iterator[tuple[str, _Task]]:
    for experiment in experiments:
        setting, place = experiment.scales[plan.scale], plan.place(experiment)
        sizes = dict(setting.sizes)
        if setting.data is not None:
            sizes["data"] = find_data(setting.data, plan.data)
        for seed in range(setting.seeds):
            file = place / f"seed-{seed}.json"
            task = _Task(experiment.measure, sizes, seed, file, setting.on_gpu)
            yield f"{experiment.name}, seed {seed}", task


def _measure(
    plan: ReproductionPlan,
    experiments: Sequence[Experiment],
    on_measurement: OnMeasurement,
    check_folder: Callable[[], None],
) -> None:
    """Make every measurement whose file is not there, the long ones first."""
    tasks = dict(_tasks(plan, experiments))
    waiting = {name: task for name, task in tasks.items() if not task.file.exists()}
    minutes = {
        e.name: e.scales[plan.scale].minutes / e.scales[plan.scale].seeds for e in experiments
    }
    order = sorted(waiting, key=lambda name: -minutes[name.partition(",")[0]])
    for task in waiting.values():
        task.file.parent.mkdir(parents=True, exist_ok=True)
    done = len(tasks) - len(waiting)
    on_measurement(done, len(tasks), "going on" if done else "")
    for name, _ in in_processes(_work, {name: waiting[name] for name in order}, plan.workers):
        check_folder()
        done += 1
        on_measurement(done, len(tasks), name)


def _work(task: _Task, send: Callable[[Any], None]) -> None:
    torch.set_num_threads(1)
    began = time.monotonic()
    with seeded(task.seed), torch.device("cuda" if task.on_gpu else "cpu"):
        numbers = task.measure(task.seed, **task.sizes)
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    record = {
        "numbers": numbers,
        "seconds": time.monotonic() - began,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "environment": environment(),
    }
    with sentences_for_os_errors(task.file.parent):
        write_json(task.file, record)


def _measured(plan: ReproductionPlan, experiment: Experiment) -> list[Numbers]:
    tasks = dict(_tasks(plan, [experiment]))
    return [
        {**(r := read_json(t.file))["numbers"], "seconds": r["seconds"]} for t in tasks.values()
    ]


# studies


def study_config(comparison: Comparison, setting: Setting, data: str | None) -> StudyConfig:
    """Return the settings of the study of a comparison."""
    given = dict(setting.sizes) | ({} if data is None else {"data": data})
    names = {field.name for field in fields(StudyConfig)}
    if unknown := set(given) - names:
        raise InputError(
            f"got {sorted(unknown)} in {comparison.name}, expected settings of a study"
        )
    return StudyConfig(**given, seeds=setting.seeds)


def _compared(
    plan: ReproductionPlan, comparison: Comparison, listener: StudyListener
) -> list[Numbers]:
    """Make a study, or go on with it; return the losses of every fresh seed."""
    setting = comparison.scales[plan.scale]
    data = None if setting.data is None else find_data(setting.data, plan.data)
    config = replace(study_config(comparison, setting, data), workers=plan.workers)
    summary = study(config, plan.place(comparison), listener)
    return losses_of(summary, setting.seeds)


def losses_of(summary: dict[str, Any], seeds: int) -> list[Numbers]:
    """Return the numbers of a comparison from the summary of its study, one for each fresh seed.

    >>> runs = [{"seed": 1, "purpose": "seed", "status": "finished", "validation_loss": 2.5}]
    >>> entry = {"name": "muon", "verdict": "tuned", "best_lr": 0.1, "rates": [{"runs": runs}]}
    >>> losses_of({"optimizers": [entry]}, seeds=1)
    [{'accuracy': {}, 'rates': {'muon': 0.1}, 'muon': 2.5}]
    """
    numbers: list[Numbers] = [{"accuracy": {}, "rates": {}} for _ in range(seeds)]
    for entry in summary["optimizers"]:
        runs = {
            run["seed"]: run
            for rate in entry["rates"]
            for run in rate["runs"]
            if run["purpose"] == "seed"
        }
        for seed in range(seeds):
            run = runs.get(seed + 1)
            loss = run["validation_loss"] if run else None
            loss = math.inf if loss is None else loss
            numbers[seed][entry["name"]] = loss if entry["verdict"] == "tuned" else math.nan
            numbers[seed]["rates"][entry["name"]] = entry["best_lr"]
            if run and run.get("validation_accuracy") is not None:
                numbers[seed]["accuracy"][entry["name"]] = run["validation_accuracy"]
    return numbers


# verdicts


def judgement(plan: ReproductionPlan, claim: Claim, numbers: dict[str, list[Numbers]]) -> Judgement:
    """Return the verdict on a claim."""
    if obstacle := plan.obstacle(claim.experiment):
        return Judgement("not testable here", (), None, obstacle)
    return judge_claim(claim, [claim.value(one) for one in numbers[claim.experiment.name]])


def _summary(
    plan: ReproductionPlan, paper: Paper, numbers: dict[str, list[Numbers]]
) -> dict[str, Any]:
    claims = plan.claims_of(paper)
    used = {claim.experiment.name: claim.experiment for claim in claims}
    return {
        "kind": "reproduction",
        "title": paper.title,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": environment(),
        "settings": {"scale": plan.scale},
        "paper": {"name": paper.name, "authors": paper.authors, "arxiv": paper.arxiv},
        "claims": [_row(claim, judgement(plan, claim, numbers)) for claim in claims],
        "experiments": [
            _experiment(plan, experiment, numbers.get(name, []))
            for name, experiment in used.items()
        ],
        "left_out": dict(paper.left_out),
    }


def _row(claim: Claim, result: Judgement) -> dict[str, Any]:
    return {
        "name": claim.name,
        "sentence": claim.sentence,
        "place": claim.place,
        "source": claim.source,
        "checks": list(claim.checks),
        "experiment": claim.experiment.name,
        "kind": claim.experiment.kind,
        "quantity": claim.quantity,
        "criterion": claim.criterion,
        "limits": claim.limits,
        "paper": claim.paper,
        "values": _plain(result.values),
        "interval": asdict(result.interval) if result.interval else None,
        "verdict": result.verdict,
        "reason": result.reason,
        "control": claim.control,
    }


def _experiment(
    plan: ReproductionPlan, experiment: AnyExperiment, numbers: list[Numbers]
) -> dict[str, Any]:
    setting = experiment.scales.get(plan.scale)
    return {
        "name": experiment.name,
        "title": experiment.title,
        "kind": experiment.kind,
        "sizes": dict(setting.sizes) if setting else {},
        "data": setting.data if setting else None,
        "seeds": len(numbers),
        "numbers": _plain(numbers),
    }


def _plain(value: Any) -> Any:
    """A copy without NaN and infinities, which are None, and with lists for tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
