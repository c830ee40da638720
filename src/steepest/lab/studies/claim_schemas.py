"""The summary of a paper's claims, field by field."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from steepest.lab.studies.stored import Header, Number, StoredInterval


class StoredPaper(TypedDict):
    """The paper that the claims are from."""

    name: str
    authors: str
    arxiv: str


class StoredClaim(TypedDict):
    """A claim, its criterion, what was measured with every seed, and the verdict."""

    name: str
    sentence: str
    place: str
    source: str
    checks: list[str]
    experiment: str
    kind: str
    quantity: str
    criterion: str
    limits: str
    paper: str
    values: list[Number]
    interval: StoredInterval | None
    verdict: str
    reason: str
    control: bool


class StoredExperiment(TypedDict):
    """An experiment: its sizes, and the raw numbers of every seed."""

    name: str
    title: str
    kind: str
    sizes: dict[str, Any]
    data: str | None
    seeds: int
    numbers: list[dict[str, Any]]


class ReproductionSummary(Header):
    """What holds of a paper's claims?"""

    kind: Literal["reproduction"]
    paper: StoredPaper
    claims: list[StoredClaim]
    experiments: list[StoredExperiment]
    left_out: dict[str, str]
