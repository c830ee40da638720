"""Whether a learning rate carries over to larger sizes of a user's own model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest.lab.errors import InputError
from steepest.transfer import CoordinateCheck, RateTransfer, coordinate_check, rate_transfer
from steepest.transfer.rules import OptimizerName, Rule

CHECKED = (5, 20)


@dataclass(frozen=True)
class TransferStudy:
    """The coordinate check and the best rates over sizes.

    Attributes:
        coordinates: at the best rate of the first size.
        rates: the best one of each size.
    """

    coordinates: CoordinateCheck
    rates: RateTransfer

    @property
    def passed(self) -> bool:
        """Whether the best rate stays; the coordinate check says where to look if not."""
        return self.rates.passed

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "kind": "transfer",
            "passed": self.passed,
            "rates": self.rates.as_dict(),
            "coordinates": _plain(self.coordinates.as_dict()),
        }


def transfer_study(
    build: Callable[..., Any],
    sizes: Sequence[str],
    batches: Sequence[Any],
    loss: Callable[[Any, Any], Any],
    *,
    lr: float,
    rule: Rule,
    optimizer: OptimizerName,
    seeds: int,
    path: Path,
    on_run: Callable[[str, float], None] = lambda key, score: None,
) -> TransferStudy:
    """Find the best rate of each size, then check the coordinates at that of the first.

    Args:
        build, loss, lr, rule, optimizer, seeds, on_run: as for `rate_transfer`.
        sizes: as a user types them, such as "width=64,depth=2".
        batches: one for each step.
        path: the file of finished runs.

    Raises:
        InputError: for sizes that cannot be read, and what the two raise for bad input.
    """
    asked = [_size(each) for each in sizes]
    try:
        rates = rate_transfer(
            build, asked, _Batches(batches), loss, lr=lr, rule=rule, optimizer=optimizer,
            steps=len(batches), seeds=seeds, path=path, on_run=on_run,
        )  # fmt: skip
        coordinates = coordinate_check(
            build, asked, batches[0], loss, lr=rates.rows[0].lr, rule=rule, optimizer=optimizer,
            steps=CHECKED, seeds=seeds,
        )  # fmt: skip
    except (ValueError, TypeError, FloatingPointError) as error:
        raise InputError(str(error)) from error
    return TransferStudy(coordinates, rates)


def _plain(value: Any) -> Any:
    """NaN, the slope of what does not move, as None, which JSON has."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class _Batches:
    """Batches by number."""

    def __init__(self, batches: Sequence[Any]):
        self._batches = batches

    def __call__(self, i: int) -> Any:
        return self._batches[i]


def _size(text: str) -> dict[str, int]:
    """`width=64,depth=2` as a dictionary."""
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not name.isidentifier() or not value.isdecimal():
            raise InputError(
                f"got the size {text!r}, expected names and whole numbers such as width=64,depth=2"
            )
        found[name] = int(value)
    return found
