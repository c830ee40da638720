"""Does the best learning rate stay where it is when the model grows?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from steepest.diagnosis.intervals import Interval, jackknife
from steepest.printing import as_text
from steepest.transfer.coordinates import Loss
from steepest.transfer.dimensions import Build
from steepest.transfer.parametrization import parametrize
from steepest.transfer.rules import OptimizerName, Rule

LAST = 10
"""Losses at the end whose mean is the score of a run."""
FURTHEST = 12
"""Octaves from the first rate, up to which a grid grows."""
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


@dataclass(frozen=True)
class RateTransfer:
    """Best learning rates over sizes; prints as a table.

    Attributes:
        rule, optimizer, steps: what was run.
        rows: a `SizeOptimum` for each size, in the order given.
        drift: by how many octaves the optimum moves from the first size to the last.
        penalty: of the last size's score with the best rate of the first, over that with its own,
            minus 1.
    """

    rule: str
    optimizer: str
    steps: int
    rows: tuple[SizeOptimum, ...]
    drift: float
    penalty: float

    @property
    def passed(self) -> bool:
        """Whether the optimum moves by at most an octave and the score by at most 1%."""
        return abs(self.drift) <= DRIFT and self.penalty <= PENALTY

    @property
    def verdict(self) -> str:
        """One sentence with the numbers."""
        said = "transfers" if self.passed else "does not transfer"
        moved = f"the best rate moves by {self.drift:+.2f} octaves (at most {DRIFT:g})"
        cost = f"{100 * self.penalty:.1f}% (at most {100 * PENALTY:g}%)"
        return f"{said}: {moved}, and that of the first size costs the last {cost}"

    def table(self) -> Table:
        """Return the table for `rich`."""
        table = Table(
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"best learning rates: {self.rule}, {self.optimizer}, {self.steps} steps",
            caption=self.verdict,
        )
        for title in ("size", "best rate", "interpolated", "80% interval", "loss"):
            table.add_column(title, justify="left" if title == "size" else "right")
        for row in self.rows:
            found = row.interval
            table.add_row(
                ", ".join(f"{key} {value}" for key, value in row.size.items()),
                f"{row.lr:.3g}",
                f"{2.0**row.octaves:.3g}",
                f"{2.0**found.low:.3g} to {2.0**found.high:.3g}" if found else "-",
                f"{row.score:.4g}",
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return as_text(self.table(), 100)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "passed": self.passed, "verdict": self.verdict}


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
    path: str | Path | None = None,
    on_run: Callable[[str, float], None] = lambda key, score: None,
    **how: Any,
) -> RateTransfer:
    """Train every size at rates by factors of 2 and compare the best ones.

    The grid of each size starts at `lr` and grows until its best rate, by the mean over the seeds,
    lies inside. All runs see the same batches in the same order; the rate rises linearly over the
    first tenth of the steps and stays. A score is the mean of the last 10 losses, at most twice the
    first one: that stands for a run that diverged.

    Args:
        build: from sizes to a model, as for `parametrize`.
        sizes: two or more, of which one dimension grows, such as `[dict(width=64), ...]`.
        batches: from a number to a batch, the same for the same number.
        loss: `loss(model, batch) -> scalar`.
        lr: where to look first, in the units of the base.
        rule, optimizer, how: as for `parametrize`.
        steps: of each run.
        seeds: runs for every rate, with initializations of their own.
        base: the size whose rates these are; the first by default.
        path: a file of finished runs, lines of JSON; what it has is not run again. Of `build`,
            `batches` and `loss` only the names are known: what they do is not looked at, so changed
            ones need another file.
        on_run: called with the name and the score of every run, also those from the file.

    Raises:
        ValueError: for fewer than two sizes, and where no best rate is found within 12 octaves, or
            the rates make no difference.

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
    >>> len(found.rows), abs(found.drift) < 3
    (2, True)
    """
    if len(sizes) < 2:
        raise ValueError(f"got {len(sizes)} sizes, expected at least 2 to compare")
    runs = _Runs(path, on_run)
    base = dict(base or sizes[0])
    rows = []
    for size in sizes:
        target = {**base, **size}

        def score(octave: int, seed: int, target: dict[str, Any] = target) -> float:
            rate = lr * 2.0**octave
            named: list[Any] = [
                rule,
                optimizer,
                steps,
                base,
                target,
                sorted(how.items()),
                rate,
                seed,
            ]
            named += [getattr(each, "__qualname__", "") for each in (build, batches, loss)]
            key = json.dumps(named, default=str)

            def run() -> float:
                torch.manual_seed(seed)
                made = parametrize(build, base, target, rule=rule, optimizer=optimizer, **how)
                return _train(made, rate, batches, loss, steps)

            return runs(key, run)

        rows.append(_optimum(dict(size), lr, score, seeds))
    first, last = rows[0], rows[-1]
    if first.lr not in last.scores:
        octave = round(math.log2(first.lr / lr))
        last.scores[first.lr] = tuple(score(octave, seed) for seed in range(seeds))
    penalty = fmean(last.scores[first.lr]) / last.score - 1 if last.score > 0 else math.inf
    drift = last.octaves - first.octaves
    return RateTransfer(rule, optimizer, steps, tuple(rows), drift, penalty)


def _train(made: Any, lr: float, batches: Callable[[int], Any], loss: Loss, steps: int) -> float:
    """The score of one run."""
    optimizer = made.optimizer(lr)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / warm))
    losses: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(made.model, batches(step))
        losses.append(value.item())
        if not math.isfinite(losses[-1]) or losses[-1] > 1e3 * losses[0]:
            return 2 * losses[0]
        value.backward()
        try:
            optimizer.step()
        except FloatingPointError:
            return 2 * losses[0]
        schedule.step()
    return min(fmean(losses[-LAST:]), 2 * losses[0])


class _Runs:
    """Scores by name, on disk as they come."""

    def __init__(self, path: str | Path | None, on_run: Callable[[str, float], None]):
        self._path = None if path is None else Path(path)
        self._on_run = on_run
        self._known: dict[str, float] = {}
        if self._path is not None and self._path.exists():
            whole, _, _ = self._path.read_text().rpartition("\n")  # a line may be cut off
            for line in whole.splitlines():
                key, value = json.loads(line)
                self._known[key] = value
            self._path.write_text(whole + "\n" if whole else "")

    def __call__(self, key: str, run: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = run()
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps([key, self._known[key]]) + "\n")
        self._on_run(key, self._known[key])
        return self._known[key]


def _optimum(
    size: dict[str, Any], lr: float, score: Callable[[int, int], float], seeds: int
) -> SizeOptimum:
    """Grow the grid until the best rate is inside."""
    grid: dict[int, tuple[float, ...]] = {}

    def mean(octave: int) -> float:
        if octave not in grid:
            grid[octave] = tuple(score(octave, seed) for seed in range(seeds))
        return fmean(grid[octave])

    best = 0
    while True:
        better = min((best, best - 1, best + 1), key=mean)
        if better == best:
            around = [mean(best - 1), mean(best), mean(best + 1)]
            if max(around) - min(around) <= 1e-6 * abs(min(around)):
                raise ValueError(
                    f"got the same loss for {size} at rates around {lr * 2.0**best:.3g}, expected "
                    "an lr that trains the model"
                )
            break
        best = better
        if abs(best) == FURTHEST:
            raise ValueError(
                f"got no best rate for {size} between {lr * 2.0**-FURTHEST:.3g} and "
                f"{lr * 2.0**FURTHEST:.3g}; expected an lr closer to it"
            )

    def vertex(kept: Sequence[int]) -> float:
        down, here, up = (fmean(grid[best + k][i] for i in kept) for k in (-1, 0, 1))
        bend = down - 2 * here + up
        shift = 0.5 * (down - up) / bend if bend > 0 else 0.0
        return math.log2(lr) + best + min(1.0, max(-1.0, shift))

    return SizeOptimum(
        size,
        lr * 2.0**best,
        vertex(range(seeds)),
        jackknife(vertex, seeds) if seeds > 1 else None,
        mean(best),
        {lr * 2.0**octave: grid[octave] for octave in sorted(grid)},
    )
