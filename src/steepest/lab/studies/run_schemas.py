"""The summary of one run of `steepest train`, field by field.

Whatever counts what a run has read, such as `tokens`, counts in the run's `unit`.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from steepest.lab.studies.stored import Header, Number, StoredStability

Status = Literal["finished", "unfinished", "diverged"]
"""What became of a run: its last step is done, or it can go on, or a number was not finite."""


class Measurement(TypedDict):
    """A line of `metrics.jsonl`; its kind says which of the other fields it has."""

    kind: str
    step: int
    tokens: NotRequired[Number]
    loss: NotRequired[Number]
    accuracy: NotRequired[Number]
    bits_per_byte: NotRequired[Number]
    lr: NotRequired[Number]
    seconds: NotRequired[Number]
    step_seconds: NotRequired[Number]
    optimizer_share: NotRequired[Number]
    units_per_second: NotRequired[Number]
    mfu: NotRequired[Number]
    text: NotRequired[str]
    matrix: NotRequired[str]
    role: NotRequired[str]
    nuclear_rank: NotRequired[Number]
    stable_rank: NotRequired[Number]
    stable_rank_output: NotRequired[Number]
    sharpness: NotRequired[Number]
    stability: NotRequired[list[StoredStability]]


class RunResult(TypedDict):
    """Where a run ended, or where it is: of a run without a result, its last measurements.

    Losses are in nats per unit. `step` is the last one measured.
    """

    step: int
    validation_loss: Number
    validation_accuracy: NotRequired[Number]
    bits_per_byte: NotRequired[Number]
    tokens: NotRequired[Number]
    parameters: NotRequired[Number]
    seconds: NotRequired[Number]
    step_seconds: NotRequired[Number]
    optimizer_share: NotRequired[Number]
    units_per_second: NotRequired[Number]
    mfu: NotRequired[Number]
    peak_memory_bytes: NotRequired[Number]
    optimizer_state_bytes: NotRequired[Number]
    wall_seconds: NotRequired[Number]


class RunSummary(Header):
    """One run: what was asked for, what was measured, where it ended.

    `optimizer` and `model` are names, `steps` is the number of updates asked for, and `reason` says
    why a run diverged.
    """

    kind: Literal["run"]
    status: Status
    reason: str | None
    unit: str
    model: str
    optimizer: str
    label: str
    lr: Number
    steps: int
    result: RunResult
    metrics: list[Measurement]


class ComparedRun(TypedDict):
    """A run of a comparison, by the name that the comparison shows."""

    name: str
    summary: RunSummary
