"""What a few real steps of a geometry bring, the weights put back after each descent.

No model of the loss at the start will do: what bounds later steps is the curvature of other
directions than the first, and a few steps of one matrix bend the loss beyond its second order. So
the loss itself is descended for `DESCENT_STEPS` steps of the best size. Directions come from some
batches in turn, the decrease is read off another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from steepest.curvature.loss_function import LossFunction
from steepest.diagnosis.evidence import Evidence, matrices_of

DESCENT_STEPS = 4
FARTHEST = 12
"""How far the best size of a step is looked for from a guess, in powers of 2."""
Step = Callable[[Tensor, int], Tensor]
"""From a gradient, and the number of the batch that judges, to a direction."""


@dataclass(frozen=True)
class Descent:
    """Of one geometry, from B turns of the batches.

    Attributes:
        sizes: of the first step, those that were tried, `(S,)`; the next ones fall linearly.
        falls: by how much the loss falls in `DESCENT_STEPS` steps, `(B, S)`; minus infinity if it
            blows up.
    """

    sizes: tuple[float, ...]
    falls: Tensor

    def log_decrease(self, turns: Sequence[int]) -> float:
        """The logarithm of the decrease by steps of the best size; NaN if none decreases."""
        fall = float(self.falls[list(turns)].mean(0).amax())
        return math.log(fall) if fall > 0 else math.nan


@dataclass(frozen=True)
class Layer:
    """Matrices of one shape that move together: one, or a stack of them.

    Attributes:
        places: the evidence on each.
        steps: for each name of a geometry its direction, on gradients `(K, m, n)`.
        guesses: likewise, at which size the search for the best one starts.
    """

    places: Sequence[Evidence]
    steps: Mapping[str, Step]
    guesses: Mapping[str, float]

    def gradient(self, batch: int) -> Tensor:
        """Return the gradients on a batch, `(K, m, n)`."""
        return torch.stack([place.gradients[batch] for place in self.places])


class Walk:
    """Real steps of the matrices of a layer, always from the same weights.

    Args:
        function: of the loss; its parameters move, and are put back.
        places: the matrices.
        tick: called after each gradient.
    """

    def __init__(
        self, function: LossFunction, places: Sequence[Evidence], tick: Callable[[], None]
    ):
        self._function, self._places, self._tick = function, places, tick
        self._weights = {p.row.name: function.parameters[p.row.name] for p in places}
        self._start = {name: W.detach().clone() for name, W in self._weights.items()}
        self._losses: dict[int, float] = {}  # at the start, by batch

    def gradient(self, batch: Any) -> Tensor:
        """Return the gradients where the walk is, `(K, m, n)`."""
        weights = list(self._weights.values())
        gradients = torch.autograd.grad(self._function(batch), weights, materialize_grads=True)
        self._tick()
        return torch.stack(self._matrices(dict(zip(self._weights, gradients, strict=True))))

    def falls(
        self, size: float, steps: int, direction: Callable[[int], Tensor], judges: Sequence[Any]
    ) -> list[float]:
        """Return by how much the loss falls on each of some batches; -inf if it blows up.

        Args:
            size: of the first step; the next ones fall linearly.
            steps: how many.
            direction: from the number of a step to its direction, `(K, m, n)`.
            judges: the batches.
        """
        for judge in judges:
            if id(judge) not in self._losses:
                self._losses[id(judge)] = self._function(judge).item()
        try:
            for k in range(steps):
                D = direction(k)
                with torch.no_grad():
                    for W, update in zip(self._matrices(self._weights), D, strict=True):
                        W.sub_(update, alpha=size * (1 - k / steps))
            return [self._losses[id(judge)] - self._function(judge).item() for judge in judges]
        except FloatingPointError:
            return [-math.inf] * len(judges)
        finally:
            with torch.no_grad():
                for name, W in self._weights.items():
                    W.copy_(self._start[name])

    def _matrices(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        return [matrices_of(p.row, whole[p.row.name])[p.index] for p in self._places]


def descents(
    function: LossFunction,
    batches: Sequence[Any],
    layers: Sequence[Layer],
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Descent]]:
    """Return for each layer the descent in each of its geometries.

    Args:
        function: the loss of a model.
        batches: at least two, those of the layers' gradients.
        layers: which.
        tick: called after each gradient.
    """
    names = list(dict.fromkeys(place.row.name for layer in layers for place in layer.places))
    function = function.of(names)
    results = []
    for layer in layers:
        walk = Walk(function, layer.places, tick)
        results.append({name: _descent(layer, name, walk, batches) for name in layer.steps})
    return results


def _descent(layer: Layer, geometry: str, walk: Walk, batches: Sequence[Any]) -> Descent:
    """A size for all turns: by losses along the first direction, from there by whole descents."""
    step, guess, B = layer.steps[geometry], layer.guesses[geometry], len(batches)
    first = [step(layer.gradient(turn), (turn - 1) % B) for turn in range(B)]

    def fall(turn: int, size: float, steps: int) -> float:
        judge = (turn - 1) % B

        def direction(k: int) -> Tensor:
            b = (turn + k % (B - 1)) % B
            return step(walk.gradient(batches[b]), judge) if k else first[turn]

        return walk.falls(size, steps, direction, [batches[judge]])[0]

    def falls(octave: int, steps: int) -> Tensor:
        size = guess * 2.0**octave
        return torch.tensor([fall(turn, size, steps) for turn in range(B)], dtype=torch.float64)

    one = best_octave(lambda octave: float(falls(octave, 1).mean()), 0, (4, 2, 1))
    tried: dict[int, Tensor] = {}

    def mean(octave: int) -> float:
        tried[octave] = falls(octave, DESCENT_STEPS)
        return float(tried[octave].mean())

    best_octave(mean, one + 1, (1,))  # several steps mostly go farther
    return Descent(
        tuple(guess * 2.0**octave for octave in tried), torch.stack(list(tried.values()), 1)
    )


def best_octave(value: Callable[[int], float], start: int, strides: Sequence[int]) -> int:
    """Return where a function of the octave is largest, uphill from a start by given strides.

    It is called once for each octave, and about `FARTHEST` from the start at most.
    """
    value, best = cache(value), start
    for stride in strides:
        while abs(best - start) < FARTHEST:
            better = max((best - stride, best, best + stride), key=value)
            if better == best:
                break
            best = better
    return best


def log_ratio(descent: Descent, other: Descent) -> Callable[[Sequence[int]], float]:
    """Return the log ratio of two decreases as a function of the turns that are kept."""
    return lambda turns: descent.log_decrease(turns) - other.log_decrease(turns)
