"""Which optimizer, at its own best learning rate? Many runs, tuned fairly, within a time budget.

The same initialization and data order for all, the same AdamW for everything that is no matrix,
and for every optimizer a grid of rates of its own, in steps of a factor of two. A grid whose best
rate lies at its edge grows, or the result says "inconclusive". The best rate is then run with
fresh seeds, which the rate was not chosen on.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from steepest.lab.data import Data
from steepest.lab.errors import InputError
from steepest.lab.files import read_json, write_json
from steepest.lab.models import sizes_of, smaller
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.studies.summary import summarize
from steepest.lab.sweep import Run, run_all
from steepest.lab.train import TrainConfig, named_optimizer
from steepest.lab.train.optimizers import spec_slug
from steepest.lab.train.run_folder import opened, sentences_for_os_errors
from steepest.lab.train.settings_file import write_settings
from steepest.lab.train.setup import check_run, data_of
from steepest.printing import rough_duration

GROWTH = 4  # most rates added to a grid
MEASUREMENTS = 10  # of the validation loss, and of the condition, in each run
FEWEST_STEPS = 120  # below this the model shrinks instead
CALIBRATION_STEPS = 12
RESERVE = 0.85  # share of the budget that is planned for; machines have moods


@dataclass(frozen=True)
class Contender:
    """An optimizer, and the settings that it is tuned with beside its rate."""

    optimizer: str
    changes: tuple[tuple[str, float], ...] = ()


Grids = dict[Contender, list[float]]
WidthAndDepth = tuple[int | None, int | None]
"""Width and depth of a model; None where its name decides."""


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
    data = data_of(config)
    check_run(config.first_run, data)  # before there is a folder
    settings = {**config.identity, "data_sha256": data.sha256}
    folder = opened(out, settings, StudyConfig().identity)
    with sentences_for_os_errors(out), folder as check_folder:
        write_settings(out, "study", config)
        return _Study(config, out, data, progress, check_folder).conduct()


class _Study:
    def __init__(
        self,
        config: StudyConfig,
        out: Path,
        data: Data,
        progress: StudyListener,
        check_folder: Callable[[], None] = lambda: None,
    ):
        self.config, self.out, self.data, self.progress = config, out, data, progress
        self.check_folder = check_folder
        self.started = time.monotonic()
        self.state: dict[str, Any] = {"spent": 0.0, "notes": []}
        if (out / "plan.json").exists():
            self.state |= read_json(out / "plan.json")
            progress.say(f"going on with the study in {out}")
        self.earlier: float = self.state["spent"]

    def conduct(self) -> dict[str, Any]:
        self.progress.say(f"data: {self.data}")
        if "steps" not in self.state:
            self.plan()
        planned_for = self.state.get("minutes", self.config.minutes)
        if self.config.steps is None and self.config.minutes != planned_for:
            self.progress.say(
                f"the plan of {planned_for:g} minutes, {self.state['steps']} steps a run, stays; "
                f"with {self.config.minutes:g} minutes only the grids may grow further. For runs "
                "of another length choose another --out"
            )
        grids = self.first_grids()
        self.tune(grids)
        chosen = {name: self.chosen(name, grids) for name in self.config.optimizers}
        best = {c: self.best(c, grids[c]) for c in chosen.values()}
        fresh = {
            name: [self.run(c, rate, seed) for seed in range(1, self.config.seeds + 1)]
            for name, c in chosen.items()
            if (rate := best[c]) is not None
        }
        turns = zip(*fresh.values(), strict=True)  # a slow moment of the machine hits all of them
        self.perform("fresh seeds", [run for turn in turns for run in turn])
        summary = summarize(
            config=self.config,
            steps=self.state["steps"],
            data=self.data,
            environment=read_json(self.out / "environment.json"),
            tuning={n: {r: self.run(c, r, 0) for r in grids[c]} for n, c in chosen.items()},
            varied={n: self.varied(n, grids) for n, c in chosen.items() if c.changes},
            verdicts={name: self.verdict(c, grids[c]) for name, c in chosen.items()},
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
        config = self.config
        runs = {
            n: (len(named_optimizer(n).rates) + 1) * len(config.variants_of(n)) + config.seeds
            for n in config.optimizers
        }
        size, steps = (config.width, config.depth), config.steps
        notes: list[str] = []
        while steps is None:
            steps = self.affordable(size, runs)
            less = self.smaller(size)
            if steps >= FEWEST_STEPS or (less is None and steps >= 20):
                break
            if less is None:
                raise InputError(
                    f"got {config.minutes} minutes, which is enough for {steps} steps in each "
                    f"of {sum(runs.values())} runs of the smallest model; give more minutes, or "
                    "fewer --optimizers or --seeds"
                )
            width, depth = self.sizes(size)
            notes.append(
                f"width {width} and depth {depth} would leave {steps} steps a run: "
                f"the model shrinks to width {less[0]} and depth {less[1]}"
            )
            size, steps = less, None
        self.state |= {"minutes": config.minutes, "steps": steps}
        self.state |= {"model": {"width": size[0], "depth": size[1]}}
        self.state |= {"runs": sum(runs.values()), "notes": notes}
        self.save()
        self.say_plan()

    def say_plan(self) -> None:
        """Say what will be run, before it is."""
        config, steps = self.config, self.state["steps"]
        for note in self.state["notes"]:
            self.progress.say(f"note: {note}")
        for name in config.optimizers:
            varied = f", with each of {config.vary}" if config.vary else ""
            if config.vary and config.variants_of(name) == ({},):
                varied = f", without {config.vary}, which it does not take"
            record = named_optimizer(name)
            rates = ", ".join(f"{rate:g}" for rate in sorted(record.rates))
            self.progress.say(f"{record.label}: learning rates {rates}{varied}, and beyond an edge")
        within = "" if config.steps else f", within {rough_duration(60 * config.minutes)}"
        self.progress.say(
            f"{self.state['runs']} runs of {steps} steps: {len(config.optimizers)} optimizers, "
            f"3 learning rates each and one to spare{' for each value' if config.vary else ''}, "
            f"{config.seeds} fresh seed{'s' if config.seeds > 1 else ''} at the best"
            f"{within}"
        )

    def sizes(self, size: WidthAndDepth) -> WidthAndDepth:
        """Return width and depth of the model, also where its name decides; None if unknown."""
        sizes = self.model_sizes(size)
        return (size[0] or getattr(sizes, "width", None), size[1] or getattr(sizes, "depth", None))

    def model_sizes(self, size: WidthAndDepth) -> Any:
        config, shape = self.config, self.data.shape(self.config.context)
        return sizes_of(
            config.model, shape, width=size[0], depth=size[1], options=config.model_options
        )

    def smaller(self, size: WidthAndDepth) -> WidthAndDepth | None:
        config, shape = self.config, self.data.shape(self.config.context)
        return smaller(
            config.model, shape, width=size[0], depth=size[1], options=config.model_options
        )

    def affordable(self, size: WidthAndDepth, runs: dict[str, int]) -> int:
        """Measure what a step costs, and return the number of steps that fits."""
        width, depth = self.sizes(size)
        name = f"calibration-{width}x{depth}"
        trials = {}
        for optimizer in runs:
            rate = named_optimizer(optimizer).rates[0]
            contender = Contender(optimizer, tuple(self.config.variants_of(optimizer)[0].items()))
            config = self.settings(contender, rate, 0, size, CALIBRATION_STEPS)
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
        self, contender: Contender, rate: float, seed: int, size: WidthAndDepth, steps: int
    ) -> TrainConfig:
        every = max(1, steps // MEASUREMENTS)
        return self.config.run_of(
            contender.optimizer,
            lr=rate,
            width=size[0],
            depth=size[1],
            steps=steps,
            seed=seed,
            validate_every=every,
            conditions_every=every if seed == 1 else 0,
            sharpness_every=every if seed == 1 and self.config.sharpness else 0,
            checkpoint_every=max(50, steps // 4),
            **dict(contender.changes),
        )

    def run(self, contender: Contender, rate: float, seed: int) -> Run:
        model = self.state["model"]
        size = model["width"], model["depth"]
        settings = self.settings(contender, rate, seed, size, self.state["steps"])
        changes = "".join(f"-{name}{value:g}" for name, value in contender.changes)
        name = f"{spec_slug(contender.optimizer)}-lr{rate:g}{changes}-seed{seed}"
        return Run(settings, self.out / "runs" / name)

    # tuning

    def first_grids(self) -> Grids:
        """The rates of every optimizer, once for each variant that it is tuned with."""
        return {
            Contender(name, tuple(changes.items())): sorted(named_optimizer(name).rates)
            for name in self.config.optimizers
            for changes in self.config.variants_of(name)
        }

    def tune(self, grids: Grids) -> None:
        """Run every grid; while a best rate lies at an edge and time allows, go beyond it."""
        self.perform("tuning", [self.run(c, r, 0) for c, rates in grids.items() for r in rates])
        for _ in range(GROWTH):
            added = []
            for contender, rates in grids.items():
                beyond = self.beyond(contender, rates)
                if beyond is not None and self.time_for(contender, beyond):
                    rates.append(beyond)
                    rates.sort()
                    added.append(self.run(contender, beyond, 0))
            if not added:
                return
            self.perform("growing grids", added)

    def beyond(self, contender: Contender, rates: list[float]) -> float | None:
        """The next rate past the edge that the best one lies at, if it does."""
        best = self.best(contender, rates)
        if best is None or best == rates[0]:  # None: all diverged
            return rates[0] / 2
        return rates[-1] * 2 if best == rates[-1] else None

    def best(self, contender: Contender, rates: list[float]) -> float | None:
        losses = {r: self.loss(contender, r) for r in rates}
        return min(rates, key=losses.__getitem__) if min(losses.values()) < math.inf else None

    def loss(self, contender: Contender, rate: float | None) -> float:
        """Validation loss of the tuning run at a rate; infinite for none and for a diverged one."""
        loss = None if rate is None else self.run(contender, rate, 0).result["validation_loss"]
        return math.inf if loss is None else float(loss)

    def chosen(self, name: str, grids: Grids) -> Contender:
        """The variant of an optimizer whose best run is best."""
        variants = [contender for contender in grids if contender.optimizer == name]
        return min(variants, key=lambda c: self.loss(c, self.best(c, grids[c])))

    def varied(self, name: str, grids: Grids) -> list[dict[str, Any]]:
        """The best rate and its loss for each value of the second number."""
        rows = []
        for contender in (c for c in grids if c.optimizer == name):
            rate = self.best(contender, grids[contender])
            loss = self.loss(contender, rate)
            known = loss if math.isfinite(loss) else None
            rows.append({**dict(contender.changes), "best_lr": rate, "validation_loss": known})
        return rows

    def verdict(self, contender: Contender, rates: list[float]) -> tuple[str, str]:
        grid = f"{len(rates)} rates from {rates[0]:g} to {rates[-1]:g}"
        best = self.best(contender, rates)
        if best is None:
            return "inconclusive", f"every one of {grid} diverged"
        if best in (rates[0], rates[-1]):
            grown = len(rates) - len(named_optimizer(contender.optimizer).rates)
            why = "a grid grows no further" if grown >= GROWTH else "the time was spent"
            return "inconclusive", f"the best of {grid} lies at the edge, and {why}"
        for name, value in contender.changes:
            values = [changes[name] for changes in self.config.variants]
            said = f"the best {name} of {', '.join(f'{v:g}' for v in values)}"
            if value in (values[0], values[-1]) and value != 0:
                return "inconclusive", f"{said} is {value:g}, at the edge; give more to --vary"
            return "tuned", f"the best of {grid} lies inside; {said} is {value:g}"
        return "tuned", f"the best of {grid} lies inside"

    # time

    def time_for(self, contender: Contender, rate: float) -> bool:
        """Whether another tuning run still leaves time for the fresh seeds."""
        run = self.run(contender, rate, 0)
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
