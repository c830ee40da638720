"""The ground truth for one matrix: real steps in each geometry, all else held fixed.

Directions come from some batches, the step size is tuned on another, the decrease is read off a
third. The roles go round, and the spread over the rounds gives the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from steepest.curvature.loss_function import Loss, LossFunction
from steepest.diagnosis.evidence import GEOMETRIES, Evidence, GeometryName, direction
from steepest.diagnosis.intervals import Interval, jackknife

STEPS = 8
OCTAVES = 12  # as far as step sizes are looked for, on either side of the first guess


@dataclass(frozen=True)
class RaceResult:
    """What real steps of one geometry gave for one matrix.

    Attributes:
        geometry: of the steps.
        steps: how many, with sizes that fall linearly.
        step_size: the first one, tuned; the median over the rounds.
        decrease: of the loss on the batch that was kept for it, the mean over the rounds.
        decreases: of each round.
        log_ratio: the natural logarithm of the decrease over the Euclidean one, with its 95%
            interval; None where one of them did not decrease.
    """

    geometry: GeometryName
    steps: int
    step_size: float
    decrease: float
    decreases: tuple[float, ...]
    log_ratio: Interval | None


def race(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    matrices: Sequence[Evidence],
    tick: Callable[[], None] = lambda: None,
    **how: Any,
) -> dict[str, tuple[RaceResult, ...]]:
    """Return the results of each geometry, by matrix; the model itself does not move.

    Args:
        model, loss, how: as for `diagnose`.
        batches: at least 3: one to tune, one to score, the rest for directions, in turns.
        matrices: which; where they tell a best step, the search for a step size starts there.
        tick: called after each gradient.
    """
    names = list(dict.fromkeys(each.row.name for each in matrices))
    function = LossFunction(model, loss, names, **how)
    results = {}
    for place in matrices:
        W = function.parameters[place.row.name]
        track = _Track(function, W, place, tick)
        falls: dict[GeometryName, list[float]] = {}
        sizes: dict[GeometryName, list[float]] = {}
        for geometry in GEOMETRIES:
            falls[geometry], sizes[geometry] = [], []
            guess = track.guess(geometry)
            for turn in range(len(batches)):
                score, tune, *rest = (*batches[turn:], *batches[:turn])
                guess, fall = track.tuned(geometry, guess, rest, tune, score, wide=turn == 0)
                sizes[geometry].append(guess)
                falls[geometry].append(fall)
        results[place.label] = tuple(
            RaceResult(
                geometry,
                STEPS,
                sorted(sizes[geometry])[len(batches) // 2],
                fmean(falls[geometry]),
                tuple(falls[geometry]),
                _log_ratio(falls[geometry], falls["euclidean"]),
            )
            for geometry in GEOMETRIES
        )
    return results


def _log_ratio(mine: list[float], euclidean: list[float]) -> Interval | None:
    def estimate(kept: Sequence[int]) -> float:
        a, b = (fmean(each[i] for i in kept) for each in (mine, euclidean))
        return math.log(a / b) if min(a, b) > 0 else math.nan

    return jackknife(estimate, len(mine), 0.95)


class _Track:
    """Runs of one matrix from the same place."""

    def __init__(
        self, function: LossFunction, W: Tensor, place: Evidence, tick: Callable[[], None]
    ):
        self._function, self._W, self._place, self._tick = function, W, place, tick
        self._start = W.detach().clone()
        self._known: dict[int, float] = {}  # losses at the start, by batch

    def tuned(
        self,
        geometry: GeometryName,
        guess: float,
        rest: Sequence[Any],
        tune: Any,
        score: Any,
        wide: bool,
    ) -> tuple[float, float]:
        """The step size with the largest decrease on `tune`, and its decrease on `score`.

        By factors of 2 from the guess, if that is to be looked for far and wide first of 4.
        """
        falls: dict[int, tuple[float, float]] = {}

        def fall(octave: int) -> float:
            if octave not in falls:
                falls[octave] = self.falls(geometry, guess * 2.0**octave, rest, (tune, score))
            return falls[octave][0]

        best = 0
        for stride in (2, 1) if wide else (1,):
            while abs(best) < OCTAVES:
                better = max((best - stride, best, best + stride), key=fall)
                if better == best:
                    break
                best = better
        return guess * 2.0**best, falls[best][1]

    def falls(
        self, geometry: GeometryName, size: float, rest: Sequence[Any], judges: tuple[Any, Any]
    ) -> tuple[float, float]:
        """By how much the loss falls on each judge; minus infinity if it blows up."""
        try:
            self._run(geometry, size, rest)
            after = [self._loss(judge) for judge in judges]
        except FloatingPointError:
            return -math.inf, -math.inf
        finally:
            with torch.no_grad():
                self._W.copy_(self._start)
        before = [self._before(judge) for judge in judges]
        return before[0] - after[0], before[1] - after[1]

    def _before(self, judge: Any) -> float:
        if id(judge) not in self._known:
            self._known[id(judge)] = self._loss(judge)
        return self._known[id(judge)]

    def _loss(self, judge: Any) -> float:
        return self._function(judge).item()

    def _run(self, geometry: GeometryName, size: float, rest: Sequence[Any]) -> None:
        squares: Tensor | None = None
        for k in range(STEPS):
            value = self._function(rest[k % len(rest)])
            [G] = torch.autograd.grad(value, [self._W])
            self._tick()
            part = self._part(G)
            squares = part.square() if squares is None else squares + part.square()
            D = direction(geometry, part, squares / (k + 1))
            with torch.no_grad():
                self._part(self._W).sub_(D, alpha=size * (1 - k / STEPS))

    def _part(self, tensor: Tensor) -> Tensor:
        view = self._place.row.view
        assert view is not None
        return view.matrices(tensor if tensor.is_contiguous() else tensor.contiguous())[
            self._place.index
        ]

    def guess(self, geometry: GeometryName) -> float:
        """The best single step of the quadratic model, or a hundredth of the matrix."""
        curvature = self._place.curvatures.get(geometry)
        gains = self._place.gains[geometry]
        B = len(gains)
        gain = float((gains.sum() - gains.diag().sum()) / (B * (B - 1)))
        if curvature is not None and gain > 0 and abs(float(curvature.mean())) > 0:
            return gain / abs(float(curvature.mean()))
        scale = float(self._part(self._start).norm()) or 1.0
        m, n = self._place.shape
        lengths = {"euclidean": 1.0, "spectral": math.sqrt(min(m, n))}
        return 0.01 * scale / lengths.get(geometry, math.sqrt(m * n))
