"""A multiplier in front of a parameter, to be folded into it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Fold:
    """A multiplier in front of a parameter, and what it is for.

    `of_output` says whether the output of its layer is that much smaller for it; not where it takes
    back what another one did.
    """

    multiplier: float
    reason: str
    of_output: bool = True


Folds = dict[str, list[Fold]]


def add(
    multipliers: Folds, names: Iterable[str], multiplier: float, reason: str, of_output: bool = True
) -> None:
    """Add a multiplier to those of each of these parameters."""
    for name in names:
        multipliers.setdefault(name, []).append(Fold(multiplier, reason, of_output))


def own_parameters(model: nn.Module, path: str) -> list[str]:
    """Names of the parameters that a module has itself."""
    module = model.get_submodule(path)
    prefix = f"{path}." if path else ""
    return [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)]
