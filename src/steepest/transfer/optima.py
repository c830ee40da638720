"""The best learning rate of every size, and what carrying one to another costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from steepest.diagnosis.intervals import Interval, jackknife
from steepest.printing import as_text
from steepest.transfer.runs import written

DRIFT, PENALTY = 1.0, 0.01
"""A rate transfers if its optimum moves by at most an octave, and the loss by at most 1%."""


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


def optimum(
    lr: float, size: Mapping[str, Any], best: int, grid: Mapping[int, tuple[float, ...]]
) -> SizeOptimum:
    """Of a grid of rates lr 2^k with the scores of the seeds, the one with the lowest mean."""
    scores, rate = {lr * 2.0**k: grid[k] for k in grid}, lr * 2.0**best
    vertex, seeds = partial(_vertex, scores, rate), range(len(grid[best]))
    interval = _interval(vertex, len(seeds))
    return SizeOptimum(dict(size), rate, vertex(seeds), interval, fmean(grid[best]), scores)


def horizon(
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


def _interval(estimate: Callable[[Sequence[int]], float], seeds: int) -> Interval | None:
    return jackknife(estimate, seeds) if seeds > 1 else None


def _vertex(scores: Mapping[float, tuple[float, ...]], lr: float, seeds: Sequence[int]) -> float:
    """log2 of the rate at the vertex of the parabola through a rate and its neighbours."""
    down, here, up = (fmean(scores[lr * 2.0**k][i] for i in seeds) for k in (-1, 0, 1))
    bend = down - 2 * here + up
    shift = 0.5 * (down - up) / bend if bend > 0 else 0.0
    return math.log2(lr) + min(1.0, max(-1.0, shift))
