"""How often the verdicts of `diagnose` agree with races, over architectures and stages of training.

Truth is the race of one matrix: eight real steps in each geometry, the step size tuned on one
batch, the loss judged on another, directions from others again; none of them has been seen by
training or by the prediction. Let s and e be the decreases by spectral and by Euclidean steps, and
a = (s - e) / max(s, e) with its 95% interval over rounds. A case is decided as

- won by spectral steps, if the interval lies above 0 and a > 5%;
- not won, if the interval lies below 10%: the two are as good as equal, or Euclidean ones won.

All others are undecided and left out. A verdict of "spectral" is right on the first kind, one of
"euclidean" on the second; "cannot tell" is counted apart. The tables show the share that is told,
accuracy on both kinds, and their mean (balanced accuracy). They show the rank correlation of
predicted with raced advantage, and how often spectral steps won by what was predicted
(reliability). Two rules that know no numbers are scored too: "always spectral" and "spectral for
every hidden matrix". Intervals resample whole networks. The networks in HELD_OUT were not looked at
before rules and thresholds were fixed.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from scipy import stats

from measure import save, table
from networks import KINDS, Problem, problem
from peers import Peer
from steepest.curvature.loss_function import LossFunction
from steepest.diagnosis import diagnose
from steepest.diagnosis.evidence import gather
from steepest.diagnosis.intervals import WORTH_IT, worth_it
from steepest.diagnosis.race import race
from steepest.statistics import Interval

HELD_OUT = ("mixer", "mixtral", "gru", "convnext")
JUDGED, RACED = 8, 10  # batches for the prediction, and for the race
WON, EQUAL = 0.05, 0.10
BINS = (-math.inf, 0.8, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, math.inf)


@dataclass(frozen=True)
class Settings:
    """What to run."""

    networks: tuple[str, ...] = tuple(KINDS)
    """Which networks."""
    stages: tuple[int, ...] = (0, 30, 300, 1500)
    """After how many steps of AdamW."""
    sizes: tuple[int, ...] = (48, 8)
    """Examples in a batch; of text a quarter as many sequences of 32 tokens."""
    run: bool = True
    """Whether to race what has not been raced; else only what has been is judged."""
    races: Path = Path("benchmarks/results/advice.json")
    """Earlier figures, whose races are not run again: they take minutes a matrix."""
    raw: Path = Path("runs/advice")
    """Folder of finished cases, so that a stopped run goes on."""
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


def trained(name: str, stage: int, size: int) -> Problem:
    given = problem(name, size)
    optimizer = torch.optim.AdamW(given.model.parameters(), 3e-3, weight_decay=0.0)
    for step in range(stage):
        optimizer.zero_grad()
        given.loss(given.model, given.train(step)).backward()
        optimizer.step()
    return given


Truth = tuple[float, int]
"""The advantage a; 1 for won by spectral steps, -1 for not won, 0 for undecided."""


def raced(name: str, stage: int, size: int) -> dict[str, Truth]:
    """The truth on each matrix."""
    given = trained(name, stage, size)
    judged = [given.fresh(i) for i in range(JUDGED)]
    batches = [given.fresh(JUDGED + i) for i in range(RACED)]
    function = LossFunction(given.model, given.loss)
    found = gather(function, judged, None, curvature=True)
    results = race(function, batches, found)
    return {
        name: truth({each.geometry: list(each.decreases) for each in mine})
        for name, mine in results.items()
    }


def advised(name: str, stage: int, size: int, matrices: list[str]) -> list[dict[str, Any]]:
    """What is said of some matrices, and why."""
    given = trained(name, stage, size)
    batches = [given.fresh(i) for i in range(JUDGED)]
    names = list(dict.fromkeys(name.partition("[")[0] for name in matrices))
    answers = {
        level: diagnose(
            given.model, given.loss, batches, level=level, parameters=names, warmup_steps=0
        )
        for level in ("quick", "standard")
    }
    rows = []
    for row in (answers["standard"][name] for name in matrices):
        case: dict[str, Any] = {
            "network": name,
            "stage": stage,
            "batch": size,
            "matrix": row.matrix,
            "role": row.role,
            "stable_rank": row.stable_rank,
            "nuclear_rank_across": row.nuclear_rank_across,
        }
        for level, found in answers.items():
            same = found[row.matrix]
            predicted = same.prediction("spectral").log_ratio
            case[level] = {
                "spectral": None if predicted is None else predicted.value,
                "interval": None if predicted is None else [predicted.low, predicted.high],
            }
        rows.append(case)
    return rows


def told(prediction: dict[str, Any]) -> int:
    """1 for spectral, -1 for Euclidean, 0 for cannot tell, if there were only these two."""
    if prediction["spectral"] is None:
        return 0
    worth = worth_it(Interval(prediction["spectral"], *prediction["interval"]))
    return 0 if worth is None else 1 if worth else -1


def truth(decreases: dict[str, list[float]]) -> Truth:
    s, e = (np.array(decreases[name]) for name in ("spectral", "euclidean"))
    best = max(s.mean(), e.mean())
    if not (np.isfinite(s).all() and np.isfinite(e).all()) or best <= 0:
        return math.nan, 0
    d = (s - e) / best
    half = float(stats.t.ppf(0.975, len(d) - 1)) * d.std(ddof=1) / math.sqrt(len(d))
    a = float(d.mean())
    if a - half > 0 and a > WON:
        return a, 1
    return a, -1 if a + half < EQUAL else 0


def balanced(kind: np.ndarray, answer: np.ndarray) -> float:
    sides = [
        float((answer[kind == side] == side).mean()) for side in (-1, 1) if (kind == side).any()
    ]
    return float(np.mean(sides)) if len(sides) == 2 else math.nan


def score(rows: list[dict[str, Any]], level: str) -> dict[str, float]:
    decided = [row for row in rows if row["truth"]]
    if not decided:
        return {"decided": 0}
    kind = np.array([row["truth"] for row in decided])
    answer = np.array([told(row[level]) for row in decided])
    spoken = answer != 0
    hidden = np.array([1 if row["role"] not in ("embedding", "head") else -1 for row in decided])
    value = np.array([row[level]["spectral"] for row in decided], dtype=float)
    known = np.isfinite(value)
    rank = stats.spearmanr(
        value[known], [r["advantage"] for r, k in zip(decided, known, strict=True) if k]
    )

    def right(side: int) -> float:
        mine = spoken & (kind == side)
        return float((answer[mine] == side).mean()) if mine.any() else math.nan

    return {
        "cases": len(rows),
        "decided": len(decided),
        "not won by spectral": float((kind < 0).mean()),
        "told": float(spoken.mean()),
        "balanced accuracy": balanced(kind[spoken], answer[spoken]),
        "right where spectral won": right(1),
        "right where it did not": right(-1),
        "the same, guessing the likelier": balanced(
            kind[known], np.where(value[known] > math.log(WORTH_IT), 1, -1)
        ),
        "always spectral": balanced(kind, np.ones_like(kind)),
        "spectral for hidden": balanced(kind, hidden),
        "rank correlation": float(rank[0]),
    }


def intervals(
    rows: list[dict[str, Any]], level: str, names: list[str], draws: int = 500
) -> dict[str, tuple[float, float]]:
    """95% intervals that resample networks."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["network"], []).append(row)
    rng, kinds = np.random.default_rng(0), list(groups)
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(draws):
        sample = [row for k in rng.choice(len(kinds), len(kinds)) for row in groups[kinds[k]]]
        scored = score(sample, level)
        for name in names:
            found[name].append(scored.get(name, math.nan))
    return {
        name: (float(np.nanquantile(each, 0.025)), float(np.nanquantile(each, 0.975)))
        for name, each in found.items()
    }


def reliability(rows: list[dict[str, Any]], level: str) -> list[dict[str, float]]:
    """By predicted ratio of decreases: how many cases, and how often spectral steps won."""
    decided = [row for row in rows if row["truth"] and row[level]["spectral"] is not None]
    bins = []
    for low, high in itertools.pairwise(BINS):
        mine = [row for row in decided if low <= math.exp(row[level]["spectral"]) < high]
        if mine:
            won = float(np.mean([row["truth"] > 0 for row in mine]))
            bins.append({"from": low, "to": high, "cases": len(mine), "won": won})
    return bins


def kept(place: Path, make: Callable[[], Any], what: str, console: Console) -> Any:
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        made = make()
        place.write_text(json.dumps(made))
        console.print(f"{what}: {len(made)} matrices, {time.perf_counter() - began:.0f} s")
    return json.loads(place.read_text())


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    console = Console(stderr=True)
    earlier: dict[tuple[str, int, int], dict[str, Truth]] = {}
    for row in json.loads(settings.races.read_text())["rows"] if settings.races.exists() else []:
        races = earlier.setdefault((row["network"], row["stage"], row["batch"]), {})
        races[row["matrix"]] = row["advantage"], row["truth"]
    rows: list[dict[str, Any]] = []
    for case in itertools.product(settings.networks, settings.stages, settings.sizes):
        name, stage, size = case
        file = f"{name}-{stage}-{size}.json"
        race, advice = settings.raw / "race" / file, settings.raw / "advice" / file
        if not (settings.run or race.exists() or case in earlier):
            continue
        what = f"{name} after {stage} steps, batches of {size}"
        races = earlier.get(case) or kept(race, lambda c=case: raced(*c), f"race: {what}", console)
        decided = [matrix for matrix, (_, kind) in races.items() if kind]
        said = kept(
            advice,
            lambda c=case, d=decided: advised(*c, d) if d else [],
            f"advice: {what}",
            console,
        )
        about = {row["matrix"]: row for row in said}
        for matrix, (advantage, kind) in races.items():
            row = {"network": name, "stage": stage, "batch": size, "matrix": matrix}
            row |= {"advantage": advantage, "truth": kind}
            rows.append(row | about.get(matrix, {}))
    scores, spreads, bins = {}, {}, {}
    for part, chosen in (
        ("tuned on", [row for row in rows if row["network"] not in HELD_OUT]),
        ("held out", [row for row in rows if row["network"] in HELD_OUT]),
        ("all", rows),
    ):
        for level in ("quick", "standard"):
            key = f"{part}, {level}"
            scores[key] = score(chosen, level)
            if part != "tuned on":
                spreads[key] = intervals(chosen, level, list(scores[key]))
            if part == "all":
                bins[key] = reliability(chosen, level)
    names = list(scores["all, quick"])
    table(
        "verdicts on spectral against Euclidean steps, beside the race",
        ["", *scores],
        [
            [name, *(f"{each.get(name, math.nan):.3g}" for each in scores.values())]
            for name in names
        ],
    )
    for key, found in bins.items():
        table(
            f"how often spectral steps won, by what was predicted: {key}",
            ["predicted ratio", "cases", "won"],
            [
                [f"{b['from']:.3g} to {b['to']:.3g}", str(b["cases"]), f"{b['won']:.2f}"]
                for b in found
            ],
        )
    peers = [Peer("steepest", lambda *_: None, "steepest")]
    save(
        settings.out / "advice.json",
        settings,
        peers,
        {},
        scores=scores,
        intervals=spreads,
        reliability=bins,
        rows=rows,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
