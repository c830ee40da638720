"""What steps of a geometry would bring: a few of them on the Gauss-Newton model, and one for real.

A single product along the gradient's direction flatters spectral steps: what bounds the next steps
is the curvature of other directions. So the model is descended for `STEPS` steps, and since it
holds only so far, the loss itself is followed along the first direction. Directions come from some
batches in turn, gains and curvature from another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steepest.curvature.loss_function import Loss, LossFunction
from steepest.curvature.operators import GaussNewton, Hessian
from steepest.diagnosis.evidence import Evidence, matrices_of

STEPS = 3
OCTAVES = range(-6, 5, 2)
"""Sizes of the real step, in powers of 2 around the best one of the model."""
ModelOf = Literal["gauss-newton", "hessian"]
Step = Callable[[Tensor, int], Tensor]
"""From a gradient, and the number of the batch that judges, to a direction."""


@dataclass(frozen=True)
class Descent:
    """Of one geometry, from B turns of the batches.

    Attributes:
        gains: ⟨G, D⟩ of each greedy step on the model, `(B, STEPS)`; G of the batch that judges.
        prices: ⟨D, B D⟩ likewise.
        falls: by how much the loss falls in one real step, `(B, sizes)`; None without a gain.
        size: of the step in the middle of them, 2**0.
    """

    gains: Tensor
    prices: Tensor
    falls: Tensor | None
    size: float

    def log_decrease(self, turns: Sequence[int]) -> float:
        """The logarithm of the decrease: the geometric mean of what model and real step say."""
        kept = list(turns)
        gains, prices = self.gains[kept].mean(0), self.prices[kept].mean(0)
        steps = (gains.clamp(min=0).square() / (2 * prices))[prices > 0]
        model = float(steps.sum())
        real = 0.0 if self.falls is None else float(self.falls[kept].mean(0).amax())
        return 0.5 * math.log(model) + 0.5 * math.log(real) if min(model, real) > 0 else math.nan


@dataclass(frozen=True)
class Layer:
    """Matrices of one shape that move together: one, or a stack of them.

    Attributes:
        places: the evidence on each.
        steps: for each name of a geometry its direction, on gradients `(K, m, n)`.
    """

    places: Sequence[Evidence]
    steps: Mapping[str, Step]

    def gradient(self, batch: int) -> Tensor:
        """Return the gradients on a batch, `(K, m, n)`."""
        return torch.stack([place.gradients[batch] for place in self.places])

    def spread(self, D: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return steps `(K, m, n)` as steps of whole parameters."""
        whole = {
            place.row.name: torch.zeros_like(like[place.row.name], requires_grad=False)
            for place in self.places
        }
        for place, mine in zip(self.places, D, strict=True):
            matrices_of(place.row, whole[place.row.name])[place.index].copy_(mine)
        return whole

    def gather(self, whole: Mapping[str, Tensor]) -> Tensor:
        """Return `(K, m, n)` out of whole parameters."""
        return torch.stack([matrices_of(p.row, whole[p.row.name])[p.index] for p in self.places])


def descents(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    layers: Sequence[Layer],
    tick: Callable[[], None] = lambda: None,
    **how: Any,
) -> tuple[list[dict[str, Descent]], ModelOf]:
    """Return for each layer the descent in each of its geometries, and whose model it is.

    The Hessian stands in for Gauss-Newton where the loss is no function of what one call of the
    model returns; of its curvatures the magnitude is taken.

    Args:
        model, loss, how: as for `diagnose`.
        batches: more than `STEPS`, those of the layers' gradients.
        layers: which.
        tick: called for each layer, geometry and batch.
    """
    names = list(dict.fromkeys(place.row.name for layer in layers for place in layer.places))
    function = LossFunction(model, loss, names, **how)
    operator = _operator(function, batches[0])
    found: list[dict[str, list[tuple[list[float], list[float]]]]] = [
        {name: [] for name in layer.steps} for layer in layers
    ]
    window: dict[int, Hessian | GaussNewton] = {}
    for turn in range(len(batches)):
        # Only the batches of this turn keep their graphs.
        needed = [(turn + k) % len(batches) for k in (-1, *range(1, STEPS))]
        window = {
            b: window.get(b) or operator(model, loss, batches[b], names, **how) for b in needed
        }
        for layer, mine in zip(layers, found, strict=True):
            for name, step in layer.steps.items():
                mine[name].append(_greedy(layer, step, window, turn, len(batches)))
                tick()
    window.clear()
    result: list[dict[str, Descent]] = []
    for layer, mine in zip(layers, found, strict=True):
        result.append({})
        for name, step in layer.steps.items():
            gains, prices = (torch.tensor(each) for each in zip(*mine[name], strict=True))
            result[-1][name] = _followed(layer, step, gains, prices, function, batches)
    return result, "hessian" if operator is Hessian else "gauss-newton"


def _operator(function: LossFunction, batch: Any) -> type[Hessian] | type[GaussNewton]:
    try:
        function.with_outputs(batch)
    except ValueError:
        return Hessian
    return GaussNewton


def _greedy(
    layer: Layer,
    step: Step,
    operators: Mapping[int, Hessian | GaussNewton],
    turn: int,
    count: int,
) -> tuple[list[float], list[float]]:
    """Steps of the best size on the model of the batch before: their gains and prices."""

    def product(batch: int, D: Tensor) -> Tensor:
        B = operators[batch]
        return layer.gather(B.block(layer.spread(D, B.parameters)))

    judge = (turn - 1) % count
    moved = torch.zeros_like(layer.gradient(judge))
    ahead = layer.gradient(judge)  # where the steps have led
    gains, prices = [], []
    for k in range(STEPS):
        b = (turn + k) % count
        D = step(layer.gradient(b) - (product(b, moved) if k else 0), judge)
        image = product(judge, D)
        gains.append(float(torch.sum(ahead * D)))
        prices.append(abs(float(torch.sum(D * image))))
        size = max(gains[-1], 0.0) / prices[-1] if prices[-1] else 0.0
        moved, ahead = moved + size * D, ahead - size * image
    return gains, prices


def _followed(
    layer: Layer,
    step: Step,
    gains: Tensor,
    prices: Tensor,
    function: LossFunction,
    batches: Sequence[Any],
) -> Descent:
    """The descent with the losses along its first direction."""
    gain, price = float(gains[:, 0].mean()), float(prices[:, 0].mean())
    if gain <= 0 or price <= 0:
        return Descent(gains, prices, None, 0.0)
    weights = {place.row.name: function.parameters[place.row.name] for place in layer.places}
    start = {name: W.detach().clone() for name, W in weights.items()}
    falls: list[list[float]] = []
    for turn in range(len(batches)):
        judge = (turn - 1) % len(batches)
        D = layer.spread(step(layer.gradient(turn), judge), weights)
        before = function(batches[judge]).item()
        falls.append([])
        for octave in OCTAVES:
            try:
                with torch.no_grad():
                    for name, W in weights.items():
                        W.sub_(D[name], alpha=gain / price * 2.0**octave)
                falls[-1].append(before - function(batches[judge]).item())
            except FloatingPointError:
                falls[-1].append(-math.inf)
            finally:
                with torch.no_grad():
                    for name, W in weights.items():
                        W.copy_(start[name])
    return Descent(gains, prices, torch.tensor(falls), gain / price)


def log_ratio(mine: Descent, other: Descent) -> Callable[[Sequence[int]], float]:
    """Return the log ratio of two decreases as a function of the turns that are kept."""
    return lambda turns: mine.log_decrease(turns) - other.log_decrease(turns)
