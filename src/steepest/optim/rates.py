"""A program that sets one rate for all groups undoes their ratio: one warning."""

from __future__ import annotations

import sys
import warnings
from typing import Any

_TINY = 1 / 20  # of the smallest base rate: where a warm-up of any rate can begin
_STEPS = 100  # that a warm-up by epochs may stay there

_INSIDE = ("torch", __name__.split(".")[0])


class Rates:
    """Watches the rates of groups from step to step, and warns once.

    Evidence for one rate for all groups, where the rates that the groups were made with differ:

    - they are equal at once, from rates that had their ratio, and not tiny; or from rates of which
      one at least was smaller. Rates that have lost their ratio already and fall to an equal one
      have come to the floor of a schedule (`eta_min`, `min_lr`);
    - they are equal in two steps in a row, and not the same;
    - they are equal from the first step on, for `_STEPS` steps.

    Evidence for the first group alone: its rate has changed twice while all others have the rate
    that they were made with, and no scheduler of torch has left its `initial_lr`.
    """

    def __init__(self) -> None:
        self._last: list[float] | None = None
        self._changes = 0
        self._equal = 0  # steps since the first one, with one rate for all groups
        self._warned = False

    def restart(self, groups: list[dict[str, Any]]) -> None:
        """Go on from the rates of a loaded state."""
        self._last = [float(group["lr"]) for group in groups]
        self._changes = 0

    def watch(self, groups: list[dict[str, Any]]) -> None:
        """Look at the rates of a step."""
        rates = [float(group["lr"]) for group in groups]
        if self._warned or (rates == self._last and not self._equal):
            return
        bases = [float(group["base_lr"]) for group in groups]
        if len(set(bases)) < 2 or 0.0 in rates:
            return
        is_first = self._last is None
        last = self._last if self._last and len(self._last) == len(rates) else bases
        self._last = rates
        same = len(set(rates)) == 1 and (is_first or (self._equal and rates == last))
        self._equal = self._equal + 1 if same else 0
        if self._equal == _STEPS or self._are_one(rates, last, bases):
            self._warn(f"all {len(rates)} groups have the learning rate {rates[0]:g}", bases)
        elif self._first_alone(rates, last, bases) and not any("initial_lr" in g for g in groups):
            self._warn("only the learning rate of the first group changes", bases)

    @staticmethod
    def _are_one(rates: list[float], last: list[float], bases: list[float]) -> bool:
        if len(set(rates)) > 1:
            return False
        if len(set(last)) == 1:
            return rates != last
        factors = [rate / base for rate, base in zip(last, bases, strict=True) if base]
        in_ratio = max(factors) <= min(factors) * (1 + 1e-6)
        return rates[0] > min(last) or (in_ratio and rates[0] > _TINY * min(bases))

    def _first_alone(self, rates: list[float], last: list[float], bases: list[float]) -> bool:
        alone = rates[1:] == bases[1:] == last[1:]
        self._changes = self._changes + 1 if alone and rates[0] != last[0] else 0
        return self._changes >= 2

    def _warn(self, seen: str, bases: list[float]) -> None:
        self._warned = True
        warnings.warn(
            f"{seen}, but they were made with {', '.join(f'{base:g}' for base in bases)}, so their "
            "ratio is lost. A loop that sets rates by hand sets each from its own: "
            "`for group in optimizer.param_groups: group['lr'] = factor * group['base_lr']`. "
            "Where one rate is meant, pass it as adamw_lr too",
            UserWarning,
            stacklevel=callers_level(),
        )


def callers_level() -> int:
    """Return how far up from a warning the line of the program is that called this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level
