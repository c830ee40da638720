"""Whether matrices of one kind in neighbouring layers want to be orthogonalized as one (TEON)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from steepest.diagnosis.descent import Descent, Layer, log_ratio
from steepest.diagnosis.evidence import Evidence, direction
from steepest.diagnosis.intervals import worth_it
from steepest.geometry import StackedSpectral
from steepest.model.parameter_roles import RoleTable
from steepest.model.stacks import find_stacks
from steepest.statistics import Interval, jackknife

StackVerdict = Literal["stacked", "spectral", "cannot tell"]


@dataclass(frozen=True)
class StackDiagnosis:
    """Matrices of one kind in neighbouring layers: one polar factor, or one for each?

    Attributes:
        matrices: which, in the order of their layers.
        log_ratio: the natural logarithm of the decrease by stacked steps over that by separate
            spectral ones, all these matrices moving together, with its 80% interval.
        verdict: "stacked" where that is worth it for sure, "spectral" where it is not.
    """

    matrices: tuple[str, ...]
    log_ratio: Interval | None
    verdict: StackVerdict


def stack_layers(table: RoleTable, evidence: Sequence[Evidence], size: int) -> list[Layer]:
    """Return the stacks that TEON would make of `size` layers, with both ways to step."""
    numbers = find_stacks(table, size)
    members: dict[int, list[Evidence]] = defaultdict(list)
    for place in evidence:
        number = numbers.get(place.row.name, [None] * (place.index + 1))[place.index]
        if number is not None:
            members[number].append(place)
    steps = {"stacked": _together, "spectral": _separate}
    layers = []
    for places in members.values():
        if len(places) == size:
            guess = min(place.best_step("spectral") for place in places)
            layers.append(Layer(places, steps, dict.fromkeys(steps, guess)))
    return layers


def judge_stack(layer: Layer, descents: dict[str, Descent]) -> StackDiagnosis:
    """Return the answer for one stack."""
    ratio = log_ratio(descents["stacked"], descents["spectral"])
    interval = jackknife(ratio, len(descents["stacked"].falls))
    worth = None if interval is None else worth_it(interval)
    verdicts: dict[bool | None, StackVerdict] = {True: "stacked", False: "spectral"}
    verdict = verdicts.get(worth, "cannot tell")
    return StackDiagnosis(tuple(place.label for place in layer.places), interval, verdict)


def _separate(G: Tensor, judge: int) -> Tensor:
    return direction("spectral", G, G)


def _together(G: Tensor, judge: int) -> Tensor:
    """As `StackedSpectral`, with polar factors as exact as the others here."""
    Z = StackedSpectral(1).matrix(G)
    return direction("spectral", Z, Z).unflatten(-1, (G.shape[-3], G.shape[-1])).movedim(-2, -3)
