"""Time to the same error of the Hessian's largest eigenvalues and of its trace, beside the peers.

The errors are 1e-3 for the largest eigenvalue, 1e-3 for each of the ten largest, and 5 % for the
trace. Each method is timed at its best setting: the one with the fewest products that reaches the
error. Ours has one setting, the tolerance.

Eigenvalues must be reached from several starts. The peers start at random vectors, ours near the
gradient, as `sharpness` does. SciPy from the same start is shown too, but it is not a peer. The
trace must be reached in the root mean square over probes. References are the largest Ritz values
over all starts, and our trace with 200 products. The timed runs show the error that they reached.
A method marked "!" missed it, and cannot be the best peer.

Install the peers with `pip install -e '.[bench]'`. The output names those that are missing.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature_methods import (
    EIGENVALUE_ERROR,
    NEAR_GRADIENT,
    TRACE_ERROR,
    Methods,
    eigenvalue_methods,
    relative_error,
    root_mean_square,
    trace_methods,
    tridiagonals,
)
from curvature_products import MISSING, STEEPEST, Problem, problem, product_times, timed, trained
from measure import quiet, save, table
from peers import Peer

PACKAGES = ("steepest", "PyHessian", "curvlinops-for-pytorch", "scipy", "torch")
COLUMNS = ["method", "setting", "products", "ms", "ms / product", "error", "ours / this"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    problems: tuple[str, ...] = ("mlp", "cnn", "gpt")
    """Which networks."""
    untrained: bool = True
    """Whether to measure before training too, in one round."""
    starts: int = 4
    """Starts from which eigenvalues must be reached; three at most before training."""
    rounds: int = 3
    """How often each method is timed."""
    products: bool = True
    """Whether to time products against sizes of models and batches."""
    threads: int | None = None
    """Threads on the CPU; by default as many as PyTorch takes."""
    data: Path = Path("data")
    """Folder with mnist/mnist.npz and cifar10/cifar10_5k_1k.npz; clusters of noise without it."""
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


@dataclass
class Task:
    """A number to reach, and the methods that should reach it."""

    name: str
    bound: float
    methods: Methods
    reference: Any
    reference_error: float = 0.0


def tasks(network: Problem, state: str, starts: int) -> Iterator[Task]:
    Ts = tridiagonals(network, starts)
    for count in (1, 10):
        yield Task(f"{count} largest", EIGENVALUE_ERROR, *eigenvalue_methods(count, *Ts))
    if state == "trained":  # before training the trace nearly cancels
        methods, trace = trace_methods(network, starts)
        error = trace.error / abs(trace.value)
        yield Task("trace", TRACE_ERROR, methods, trace.value, error)


def race(network: Problem, task: Task, rounds: int) -> list[Row]:
    """Time the methods in turns; those beyond three times the fastest take part once."""
    runs: dict[str, list[tuple[float, int, float]]] = {name: [] for name in task.methods}
    order = random.Random(0)
    for seed in range(rounds):
        fastest = min((run[0][0] for run in runs.values() if run), default=math.inf)
        for name in order.sample(sorted(runs), len(runs)):
            if seed and runs[name][0][0] > 3 * fastest:
                continue
            method, setting = task.methods[name]
            seconds, (answer, products) = timed(partial(method, network, seed, **setting))
            runs[name].append((seconds, products, relative_error(answer, task.reference)))
            network.model.zero_grad()
    return [row(task, name, run, runs.get(STEEPEST, [])) for name, run in runs.items()]


def row(task: Task, name: str, run: list[tuple[float, int, float]], ours: list) -> Row:
    seconds, products, errors = zip(*run, strict=True)
    if task.name == "trace":  # the root mean square of few runs scatters, so twice the bound
        error, bound = root_mean_square(errors), 2 * task.bound
    else:
        error, bound = max(errors), task.bound
    ratios = [a[0] / b for a, b in zip(ours, seconds, strict=False)]
    return {
        "method": name,
        "reached": error <= bound,
        "setting": {k: v for k, v in task.methods[name][1].items() if k != "count"},
        "ms": 1e3 * statistics.median(seconds),
        "products": statistics.mean(products),
        "ms_product": 1e3 * statistics.median(s / p for s, p, _ in run),
        "error": error if math.isfinite(error) else None,
        "rounds": len(run),
        "ratio": statistics.median(ratios) if ratios else None,
    }


def compare(network: Problem, state: str, settings: Settings) -> Iterator[Row]:
    """Our time by that of the fastest peer that reached the error, for each task."""
    starts, rounds = settings.starts, settings.rounds
    if state == "untrained":
        starts, rounds = min(starts, 3), 1
    for task in tasks(network, state, starts):
        rows = race(network, task, rounds)
        ours = next((r for r in rows if r["method"] == STEEPEST), None)
        peers = [r for r in rows if r["method"] not in (STEEPEST, NEAR_GRADIENT) and r["reached"]]
        best = min(peers, key=lambda r: r["ms"], default=None)
        show(f"{network.name}, {state}: {task.name} to {task.bound:g}", rows)
        yield {
            "problem": network.name,
            "state": state,
            "task": task.name,
            "data": network.data,
            "parameters": network.size,
            "reference": np.atleast_1d(task.reference).tolist(),
            "reference_error": task.reference_error,
            "best_peer": best["method"] if best else None,
            "ratio": best["ratio"] if best and ours and ours["reached"] else None,
            "methods": rows,
        }


def show(title: str, rows: list[Row]) -> None:
    lines = []
    for r in sorted(rows, key=lambda r: r["ms"]):
        error = f"{r['error']:.1e}" if r["error"] is not None else "no value"
        lines.append(
            [
                r["method"],
                ", ".join(f"{k} {v:g}" for k, v in r["setting"].items()),
                f"{r['products']:.0f}",
                f"{r['ms']:.0f}",
                f"{r['ms_product']:.1f}",
                error if r["reached"] else f"! {error}",
                f"{r['ratio']:.2f}" if r["ratio"] else "-",
            ]
        )
    table(title, COLUMNS, lines)


def main(settings: Settings) -> None:
    quiet()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    rows: list[Row] = []
    with sdpa_kernel([SDPBackend.MATH]):  # attention with a second derivative, also for the peers
        products = product_times(settings.data) if settings.products else []
        for name in settings.problems:
            initial = problem(name, settings.data)
            states = {"trained": trained(initial)}
            if settings.untrained:
                states["untrained"] = initial
            for state, network in states.items():
                Console(stderr=True).print(f"{network.name}, {state} ...")
                rows += compare(network, state, settings)
    peers = [Peer(package, lambda *_: None, package) for package in PACKAGES]
    path = settings.out / "curvature_cpu.json"
    save(path, settings, peers, MISSING, products=products, rows=rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
