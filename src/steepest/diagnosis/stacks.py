"""Whether matrices of one kind in neighbouring layers want to be orthogonalized as one (TEON)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steepest.curvature.loss_function import Loss, unwrapped
from steepest.curvature.operators import GaussNewton, Hessian, split
from steepest.diagnosis.evidence import (
    ASCENTS,
    Evidence,
    direction,
    matrices_of,
    smoothness_operator,
)
from steepest.diagnosis.inputs import all_roles
from steepest.diagnosis.intervals import Interval, jackknife
from steepest.geometry import StackedSpectral
from steepest.optim.teon import find_stacks

StackVerdict = Literal["stacked", "spectral", "cannot tell"]


@dataclass(frozen=True)
class StackDiagnosis:
    """Matrices of one kind in neighbouring layers: one polar factor, or one for each?

    Attributes:
        matrices: which, in the order of their layers.
        log_ratio: the natural logarithm of the bound gain² / (2 smoothness) of the stacked step
            over that of separate spectral steps, with its 95% interval. Both are of all these
            matrices moving together; smoothness is in the norm that goes with the step, the
            spectral norm of [D₁ | ... | D_K] or the largest one of the D_k.
        verdict: which of the two is larger.
    """

    matrices: tuple[str, ...]
    log_ratio: Interval | None
    verdict: StackVerdict


def diagnose_stacks(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    found: Sequence[Evidence],
    size: int,
    tick: Callable[[], None] = lambda: None,
    **how: Any,
) -> tuple[StackDiagnosis, ...]:
    """Return an answer for each stack that TEON would make of `size` layers.

    Args:
        model, loss, batches, how: as for `diagnose`.
        found: the evidence on single matrices, with their gradients.
        size: number of layers in a stack.
        tick: called for each stack and batch.
    """
    numbers = find_stacks(all_roles(unwrapped(model)), size)
    members: dict[int, list[Evidence]] = defaultdict(list)
    for place in found:
        number = numbers.get(place.row.name, [None] * (place.index + 1))[place.index]
        if number is not None:
            members[number].append(place)
    return tuple(
        _answer(model, loss, batches, places, tick, how)
        for places in members.values()
        if len(places) == size
    )


def _answer(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    places: list[Evidence],
    tick: Callable[[], None],
    how: dict[str, Any],
) -> StackDiagnosis:
    G = torch.stack([place.gradients for place in places], dim=1)  # (B, K, m, n)
    names = list(dict.fromkeys(place.row.name for place in places))
    operator = smoothness_operator(model, loss, batches[0], names, how)
    steps = {"stacked": _together, "spectral": _separate}
    gains = {name: step(G).flatten(1) @ G.flatten(1).mT for name, step in steps.items()}
    smoothness: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(len(batches)):
        B = operator(model, loss, batches[(i + 1) % len(batches)], names, **how)
        for name, step in steps.items():
            D, best = step(G[i]), 0.0
            for _ in range(ASCENTS + 1):
                BD = _product(B, places, D)
                best = max(best, abs(float(torch.sum(D * BD))))
                D = step(BD)
            smoothness[name].append(best)
        tick()

    def log_bound(name: str, kept: Sequence[int]) -> float:
        gain = fmean(float(gains[name][i, j]) for i in kept for j in kept if i != j)
        largest = fmean(smoothness[name][i] for i in kept)
        return 2 * math.log(gain) - math.log(largest) if min(gain, largest) > 0 else math.nan

    def log_ratio(kept: Sequence[int]) -> float:
        return log_bound("stacked", kept) - log_bound("spectral", kept)

    interval = jackknife(log_ratio, len(batches))
    verdict: StackVerdict = "cannot tell"
    if interval is not None and not interval.low <= 0 <= interval.high:
        verdict = "stacked" if interval.value > 0 else "spectral"
    return StackDiagnosis(tuple(place.label for place in places), interval, verdict)


def _separate(G: Tensor) -> Tensor:
    return direction("spectral", G, G)


def _together(G: Tensor) -> Tensor:
    """As `StackedSpectral`, with polar factors as exact as the others here."""
    Z = StackedSpectral(1).matrix(G)
    return direction("spectral", Z, Z).unflatten(-1, (G.shape[-3], G.shape[-1])).movedim(-2, -3)


def _product(B: Hessian | GaussNewton, places: list[Evidence], D: Tensor) -> Tensor:
    """The product with steps D `(K, m, n)` of all the matrices together."""
    like = list(B.parameters.values())
    v = B.vector()
    for place, pieces in _pieces(B, places, split(v, like)):
        pieces[place.index].copy_(D[places.index(place)])
    image = split(B @ v, like)
    return torch.stack([pieces[place.index] for place, pieces in _pieces(B, places, image)])


def _pieces(
    B: Hessian | GaussNewton, places: list[Evidence], tensors: list[Tensor]
) -> list[tuple[Evidence, list[Tensor]]]:
    by_name = dict(zip(B.parameters, tensors, strict=True))
    return [(place, matrices_of(place.row, by_name[place.row.name])) for place in places]
