"""Where does curvature settle? Full-batch training of a small network, each optimizer measured
against its own threshold.

Gradient descent sharpens until λ_max of the Hessian reaches 2 / lr, and stays there (Cohen et al.,
arXiv 2103.00065); Adam does so in its own geometry (arXiv 2207.14484). For the others the same is
asked, and reported also where it is not so.

What is called what is fixed here, and not by the runs of a report. The ratio of what is measured to
its threshold, averaged over the last fifth of the run, is "at the edge" from 0.9 to 1.1 and "above"
beyond; below that it is "still rising" if it is 2% or more higher than over the fifth before, else
"below". A run is "diverged" if its loss is ten times that at the start, or not finite. The rates
were placed by earlier runs, so that some reach the edge in the steps given.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from steepest import SOAP, KLShampoo, Muon, Shampoo, SignSGD, Signum, SpectralDescent
from steepest.curvature import SharpnessTracker
from steepest.lab.errors import InputError
from steepest.lab.files import read_json, write_json
from steepest.lab.memory import check_fits
from steepest.lab.processes import in_processes
from steepest.lab.studies.study_config import MOST_SEEDS
from steepest.lab.train.run_folder import environment, opened, sentences_for_os_errors

LAST_RECORDS = 5  # the part of a run that the verdict is on: one of so many
EDGE = (0.9, 1.1)
RISING = 1.02  # times the mean over the part before
BLOWN = 10.0  # times the loss at the start: diverged


MethodName = Literal[
    "gd",
    "heavy-ball",
    "adam",
    "signsgd",
    "signum",
    "spectral-dual",
    "muon-0",
    "muon",
    "shampoo",
    "kl-shampoo",
    "soap",
]


@dataclass(frozen=True)
class Method:
    """An optimizer, how it is built for some matrices at a rate, and the rates to run it at."""

    label: str
    build: Callable[..., Optimizer]
    rates: tuple[float, ...]


EDGE_METHODS: dict[MethodName, Method] = {
    "gd": Method("GD", torch.optim.SGD, (0.1, 0.2, 0.4)),
    "heavy-ball": Method(
        "GD, heavy ball 0.9", partial(torch.optim.SGD, momentum=0.9), (0.125, 0.25, 0.5)
    ),
    "adam": Method("Adam", partial(torch.optim.Adam, eps=1e-7), (1e-3, 2e-3, 4e-3)),
    "signsgd": Method("SignSGD", SignSGD, (1e-4, 2e-4, 4e-4)),
    "signum": Method("Signum", Signum, (1e-4, 2e-4, 4e-4)),
    "spectral-dual": Method(
        "SpectralDescent, dual length", partial(SpectralDescent, length="dual"), (0.05, 0.1, 0.2)
    ),
    "muon-0": Method("Muon, no momentum", partial(Muon, momentum=0.0), (1e-3, 2e-3, 4e-3)),
    "muon": Method("Muon", Muon, (1e-3, 2e-3, 4e-3)),
    "shampoo": Method("Shampoo", Shampoo, (2.5e-4, 5e-4, 1e-3)),
    "kl-shampoo": Method("KL-Shampoo", KLShampoo, (2.5e-4, 5e-4, 1e-3)),
    "soap": Method("SOAP", SOAP, (5e-4, 1e-3, 2e-3)),
}


Key = tuple[MethodName, float, int]
"""Optimizer, rate and seed of a run."""


@dataclass(frozen=True, kw_only=True)
class EdgeConfig:
    """The network, the data and the length of the runs."""

    optimizers: tuple[MethodName, ...] = tuple(EDGE_METHODS)
    """Which optimizers."""
    seeds: int = 2
    """Initializations for each optimizer and rate."""
    steps: int = 3000
    """Full-batch steps of each run."""
    every: int = 30
    """Steps between two measurements."""
    width: int = 64
    """Units in each of the two hidden layers."""
    examples: int = 500
    """Images of digits, 8 by 8, of the 1797 that scikit-learn brings."""
    workers: int | None = None
    """Runs at a time; by default one for each core."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "every", "width", "examples", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"got {name}={getattr(self, name)}, expected at least 1")
        if self.seeds > MOST_SEEDS:
            raise InputError(f"got seeds={self.seeds}, expected at most {MOST_SEEDS}")
        if self.steps < LAST_RECORDS * self.every:
            raise InputError(
                f"got steps={self.steps} with a measurement every {self.every}, expected at least "
                f"{LAST_RECORDS} measurements; the verdict is on the last fifth of them"
            )
        if not self.optimizers or len(set(self.optimizers)) < len(self.optimizers):
            raise InputError(f"got optimizers {self.optimizers}, expected each of them once")


def edge_of_stability(
    config: EdgeConfig, out: Path, on_run: Callable[[int, int, str], None] = lambda *_: None
) -> dict[str, Any]:
    """Make all runs, those that are not finished yet, and return the summary.

    `on_run` is told how many of how many runs are done, and what the last one found.

    Raises:
        InputError: for settings or folders that cannot work, or without scikit-learn.
    """
    digits(config.examples)  # before there is a folder
    weights = config.width * (64 + config.width + 10)  # and as many gradients
    check_fits(f"a network of width {config.width}", 2 * 4 * weights, "choose a smaller width")
    settings = {k: v for k, v in asdict(config).items() if k != "workers"}
    with sentences_for_os_errors(out), opened(out, settings) as check_folder:
        (out / "runs").mkdir(exist_ok=True)
        runs: list[Key] = [
            (name, rate, seed)
            for seed in range(config.seeds)
            for name in config.optimizers
            for rate in EDGE_METHODS[name].rates
        ]
        waiting = {str(place): run for run in runs if not (place := _place(out, *run)).exists()}
        done = len(runs) - len(waiting)
        on_run(done, len(runs), "going on" if done else "")
        work = partial(_run, config, out)
        for name, _ in in_processes(work, waiting, config.workers or os.cpu_count() or 1):
            check_folder()
            done += 1
            run, result = waiting[name], read_json(Path(name))
            on_run(
                done, len(runs), f"{EDGE_METHODS[run[0]].label} at {run[1]:g}: {result['verdict']}"
            )
        summary = summarize_edge(config, {run: read_json(_place(out, *run)) for run in runs})
        write_json(out / "summary.json", summary)
        return summary


def _place(out: Path, name: MethodName, rate: float, seed: int) -> Path:
    return out / "runs" / f"{name}-{rate:g}-seed{seed}.json"


def digits(examples: int) -> tuple[Tensor, Tensor]:
    """Return images `(examples, 64)`, centred, entries of mean square 1, and classes one-hot.

    Raises:
        InputError: for more than there are, or without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits come with scikit-learn, which is not installed; "
            "run: pip install 'steepest[report]'"
        ) from error
    images, classes = load_digits(return_X_y=True)
    if examples > len(images):
        raise InputError(f"got examples={examples}, expected at most {len(images)}")
    X = torch.tensor(images, dtype=torch.float32)[:examples]
    X = X - X.mean(0)
    X /= X.square().mean().sqrt()
    return X, nn.functional.one_hot(torch.tensor(classes[:examples]), 10).float()


def network(width: int) -> nn.Module:
    """A network without biases, so that every parameter is a matrix that the optimizer moves."""
    return nn.Sequential(
        nn.Linear(64, width, bias=False),
        nn.Tanh(),
        nn.Linear(width, width, bias=False),
        nn.Tanh(),
        nn.Linear(width, 10, bias=False),
    )


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the squared distance to the one-hot class, mean over images."""
    X, Y = batch
    return 0.5 * (model(X) - Y).square().sum(1).mean()


def _run(config: EdgeConfig, out: Path, run: Key, send: Callable[[Any], None]) -> None:
    torch.set_num_threads(1)
    with sentences_for_os_errors(out):
        write_json(_place(out, *run), trained(config, *run))


def trained(config: EdgeConfig, name: MethodName, rate: float, seed: int) -> dict[str, Any]:
    """Train once; return the records of the tracker, the ratios and the verdict."""
    torch.manual_seed(seed)
    batch, model = digits(config.examples), network(config.width)
    optimizer = EDGE_METHODS[name].build(list(model.parameters()), lr=rate)
    tracker = SharpnessTracker(model, squared_error, batch, optimizer, every=config.every)
    first, diverged = tracker.measure()["loss"], False
    try:
        for _ in range(config.steps):
            optimizer.zero_grad()
            loss = squared_error(model, batch)
            if not loss.item() <= BLOWN * first:
                diverged = True
                break
            loss.backward()
            optimizer.step()
            tracker.step()
    except FloatingPointError:  # from the optimizer or the tracker
        diverged = True
    return {"diverged": diverged, **verdict(tracker.records, diverged), "records": tracker.records}


def verdict(records: list[dict[str, Any]], diverged: bool) -> dict[str, Any]:
    """Return where the ratios of the last fifth of the measurements lie, and what that is called.

    >>> records = [{"stability": [{"ratio": r}]} for r in (0.2, 0.6, 1.3, 0.9, 1.02)]
    >>> verdict(records, diverged=False)
    {'ratio': 1.02, 'low': 1.02, 'high': 1.02, 'verdict': 'at the edge'}
    """
    ratios = [record["stability"][0]["ratio"] for record in records if "stability" in record]
    part = max(1, len(ratios) // LAST_RECORDS)
    before, last = ratios[-2 * part : -part], ratios[-part:]
    if diverged or not last or any(map(math.isnan, last)):
        return {"ratio": None, "low": None, "high": None, "verdict": "diverged"}
    mean = fmean(last)
    if mean < EDGE[0]:
        word = "still rising" if before and mean >= RISING * fmean(before) else "below"
    else:
        word = "above" if mean > EDGE[1] else "at the edge"
    return {"ratio": mean, "low": min(last), "high": max(last), "verdict": word}


def summarize_edge(config: EdgeConfig, results: dict[Key, dict[str, Any]]) -> dict[str, Any]:
    """Return the summary: for each optimizer and rate the curves and verdicts of its seeds."""
    entries = []
    for name in config.optimizers:
        for rate in EDGE_METHODS[name].rates:
            runs = [results[name, rate, seed] for seed in range(config.seeds)]
            measured = [r for run in runs for r in run["records"] if "stability" in r]
            entries.append(
                {
                    "name": name,
                    "label": EDGE_METHODS[name].label,
                    "lr": rate,
                    "measure": measured[0]["stability"][0]["measure"] if measured else None,
                    "threshold": measured[-1]["stability"][0]["threshold"] if measured else None,
                    "runs": [
                        {key: run[key] for key in ("ratio", "low", "high", "verdict")}
                        | _curves(run["records"])
                        for run in runs
                    ],
                }
            )
    return {
        "kind": "edge_of_stability",
        "title": "Where does curvature settle under each optimizer?",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "settings": {k: v for k, v in asdict(config).items() if k not in ("workers", "optimizers")},
        "data": {"name": "digits", "description": "8 by 8 images of digits, from scikit-learn"},
        "environment": environment(),
        "edge": list(EDGE),
        "entries": entries,
    }


def _curves(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the figures show of a run, as lists over its measurements."""
    rows = [record.get("stability", [{}])[0] for record in records]
    return {
        "steps": [record["step"] for record in records],
        "loss": [record["loss"] for record in records],
        "sharpness": [record["sharpness"] for record in records],
        "value": [row.get("value") for row in rows],
        "ratios": [row.get("ratio") for row in rows],
        "products": sum(record["products"] for record in records),
        "seconds": sum(record["seconds"] for record in records),
    }
