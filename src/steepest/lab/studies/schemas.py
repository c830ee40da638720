"""The kinds of summaries, field by field; a summary is checked when it is read.

The report and the tables of the command line take nothing but these. A field may be absent where it
is `NotRequired`: either not every study measures it, or version 0.1 did not write it yet. Fields
that are not listed here are kept and not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from steepest.lab.errors import InputError
from steepest.lab.studies.claim_schemas import ReproductionSummary
from steepest.lab.studies.fields import problems
from steepest.lab.studies.run_schemas import ComparedRun, RunSummary
from steepest.lab.studies.stored import (
    Condition,
    Header,
    Mean,
    Number,
    SharpnessAt,
    StoredInterval,
)
from steepest.optim.record import ADAMW

# A study of optimizers.


class StudyRun(TypedDict):
    """A run at one rate: its last losses, in nats per unit and bits per byte; its accuracy."""

    seed: int
    purpose: str
    status: str
    validation_loss: Number
    bits_per_byte: NotRequired[Number]
    validation_accuracy: NotRequired[Number]


class StudyRate(TypedDict):
    """All runs at one rate."""

    lr: float
    runs: list[StudyRun]


class Curve(TypedDict):
    """The validation losses of one seed."""

    seed: int
    tokens: list[Number]
    seconds: list[Number]
    validation_loss: list[Number]


class StudyVariant(TypedDict):
    """The best rate with one value of a second number, which is a field of its own name."""

    best_lr: Number
    validation_loss: Number


class StudyOptimizer(TypedDict):
    """An optimizer at its own best rate."""

    name: str
    label: str
    geometry: str
    memory: str
    verdict: str
    reason: str
    rates: list[StudyRate]
    best_lr: Number
    validation_loss: Mean | None
    bits_per_byte: Mean | None
    validation_accuracy: NotRequired[Mean | None]
    gap_to_baseline: Mean | None
    tokens_to_baseline: Number
    seconds_to_baseline: Number
    step_seconds: Number
    optimizer_share: Number
    peak_memory_bytes: Number
    optimizer_state_bytes: Number
    curves: list[Curve]
    conditions: NotRequired[list[Condition]]
    sharpness: NotRequired[list[SharpnessAt]]
    varied: NotRequired[list[StudyVariant]]


class StudySummary(Header):
    """Which optimizer, at its own best rate?"""

    kind: NotRequired[Literal["study"]]
    baseline: str
    optimizers: list[StudyOptimizer]


# The edge of stability.


class EdgeRun(TypedDict):
    """A run of one seed: its curves, and where they end."""

    ratio: Number
    low: Number
    high: Number
    verdict: str
    steps: list[int]
    loss: list[Number]
    sharpness: list[Number]
    ratios: list[Number]


class EdgeEntry(TypedDict):
    """An optimizer at one rate."""

    name: str
    label: str
    lr: float
    measure: str | None
    threshold: Number
    runs: list[EdgeRun]


class EdgeSummary(Header):
    """Where does curvature settle under each optimizer?"""

    kind: Literal["edge_of_stability"]
    edge: list[float]
    entries: list[EdgeEntry]


# A diagnosis.


class StoredSpectrum(TypedDict):
    """The largest singular values of a matrix, and its nuclear rank."""

    leading: list[float]
    nuclear_rank: Number


class StoredPrediction(TypedDict):
    """What steps in a geometry gain over Euclidean ones, as a logarithm."""

    geometry: str
    log_ratio: StoredInterval | None


class DiagnosisRow(TypedDict):
    """A matrix, what was measured of it, and its verdict."""

    matrix: str
    role: str
    shape: list[int]
    tokens: int
    stable_rank: Number
    stable_rank_centred: Number
    stable_rank_output: Number
    nuclear_rank: Number
    nuclear_rank_across: Number
    gradient: NotRequired[StoredSpectrum | None]
    momentum: NotRequired[StoredSpectrum | None]
    predictions: list[StoredPrediction]
    race: list[StoredPrediction]
    verdict: str
    reason: str


class StackRow(TypedDict):
    """Matrices of neighbouring layers: as one over apart."""

    matrices: list[str]
    log_ratio: StoredInterval | None
    verdict: str


class PlannedRow(TypedDict):
    """The geometry that a parameter gets."""

    parameter: str
    geometry: str
    reason: NotRequired[str]


class StoredAdvice(TypedDict):
    """A plan, and what to know of it."""

    rows: list[PlannedRow]
    notes: list[str]


class AuditedRow(TypedDict):
    """The first step of a parameter."""

    parameter: str
    geometry: str
    lr: Number
    rms: Number
    spectral_norm: Number
    relative_spectral_norm: Number
    against_adamw: Number


class StoredAuditWarning(TypedDict):
    """A mistake that the audit sees."""

    kind: str
    message: str


class AuditSummary(TypedDict):
    """What the first step of an optimizer does."""

    rows: list[AuditedRow]
    warnings: list[StoredAuditWarning]
    measured_on: str


class DiagnosisSummary(Header):
    """Which norm does each matrix want?"""

    kind: Literal["diagnosis"]
    level: str
    batches: int
    rows: list[DiagnosisRow]
    stacks: NotRequired[list[StackRow]]
    advice: NotRequired[StoredAdvice | None]
    default: NotRequired[list[PlannedRow] | None]
    notes: NotRequired[list[str]]
    audit: NotRequired[AuditSummary | None]
    monitored: NotRequired[list[Condition]]


# A check of transfer.


class StoredSizeOptimum(TypedDict):
    """The best rate of a size; `scores` are the losses of all seeds by rate."""

    size: dict[str, Any]
    lr: float
    octaves: float
    interval: StoredInterval | None
    score: float
    scores: dict[str, list[Number]]


class StoredHorizon(TypedDict):
    """The best rates of all sizes after a number of steps."""

    steps: int
    rows: list[StoredSizeOptimum]
    advised: NotRequired[Number]
    advised_penalty: NotRequired[Number]
    advised_diverged: NotRequired[bool]


class StoredRates(TypedDict):
    """The best rates of all sizes."""

    rule: str
    optimizer: str
    horizons: list[StoredHorizon]


class StoredLayerSlope(TypedDict):
    """How the change of a layer's output depends on the size."""

    layer: str
    step: int
    slope: Number
    error: Number
    passed: NotRequired[bool | None]


class Coordinates(TypedDict):
    """The coordinate check."""

    rows: list[StoredLayerSlope]


class StoredSizeCurve(TypedDict):
    """The sharpness of a size along training, over its threshold."""

    size: dict[str, Any]
    steps: list[int]
    ratios: list[Number]
    losses: list[Number]
    ending: list[float]
    movement: list[float]


class Consistency(TypedDict):
    """The sharpness of all sizes along training."""

    measure: str
    rows: list[StoredSizeCurve]


class TransferAxis(TypedDict):
    """What grows, and what was measured while it did."""

    name: str
    rates: StoredRates
    coordinates: Coordinates | None
    consistency: Consistency | None
    blown: list[str]


class TransferAdvice(TypedDict):
    """The rate for the target, as a sentence."""

    said: str


class TransferSummary(Header):
    """Does the learning rate transfer?"""

    kind: Literal["transfer"]
    verdict: str
    reasons: list[str]
    retune: list[str]
    advice: TransferAdvice | None
    axes: list[TransferAxis]


class ComparedStudy(TypedDict):
    """A study of a comparison, by the name that the comparison shows."""

    name: str
    summary: StudySummary


class ComparisonSummary(Header):
    """Several runs or several studies beside each other; one of the two lists is empty."""

    kind: Literal["comparison"]
    runs: list[ComparedRun]
    studies: list[ComparedStudy]


SCHEMAS: dict[str, type] = {
    "study": StudySummary,
    "edge_of_stability": EdgeSummary,
    "diagnosis": DiagnosisSummary,
    "transfer": TransferSummary,
    "run": RunSummary,
    "comparison": ComparisonSummary,
    "reproduction": ReproductionSummary,
}
"""The schema of each kind; a summary without a kind is a study."""


def kind_of(summary: Mapping[str, Any]) -> str:
    """Return the kind of a summary; one without a kind is a study.

    Raises:
        InputError: for another kind.
    """
    kind = summary.get("kind") or "study"
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise InputError(
            f"got a summary of the kind {kind!r}, expected one of {', '.join(SCHEMAS)}; it may be "
            "from a newer version of steepest"
        )
    return kind


def checked_summary(summary: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a summary with the names of this version, if it has every field of its kind.

    Raises:
        InputError: for another kind, and for the first field that is missing or of another type,
            by its name and the file it is in.

    >>> summary = {"kind": "edge_of_stability", "edge": [0.9, "1.1"], "entries": []}
    >>> checked_summary(summary, Path("a.json"))
    Traceback (most recent call last):
    steepest.lab.errors.InputError: got a.json with edge[1] = '1.1', expected a number. ...
    """
    try:
        kind = kind_of(summary)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    for problem in problems(summary, SCHEMAS[kind], ""):
        raise InputError(
            f"got {path} {problem}. That is not how steepest writes a summary of the kind "
            f"{kind!r}: run once more the command that made it; no finished run is lost"
        )
    return cast(dict[str, Any], _modern(summary))


_OLD = {
    ("geometry", "adaptive"): ADAMW, ("verdict", "adaptive"): ADAMW, ("optimizer", "adam"): ADAMW,
}  # fmt: skip
"""A field and its value in version 0.1, and what the value is called now."""


def _modern(value: Any) -> Any:
    if isinstance(value, list):
        return [_modern(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _OLD.get((key, item), item) if isinstance(item, str) else _modern(item)
        for key, item in value.items()
    }
