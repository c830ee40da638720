"""Does a plan train at least as well as the best single choice?

Each network is trained with the plan of `diagnose` and with four single choices: Muon for hidden
matrices (the default plan), AdamW, SGD with momentum and Signum for everything. The diagnosis is
standard, on eight batches, after 60 steps of AdamW that are then thrown away: at initialization
the first steps of a language model only learn which tokens are frequent. All have a linear decay
to zero after 10% of warm-up, the same data in the same order and the same initialization for a
seed; each is tuned on its own grid of rates by factors of 2, grown until the best (mean fresh loss
over the tuning seeds) lies inside, and then run with fresh seeds. The measure is the loss on fresh
data after the last step.

Written before any run: the plan does at least as well if the 95% interval of its paired difference
to the best single choice, over the fresh seeds, reaches zero or below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import tyro
from rich.console import Console
from scipy import stats
from torch import nn

import steepest
from measure import save, table
from networks import problem
from peers import Peer
from steepest.diagnosis import Plan, diagnose

TUNING, FRESH = (0, 1), (10, 11, 12, 13, 14)
JUDGED, WARM_UP = 8, 60
START = {"plan": 0.02, "muon": 0.02, "adamw": 0.004, "sgd": 0.1, "signum": 0.001}


@dataclass(frozen=True)
class Settings:
    """What to run."""

    networks: tuple[str, ...] = ("cnn", "gated", "mlp", "whitened", "llama")
    """Which networks; "gated" and "llama" have SwiGLU."""
    steps: int = 300
    """Of each run."""
    batch: int = 48
    """Examples in a batch."""
    raw: Path = Path("runs/use_of_advice.jsonl")
    """Finished runs, so that a stopped comparison goes on."""
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


def optimizer(name: str, model: nn.Module, plan: Plan, lr: float) -> torch.optim.Optimizer:
    if name == "plan":
        return plan.optimizer(model, lr)
    if name == "muon":
        return Plan.default(model).optimizer(model, lr)
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    return steepest.Signum(list(model.parameters()), lr=lr)


def built(network: str, settings: Settings, seed: int) -> Any:
    given = problem(network, settings.batch)
    torch.manual_seed(1000 + seed)
    for module in given.model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return given


def trained(network: str, name: str, plan: Plan, lr: float, seed: int, settings: Settings) -> float:
    """The fresh loss at the end; infinite if it blew up."""
    given = built(network, settings, seed)
    made = optimizer(name, given.model, plan, lr)
    warm = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        made,
        lambda k: min((k + 1) / warm, (settings.steps - k) / (settings.steps - warm)),
    )
    for step in range(settings.steps):
        made.zero_grad()
        value = given.loss(given.model, given.train(10_000 * seed + step))
        if not torch.isfinite(value):
            return math.inf
        value.backward()
        try:
            made.step()
        except FloatingPointError:
            return math.inf
        schedule.step()
    given.model.eval()
    with torch.no_grad():
        found = fmean(given.loss(given.model, given.fresh(i)).item() for i in range(JUDGED))
    return found if math.isfinite(found) else math.inf


class Runs:
    """Losses by network, choice, rate and seed; on disk as they come."""

    def __init__(self, settings: Settings, console: Console):
        self._settings, self._console = settings, console
        self._known: dict[str, float] = {}
        settings.raw.parent.mkdir(parents=True, exist_ok=True)
        if settings.raw.exists():
            for line in settings.raw.read_text().splitlines():
                key, value = json.loads(line)
                self._known[key] = value

    def __call__(self, network: str, name: str, plan: Plan, lr: float, seed: int) -> float:
        key = f"{network} {self._settings.steps} {name} {lr:.6g} {seed}"
        if key not in self._known:
            value = trained(network, name, plan, lr, seed, self._settings)
            self._known[key] = value
            with self._settings.raw.open("a") as file:
                file.write(json.dumps([key, value]) + "\n")
        return self._known[key]


def best_rate(start: float, loss: Callable[[float], float]) -> float:
    """The rate of the lowest loss on a grid of factors of 2 that has it inside."""
    grid = {0, -1, 1}
    while True:
        best = min(grid, key=lambda k: loss(start * 2.0**k))
        more = {best - 1, best + 1}
        if more <= grid:
            return start * 2.0**best
        grid |= more


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    console = Console(stderr=True)
    run = Runs(settings, console)
    figures: dict[str, Any] = {}
    for network in settings.networks:
        given = built(network, settings, TUNING[0])
        first = torch.optim.AdamW(given.model.parameters(), 3e-3, weight_decay=0.0)
        for step in range(WARM_UP):
            first.zero_grad()
            given.loss(given.model, given.train(step)).backward()
            first.step()
        batches = [given.train(10**5 + i) for i in range(JUDGED)]
        plan = diagnose(given.model, given.loss, batches).plan()
        rows: dict[str, dict[str, Any]] = {}
        for name, start in START.items():
            lr = best_rate(
                start,
                lambda lr, n=name, p=plan, w=network: fmean(run(w, n, p, lr, s) for s in TUNING),
            )
            losses = [run(network, name, plan, lr, seed) for seed in FRESH]
            rows[name] = {"lr": lr, "losses": losses, "mean": fmean(losses)}
            console.print(f"{network} {name}: lr {lr:.3g}, loss {fmean(losses):.4f}")
        single = min((name for name in rows if name != "plan"), key=lambda n: rows[n]["mean"])
        differences = [
            a - b for a, b in zip(rows["plan"]["losses"], rows[single]["losses"], strict=True)
        ]
        half = float(stats.t.ppf(0.975, len(FRESH) - 1)) * stdev(differences) / len(FRESH) ** 0.5
        mean = fmean(differences)
        geometries = {row.parameter: row.geometry for row in plan}
        figures[network] = {
            "plan": geometries,
            "runs": rows,
            "best single": single,
            "difference": {"value": mean, "low": mean - half, "high": mean + half},
            "at least as well": mean - half <= 0,
        }
    table(
        f"fresh loss after {settings.steps} steps, mean over {len(FRESH)} seeds",
        ["", *START, "plan - best single (95%)"],
        [
            [
                network,
                *(f"{each['runs'][name]['mean']:.4f}" for name in START),
                f"{each['difference']['value']:+.4f} "
                f"({each['difference']['low']:+.4f} to {each['difference']['high']:+.4f})",
            ]
            for network, each in figures.items()
        ],
    )
    peers = [Peer("steepest", lambda *_: None, "steepest")]
    save(settings.out / "use_of_advice.json", settings, peers, {}, networks=figures)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
