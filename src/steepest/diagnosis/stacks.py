"""Whether matrices of one kind in neighbouring layers want to be orthogonalized as one (TEON)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from steepest.diagnosis.descent import Descent, Layer, log_ratio
from steepest.diagnosis.evidence import Evidence, direction
from steepest.diagnosis.intervals import Interval, jackknife
from steepest.geometry import StackedSpectral
from steepest.optim.teon import find_stacks
from steepest.parameter_roles import RoleTable

StackVerdict = Literal["stacked", "spectral", "cannot tell"]


@dataclass(frozen=True)
class StackDiagnosis:
    """Matrices of one kind in neighbouring layers: one polar factor, or one for each?

    Attributes:
        matrices: which, in the order of their layers.
        log_ratio: the natural logarithm of the decrease by stacked steps over that by separate
            spectral ones, all these matrices moving together, with its 80% interval.
        verdict: which of the two is larger, where the interval leaves out 0.
    """

    matrices: tuple[str, ...]
    log_ratio: Interval | None
    verdict: StackVerdict


def stack_layers(table: RoleTable, found: Sequence[Evidence], size: int) -> list[Layer]:
    """Return the stacks that TEON would make of `size` layers, with both ways to step."""
    numbers = find_stacks(table, size)
    members: dict[int, list[Evidence]] = defaultdict(list)
    for place in found:
        number = numbers.get(place.row.name, [None] * (place.index + 1))[place.index]
        if number is not None:
            members[number].append(place)
    steps = {"stacked": _together, "spectral": _separate}
    return [Layer(places, steps) for places in members.values() if len(places) == size]


def judge_stack(layer: Layer, descents: dict[str, Descent]) -> StackDiagnosis:
    """Return the answer for one stack."""
    ratio = log_ratio(descents["stacked"], descents["spectral"])
    interval = jackknife(ratio, len(descents["stacked"].gains))
    verdict: StackVerdict = "cannot tell"
    if interval is not None and not interval.low <= 0 <= interval.high:
        verdict = "stacked" if interval.value > 0 else "spectral"
    return StackDiagnosis(tuple(place.label for place in layer.places), interval, verdict)


def _separate(G: Tensor, judge: int) -> Tensor:
    return direction("spectral", G, G)


def _together(G: Tensor, judge: int) -> Tensor:
    """As `StackedSpectral`, with polar factors as exact as the others here."""
    Z = StackedSpectral(1).matrix(G)
    return direction("spectral", Z, Z).unflatten(-1, (G.shape[-3], G.shape[-1])).movedim(-2, -3)
