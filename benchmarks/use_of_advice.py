"""Does a plan train no worse than Muon?

Each network is trained from scratch with the plan of `diagnose` and with Muon, its default plan.
The diagnosis is standard, of the untrained network, on eight batches and with sixty others for its
warm-up, as the command draws them. Both have a linear decay to zero after 10% of warm-up, the same
data in the same order and the same initialization for a seed. Each is tuned on its own grid of
rates by factors of 2, grown until the best (mean fresh loss over the tuning seeds) lies inside.
Then it is run with five fresh seeds, and more until the half-width of the 95% interval of the
paired difference is at most 0.02. The measure is the loss on fresh data after the last step. A
plan that is Muon's in every row is Muon bit for bit, so its difference is 0 without a run.

Written before any run: the plan is not worse if the 95% interval reaches zero or below, and better
if it lies below. Its rule has two conditions. The weights do not look fresh. Four real steps of
another geometry are predicted to decrease the loss by 10% or more beyond spectral ones, with a 95%
interval above 1. A hidden matrix leaves Muon if both hold. By this rule the SwiGLU network's plan
was Muon. So a second one was written, still before any plan was trained. For Euclidean steps the
10% will do where the bound of the theory agrees: nr(G) / st(A) is below 1/2 with its 95% interval.
Earlier races support it: of 16 matrices for which both spoke so, spectral steps won none.
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
MOST_SEEDS, HALF = 25, 0.02
JUDGED, WARM_UP = 8, 60
START = {"plan": 0.02, "muon": 0.02, "adamw": 0.004, "sgd": 0.1, "signum": 0.001}


@dataclass(frozen=True)
class Settings:
    """What to run."""

    networks: tuple[str, ...] = (
        "gated", "llama", "hf gpt2", "hf vit", "whitened", "cnn", "mlp", "hf neox",
    )  # fmt: skip
    """Which networks; "gated" and "llama" have SwiGLU."""
    choices: tuple[str, ...] = ("plan", "muon")
    """What trains them: "plan", "muon", "adamw", "sgd", "signum"."""
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


def advised(network: str, settings: Settings, console: Console) -> Plan:
    """The plan of a diagnosis of the untrained network; on disk, as it takes minutes."""
    place = settings.raw.with_name(f"{settings.raw.stem} {network}.toml")
    if not place.exists():
        task = built(network, settings, TUNING[0])
        batches = [task.train(10**5 + i) for i in range(JUDGED + WARM_UP)]
        advice = diagnose(task.model, task.loss, batches)
        console.print(f"{network}: {'; '.join(advice.notes)}", highlight=False)
        advice.save(place.with_suffix(".json"))
        advice.plan().save(place)
    return Plan.load(place)


def interval(differences: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95% interval."""
    count = len(differences)
    t = float(stats.t.ppf(0.975, count - 1))
    return fmean(differences), t * stdev(differences) / count**0.5


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    console = Console(stderr=True)
    run = Runs(settings, console)
    figures: dict[str, Any] = {}
    for network in settings.networks:
        plan = advised(network, settings, console)
        default = Plan.default(built(network, settings, TUNING[0]).model)
        changed = {
            row.parameter: {"geometry": row.geometry, "reason": row.reason}
            for row, other in zip(plan, default, strict=True)
            if row.geometry != other.geometry
        }
        console.print(f"{network}: the plan changes {changed or 'nothing'}", highlight=False)
        names = [name for name in settings.choices if name != "plan" or changed]

        def best(name: str, plan: Plan = plan, network: str = network) -> float:
            return best_rate(
                START[name],
                lambda lr: fmean(run(network, name, plan, lr, seed) for seed in TUNING),
            )

        rates = {name: best(name) for name in names}
        seeds = list(FRESH)
        while True:
            losses = {
                name: [run(network, name, plan, rates[name], seed) for seed in seeds]
                for name in names
            }
            if not changed:
                losses["plan"], rates["plan"] = losses["muon"], rates["muon"]
            pairs = zip(losses["plan"], losses["muon"], strict=True)
            mean, half = interval([a - b for a, b in pairs])
            if half <= HALF or len(seeds) >= MOST_SEEDS:
                break
            seeds.append(seeds[-1] + 1)
        figures[network] = {
            "changed": changed,
            "seeds": seeds,
            "runs": {
                name: {"lr": rates[name], "losses": losses[name], "mean": fmean(losses[name])}
                for name in losses
            },
            "difference": {"value": mean, "low": mean - half, "high": mean + half},
            "not worse": mean - half <= 0,
            "better": mean + half < 0,
        }
        for name in losses:
            console.print(f"{network} {name}: lr {rates[name]:.3g}, loss {fmean(losses[name]):.4f}")
        console.print(f"{network}: {mean:+.4f} ± {half:.4f}, {len(seeds)} seeds", highlight=False)
    table(
        f"fresh loss after {settings.steps} steps",
        ["", "changed", *settings.choices, "seeds", "plan - Muon (95%)"],
        [
            [
                network,
                ", ".join(f"{k}: {v['geometry']}" for k, v in entry["changed"].items()) or "-",
                *(f"{entry['runs'][name]['mean']:.4f}" for name in settings.choices),
                str(len(entry["seeds"])),
                f"{entry['difference']['value']:+.4f} "
                f"({entry['difference']['low']:+.4f} to {entry['difference']['high']:+.4f})",
            ]
            for network, entry in figures.items()
        ],
    )
    peers = [Peer("steepest", lambda *_: None, "steepest")]
    save(settings.out / "use_of_advice.json", settings, peers, {}, networks=figures)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
