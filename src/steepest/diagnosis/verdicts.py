"""`diagnose`: from batches to evidence, to predictions, to a verdict for each matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from steepest.curvature.loss_function import Loss, unwrapped
from steepest.diagnosis.diagnosis import Diagnosis, Level, MatrixDiagnosis, Prediction, Verdict
from steepest.diagnosis.evidence import Evidence, GeometryName, gather
from steepest.diagnosis.inputs import all_roles
from steepest.diagnosis.intervals import Interval, jackknife
from steepest.diagnosis.plan import Plan
from steepest.diagnosis.race import RaceResult, race
from steepest.diagnosis.stacks import StackDiagnosis, diagnose_stacks

STACK = 2
"""Layers in a stack, as by default in TEON."""
FEWEST: dict[Level, int] = {"quick": 3, "standard": 3, "thorough": 6}
"""Batches at least: a direction, its gain and a spread over what is left out."""


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

    | level      | what it adds                                  | price                           |
    |------------|-----------------------------------------------|---------------------------------|
    | "quick"    | soft ranks, gains between batches, the bounds | a gradient for each batch       |
    | "standard" | curvature and smoothness in each geometry     | 16 products for matrix, batch   |
    | "thorough" | real steps, on batches of their own           | hundreds of steps a matrix      |

    The quick prediction is that of Davis and Drusvyatskiy (arXiv 2512.04299, section 1): a spectral
    step decreases the bound by nr(G) / st(A) times what a Euclidean step does. Here nr(G) is taken
    across batches, as its noise counts on the batch it comes from. The standard one compares the
    same bound, gain² / (2 smoothness), with the smoothness measured: the largest ⟨D, B D⟩ over
    steps of length 1 in each geometry's norm, B the Gauss-Newton matrix of the weight. The Hessian
    along the direction itself is reported too, but tells less of several steps: it is what the
    first one meets. Verdicts follow from 95% intervals over batches. Queries, keys and values of
    two layers in a row are also judged as a stack (TEON): one polar factor, or one for each.

    Args:
        model: any module, also compiled; unchanged, as are its gradients and random generators.
        loss: `loss(model, batch) -> scalar`, the mean over examples.
        batches: at least 3, for "thorough" 6; of independent examples, as those of training.
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
    given = list(batches)
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
    stacks: tuple[StackDiagnosis, ...] = ()
    if level != "quick":
        stacks = diagnose_stacks(model, loss, judged, found, STACK, tick, **how)
    rows = [_answer(each, raced.get(each.label, ())) for each in found]
    default = Plan.default(all_roles(unwrapped(model)))
    return Diagnosis(rows, level, len(given), default, found[0].smoothness_of, stacks)


def _answer(given: Evidence, raced: tuple[RaceResult, ...]) -> MatrixDiagnosis:
    inputs = given.inputs
    stable = fmean(each.entering for each in inputs) if inputs else None
    predictions = _predictions(given, stable)
    verdict, reason = _verdict(predictions, bool(given.curvatures), stable)
    across = _across(given.gains, slice(None))
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
        gradient_stable_rank=given.stable_rank,
        predictions=predictions,
        race=raced,
        verdict=verdict,
        reason=reason,
    )


def _predictions(given: Evidence, stable: float | None) -> tuple[Prediction, ...]:
    B = len(given.nuclear_ranks)
    predictions = []
    for geometry in given.gains:
        gain = _mean_gain(given.gains[geometry], range(B))
        interval: Interval | None = None
        curvature = best = fall = smoothness = bound = None
        if given.curvatures:
            curvature = given.curvatures[geometry].mean().item()
            best = gain / abs(curvature) if curvature else math.inf
            fall = 0.5 * gain * best if gain > 0 else 0.0
            smoothness = given.smoothness[geometry].mean().item()
            bound = 0.5 * gain**2 / smoothness if gain > 0 and smoothness else 0.0

            def measured(kept: Sequence[int], geometry: GeometryName = geometry) -> float:
                mine, euclidean = (_bound(given, each, kept) for each in (geometry, "euclidean"))
                return mine - euclidean

            interval = jackknife(measured, B)
        elif geometry == "spectral" and stable is not None:

            def ranks(kept: Sequence[int]) -> float:
                inputs = [given.inputs[i].entering for i in kept]
                return _log(_across(given.gains, kept)) - _log(fmean(inputs))

            interval = jackknife(ranks, B)
        if geometry == "euclidean":
            interval = Interval(0.0, 0.0, 0.0)
        predictions.append(
            Prediction(geometry, gain, curvature, best, fall, smoothness, bound, interval)
        )
    return tuple(predictions)


def _mean_gain(gains: Tensor, kept: Sequence[int]) -> float:
    """Over pairs of different batches."""
    return fmean(gains[i, j].item() for i in kept for j in kept if i != j)


def _bound(given: Evidence, geometry: GeometryName, kept: Sequence[int]) -> float:
    """The logarithm of gain² / (2 smoothness) on some of the batches."""
    gain = _mean_gain(given.gains[geometry], kept)
    smoothness = given.smoothness[geometry][list(kept)].mean().item()
    return 2 * _log(gain) - _log(2 * smoothness)


def _across(gains: dict[GeometryName, Tensor], kept: Any) -> float:
    """The nuclear rank across batches; NaN where a mean gain is not positive."""
    batches = range(len(gains["spectral"]))[kept] if isinstance(kept, slice) else kept
    spectral, euclidean = (_mean_gain(gains[name], batches) for name in ("spectral", "euclidean"))
    return (spectral / euclidean) ** 2 if min(spectral, euclidean) > 0 else math.nan


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _verdict(
    predictions: tuple[Prediction, ...], measured: bool, stable: float | None
) -> tuple[Verdict, str]:
    """The geometry of the largest prediction, if it differs from the Euclidean one for sure."""
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
    if ratio.low > 0:
        return best, f"predicted to decrease the loss {times} as much as a Euclidean step"
    if all(each.high < 0 for each in others.values()):
        return "euclidean", f"the best other, {best}, is predicted at {times} of it"
    return (
        "cannot tell",
        f"the best, {best}, at {times} of a Euclidean step; the interval has 1 in it",
    )
