"""The ground truth for one matrix: real steps in each geometry, all else held fixed.

Directions come from some batches, the step size is tuned on another, the decrease is read off a
third. The roles go round, and the spread over the rounds gives the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from steepest.curvature.loss_function import LossFunction
from steepest.diagnosis.descent import Walk, best_octave
from steepest.diagnosis.evidence import GEOMETRIES, Evidence, GeometryName, direction
from steepest.statistics import Interval, jackknife

RACE_STEPS = 8


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
    function: LossFunction,
    batches: Sequence[Any],
    matrices: Sequence[Evidence],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, tuple[RaceResult, ...]]:
    """Return the results of each geometry, by matrix; the model itself does not move.

    Args:
        function: the loss of a model.
        batches: at least 3: one to tune, one to score, the rest for directions, in turns.
        matrices: which; where they tell a best step, the search for a step size starts there.
        tick: called after each gradient.
    """
    function = function.of(list(dict.fromkeys(place.row.name for place in matrices)))
    results = {}
    for place in matrices:
        track = _Track(function, place, tick)
        falls: dict[GeometryName, list[float]] = {}
        sizes: dict[GeometryName, list[float]] = {}
        for geometry in GEOMETRIES:
            falls[geometry], sizes[geometry] = [], []
            guess = place.best_step(geometry)
            for turn in range(len(batches)):
                score, tune, *rest = (*batches[turn:], *batches[:turn])
                guess, fall = track.tuned(geometry, guess, rest, tune, score, wide=turn == 0)
                sizes[geometry].append(guess)
                falls[geometry].append(fall)
        results[place.label] = tuple(
            RaceResult(
                geometry,
                RACE_STEPS,
                sorted(sizes[geometry])[len(batches) // 2],
                fmean(falls[geometry]),
                tuple(falls[geometry]),
                _log_ratio(falls[geometry], falls["euclidean"]),
            )
            for geometry in GEOMETRIES
        )
    return results


def _log_ratio(decreases: list[float], euclidean: list[float]) -> Interval | None:
    def estimate(kept: Sequence[int]) -> float:
        a, b = (fmean(values[i] for i in kept) for values in (decreases, euclidean))
        return math.log(a / b) if min(a, b) > 0 else math.nan

    return jackknife(estimate, len(decreases), 0.95)


class _Track:
    """Walks of one matrix."""

    def __init__(self, function: LossFunction, place: Evidence, tick: Callable[[], None]):
        self._walk = Walk(function, [place], tick)

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

        @cache
        def falls(octave: int) -> list[float]:
            size = guess * 2.0**octave
            return self._walk.falls(
                size, RACE_STEPS, self._direction(geometry, rest), [tune, score]
            )

        best = best_octave(lambda octave: falls(octave)[0], 0, (2, 1) if wide else (1,))
        return guess * 2.0**best, falls(best)[1]

    def _direction(self, geometry: GeometryName, rest: Sequence[Any]) -> Callable[[int], Tensor]:
        squares = torch.zeros(())

        def step(k: int) -> Tensor:
            nonlocal squares
            G = self._walk.gradient(rest[k % len(rest)])
            squares = G.square() + (squares if k else 0)
            return direction(geometry, G, squares / (k + 1))

        return step
