"""What the stored summaries of all kinds share: numbers, means, headers, units, measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

Number = float | None
"""A whole number or another one; None and NaN say that it was not measured."""


class StoredInterval(TypedDict):
    """An estimate with the two ends of its interval."""

    value: Number
    low: Number
    high: Number


class Mean(TypedDict):
    """A mean over `n` seeds with its 95% interval, which a single seed does not have."""

    mean: Number
    low: Number
    high: Number
    n: int


class Header(TypedDict):
    """The fields that every kind has: the title, and where and how the numbers were made."""

    title: NotRequired[str]
    created: NotRequired[str | None]
    command: NotRequired[str | None]
    settings: NotRequired[dict[str, Any] | None]
    environment: NotRequired[dict[str, Any] | None]
    data: NotRequired[dict[str, Any] | None]
    plan: NotRequired[dict[str, Any] | None]


class Condition(TypedDict):
    """Nuclear rank of a gradient and stable rank of what enters its layer, at a step."""

    step: int
    matrix: str
    role: str
    nuclear_rank: Number
    stable_rank: Number
    stable_rank_output: NotRequired[Number]


class StoredStability(TypedDict):
    """What limits the steps of one group of parameters, over its threshold."""

    measure: str
    ratio: Number


class SharpnessAt(TypedDict):
    """The largest eigenvalue of the Hessian at a step."""

    step: int
    sharpness: Number
    stability: list[StoredStability]


def unit_of(summary: Mapping[str, Any]) -> str:
    """Return what a summary counts its data in: "tokens", unless it says otherwise.

    >>> unit_of({"data": {"unit": "images"}}), unit_of({})
    ('images', 'tokens')
    """
    places = (summary, summary.get("data") or {}, summary.get("settings") or {})
    return next((str(place["unit"]) for place in places if place.get("unit")), "tokens")


def loss_unit(unit: str) -> str:
    """Return the unit of a cross entropy: "nats per token".

    >>> loss_unit("images")
    'nats per image'
    """
    return f"nats per {unit.removesuffix('s')}"
