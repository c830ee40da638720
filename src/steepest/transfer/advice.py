"""The learning rate for the size to train, from the best rates of the sizes that were tried."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from steepest.results import Column, Result, ResultTable
from steepest.statistics import fit
from steepest.transfer.coordinates import axis_of
from steepest.transfer.runs import written

if TYPE_CHECKING:
    from steepest.transfer.optima import RateTransfer

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Advice(Result):
    """What to train the target with.

    Attributes:
        target: its sizes.
        lr: in the units of the base, as `Parametrized.optimizer` takes it.
        low, high: its 80% interval.
        slopes: octaves by which the best rate moves when a size doubles, with their standard
            errors.
        points: how many best rates, of a size and a seed each, this is from.
    """

    target: dict[str, Any]
    lr: float
    low: float
    high: float
    slopes: dict[str, tuple[float, float]]
    points: int

    @property
    def is_known(self) -> bool:
        """Whether the interval is at most an octave to both sides."""
        return self.high <= 4 * self.low

    def table(self) -> ResultTable:
        """Return the slope over every size, with the rate at the target as the title."""
        columns = (
            Column("size"),
            Column("slope", "octaves a doubling", "+.2f"),
            Column("error", "± s.e.", ".2f"),
        )
        rows = tuple((name, *slope) for name, slope in self.slopes.items())
        title = f"learning rate {self.lr:.3g} for {written(self.target)}"
        return ResultTable(columns, rows, title, str(self))

    def __str__(self) -> str:
        slopes = ", ".join(
            f"{slope:+.2f} ± {error:.2f} octaves a doubling of the {name}"
            for name, (slope, error) in self.slopes.items()
        )
        rate = f"{self.lr:.3g} (80% interval {self.low:.3g} to {self.high:.3g})"
        if not self.is_known:
            rate = (
                f"cannot tell to an octave, as its 80% interval is {self.low:.3g} to "
                f"{self.high:.3g} (take more seeds, or sizes nearer to it)"
            )
        return (
            f"learning rate for {written(self.target)}: {rate}, from {self.points} best rates: "
            f"{slopes}"
        )


def _renamed(old: str, new: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function take an argument by its old name too, with a warning."""

    def decorator(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def renaming(*args: P.args, **kwargs: P.kwargs) -> T:
            if old in kwargs:
                warnings.warn(
                    f"{old}= of {function.__name__} is called {new}= now; the old name goes with "
                    "the next version",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return renaming

    return decorator


@_renamed("found", "transfers")
def advise(transfers: Sequence[RateTransfer], target: Mapping[str, Any]) -> Advice | None:
    """Return the rate at `target` that a straight line through the best rates has there.

    The line is log2 of the best rate after all steps, of each size and seed, against log2 of each
    size that was grown, by least squares; the interval is that of its mean at the target, Student's
    t. It is wide where the target is far beyond what was tried, or where few sizes were.

    Args:
        transfers: one for each size that was grown, all from the same base.
        target: has a value for every size that was grown.

    Returns:
        The advice; None where there are too few points for an interval, or where a seed has its
        lowest loss at an end of the grid.

    Raises:
        ValueError: for a target without a size that was grown.
    """
    axes = [axis_of([row.size for row in transfer.rows]) for transfer in transfers]
    if missing := [name for name, _ in axes if name not in target]:
        raise ValueError(f"got a target without {missing[0]}, expected all of {dict(axes)}")
    points: dict[tuple[Any, ...], float] = {}  # the base is in every one of them
    for k, transfer in enumerate(transfers):
        for row, value in zip(transfer.rows, axes[k][1], strict=True):
            grown = [0.0] * len(axes)
            grown[k] = math.log2(value / axes[k][1][0])
            for seed in range(len(row.scores[row.lr])):
                points[*grown, seed] = row.vertex([seed])
    at = [math.log2(target[name] / values[0]) for name, values in axes]
    if not all(map(math.isfinite, points.values())):
        return None
    line = fit([key[:-1] for key in points], list(points.values()))
    rate = line.at(at)
    if rate is None:
        return None
    slopes = {name: slope for (name, _), slope in zip(axes, line.slopes, strict=True)}
    return Advice({**target}, 2.0**rate.value, 2.0**rate.low, 2.0**rate.high, slopes, len(points))
