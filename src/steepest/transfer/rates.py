"""Does the best learning rate stay where it is when the model grows?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from steepest.diagnosis.intervals import Interval, jackknife
from steepest.printing import as_text
from steepest.transfer.advice import continued
from steepest.transfer.coordinates import Loss, axis_of
from steepest.transfer.dimensions import Build, blueprint
from steepest.transfer.parametrization import parametrize
from steepest.transfer.rules import OptimizerName, Rule
from steepest.transfer.runs import Finished, named, score, seeded, training, written

FURTHEST = 12
"""Octaves from the first rate, up to which a grid grows."""
DRIFT, PENALTY = 1.0, 0.01
"""A rate transfers if its optimum moves by at most an octave, and the loss by at most 1%."""
_USUAL = 5  # rates for a size, to tell how much is left


@dataclass(frozen=True)
class SizeOptimum:
    """The best learning rate of one size.

    Attributes:
        size: as given.
        lr: of the lowest score on the grid, in the units of the base.
        octaves: log2 of the rate at the vertex of a parabola through the lowest score and its
            neighbours.
        interval: of that at 80%, over the seeds; None for a single one.
        score: at `lr`, the mean over the seeds.
        scores: of every rate and seed.
    """

    size: dict[str, Any]
    lr: float
    octaves: float
    interval: Interval | None
    score: float
    scores: dict[float, tuple[float, ...]]

    def vertex(self, seeds: Sequence[int]) -> float:
        """Return the `octaves` that some of the seeds have, around the `lr` of all."""
        return _vertex(self.scores, self.lr, seeds)


@dataclass(frozen=True)
class Horizon:
    """Best rates over sizes, after so many steps.

    Attributes:
        steps: of the runs, at whose end the loss counts.
        rows: a `SizeOptimum` for each size, in the order given.
        drift: by how many octaves the optimum of a size differs from that of the first, where it
            does most.
        interval: of the drift at 80%, over the seeds; None for a single one.
        penalty: of the last size's score with the best rate of the first over that with its own
            best, minus 1: rates on the grid, or interpolated where that is better.
        penalty_interval: at 80%, as that of the drift.
        advised: the rate at the last size that the best rates of all others advise, as `advise`
            does; None where they are too few.
        advised_penalty: of the last size's score with that rate, likewise: what the advice would
            have cost.
    """

    steps: int
    rows: tuple[SizeOptimum, ...]
    drift: float
    interval: Interval | None
    penalty: float
    penalty_interval: Interval | None
    advised: float | None = None
    advised_penalty: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the optimum moves by at most an octave and the score by at most 1%."""
        return abs(self.drift) <= DRIFT and self.penalty <= PENALTY

    @property
    def verdict(self) -> str:
        """One sentence with the numbers."""
        said = "transfers" if self.passed else "does not transfer"
        moved, cost = f"{self.drift:+.2f} octaves", f"{100 * self.penalty:z.1f}%"
        if found := self.interval:
            moved += f" (80% interval {found.low:+.2f} to {found.high:+.2f}, at most {DRIFT:g})"
        if found := self.penalty_interval:
            cost += (
                f" ({100 * found.low:z.1f} to {100 * found.high:z.1f}%, at most {100 * PENALTY:g}%)"
            )
        sentence = (
            f"{said} over {self.steps} steps: the best rate moves by {moved}, and that of the "
            f"first size costs the last one {cost}"
        )
        if self.advised is None or self.advised_penalty is None:
            return sentence
        return (
            f"{sentence}; {self.advised:.3g}, advised by the sizes before, costs it "
            f"{100 * self.advised_penalty:z.1f}%"
        )


@dataclass(frozen=True)
class RateTransfer:
    """Best learning rates over sizes, at half of the steps and at all; prints as a table.

    Attributes:
        rule, optimizer: what was run.
        horizons: of half of the steps, and of all of them.
    """

    rule: str
    optimizer: str
    horizons: tuple[Horizon, ...]

    @property
    def rows(self) -> tuple[SizeOptimum, ...]:
        """The best rates after all steps."""
        return self.horizons[-1].rows

    @property
    def passed(self) -> bool:
        """Whether both horizons pass."""
        return all(each.passed for each in self.horizons)

    @property
    def verdict(self) -> str:
        """A sentence for each horizon, with the numbers."""
        return "; ".join(each.verdict for each in self.horizons)

    def table(self) -> Table:
        """Return the table for `rich`."""
        table = Table(
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"best learning rates: {self.rule}, {self.optimizer}",
            caption="\n".join(each.verdict for each in self.horizons),
        )
        for title in ("size", "steps", "best rate", "interpolated", "80% interval", "loss"):
            table.add_column(title, justify="left" if title == "size" else "right")
        for horizon in self.horizons:
            for row in horizon.rows:
                found = row.interval
                table.add_row(
                    written(row.size),
                    str(horizon.steps),
                    f"{row.lr:.3g}",
                    f"{2.0**row.octaves:.3g}",
                    f"{2.0**found.low:.3g} to {2.0**found.high:.3g}" if found else "-",
                    f"{row.score:.4g}",
                )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return as_text(self.table(), 120)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        found = {**asdict(self), "passed": self.passed, "verdict": self.verdict}
        for horizon, row in zip(self.horizons, found["horizons"], strict=True):
            row |= {"passed": horizon.passed, "verdict": horizon.verdict}
        return found


def rate_transfer(
    build: Build,
    sizes: Sequence[Mapping[str, Any]],
    batches: Callable[[int], Any],
    loss: Loss,
    *,
    lr: float,
    rule: Rule = "mup",
    optimizer: OptimizerName = "adam",
    steps: int = 60,
    seeds: int = 2,
    base: Mapping[str, Any] | None = None,
    grid_only: bool = False,
    path: str | Path | None = None,
    on_run: Callable[[str, float], None] = lambda said, done: None,
    **how: Any,
) -> RateTransfer:
    """Train every size at rates by factors of 2 and compare the best ones, at two horizons.

    The grid of each size starts at `lr` and grows until its best rates, by the mean over the seeds
    after half of the steps and after all, lie inside. All runs see the same batches in the same
    order; the rate rises linearly over the first tenth of the steps and stays, so that one run
    tells of both horizons. A score is the mean of the last 10 losses, at most twice the first one:
    that stands for a run that diverged.

    Args:
        build: from sizes to a model, as for `parametrize`.
        sizes: two or more, of which one dimension grows from each to the next, such as
            `[dict(width=64), dict(width=128)]`.
        batches: from a number to a batch, the same for the same number.
        loss: `loss(model, batch) -> scalar`.
        lr: where to look first, in the units of the base.
        rule, optimizer, how: as for `parametrize`.
        steps: of each run.
        seeds: runs for every rate, with initializations of their own.
        base: the size whose rates these are; the first by default.
        grid_only: train at no rates between those of the grid, which saves up to half of the runs
            of the last size: the rate of the first size is then carried as the grid has it, and
            the advised one is not put to the test.
        path: a file of finished runs, lines of JSON; what it has is not run again. Of `build`,
            `batches` and `loss` only the names are known: what they do is not looked at, so changed
            ones need another file.
        on_run: called after every run, also those from the file, with a line about it and the part
            of the work that is done, from 0 to 1: an estimate, as grids grow.

    Raises:
        ValueError: for fewer than two sizes or such that do not grow, where no best rate is found
            within 12 octaves, the rates make no difference, or a loss is below zero or, before any
            step, not finite.

    >>> import torch
    >>> from torch import nn
    >>> def build(width):
    ...     return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    >>> def batches(i):
    ...     x = torch.randn(32, 4, generator=torch.Generator().manual_seed(i))
    ...     return x, x[:, :1]
    >>> def loss(model, batch):
    ...     return (model(batch[0]) - batch[1]).square().mean()
    >>> found = rate_transfer(build, [dict(width=8), dict(width=32)], batches, loss,
    ...                       lr=0.03, steps=20, seeds=1)
    >>> [each.steps for each in found.horizons], len(found.rows), abs(found.horizons[-1].drift) < 3
    ([10, 20], 2, True)
    """
    if len(sizes) < 2:
        raise ValueError(f"got {len(sizes)} sizes, expected at least 2 to compare")
    if steps < 2 or seeds < 1:
        raise ValueError(f"got steps={steps} and seeds={seeds}, expected at least 2 and 1")
    name, values = axis_of(sizes)
    if list(values) != sorted(values):
        raise ValueError(
            f"got {name} {', '.join(f'{value:g}' for value in values)}, expected sizes that grow, "
            "the base first"
        )
    base = dict(base or sizes[0])
    targets = [{**base, **size} for size in sizes]
    finished, horizons = Finished(path), (steps // 2, steps)
    weights = [_work(build, target) for target in targets]
    done = [0] * len(sizes)  # runs
    grids: list[dict[int, list[tuple[float, ...]]]] = [{} for _ in sizes]

    def at(i: int, rate: float) -> list[tuple[float, ...]]:
        """For each horizon the scores of the seeds, and at last those of runs that diverged."""
        found = []
        for seed in range(seeds):
            what = (rule, optimizer, steps, base, targets[i], sorted(how.items()), rate, seed)

            def run(seed: int = seed) -> list[float]:
                with seeded(seed):
                    made = parametrize(
                        build, base, targets[i], rule=rule, optimizer=optimizer, **how
                    )
                    losses = [now for now, _ in training(made, rate, batches, loss, steps)]
                return [*(score(losses, horizon) for horizon in horizons), 2 * losses[0]]

            found.append(finished(named("rate", *what, build, batches, loss), run))
            done[i] += 1
            said = f"{written(sizes[i])}, rate {rate:.3g}: loss {found[-1][-2]:.4g}"
            on_run(said, _part(weights, done, i, seeds))
        return list(zip(*found, strict=True))

    bests = [[0] * len(sizes) for _ in horizons]
    for i, size in enumerate(sizes):
        for h in range(len(horizons)):

            def mean(octave: int, i: int = i, h: int = h) -> tuple[float, bool]:
                if octave not in grids[i]:
                    grids[i][octave] = at(i, lr * 2.0**octave)
                scores, diverged = grids[i][octave][h], grids[i][octave][-1]
                return fmean(scores), scores == diverged

            bests[h][i] = _best(size, lr, bests[h - 1][i] if h else 0, mean)
    found = []
    for h, horizon in enumerate(horizons):
        scores = ({k: grid[k][h] for k in sorted(grid)} for grid in grids)
        rows = tuple(map(partial(_optimum, lr), sizes, bests[h], scores))

        def tuned(i: int, rows: tuple[SizeOptimum, ...] = rows, h: int = h) -> float:
            """The rate of the lower score: the best one on the grid, or the interpolated one."""
            on, between = rows[i].lr, 2.0 ** rows[i].octaves
            if grid_only:
                return on
            return between if fmean(at(i, between)[h]) < rows[i].score else on

        last = len(sizes) - 1
        carried, own = (at(last, tuned(i))[h] for i in (0, last))
        advised = _advised(rows)
        there = None if advised is None or grid_only else at(last, advised)[h]
        found.append(_horizon(horizon, rows, carried, own, advised, there))
    return RateTransfer(rule, optimizer, tuple(found))


def _work(build: Build, target: Mapping[str, Any]) -> float:
    """What a step costs, as its parameters tell; small models cost the same."""
    return 1e5 + sum(math.prod(shape) for shape in blueprint(build, target, None).shapes.values())


def _part(weights: Sequence[float], done: Sequence[int], at: int, seeds: int) -> float:
    """How much of the work is done, where grids have the usual number of rates."""
    ahead = [max(_USUAL * seeds, n + 1) if i >= at else n for i, n in enumerate(done)]
    total = sum(w * n for w, n in zip(weights, ahead, strict=True))
    return sum(w * n for w, n in zip(weights, done, strict=True)) / total


def _best(
    size: Mapping[str, Any], lr: float, start: int, mean: Callable[[int], tuple[float, bool]]
) -> int:
    """The octave whose neighbours are no better; the grid grows until there is one.

    `mean` says the mean score at an octave, and whether all runs diverged there.
    """
    best = start
    while abs(best) < FURTHEST:
        (down, _), (here, diverged), (up, _) = (mean(best + k) for k in (-1, 0, 1))
        if here <= min(down, up) and not diverged:
            if max(down, up) - here <= 1e-6 * abs(here):
                raise ValueError(
                    f"got the same loss for {dict(size)} at rates around {lr * 2.0**best:.3g}, "
                    "expected an lr that trains the model"
                )
            return best
        best += 1 if up < min(here, down) and not diverged else -1
    raise ValueError(
        f"got no best rate for {dict(size)} between {lr * 2.0**-FURTHEST:.3g} and "
        f"{lr * 2.0**FURTHEST:.3g}; expected an lr closer to it"
    )


def _horizon(
    steps: int,
    rows: tuple[SizeOptimum, ...],
    carried: tuple[float, ...],
    own: tuple[float, ...],
    advised: float | None,
    there: tuple[float, ...] | None,
) -> Horizon:
    """Scores are of the last size: at the first one's rate, at its own, and at the advised one."""
    first = rows[0]
    moved = max(rows[1:], key=lambda row: abs(row.octaves - first.octaves))

    def drift(kept: Sequence[int]) -> float:
        return moved.vertex(kept) - first.vertex(kept)

    def penalty(scores: Sequence[float], kept: Sequence[int]) -> float:
        dearer, best = sum(scores[i] - own[i] for i in kept), sum(own[i] for i in kept)
        return dearer / best if best > 0 else math.inf if dearer > 0 else 0.0

    seeds = range(len(own))
    cost = partial(penalty, carried)
    return Horizon(
        steps,
        rows,
        drift(seeds),
        _interval(drift, len(seeds)),
        cost(seeds),
        _interval(cost, len(seeds)),
        advised,
        None if there is None else penalty(there, seeds),
    )


def _advised(rows: Sequence[SizeOptimum]) -> float | None:
    """The rate at the last size that all others advise; None where they are too few."""
    _, values = axis_of([row.size for row in rows])
    places, octaves = [], []
    for row, value in zip(rows[:-1], values[:-1], strict=True):
        for seed in range(len(row.scores[row.lr])):
            places.append([math.log2(value)])
            octaves.append(row.vertex([seed]))
    line = continued(places, octaves, [math.log2(values[-1])]) if len(rows) > 2 else None
    return None if line is None else 2.0**line.value


def _optimum(
    lr: float, size: Mapping[str, Any], best: int, grid: Mapping[int, tuple[float, ...]]
) -> SizeOptimum:
    scores, rate = {lr * 2.0**k: grid[k] for k in grid}, lr * 2.0**best
    vertex, seeds = partial(_vertex, scores, rate), range(len(grid[best]))
    interval = _interval(vertex, len(seeds))
    return SizeOptimum(dict(size), rate, vertex(seeds), interval, fmean(grid[best]), scores)


def _interval(estimate: Callable[[Sequence[int]], float], seeds: int) -> Interval | None:
    return jackknife(estimate, seeds) if seeds > 1 else None


def _vertex(scores: Mapping[float, tuple[float, ...]], lr: float, seeds: Sequence[int]) -> float:
    """log2 of the rate at the vertex of the parabola through a rate and its neighbours."""
    down, here, up = (fmean(scores[lr * 2.0**k][i] for i in seeds) for k in (-1, 0, 1))
    bend = down - 2 * here + up
    shift = 0.5 * (down - up) / bend if bend > 0 else 0.0
    return math.log2(lr) + min(1.0, max(-1.0, shift))
