"""What TEON's theory compares: curvature and smoothness of stacks, in its norm and in Muon's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from torch import nn

from steepest.curvature.forms import of_argument
from steepest.curvature.hessian_blocks import HessianBlock, Place, parameter_names, places
from steepest.curvature.muon_theory import EXACT_POLAR, check, climb, decrease, inner
from steepest.curvature.operators import Hessian
from steepest.geometry import Geometry, LayerwiseSpectral, StackedSpectral
from steepest.model.parameter_roles import roles
from steepest.model.stacks import find_stacks
from steepest.model.unwrapping import unwrapped
from steepest.results import Result, Results, ResultTable

Stacks = Sequence[Sequence[str]] | None
Norm = Literal["layerwise", "mode 1", "mode 2"]


@dataclass(frozen=True, repr=False)
class StackCondition(Result):
    """One stack of K matrices in one norm, as `stack_conditions` returns it.

    Attributes:
        matrices: names of the members, in order.
        shape: (K, out, in).
        norm: "layerwise", the largest operator norm of a member (K steps of Muon), or the operator
            norm of the members side by side ("mode 1", TEON) or below each other ("mode 2").
        dual_norm: of the gradient: the sum of the nuclear norms, or that of the stack.
        curvature: J = ⟨D, H[D]⟩ along the direction D of steepest descent in this norm.
        smoothness_at_least: a lower bound of L, the smallest constant with
            ‖H[E]‖_dual <= L ‖E‖, from the best E that was found.
        products: how many Hessian-vector products it took.
    """

    matrices: tuple[str, ...]
    shape: tuple[int, int, int]
    norm: Norm
    dual_norm: float
    curvature: float
    smoothness_at_least: float
    products: int

    def table(self) -> ResultTable:
        """Return norm, curvature and decreases as one row."""
        columns = ("matrices", "shape", "norm", "dual_norm", "curvature", "decrease")
        return ResultTable.of([self], (*columns, "guarantee_at_most"), "stacks of matrices")

    @property
    def decrease(self) -> float:
        """‖G‖_dual² / (2 J), by which the quadratic model falls at the best step along D."""
        return decrease(self.dual_norm, self.curvature)

    @property
    def guarantee_at_most(self) -> float:
        """‖G‖_dual² / (2 L), the decrease that the theory promises; above it, as L is from below.

        The rate of theorem 4.5, min ‖G‖_dual <= sqrt(2 L Δ / T), is the sum of these.
        """
        return decrease(self.dual_norm, self.smoothness_at_least)


def _parameters(model: nn.Module, stacks: Stacks = None, *, size: int = 2, **_: float) -> list[str]:
    """The parameters of all stacks."""
    return parameter_names(list(chain(*_stacks(model, stacks, size))))


@of_argument(_parameters)
def stack_conditions(
    H: Hessian,
    stacks: Stacks = None,
    *,
    size: int = 2,
    tolerance: float = 1e-2,
    max_products: int = 30,
) -> Results[StackCondition]:
    """Return three rows for each stack: curvature and smoothness in the norms of Muon and TEON.

    Theory (Zhang et al., "TEON", arXiv 2601.23261, theorem 4.5): L_stacked <= L_layerwise <=
    K L_stacked, while the duals of the gradient are within layerwise / sqrt(K) <= stacked <=
    layerwise. TEON is ahead where L falls by more than the square of the dual norm does. H is the
    Hessian over the whole stack, so with the blocks between its members.

    Args:
        H: the Hessian of the parameters that hold the stacks. Or in its place `model, loss, batch`,
            and settings, which make one.
        stacks: names of the members of each, as `TEON.stacks` gives them, `name[i]` for the matrix
            i of a parameter of several; by default queries, keys and values of `size` layers each.
        size: K, of the default stacks.
        tolerance: relative gain at which a search for L ends.
        max_products: where each of three searches for every L stops in any case.

    Raises:
        ValueError: for what `Hessian` refuses, stacks of matrices that are none or differ in shape,
            and a model in which no stack is found.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> loss = lambda model, x: 0.5 * (model[0].weight + model[1].weight - x).square().sum()
    >>> H = Hessian(model, loss, torch.eye(2))
    >>> rows = stack_conditions(H, [("0.weight", "1.weight")])
    >>> [(row.norm, round(row.curvature, 3)) for row in rows]  # 2 for each of K, but K stacked
    [('layerwise', 8.0), ('mode 1', 4.0), ('mode 2', 4.0)]
    """
    check(tolerance, max_products)
    norms: dict[Norm, Geometry] = {
        "mode 1": StackedSpectral(1, EXACT_POLAR),
        "mode 2": StackedSpectral(2, EXACT_POLAR),
        "layerwise": LayerwiseSpectral(EXACT_POLAR),
    }
    rows = []
    for members in _stacks(H.model, stacks, size):
        part = H.block(parameter_names(members))
        block = HessianBlock(part, members)
        G = block.gradient
        if not G.any():
            continue
        conditions: dict[Norm, StackCondition] = {}
        starts = [G]  # what is best in one norm is a good start in the next
        for norm, geometry in norms.items():
            before = part.products
            D = geometry.direction(G)
            searches = [climb(block, geometry, X, tolerance, max_products) for X in starts]
            value, E = max(searches, key=lambda search: search[0])
            starts.append(E)
            conditions[norm] = StackCondition(
                matrices=tuple(place.label for place in members),
                shape=(G.shape[0], G.shape[1], G.shape[2]),
                norm=norm,
                dual_norm=inner(D, G),
                curvature=inner(D, block(D)),
                smoothness_at_least=value,
                products=part.products - before,
            )
        rows += [conditions[norm] for norm in ("layerwise", "mode 1", "mode 2")]
    return Results(rows)


def _stacks(model: nn.Module, stacks: Stacks, size: int) -> list[list[Place]]:
    """The members of each stack, checked."""
    if stacks is None:
        return _default_stacks(model, size)
    checked = []
    for stack in stacks:
        members = [_place(model, label) for label in stack]
        shapes = {place.view.sizes()[place.index] for place in members}
        if len(shapes) != 1 or len(set(members)) != len(members):
            raise ValueError(
                f"got the stack {tuple(stack)} of shapes {sorted(shapes)}, expected different "
                "matrices of one shape"
            )
        checked.append(members)
    return checked


def _place(model: nn.Module, label: str) -> Place:
    name, index = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", label).groups()  # type: ignore[union-attr]
    members = places(model, [name])
    if (index is None and len(members) > 1) or int(index or 0) >= len(members):
        raise ValueError(
            f"got {label!r}, but {name} is {len(members)} matrices; expected one, such as "
            f"{members[-1].label!r}"
        )
    return members[int(index or 0)]


def _default_stacks(model: nn.Module, size: int) -> list[list[Place]]:
    """Those that TEON makes."""
    stacks: dict[int, list[Place]] = defaultdict(list)
    table = roles(unwrapped(model))
    for name, numbers in find_stacks(table, size).items():
        for index, number in enumerate(numbers):
            if number is not None:
                stacks[number].append(Place(name, table[name].view, index))  # type: ignore[arg-type]
    if not stacks:
        raise ValueError(
            f"got a {type(model).__name__} without queries, keys or values of {size} layers, "
            "expected some; name the members of each in stacks"
        )
    return list(stacks.values())
