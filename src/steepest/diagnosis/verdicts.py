"""`diagnose`: from batches to evidence, to predictions, to a verdict for each matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from torch import nn

from steepest.curvature.loss_function import Loss, listed, unwrapped
from steepest.diagnosis.descent import Descent, Layer, Step, descents, log_ratio
from steepest.diagnosis.diagnosis import Diagnosis, Level, MatrixDiagnosis, Prediction, Verdict
from steepest.diagnosis.evidence import (
    GEOMETRIES,
    Evidence,
    GeometryName,
    gather,
    second_moment,
    unit,
)
from steepest.diagnosis.intervals import Interval, jackknife, worth_it
from steepest.diagnosis.plan import Plan
from steepest.diagnosis.race import RaceResult, race
from steepest.diagnosis.stacks import StackDiagnosis, judge_stack, stack_layers
from steepest.parameter_roles import roles_in_loss

STACK = 2
"""Layers in a stack, as by default in TEON."""
FEWEST: dict[Level, int] = {"quick": 3, "standard": 4, "thorough": 8}
"""Batches at least: for directions, and another one that judges them."""


def diagnose(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    level: Level = "standard",
    parameters: Sequence[str] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    **how: Any,
) -> Diagnosis:
    """Say for each matrix of a model which norm it wants to descend in, with the evidence.

    | level      | what it adds                               | price                             |
    |------------|--------------------------------------------|-----------------------------------|
    | "quick"    | soft ranks, gains between batches          | a gradient for each batch         |
    | "standard" | the Hessian along each direction, and four | about 60 gradients for each batch |
    |            | real steps in each geometry                | and matrix                        |
    | "thorough" | real steps, on batches of their own        | hundreds of gradients a matrix    |

    The quick prediction is that of Davis and Drusvyatskiy (arXiv 2512.04299, section 1): a spectral
    step decreases the bound by nr(G) / st(A) times what a Euclidean step does. Here nr(G) is taken
    across batches, as its noise counts on the batch it comes from. The standard one takes four real
    steps of the best size in each geometry, all else fixed, and puts the weights back. The Hessian
    along the first direction is reported too; its one number tells less of what several steps
    will bring.

    Intervals are jackknives over batches, at 80%. A verdict is another geometry where that is
    predicted to gain 10% or more on Euclidean steps and surely something, and Euclidean, the
    cheapest, where surely none gains that. Queries, keys and values of two layers in a row are
    judged as a stack as well (TEON): one polar factor, or one for each.

    Args:
        model: any module, also compiled; unchanged, as are its gradients and random generators.
        loss: `loss(model, batch) -> scalar`, the mean over examples.
        batches: at least 3, for "standard" 4, for "thorough" 8; of independent examples, as those
            of training. Few make wide intervals; 8 is a good number.
        level: how much to measure.
        parameters: names or patterns; by default all matrices that are trained.
        on_progress: called with the number of gradients and products so far.
        how: as for `steepest.curvature.Hessian`: `batch_norm`, `dtype`.

    Raises:
        ValueError: for too few batches, models without matrices, losses that cannot be used.
        FloatingPointError: for a loss that is not finite.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    >>> batches = [(torch.randn(64, 20), torch.randint(5, (64,))) for _ in range(4)]
    >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> found = diagnose(model, loss, batches, level="quick")
    >>> [row.matrix for row in found], 1 <= found["2.weight"].stable_rank <= 5
    (['0.weight', '2.weight'], True)
    """
    given = listed(batches)
    if level not in FEWEST:
        raise ValueError(f"got level={level!r}, expected one of {', '.join(FEWEST)}")
    if len(given) < FEWEST[level]:
        raise ValueError(
            f"got {len(given)} batches, expected at least {FEWEST[level]} for level={level!r}: "
            "directions and what judges them come from different batches"
        )
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        on_progress(done)

    # A verdict and the race that it may be held against share no batch.
    judged = given if level != "thorough" else given[: len(given) // 2]
    found = gather(model, loss, judged, parameters, level != "quick", tick, **how)
    raced: dict[str, tuple[RaceResult, ...]] = {}
    if level == "thorough":
        raced = race(model, loss, given[len(given) // 2 :], found, tick, **how)
    table = roles_in_loss(unwrapped(model), loss, given[0])
    descended: list[dict[str, Descent]] = [{} for _ in found]
    stacks: list[StackDiagnosis] = []
    if level != "quick":
        layers = [single_layer(place) for place in found]
        layers += (stacked := stack_layers(table, found, STACK))
        descended = descents(model, loss, judged, layers, tick, **how)
        both = zip(stacked, descended[len(found) :], strict=True)
        stacks = [judge_stack(layer, mine) for layer, mine in both]
    rows = [
        answer(place, mine, raced.get(place.label, ()))
        for place, mine in zip(found, descended[: len(found)], strict=True)
    ]
    return Diagnosis(rows, level, len(given), Plan.default(table), stacks)


def single_layer(place: Evidence) -> Layer:
    """Return one matrix with its step in every geometry."""

    def step(geometry: GeometryName) -> Step:
        return lambda G, judge: unit(geometry, G, second_moment(place.gradients, judge))

    return Layer(
        [place],
        {geometry: step(geometry) for geometry in GEOMETRIES},
        {geometry: place.best_step(geometry) for geometry in GEOMETRIES},
    )


def answer(
    given: Evidence, descended: dict[str, Descent], raced: tuple[RaceResult, ...]
) -> MatrixDiagnosis:
    """Return the row of one matrix: what follows from its evidence."""
    inputs = given.inputs
    stable = fmean(each.entering for each in inputs) if inputs else None
    predictions = _predictions(given, descended, stable)
    verdict, reason = _verdict(predictions, bool(descended), stable)
    across = _across(given, range(len(given.gradients)))
    return MatrixDiagnosis(
        matrix=given.label,
        parameter=given.row.name,
        role=given.row.role,
        shape=given.shape,
        tokens=inputs[0].tokens if inputs else 0,
        stable_rank=stable,
        stable_rank_centred=inputs[0].centred if inputs else None,
        stable_rank_output=inputs[0].leaving if inputs else None,
        nuclear_rank=given.nuclear_ranks.mean().item(),
        nuclear_rank_across=across if math.isfinite(across) else None,
        gradient=given.gradient,
        momentum=given.momentum,
        predictions=predictions,
        race=raced,
        verdict=verdict,
        reason=reason,
    )


def _predictions(
    given: Evidence, descended: dict[str, Descent], stable: float | None
) -> tuple[Prediction, ...]:
    B = len(given.nuclear_ranks)
    predictions = []
    for geometry in given.gains:
        gain = given.gain(geometry, range(B))
        interval: Interval | None = None
        curvature = best = fall = None
        if given.curvatures:
            curvature = given.curvatures[geometry].mean().item()
            best = gain / abs(curvature) if curvature else math.inf
            fall = 0.5 * gain * best if gain > 0 else 0.0
        if descended:
            interval = jackknife(log_ratio(descended[geometry], descended["euclidean"]), B)
        elif geometry == "spectral" and stable is not None:

            def ranks(kept: Sequence[int]) -> float:
                inputs = [given.inputs[i].entering for i in kept]
                return _log(_across(given, kept)) - _log(fmean(inputs))

            interval = jackknife(ranks, B)
        if geometry == "euclidean":
            interval = Interval(0.0, 0.0, 0.0)
        predictions.append(Prediction(geometry, gain, curvature, best, fall, interval))
    return tuple(predictions)


def _across(given: Evidence, kept: Sequence[int]) -> float:
    """The nuclear rank across batches; NaN where a mean gain is not positive."""
    spectral, euclidean = given.gain("spectral", kept), given.gain("euclidean", kept)
    return (spectral / euclidean) ** 2 if min(spectral, euclidean) > 0 else math.nan


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _verdict(
    predictions: tuple[Prediction, ...], measured: bool, stable: float | None
) -> tuple[Verdict, str]:
    """Another geometry if it is worth it for sure, Euclidean if none is."""
    known = {each.geometry: each.log_ratio for each in predictions if each.log_ratio is not None}
    others = {name: ratio for name, ratio in known.items() if name != "euclidean"}
    if not others:
        if not measured and stable is None:
            return "cannot tell", 'what the matrix multiplies is not known; level="standard" is'
        return "cannot tell", "the batches have no common direction: take larger ones"
    best = max(others, key=lambda name: others[name].value)
    ratio = others[best]
    value, low, high = (math.exp(each) for each in (ratio.value, ratio.low, ratio.high))
    times = f"{value:.2g} times ({low:.2g} to {high:.2g})"
    if worth_it(ratio):
        return best, f"predicted to decrease the loss {times} as much as Euclidean steps"
    if all(worth_it(each) is False for each in others.values()):
        return "euclidean", f"the best other, {best}, is predicted at {times} of it"
    return "cannot tell", f"the best, {best}, is predicted at {times} of Euclidean steps"
