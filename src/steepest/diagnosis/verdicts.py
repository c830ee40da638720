"""`diagnose`: from batches to evidence, to predictions, to a verdict for each matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from steepest.curvature.evaluation import BatchNorm
from steepest.curvature.loss_function import Loss, LossFunction, chosen_parameters, listed
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
from steepest.diagnosis.intervals import SURE, worth_it
from steepest.diagnosis.plan import Plan
from steepest.diagnosis.progress import OnProgress, Work
from steepest.diagnosis.race import RaceResult, race
from steepest.diagnosis.stacks import judge_stack, stack_layers
from steepest.diagnosis.warmup import (
    WARMUP_STEPS,
    Steps,
    WarmUp,
    checked_steps,
    divided,
    looks_fresh,
    warmed_up,
)
from steepest.model.parameter_roles import RoleTable, all_roles, roles_in_loss
from steepest.model.unwrapping import unwrapped
from steepest.statistics import Interval, jackknife

STACK = 2
"""Layers in a stack, as by default in TEON."""
FEWEST: dict[Level, int] = {"quick": 3, "standard": 4, "thorough": 8}
"""Batches at least: for directions, and another one that judges them."""
DESCENT, RACE = 54, 130
"""Gradients for each matrix and batch, about, before any is counted."""
Memo = Callable[[str, Callable[[], Any]], Any]
"""From the name of a part and what computes it to its result."""


def diagnose(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    level: Level = "standard",
    parameters: Sequence[str] | None = None,
    warmup_steps: Steps = "auto",
    on_progress: OnProgress = lambda done, total, message: None,
    batch_norm: BatchNorm = "eval",
    dtype: torch.dtype | None = None,
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

    At initialization the first steps only learn what every batch says, and verdicts are about them.
    So where weights look fresh a copy is trained first, for 60 steps of Muon, and judged in place
    of the model; `steepest.diagnosis.warmup.looks_fresh` says which weights do. The first 8 batches
    judge, the others are trained on; of fewer than 16 the first half judges. `Diagnosis.warm_up`
    and `Diagnosis.notes` say what was done.

    Args:
        model: any module, also compiled; unchanged, as are its gradients and random generators.
        loss: `loss(model, batch) -> scalar`, the mean over examples.
        batches: at least 3, for "standard" 4, for "thorough" 8; of independent examples, as those
            of training. Few make wide intervals; 8 is a good number.
        level: how much to measure.
        parameters: names or patterns; by default all matrices that are trained.
        warmup_steps: how long a copy is trained first: "auto" is 60 steps where the weights look
            fresh and there are batches for it, 0 takes the weights as they are.
        on_progress: called as `on_progress(done, total, message)`: gradients and products so far,
            an estimate of all, and what they are for.
        batch_norm, dtype: as for `steepest.curvature.Hessian`.

    Raises:
        ValueError: for too few batches, models without matrices, losses that cannot be used,
            and for a `warmup_steps` that the batches do not allow.
        FloatingPointError: for a loss that is not finite.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    >>> batches = [(torch.randn(64, 20), torch.randint(5, (64,))) for _ in range(4)]
    >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> diagnosis = diagnose(model, loss, batches, level="quick")
    >>> [row.matrix for row in diagnosis], 1 <= diagnosis["2.weight"].stable_rank <= 5
    (['0.weight', '2.weight'], True)
    """
    check_request(model, batches := listed(batches), level, parameters)
    function = LossFunction(model, loss, batch_norm=batch_norm, dtype=dtype)
    start = started(function, batches, level, parameters, warmup_steps, Work(on_progress))
    return judged(start, level, parameters)


def check_request(
    model: nn.Module, batches: Sequence[Any], level: Level, parameters: Sequence[str] | None
) -> None:
    """Raise a ValueError for what cannot be diagnosed, before any work."""
    if level not in FEWEST:
        raise ValueError(f"got level={level!r}, expected one of {', '.join(FEWEST)}")
    if len(batches) < FEWEST[level]:
        raise ValueError(
            f"got {len(batches)} batches, expected at least {FEWEST[level]} for level={level!r}: "
            "directions and what judges them come from different batches"
        )
    model = unwrapped(model)
    if not _places(all_roles(model), model, parameters):
        raise ValueError(
            f"got a {type(model).__name__} without matrices that are trained, expected some"
        )


@dataclass(frozen=True)
class Start:
    """What is judged: the model or a copy that was trained a little.

    Attributes:
        function: its loss.
        batches: those that judge.
        warm_up: how the copy was trained; None if the model itself is judged.
        fresh: whether the weights look fresh.
        notes: what to know of it, in sentences.
        work: counts gradients.
    """

    function: LossFunction
    batches: list[Any]
    warm_up: WarmUp | None
    fresh: bool
    notes: tuple[str, ...]
    work: Work


def started(
    function: LossFunction,
    batches: list[Any],
    level: Level,
    parameters: Sequence[str] | None,
    warmup_steps: Steps,
    work: Work,
    others: Iterable[Any] = (),
) -> Start:
    """Return what is judged, after a warm-up if one is asked for and possible.

    Args:
        function: the loss of the model, as a function of all trained parameters.
        batches, level, parameters, warmup_steps: as for `diagnose`.
        work: counts gradients.
        others: more batches, for a warm-up alone; too few of them are divided with `batches`.
    """
    asked = checked_steps(warmup_steps)
    fresh = looks_fresh(function, batches)
    steps = (WARMUP_STEPS if fresh else 0) if asked == "auto" else asked
    table = roles_in_loss(function.model, function.loss, batches[0])
    places = _places(table, function.model, parameters)
    if not steps:
        _expect(work, places, level, len(batches))
        kept = ("the weights look fresh and were taken as they are",) if fresh else ()
        return Start(function, batches, None, fresh, kept, work)
    try:
        judges, trained = divided(batches, list(others), FEWEST[level])
        work.expect("warm-up", "warm-up", steps)
        _expect(work, places, level, len(judges))
        work.begin("warm-up")
        copy, done = warmed_up(function, trained, judges, steps, work.tick)
    except ValueError as error:
        if asked != "auto":
            raise
        _expect(work, places, level, len(batches))
        note = f"the weights look fresh and were not warmed up: {error}"
        return Start(function, batches, None, True, (note,), work)
    before = "the weights looked fresh, so a" if fresh else "a"
    note = f"{before} copy was trained before it was judged: {done}"
    fresh = looks_fresh(copy, judges)
    still = ("the copy looks fresh as well",) if fresh else ()
    return Start(copy, judges, done, fresh, (note, *still), work)


def judged(
    start: Start,
    level: Level,
    parameters: Sequence[str] | None,
    kept: Memo = lambda name, compute: compute(),
) -> Diagnosis:
    """Return the diagnosis of what a start gave.

    Args:
        level, parameters: as for `diagnose`.
        kept: gets the name of a part ("race" or "descent" and a label) and a function without
            arguments that computes it; returns what that returns, or returned before.
    """
    function, batches, work = start.function, start.batches, start.work
    table = roles_in_loss(function.model, function.loss, batches[0])
    # A verdict and the race that it may be held against share no batch.
    half = len(batches) if level != "thorough" else len(batches) // 2
    judges, racing = batches[:half], batches[half:]
    places = _places(table, function.model, parameters)
    work.begin("gradients")
    evidence = gather(function, judges, parameters, level != "quick", work.tick)
    with_gradient = {place.label for place in evidence}
    for place in places:
        if place.label not in with_gradient:
            work.skip(f"descent {place.label}")
            work.skip(f"race {place.label}")
    layers: dict[str, Layer] = {}
    if level != "quick":
        layers = {f"descent {place.label}": single_layer(place) for place in evidence}
        for layer in stack_layers(table, evidence, STACK):
            name = f"descent {' and '.join(place.label for place in layer.places)}"
            layers[name] = layer
            work.expect(name, "stack", DESCENT * half / 2)

    def computed(name: str, compute: Callable[[], Any]) -> Any:
        def begun() -> Any:
            work.begin(name)
            return compute()

        result = kept(name, begun)
        work.skip(name)  # if it was known
        return result

    def descended(name: str, layer: Layer) -> dict[str, Descent]:
        return computed(name, lambda: descents(function, judges, [layer], work.tick)[0])

    def raced(place: Evidence) -> tuple[RaceResult, ...]:
        return computed(
            f"race {place.label}",
            lambda: race(function, racing, [place], work.tick)[place.label],
        )

    races = {place.label: raced(place) for place in evidence} if racing else {}
    walks = {name: descended(name, layer) for name, layer in layers.items()}
    answers = {
        place.label: answer(
            place, walks.get(f"descent {place.label}", {}), races.get(place.label, ())
        )
        for place in evidence
    }
    return Diagnosis(
        [answers.get(place.label) or _idle(place) for place in places],
        level,
        len(batches),
        Plan.default(table),
        [
            judge_stack(layer, walks[name])
            for name, layer in layers.items()
            if len(layer.places) > 1
        ],
        warm_up=start.warm_up,
        fresh=start.fresh,
        notes=start.notes,
    )


def _expect(work: Work, places: Sequence[Evidence], level: Level, batches: int) -> None:
    """Say how many gradients and products there will be, about."""
    judging = batches if level != "thorough" else batches // 2
    products = len(GEOMETRIES) * judging * len(places) if level != "quick" else 0
    work.expect("gradients", "gradients", judging + products)
    for place in places if level != "quick" else ():
        work.expect(f"descent {place.label}", "descent", DESCENT * judging)
        if level == "thorough":
            work.expect(f"race {place.label}", "race", RACE * (batches - judging))


def _places(table: RoleTable, model: nn.Module, parameters: Sequence[str] | None) -> list[Evidence]:
    """All matrices that are asked for."""
    names = set(chosen_parameters(model, parameters))
    return [
        Evidence(row, i)
        for row in table
        if row.name in names and row.view is not None and not row.view.is_vector
        for i in range(len(row.view.sizes()))
    ]


def _idle(place: Evidence) -> MatrixDiagnosis:
    """The row of a matrix without a gradient on some batch."""
    return MatrixDiagnosis(
        matrix=place.label,
        parameter=place.row.name,
        role=place.row.role,
        shape=place.shape,
        tokens=0,
        stable_rank=None,
        stable_rank_centred=None,
        stable_rank_output=None,
        nuclear_rank=None,
        nuclear_rank_across=None,
        gradient=None,
        momentum=None,
        predictions=(),
        race=(),
        verdict="cannot tell",
        reason="its gradient is zero on some batch: it is not used there, or lies behind zeros",
    )


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
    evidence: Evidence, descended: dict[str, Descent], raced: tuple[RaceResult, ...]
) -> MatrixDiagnosis:
    """Return the row of one matrix: what follows from its evidence."""
    inputs = evidence.inputs
    stable = fmean(batch.entering for batch in inputs) if inputs else None
    predictions = _predictions(evidence, descended)
    verdict, reason = _verdict(predictions, bool(descended), stable)
    across = min(_across(evidence, range(len(evidence.gradients))), min(evidence.shape))
    return MatrixDiagnosis(
        matrix=evidence.label,
        parameter=evidence.row.name,
        role=evidence.row.role,
        shape=evidence.shape,
        tokens=inputs[0].tokens if inputs else 0,
        stable_rank=stable,
        stable_rank_centred=inputs[0].centred if inputs else None,
        stable_rank_output=inputs[0].leaving if inputs else None,
        nuclear_rank=evidence.nuclear_ranks.mean().item(),
        nuclear_rank_across=across if math.isfinite(across) else None,
        gradient=evidence.gradient,
        momentum=evidence.momentum,
        predictions=predictions,
        race=raced,
        verdict=verdict,
        reason=reason,
        bound=_bound(evidence, SURE),
    )


def _predictions(evidence: Evidence, descended: dict[str, Descent]) -> tuple[Prediction, ...]:
    B = len(evidence.nuclear_ranks)
    predictions = []
    for geometry in evidence.gains:
        gain = evidence.gain(geometry, range(B))
        interval: Interval | None = None
        curvature = best = fall = over = None
        if evidence.curvatures:
            curvature = evidence.curvatures[geometry].mean().item()
            best = gain / abs(curvature) if curvature else math.inf
            fall = 0.5 * gain * best if gain > 0 else 0.0
        if descended:
            interval = jackknife(log_ratio(descended[geometry], descended["euclidean"]), B)
            over = jackknife(log_ratio(descended[geometry], descended["spectral"]), B, SURE)
        elif geometry == "spectral":
            interval = _bound(evidence, 0.8)
        if geometry == "euclidean":
            interval = Interval(0.0, 0.0, 0.0)
        predictions.append(Prediction(geometry, gain, curvature, best, fall, interval, over))
    return tuple(predictions)


def _bound(evidence: Evidence, confidence: float) -> Interval | None:
    """Log of nr(G) / st(A), of the decreases that the theory guarantees."""
    if not evidence.inputs:
        return None

    def ranks(kept: Sequence[int]) -> float:
        inputs = [evidence.inputs[i].entering for i in kept]
        return _log(_across(evidence, kept)) - _log(fmean(inputs))

    interval = jackknife(ranks, len(evidence.inputs), confidence)
    most = math.log(min(evidence.shape)) - _log(fmean(batch.entering for batch in evidence.inputs))
    if interval is None or interval.value <= most:
        return interval
    over = interval.value - most  # noise takes ranks beyond the sides
    return Interval(most, interval.low - over, interval.high - over)


def _across(evidence: Evidence, kept: Sequence[int]) -> float:
    """The nuclear rank across batches; NaN where a mean gain is not positive."""
    spectral, euclidean = evidence.gain("spectral", kept), evidence.gain("euclidean", kept)
    return (spectral / euclidean) ** 2 if min(spectral, euclidean) > 0 else math.nan


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _verdict(
    predictions: tuple[Prediction, ...], measured: bool, stable: float | None
) -> tuple[Verdict, str]:
    """Another geometry if it is worth it for sure, Euclidean if none is."""
    known = {
        prediction.geometry: prediction.log_ratio
        for prediction in predictions
        if prediction.log_ratio is not None
    }
    others = {name: ratio for name, ratio in known.items() if name != "euclidean"}
    if not others:
        if not measured and stable is None:
            return "cannot tell", 'what the matrix multiplies is not known; level="standard" is'
        return "cannot tell", "the batches have no common direction: take larger ones"
    best = max(others, key=lambda name: others[name].value)
    ratio = others[best]
    value, low, high = (math.exp(log) for log in (ratio.value, ratio.low, ratio.high))
    times = f"{value:.2g} times ({low:.2g} to {high:.2g})"
    if worth_it(ratio):
        return best, f"predicted to decrease the loss {times} as much as Euclidean steps"
    if all(worth_it(other) is False for other in others.values()):
        return "euclidean", f"the best other, {best}, is predicted at {times} of it"
    return "cannot tell", f"the best, {best}, is predicted at {times} of Euclidean steps"
