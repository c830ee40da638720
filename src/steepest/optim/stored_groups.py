"""Whether a stored state has the groups of an optimizer, and the overrides that make them so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from steepest.model.matrix_view import MatrixView
from steepest.optim.record import acts_on_entries


def override_for(
    groups: Iterable[Mapping[str, Any]], stored: Iterable[Mapping[str, Any]], views: bool = False
) -> str | None:
    """Return the call of `steepest.roles` that gives a model the groups of a stored state.

    None where every parameter is in a group of its kind, matrices or AdamW, or has no name; also
    where a matrix was stored without its view, by groups that were written by hand.

    Args:
        groups: of an optimizer.
        stored: of a state, with the names that the parameters of the optimizer have.
        views: whether matrices must also be seen the same way, as memory of whole matrices asks
            for.

    >>> here = [{"param_names": ["4.weight"], "geometry": "adamw"}]
    >>> there = [{"param_names": ["4.weight"], "geometry": "spectral", "views": [(1, 3, 72)]}]
    >>> override_for(here, there)
    'steepest.roles(model, {"4.weight": steepest.MatrixView(1, 3, 72, False, ())})'
    """
    now, before = _kinds(groups), _kinds(stored)
    wanted = {}
    for name in now.keys() & before.keys():
        (matrix, view), (was_matrix, old) = now[name], before[name]
        seen_apart = views and None not in (view, old) and view != old
        if matrix != was_matrix or seen_apart:
            wanted[name] = before[name]
    if not wanted or any(matrix and view is None for matrix, view in wanted.values()):
        return None
    entries = (f"{json.dumps(name)}: {_written(wanted[name][1])}" for name in now if name in wanted)
    return f"steepest.roles(model, {{{', '.join(entries)}}})"


def _kinds(groups: Iterable[Mapping[str, Any]]) -> dict[str, tuple[bool, MatrixView | None]]:
    """Whether each parameter is a matrix, and how it is seen."""
    kinds: dict[str, tuple[bool, MatrixView | None]] = {}
    for group in groups:
        names = group.get("param_names") or []
        matrix = not acts_on_entries(group)
        views = group.get("views") if matrix else None
        for name, view in zip(names, views or [None] * len(names), strict=False):
            kinds[name] = matrix, None if view is None else MatrixView(*view)
    return kinds


def _written(view: MatrixView | None) -> str:
    return '"head"' if view is None else f"steepest.MatrixView{tuple(view)}"
