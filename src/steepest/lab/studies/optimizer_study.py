"""Which optimizer, at its own best learning rate? Many runs, tuned fairly, within a time budget.

The same initialization and data order for all, the same AdamW for everything that is no matrix,
and for every optimizer a grid of rates of its own, in steps of a factor of two. A grid whose best
rate lies at its edge grows, or the result says "inconclusive". The best rate is then run with
fresh seeds, which the rate was not chosen on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from steepest.lab.data import Corpus, load
from steepest.lab.errors import InputError
from steepest.lab.files import read_json, write_json
from steepest.lab.models import GPTConfig
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.studies.summary import summarize
from steepest.lab.sweep import Run, run_all
from steepest.lab.train import TrainConfig, named_optimizer
from steepest.lab.train.loop import check_run
from steepest.lab.train.optimizers import spec_slug
from steepest.lab.train.run_folder import opened, sentences_for_os_errors

GROWTH = 4  # most rates added to a grid
MEASUREMENTS = 10  # of the validation loss, and of the condition, in each run
FEWEST_STEPS = 120  # below this the model shrinks instead
CALIBRATION_STEPS = 12
RESERVE = 0.85  # share of the budget that is planned for; machines have moods


class StudyListener(Protocol):
    """What a study tells while it runs."""

    def say(self, sentence: str) -> None:
        """Pass on a sentence worth knowing."""

    def phase(self, name: str, runs: list[Run]) -> None:
        """Announce the next runs."""

    def steps(self, running: dict[Path, int]) -> None:
        """Take the steps that running runs have done."""


def study(config: StudyConfig, out: Path, progress: StudyListener) -> dict[str, Any]:
    """Run the study, or go on where it was stopped, and return its summary.

    Raises:
        InputError: for settings, data or folders that cannot work, or a budget that is too small.
    """
    corpus = load(config.data)
    check_run(config.first_run, corpus)  # before there is a folder
    settings = {**config.identity, "data_sha256": corpus.sha256}
    with sentences_for_os_errors(out), opened(out, settings) as check_folder:
        return _Study(config, out, corpus, progress, check_folder).conduct()


class _Study:
    def __init__(
        self,
        config: StudyConfig,
        out: Path,
        corpus: Corpus,
        progress: StudyListener,
        check_folder: Callable[[], None] = lambda: None,
    ):
        self.config, self.out, self.corpus, self.progress = config, out, corpus, progress
        self.check_folder = check_folder
        self.started = time.monotonic()
        self.state: dict[str, Any] = {"spent": 0.0, "notes": []}
        if (out / "plan.json").exists():
            self.state |= read_json(out / "plan.json")
            progress.say(f"going on with the study in {out}")
        self.earlier: float = self.state["spent"]

    def conduct(self) -> dict[str, Any]:
        self.progress.say(f"data: {self.corpus}")
        if "steps" not in self.state:
            self.plan()
        planned_for = self.state.get("minutes", self.config.minutes)
        if self.config.steps is None and self.config.minutes != planned_for:
            self.progress.say(
                f"the plan of {planned_for:g} minutes, {self.state['steps']} steps a run, stays; "
                f"with {self.config.minutes:g} minutes only the grids may grow further. For runs "
                "of another length choose another --out"
            )
        grids = {name: sorted(named_optimizer(name).rates) for name in self.config.optimizers}
        self.tune(grids)
        best = {name: self.best(name, rates) for name, rates in grids.items()}
        fresh = {
            name: [self.run(name, rate, seed) for seed in range(1, self.config.seeds + 1)]
            for name, rate in best.items()
            if rate is not None
        }
        turns = zip(*fresh.values(), strict=True)  # a slow moment of the machine hits all of them
        self.perform("fresh seeds", [run for turn in turns for run in turn])
        summary = summarize(
            config=self.config,
            steps=self.state["steps"],
            model=GPTConfig(**self.state["model"]),
            corpus=self.corpus,
            environment=read_json(self.out / "environment.json"),
            tuning={n: {r: self.run(n, r, 0) for r in rates} for n, rates in grids.items()},
            verdicts={name: self.verdict(name, grids[name]) for name in grids},
            fresh=fresh,
            plan={
                "budget_seconds": None if self.config.steps else 60 * self.config.minutes,
                "spent_seconds": self.spent(),
                "runs_planned": self.state["runs"],
                "notes": self.state["notes"],
            },
        )
        write_json(self.out / "summary.json", summary)
        return summary

    # the plan

    def plan(self) -> None:
        """Fix the number of steps, and the model, so that all runs fit into the budget."""
        runs = {
            n: len(named_optimizer(n).rates) + 1 + self.config.seeds for n in self.config.optimizers
        }
        model, steps = self.config.model, self.config.steps
        notes: list[str] = []
        while steps is None:
            steps = self.affordable(model, runs)
            smaller = _smaller(model)
            if steps >= FEWEST_STEPS or (smaller is None and steps >= 20):
                break
            if smaller is None:
                raise InputError(
                    f"got {self.config.minutes} minutes, which is enough for {steps} steps in each "
                    f"of {sum(runs.values())} runs of the smallest model; give more minutes, or "
                    "fewer --optimizers or --seeds"
                )
            notes.append(
                f"width {model.width} and depth {model.depth} would leave {steps} steps a run: "
                f"the model shrinks to width {smaller.width} and depth {smaller.depth}"
            )
            model, steps = smaller, None
        self.state |= {"minutes": self.config.minutes, "steps": steps, "model": asdict(model)}
        self.state |= {"runs": sum(runs.values()), "notes": notes}
        self.save()
        for note in notes:
            self.progress.say(note)
        self.progress.say(
            f"{sum(runs.values())} runs of {steps} steps: {len(runs)} optimizers, "
            f"3 learning rates each and one to spare, {self.config.seeds} fresh seeds at the best"
        )

    def affordable(self, model: GPTConfig, runs: dict[str, int]) -> int:
        """Measure what a step costs, and return the number of steps that fits."""
        name = f"calibration-{model.width}x{model.depth}"
        trials = {}
        for optimizer in runs:
            rate = named_optimizer(optimizer).rates[0]
            config = self.settings(optimizer, rate, 0, model, CALIBRATION_STEPS)
            config = replace(config, validate_every=CALIBRATION_STEPS)
            trials[optimizer] = Run(config, self.out / name / spec_slug(optimizer))
        self.perform("timing a few steps", list(trials.values()))
        each_step = each_run = 0.0
        for optimizer, run in trials.items():
            result = run.result
            if result["status"] == "diverged":
                raise InputError(f"{result['reason']}")
            measuring = result["validation_seconds"] * (MEASUREMENTS + 2)
            each_step += runs[optimizer] * result["step_seconds"]
            each_run += runs[optimizer] * (result["start_seconds"] + measuring)
        left = RESERVE * 60 * self.config.minutes - self.spent()
        steps = (left * self.workers - each_run) / each_step
        return max(0, int(steps // MEASUREMENTS) * MEASUREMENTS)

    @property
    def workers(self) -> int:
        if self.config.workers is not None:
            return self.config.workers
        on_cpu = self.config.device == "cpu" or not torch.cuda.is_available()
        return len(os.sched_getaffinity(0)) if on_cpu and hasattr(os, "sched_getaffinity") else 1

    def settings(
        self, name: str, rate: float, seed: int, model: GPTConfig, steps: int
    ) -> TrainConfig:
        every = max(1, steps // MEASUREMENTS)
        return replace(
            self.config.first_run,
            optimizer=name,
            lr=rate,
            model=model,
            steps=steps,
            seed=seed,
            validate_every=every,
            conditions_every=every if seed == 1 else 0,
            sharpness_every=every if seed == 1 and self.config.sharpness else 0,
            checkpoint_every=max(50, steps // 4),
        )

    def run(self, name: str, rate: float, seed: int) -> Run:
        model = GPTConfig(**self.state["model"])
        settings = self.settings(name, rate, seed, model, self.state["steps"])
        return Run(settings, self.out / "runs" / f"{spec_slug(name)}-lr{rate:g}-seed{seed}")

    # tuning

    def tune(self, grids: dict[str, list[float]]) -> None:
        """Run every grid; while a best rate lies at an edge and time allows, go beyond it."""
        self.perform("tuning", [self.run(n, r, 0) for n, rates in grids.items() for r in rates])
        for _ in range(GROWTH):
            added = []
            for name, rates in grids.items():
                beyond = self.beyond(name, rates)
                if beyond is not None and self.time_for(name, beyond):
                    rates.append(beyond)
                    rates.sort()
                    added.append(self.run(name, beyond, 0))
            if not added:
                return
            self.perform("growing grids", added)

    def beyond(self, name: str, rates: list[float]) -> float | None:
        """The next rate past the edge that the best one lies at, if it does."""
        best = self.best(name, rates)
        if best is None or best == rates[0]:  # None: all diverged
            return rates[0] / 2
        return rates[-1] * 2 if best == rates[-1] else None

    def best(self, name: str, rates: list[float]) -> float | None:
        losses = {r: self.run(name, r, 0).result["validation_loss"] for r in rates}
        finite = {r: loss for r, loss in losses.items() if loss is not None}
        return min(finite, key=finite.__getitem__) if finite else None

    def verdict(self, name: str, rates: list[float]) -> tuple[str, str]:
        grid = f"{len(rates)} rates from {rates[0]:g} to {rates[-1]:g}"
        best = self.best(name, rates)
        if best is None:
            return "inconclusive", f"every one of {grid} diverged"
        if best in (rates[0], rates[-1]):
            grown = len(rates) - len(named_optimizer(name).rates)
            why = "a grid grows no further" if grown >= GROWTH else "the time was spent"
            return "inconclusive", f"the best of {grid} lies at the edge, and {why}"
        return "tuned", f"the best of {grid} lies inside"

    # time

    def time_for(self, name: str, rate: float) -> bool:
        """Whether another tuning run still leaves time for the fresh seeds."""
        run = self.run(name, rate, 0)
        if self.config.steps is not None or run.finished:
            return True
        results = filter(None, map(_result, (self.out / "runs").iterdir()))
        walls = [r["wall_seconds"] for r in results if r["status"] == "finished"]
        usual = sum(walls) / max(1, len(walls))
        ahead = 1 + len(self.config.optimizers) * self.config.seeds
        return self.spent() + usual * ahead / self.workers < 60 * self.config.minutes

    def spent(self) -> float:
        return self.earlier + time.monotonic() - self.started

    def perform(self, phase: str, runs: list[Run]) -> None:
        def on_progress(steps: dict[Path, int]) -> None:
            self.check_folder()
            self.progress.steps(steps)

        self.progress.phase(phase, runs)
        self.check_folder()
        try:
            run_all(runs, self.workers, on_progress)
        finally:
            self.check_folder()
            self.save()

    def save(self) -> None:
        self.state["spent"] = self.spent()
        write_json(self.out / "plan.json", self.state)


def _result(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / "result.json") if (folder / "result.json").exists() else None


def _smaller(model: GPTConfig) -> GPTConfig | None:
    """The next smaller model: half the width down to heads of 8, then half the depth."""
    if model.width >= 16 * model.heads and model.width % (4 * model.heads) == 0:
        return replace(model, width=model.width // 2)
    return replace(model, depth=model.depth // 2) if model.depth > 1 else None
