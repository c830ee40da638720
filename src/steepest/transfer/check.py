"""Does a learning rate carry over to larger sizes, why, and which one to use?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Unpack

from rich.console import RenderableType
from rich.text import Text
from torch.optim import Optimizer

from steepest.curvature.loss_function import Loss
from steepest.optim.family import record_of
from steepest.parametrize.dimensions import Build, growth
from steepest.parametrize.folding import folds
from steepest.parametrize.rules import ALPHA, Rule
from steepest.results import Column, Result, ResultTable
from steepest.statistics import jackknife
from steepest.transfer.advice import Advice, advise
from steepest.transfer.consistency import SuperConsistency, super_consistency
from steepest.transfer.coordinates import (
    BlownUp,
    CoordinateCheck,
    axis_of,
    coordinate_check,
)
from steepest.transfer.optima import RateTransfer
from steepest.transfer.outcomes import Outcome, together, within
from steepest.transfer.rates import rate_transfer
from steepest.transfer.runs import ParametrizeOptions

HORIZON = 0.5
"""Octaves between half of the steps and all, from which the number of steps is worth a word."""


@dataclass(frozen=True)
class Axis:
    """What was found over one size that grows.

    Attributes:
        name: of the size.
        rates: the best rate of each size, at two horizons: what decides.
        coordinates: how every layer's change depends on the size, at the best rate of the base.
        consistency: sharpness along training at that rate.
        blown: a sentence for each of these two that is None, as a run blew up.
        deepens: whether the number of layers grows.
    """

    name: str
    rates: RateTransfer
    coordinates: CoordinateCheck | None
    consistency: SuperConsistency | None
    blown: tuple[str, ...]
    deepens: bool


@dataclass(frozen=True, repr=False)
class TransferCheck(Result):
    """Whether a learning rate transfers, the evidence, and the advice; prints as text.

    Attributes:
        axes: an `Axis` for each size that was grown.
        advice: the rate for the target; None where there are too few points for an interval.
    """

    width = 140
    axes: tuple[Axis, ...]
    advice: Advice | None

    @property
    def passed(self) -> Outcome:
        """Whether the best rate stays over every size that was grown; None if it is not known."""
        return together(axis.rates.passed for axis in self.axes)

    @property
    def verdict(self) -> str:
        """`transfers over width`, `transfers over width only`, `does not transfer`, ...

        And `cannot tell over depth`, where intervals do not decide.
        """
        kept, moved, unknown = (
            " and ".join(axis.name for axis in self.axes if axis.rates.passed is outcome)
            for outcome in (True, False, None)
        )
        said = [f"transfers over {kept}" + (" only" if moved and not unknown else "")] * bool(kept)
        if moved and not kept:
            said.append("does not transfer" + (f" over {moved}" if unknown else ""))
        elif moved and unknown:
            said.append(f"not over {moved}")
        return ", ".join([*said, *([f"cannot tell over {unknown}"] if unknown else [])])

    @property
    def reasons(self) -> tuple[str, ...]:
        """What the verdict rests on, and what may be behind it."""
        return tuple(
            f"{axis.name}: {said}"
            for axis in self.axes
            for said in (
                *(horizon.verdict for horizon in axis.rates.horizons),
                *([f"coordinate check {axis.coordinates.verdict}"] if axis.coordinates else []),
                *([axis.consistency.verdict] if axis.consistency else []),
                *axis.blown,
            )
        )

    @property
    def retune(self) -> tuple[str, ...]:
        """What to tune again, or to do otherwise, at the target."""
        return (
            *_steps(self.axes),
            *(said for axis in self.axes for said in _otherwise(axis)),
            _REST,
        )

    def table(self) -> ResultTable:
        """Return the verdict on every size that was grown; `shown` has their own tables too."""
        columns = tuple(map(Column, ("over", "rates", "coordinates", "sharpness")))
        said = {True: "passed", False: "failed", None: "cannot tell"}
        rows = tuple(
            (
                axis.name,
                *(
                    None if part is None else said[part.passed]
                    for part in (axis.rates, axis.coordinates, axis.consistency)
                ),
            )
            for axis in self.axes
        )
        return ResultTable(columns, rows, self.verdict, str(self.advice or _NO_ADVICE))

    def shown(self) -> Sequence[RenderableType]:
        """Return the tables of every size, the verdict, its reasons, the advice, what to tune."""
        tables = [
            part.table()
            for axis in self.axes
            for part in (axis.rates, axis.coordinates, axis.consistency)
            if part
        ]
        lines = [*(f"  {reason}" for reason in self.reasons), str(self.advice or _NO_ADVICE)]
        lines += ["tune again:", *(f"  {setting}" for setting in self.retune)]
        return (*tables, Text(self.verdict, style="bold"), Text("\n".join(lines)))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "retune": list(self.retune),
            "advice": asdict(self.advice) | {"said": str(self.advice)} if self.advice else None,
            "axes": [
                {
                    "name": axis.name,
                    "rates": axis.rates.as_dict(),
                    "coordinates": axis.coordinates.as_dict() if axis.coordinates else None,
                    "consistency": axis.consistency.as_dict() if axis.consistency else None,
                    "blown": list(axis.blown),
                }
                for axis in self.axes
            ],
        }


def check_transfer(
    build: Build,
    sizes: Sequence[Sequence[Mapping[str, Any]]],
    batches: Callable[[int], Any],
    loss: Loss,
    *,
    lr: float,
    base: Mapping[str, Any] | None = None,
    target: Mapping[str, Any] | None = None,
    rule: Rule = "mup",
    optimizer: str | type[Optimizer] = "adamw",
    steps: int = 120,
    seeds: int = 2,
    grid_only: bool = False,
    path: str | Path | None = None,
    on_run: Callable[[str, str, float], None] = lambda phase, said, done: None,
    **options: Unpack[ParametrizeOptions],
) -> TransferCheck:
    """Find out whether a learning rate transfers over width, depth or any size, and which to use.

    For each size that grows: `rate_transfer` decides; `coordinate_check` names the layer at fault;
    `super_consistency` says whether the curvature goes the same way at all sizes, which is why
    rates transfer where they do. All three at the same rates, steps and seeds.

    Args:
        build, batches, loss, lr, rule, optimizer, seeds, grid_only, path, options: as for
            `rate_transfer`.
        sizes: for each size that grows its sizes, such as `[[dict(width=64), dict(width=128)],
            [dict(depth=2), dict(depth=8)]]`. The first of all of them together are the base.
        base: what else `build` needs, and does not grow.
        target: what is to be trained in the end; by default the largest of everything tried.
        steps: of each run.
        on_run: called after every run with the phase, a line about the run, and the part of the
            phase that is done.

    Raises:
        ValueError: for what the three raise, and a target with a size that is not grown.
    """
    optimizer = record_of(optimizer).name
    base = dict(base or {})
    for axis_sizes in sizes:
        base |= axis_sizes[0]
    largest = dict(base)
    for axis_sizes in sizes:
        largest |= axis_sizes[-1]
    grow = {key for axis_sizes in sizes for size in axis_sizes[1:] for key in size}
    if unknown := {k for k, v in (target or {}).items() if k not in grow and v != base.get(k)}:
        raise ValueError(
            f"got {sorted(unknown)} in target, which none of the sizes grows, so nothing would be "
            f"known of it; expected some of {sorted(grow)}"
        )
    shared: dict[str, Any] = {
        "rule": rule, "optimizer": optimizer, "seeds": seeds, "base": base, "path": path, **options
    }  # fmt: skip
    names = [axis_of(axis_sizes)[0] for axis_sizes in sizes]
    deepens = []
    for axis_sizes in sizes:  # before hours are spent: these raise for what the rule cannot place
        change = growth(build, base, {**base, **axis_sizes[-1]}, options.get("roles"))
        folds(change, rule, options.get("branches"), options.get("head_size"))
        deepens.append(bool(change.deepening))
    axes = []
    for name, axis_sizes, deeper in zip(names, sizes, deepens, strict=True):
        grown = [{**base, **size} for size in axis_sizes]

        def said(phase: str, name: str = name) -> Callable[[str, float], None]:
            return lambda said, done: on_run(f"{phase} over {name}", said, done)

        rates = rate_transfer(
            build, axis_sizes, batches, loss, lr=lr, steps=steps, grid_only=grid_only,
            on_run=said("rates"), **shared,
        )  # fmt: skip
        best, blown = rates.rows[0].lr, []
        coordinates = consistency = None
        try:
            coordinates = coordinate_check(
                build, grown, batches(0), loss, lr=best, on_run=said("coordinates"), **shared
            )
        except BlownUp as error:
            blown.append(f"coordinates: {error}")
        try:
            consistency = super_consistency(
                build, axis_sizes, batches, loss, lr=best, steps=steps,
                on_run=said("sharpness"), **shared,
            )  # fmt: skip
        except BlownUp as error:
            blown.append(f"sharpness: {error}")
        axes.append(Axis(name, rates, coordinates, consistency, tuple(blown), deeper))
    advice = advise([axis.rates for axis in axes], {**largest, **(target or {})})
    return TransferCheck(tuple(axes), advice)


_NO_ADVICE = (
    "no learning rate is advised: sizes and seeds are too few for an interval, or a seed has its "
    "best rate at an end of the grid"
)
_REST = (
    "batch size, weight decay and data: no rule here says how the best rate follows them, so keep "
    "them as in the small runs, or tune them at the target"
)


def _steps(axes: Sequence[Axis]) -> list[str]:
    """Whether the best rate depends on the number of steps."""
    half, full = ([row for axis in axes for row in axis.rates.horizons[h].rows] for h in (0, 1))

    def moved(kept: Sequence[int]) -> float:
        return fmean(b.vertex(kept) - a.vertex(kept) for a, b in zip(half, full, strict=True))

    seeds = axes[0].rates.horizons[0].seeds
    change, interval = moved(range(seeds)), jackknife(moved, seeds) if seeds > 1 else None
    stays = within(interval, -HORIZON, HORIZON)
    if stays:
        return []
    steps = [horizon.steps for horizon in axes[0].rates.horizons]
    known = f", 80% interval {interval.low:+.2f} to {interval.high:+.2f}" if interval else ""
    return [
        f"the number of steps: from {steps[0]} to {steps[1]} the best rate moved by {change:+.2f} "
        f"octaves{known}, so "
        + (
            "expect another one for a longer run"
            if stays is False
            else "it cannot be told whether a longer run has another one; take more seeds"
        )
    ]


def _otherwise(axis: Axis) -> list[str]:
    """What to do about an axis over which the rate moves, or may move."""
    if axis.rates.passed:
        return []
    if axis.rates.passed is None:
        unknown = dict.fromkeys(said for horizon in axis.rates.horizons for said in horizon.unknown)
        return [
            f"the learning rate at each {axis.name}, or the check itself, which cannot tell: "
            + "; ".join(unknown)
        ]
    said = [f"the learning rate at each {axis.name}: that of the base is not the best there"]
    if axis.coordinates and axis.coordinates.passed is False:
        worst = axis.coordinates.worst
        kind = "grows" if worst.slope > 0 else "freezes"
        said.append(f"look at {worst.layer}, whose change {kind} with the {axis.name}")
    if axis.deepens and axis.rates.rule not in ALPHA:
        said.append(f'the rule: "{axis.rates.rule}" says nothing of depth, "completep" does')
    return said
