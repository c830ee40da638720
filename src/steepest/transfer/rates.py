"""Does the best learning rate stay where it is when the model grows?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Unpack

from torch.optim import Optimizer

from steepest.curvature.loss_function import Loss
from steepest.optim.family import record_of
from steepest.parametrize.dimensions import Build, blueprint
from steepest.parametrize.parametrization import parametrize
from steepest.parametrize.rules import Rule
from steepest.statistics import fit
from steepest.transfer.coordinates import axis_of
from steepest.transfer.optima import RateTransfer, SizeOptimum, horizon, optimum
from steepest.transfer.runs import (
    Finished,
    ParametrizeOptions,
    named,
    score,
    torch_seeded,
    training,
    written,
)

FURTHEST = 12
"""Octaves from the first rate, up to which a grid grows."""
_USUAL = 5  # rates for a size, to tell how much is left


def rate_transfer(
    build: Build,
    sizes: Sequence[Mapping[str, Any]],
    batches: Callable[[int], Any],
    loss: Loss,
    *,
    lr: float,
    rule: Rule = "mup",
    optimizer: str | type[Optimizer] = "adamw",
    steps: int = 60,
    seeds: int = 2,
    base: Mapping[str, Any] | None = None,
    grid_only: bool = False,
    path: str | Path | None = None,
    on_run: Callable[[str, float], None] = lambda said, done: None,
    **options: Unpack[ParametrizeOptions],
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
        rule, optimizer, options: as for `parametrize`; the options are `settings`, `roles`,
            `branches` and `head_size`.
        steps: of each run.
        seeds: runs for every rate, with initializations of their own.
        base: the size whose rates these are; the first by default.
        grid_only: train at no rates between those of the grid, which saves up to half of the runs
            of the last size: the rate of the first size is then carried as the grid has it, and
            the advised one is not put to the test.
        path: a file of finished runs, lines of JSON with checksums; what it has is not run again,
            but a line that is damaged, with a warning. Of `build`,
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
    >>> result = rate_transfer(build, [dict(width=8), dict(width=32)], batches, loss,
    ...                        lr=0.03, steps=20, seeds=1)
    >>> [horizon.steps for horizon in result.horizons], len(result.rows)
    ([10, 20], 2)
    >>> abs(result.horizons[-1].drift) < 3
    True
    """
    optimizer = record_of(optimizer).name
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
    finished, lengths = Finished(path), (steps // 2, steps)
    weights = [_work(build, target) for target in targets]
    done = [0] * len(sizes)  # runs
    grids: list[dict[int, list[tuple[float, ...]]]] = [{} for _ in sizes]

    def at(i: int, rate: float) -> list[tuple[float, ...]]:
        """For each horizon the scores of the seeds, and at last those of runs that diverged."""
        scores = []
        for seed in range(seeds):
            key = (rule, optimizer, steps, base, targets[i], sorted(options.items()), rate, seed)

            def run(seed: int = seed) -> list[float]:
                with torch_seeded(seed):
                    made = parametrize(
                        build, base, targets[i], rule=rule, optimizer=optimizer,
                        example=lambda model: loss(model, batches(0)), **options,
                    )  # fmt: skip
                    losses = [now for now, _ in training(made, rate, batches, loss, steps)]
                return [*(score(losses, length) for length in lengths), 2 * losses[0]]

            scores.append(finished(named("rate", *key, build, batches, loss), run))
            done[i] += 1
            said = f"{written(sizes[i])}, rate {rate:.3g}: loss {scores[-1][-2]:.4g}"
            on_run(said, _part(weights, done, i, seeds))
        return list(zip(*scores, strict=True))

    bests = [[0] * len(sizes) for _ in lengths]
    for i, size in enumerate(sizes):
        for h in range(len(lengths)):

            def mean(octave: int, i: int = i, h: int = h) -> tuple[float, bool]:
                if octave not in grids[i]:
                    grids[i][octave] = at(i, lr * 2.0**octave)
                scores, diverged = grids[i][octave][h], grids[i][octave][-1]
                return fmean(scores), scores == diverged

            bests[h][i] = _best(size, lr, bests[h - 1][i] if h else 0, mean)
    horizons = []
    for h, length in enumerate(lengths):
        scores = ({k: grid[k][h] for k in sorted(grid)} for grid in grids)
        rows = tuple(map(partial(optimum, lr), sizes, bests[h], scores))

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
        limit = at(last, rows[-1].lr)[-1]
        horizons.append(horizon(length, rows, carried, own, advised, there, limit))
    return RateTransfer(rule, optimizer, tuple(horizons))


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
    side = "at least" if best > 0 else "at most"
    raise ValueError(
        f"got no best rate for {dict(size)}: it is {side} {lr * 2.0**best:.3g}, where the search "
        f"from lr={lr:g} ended; give an lr beyond that"
    )


def _advised(rows: Sequence[SizeOptimum]) -> float | None:
    """The rate at the last size that all others advise; None where they are too few, or unknown."""
    _, values = axis_of([row.size for row in rows])
    places, octaves = [], []
    for row, value in zip(rows[:-1], values[:-1], strict=True):
        for seed in range(len(row.scores[row.lr])):
            places.append([math.log2(value)])
            octaves.append(row.vertex([seed]))
    known = len(rows) > 2 and all(map(math.isfinite, octaves))
    rate = fit(places, octaves).at([math.log2(values[-1])]) if known else None
    return None if rate is None else 2.0**rate.value
