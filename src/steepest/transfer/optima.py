"""The best learning rate of every size, and what carrying one to another costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

from steepest.results import Column, Result, ResultTable
from steepest.statistics import Interval, jackknife
from steepest.transfer.outcomes import Outcome, span, together, within
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
        interval: of that at 80%, over the seeds; None for a single one, and where some of the seeds
            have their lowest score at an end of the grid.
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
        """Return the `octaves` that some of the seeds have; NaN at an end of the grid."""
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
        diverged: whether a run of the last size diverged at the first one's rate, so that the
            penalty is at least what is given.
        advised: the rate at the last size that the best rates of all others advise, as `advise`
            does; None where they are too few.
        advised_penalty: of the last size's score with that rate, likewise: what the advice would
            have cost.
        advised_diverged: whether a run diverged there.
    """

    steps: int
    rows: tuple[SizeOptimum, ...]
    drift: float
    interval: Interval | None
    penalty: float
    penalty_interval: Interval | None
    advised: float | None = None
    advised_penalty: float | None = None
    diverged: bool = False
    advised_diverged: bool = False

    @property
    def seeds(self) -> int:
        """How many runs there are for a rate."""
        return len(self.rows[0].scores[self.rows[0].lr])

    @property
    def drifts(self) -> tuple[Interval | None, ...]:
        """The drift of each size after the first, with its 80% interval."""
        return tuple(_drift_interval(self.rows[0], row, self.seeds) for row in self.rows[1:])

    @property
    def passed(self) -> Outcome:
        """Whether every optimum moves by at most an octave, and the score by at most 1%.

        None where an interval has both, or where there is none: it cannot be told.
        """
        moved = [within(drift, -DRIFT, DRIFT) for drift in self.drifts]
        return together([*moved, within(self.penalty_interval, -math.inf, PENALTY)])

    @property
    def unknown(self) -> tuple[str, ...]:
        """Why it cannot be told, if it cannot, and what to do."""
        if self.passed is not None:
            return ()
        if self.seeds == 1:
            return ("a single seed has no interval: take two or more",)
        said = []
        for row, drift in zip(self.rows[1:], self.drifts, strict=True):
            if drift is None:
                said.append(f"seeds disagree on the best rate of {written(row.size)}")
            elif within(drift, -DRIFT, DRIFT) is None:
                said.append(
                    f"at {written(row.size)} it moves by {drift.low:+.2f} to {drift.high:+.2f}"
                )
        if within(self.penalty_interval, -math.inf, PENALTY) is None:
            said.append("the cost is not known to be above or below the limit")
        return (*said, "take more seeds, or longer runs")

    @property
    def verdict(self) -> str:
        """One sentence with the numbers, and why it cannot be told, if it cannot."""
        said = {True: "transfers", False: "does not transfer", None: "cannot tell"}[self.passed]
        moved, cost = f"{self.drift:+.2f} octaves", _percent(self.penalty, self.diverged)
        if drift := self.interval:
            moved += f" (80% interval {drift.low:+.2f} to {drift.high:+.2f}, at most {DRIFT:g})"
        interval = self.penalty_interval
        if self.penalty == 0 and (interval is None or interval.low == interval.high):
            cost = "nothing, as both have the same best rate of those tried"
        elif interval:
            low, high = 100 * interval.low, 100 * interval.high
            cost += f" ({low:z.1f} to {high:z.1f}%, at most {100 * PENALTY:g}%)"
        sentence = (
            f"{said} over {self.steps} steps: the best rate moves by {moved}, and that of the "
            f"first size costs the last one {cost}"
        )
        if self.advised is not None and self.advised_penalty is not None:
            cost = _percent(self.advised_penalty, self.advised_diverged)
            sentence += f"; {self.advised:.3g}, advised by the sizes before, costs it {cost}"
        return "; ".join([sentence, *self.unknown])


@dataclass(frozen=True, repr=False)
class RateTransfer(Result):
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
    def passed(self) -> Outcome:
        """Whether both horizons pass; None where it cannot be told."""
        return together(horizon.passed for horizon in self.horizons)

    @property
    def verdict(self) -> str:
        """A sentence for each horizon, with the numbers."""
        return "; ".join(horizon.verdict for horizon in self.horizons)

    def table(self) -> ResultTable:
        """Return the best rate of every size, at both horizons."""
        columns = (
            Column("size"),
            Column("steps"),
            Column("lr", "best rate", ".3g"),
            Column("interpolated", form=".3g"),
            Column("interval", "80% interval", right=True),
            Column("loss"),
        )
        rows = []
        for horizon in self.horizons:
            for row in horizon.rows:
                ends = row.interval
                interval = ends and span(2.0**ends.low, 2.0**ends.high, row.scores)
                own = (row.lr, 2.0**row.octaves, interval, row.score)
                rows.append((written(row.size), horizon.steps, *own))
        title = f"best learning rates: {self.rule}, {self.optimizer}"
        return ResultTable(columns, tuple(rows), title, "\n".join(h.verdict for h in self.horizons))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        content = {**asdict(self), "passed": self.passed, "verdict": self.verdict}
        for horizon, row in zip(self.horizons, content["horizons"], strict=True):
            row |= {"passed": horizon.passed, "verdict": horizon.verdict}
        return content


def _percent(penalty: float, is_bound: bool) -> str:
    if not math.isfinite(penalty):
        return "more than a share can say, as its own best loss is zero"
    return f"{'at least ' if is_bound else ''}{100 * penalty:z.1f}%"


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
    limit: tuple[float, ...],
) -> Horizon:
    """Scores are of the last size: at the first one's rate, at its own, at the advised one.

    `limit` is what runs score that diverge.
    """
    first = rows[0]
    moved = max(rows[1:], key=lambda row: abs(row.octaves - first.octaves))

    def penalty(scores: Sequence[float], kept: Sequence[int]) -> float:
        dearer, best = sum(scores[i] - own[i] for i in kept), sum(own[i] for i in kept)
        return dearer / best if best > 0 else math.inf if dearer > 0 else 0.0

    def diverged(scores: tuple[float, ...] | None) -> bool:
        return any(score >= most for score, most in zip(scores or (), limit, strict=False))

    seeds = range(len(own))
    cost = partial(penalty, carried)
    return Horizon(
        steps,
        rows,
        moved.vertex(seeds) - first.vertex(seeds),
        _drift_interval(first, moved, len(seeds)),
        cost(seeds),
        _interval(cost, len(seeds)),
        advised,
        None if there is None else penalty(there, seeds),
        diverged(carried),
        diverged(there),
    )


def _drift_interval(first: SizeOptimum, moved: SizeOptimum, seeds: int) -> Interval | None:
    return _interval(lambda kept: moved.vertex(kept) - first.vertex(kept), seeds)


def _interval(estimate: Callable[[Sequence[int]], float], seeds: int) -> Interval | None:
    return jackknife(estimate, seeds) if seeds > 1 else None


def _vertex(scores: Mapping[float, tuple[float, ...]], lr: float, seeds: Sequence[int]) -> float:
    """log2 of the rate at the vertex of the parabola through a rate and its neighbours.

    Where some of the seeds have it farther away than that, downhill from there; NaN where the grid
    ends first, as the end is no optimum.
    """
    while True:
        down, here, up = (fmean(scores[lr * 2.0**k][i] for i in seeds) for k in (-1, 0, 1))
        bend = down - 2 * here + up
        shift = 0.5 * (down - up) / bend if bend > 0 else math.inf
        if abs(shift) <= 1:
            return math.log2(lr) + shift
        lr *= 2.0 if up < down else 0.5
        if not {lr / 2, lr * 2} <= scores.keys():
            return math.nan
