"""Which axes of which parameters grow from the base model to the target, and by how much.

The user's own `build` is called on the meta device, where nothing is allocated: at the base sizes,
and again after each size that differs.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steepest.model.parameter_roles import Override, ParameterRole, RoleTable, all_roles
from steepest.parametrize.changes import changed, module_names, settings, tensor_shapes
from steepest.parametrize.placement import check_embeddings, size_of
from steepest.parametrize.rules import Size

Build = Callable[..., nn.Module]
Overrides = Mapping[str, Override]


@dataclass(frozen=True)
class Blueprint:
    """A model on the meta device: the roles and shapes of its parameters."""

    model: nn.Module
    table: RoleTable

    def __getitem__(self, name: str) -> ParameterRole:
        """Return the row of a parameter."""
        return self.table[name]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        return {row.name: tuple(row.parameter.shape) for row in self.table}


@dataclass(frozen=True)
class Growth:
    """What grows from the base to the target.

    Attributes:
        base, target: the two models, on the meta device.
        sizes: of each parameter of the target.
        counterparts: for each parameter of the target, those of the base that do the same; several
            in a list of layers that grows.
        lists: the module lists whose lengths differ, with the lengths `(base, target)`.
        deepening: the sizes that change nothing but such lengths.
        changed: the sizes that differ.
        numbers: the sizes that change neither shapes nor modules, but numbers that modules keep,
            such as the number of heads; with the names of these.
    """

    base: Blueprint
    target: Blueprint
    sizes: dict[str, Size]
    counterparts: dict[str, list[str]]
    lists: dict[str, tuple[int, int]]
    deepening: tuple[str, ...]
    numbers: dict[str, set[str]]
    changed: frozenset[str]


def growth(
    build: Build,
    base: Mapping[str, Any],
    target: Mapping[str, Any],
    overrides: Overrides | None,
    like: RoleTable | None = None,
) -> Growth:
    """Find out what grows; `target` has a value for every size of `base`.

    `like` are the roles of the base by an example, if there is one.

    Raises:
        ValueError: if `build` fails on the meta device, for an axis that does not grow in
            proportion, and for parameters of the target that the base has nothing like. The
            message names the parameter and the axis.
    """
    first = last = blueprint(build, base, overrides, like)
    sizes, waiting, deepening = dict(base), [], []
    deepened: set[str] = set()
    alone: dict[str, set[str]] = {}
    differ = [key for key in base if base[key] != target[key]]
    for key in differ:
        sizes[key] = target[key]
        waiting.append(key)
        try:
            after = blueprint(build, sizes, overrides, like)
        except ValueError:  # perhaps only together with the next: heads that divide the width
            if key == differ[-1]:
                raise
            continue
        _check_sequentials(last, after)
        _check_axes(last, after, {name: _ratio(name, base, target) for name in waiting})
        if numbers := _only_numbers(last, after, waiting, base, target):
            alone |= dict.fromkeys(waiting, numbers)
        if _only_deepens(last, after):
            deepening += waiting
            deepened |= set(growing_lists(last.shapes, after.shapes))
        last, waiting = after, []
    lists = growing_lists(first.shapes, last.shapes)
    counterparts = {name: counterparts_of(name, first, lists) for name in last.shapes}
    row_sizes = {}
    for row in last.table:
        where = in_list(row.name, lists)
        blocks = 1.0 if where is None else lists[where][1] / lists[where][0]
        module = last.model.get_submodule(row.name.rpartition(".")[0])
        row_sizes[row.name] = size_of(row, first[counterparts[row.name][0]], module, blocks)
    check_embeddings(last.table, {n: first[c[0]] for n, c in counterparts.items()}, row_sizes)
    grown = Growth(
        first, last, row_sizes, counterparts, lists, tuple(deepening), alone, frozenset(differ)
    )
    _check_lists(grown, deepened)
    return grown


def blueprint(
    build: Build,
    sizes: Mapping[str, Any],
    overrides: Overrides | None,
    like: RoleTable | None = None,
) -> Blueprint:
    """Build a model on the meta device."""
    call = f"build({', '.join(f'{key}={value!r}' for key, value in sizes.items())})"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build(**sizes)
    except Exception as error:
        raise ValueError(
            f"got {type(error).__name__} from {call} on the meta device ({error}); expected a "
            "function that makes a model of any sizes and reads no values of its tensors, such as "
            "`lambda width: Model(width)`; load weights and move the model afterwards"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"got a {type(model).__name__} from {call}, expected an nn.Module")
    if lazy := [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]:
        raise ValueError(
            f"got {lazy[0]} without a shape from {call}, of a lazy module; expected layers with "
            "sizes of their own, such as nn.Linear in place of nn.LazyLinear"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few matrices are no reason to worry here
        return Blueprint(model, all_roles(model, overrides, like=like))


def growing_lists(base: Iterable[str], target: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the lists of layers that are longer or shorter at the target, with both lengths.

    Args:
        base, target: names of parameters or modules.
    """
    before, after = _members(base), _members(target)
    lists = {
        name: (len(before[name]), len(after[name]))
        for name in after
        if name in before and before[name] != after[name]
    }
    for name, (few, many) in lists.items():
        got = f"got {name} with {few} members at the base and {many} at the target, expected"
        if "expert" in name.lower():
            raise ValueError(
                f"{got} as many experts; only growth of the number of layers is covered by a "
                "published rule"
            )
        if re.search(r"(^|[._])heads?$", name):
            raise ValueError(
                f"{got} as many; a head is a part of a layer and no layer: use one Linear for all "
                "attention heads, and cut its output into heads"
            )
    return lists


def _check_lists(growth: Growth, deepened: set[str]) -> None:
    """Raise for lists of parts of a layer, which become more while no output of theirs grows."""
    for where in set(growth.lists) - deepened:
        members = [s for name, s in growth.sizes.items() if in_list(name, {where: None})]
        grows = any(s.fan_in != 1 or s.fan_out != 1 for s in members)
        if grows and all((s.fan_out - 1) * (s.blocks - 1) <= 0 for s in members):
            few, many = growth.lists[where]
            raise ValueError(
                f"got {where} with {few} members at the base and {many} at the target, whose "
                "outputs do not grow, so that they are parts of a layer and no layers; expected "
                "one Linear for all of them (all attention heads), whose output is cut into parts"
            )


def _check_sequentials(before: Blueprint, after: Blueprint) -> None:
    """Raise for a Sequential that grows in its middle, so that the layers behind change places."""
    for where in growing_lists(before.shapes, after.shapes):
        if not isinstance(after.model.get_submodule(where), nn.Sequential):
            continue
        old, new = (
            [_form(layer) for layer in side.model.get_submodule(where).children() if _form(layer)]
            for side in (before, after)
        )
        shorter, longer = sorted((old, new), key=len)
        if shorter[-1] == longer[-1] != longer[len(shorter) - 1]:
            raise ValueError(
                f"got {where or 'the model'}, an nn.Sequential in which other layers stand behind "
                f"the blocks, with {len(old)} layers at the base and {len(new)} at the target, so "
                "that the same layer has two names; expected the blocks in a module of their own, "
                "such as nn.Sequential(first, nn.Sequential(*blocks), last)"
            )


def _form(layer: nn.Module) -> list[tuple[str, ...]]:
    """The type of a layer with the shape of every parameter; empty for one without parameters."""
    kind = type(layer).__qualname__
    return [(kind, name, str(tuple(p.shape))) for name, p in layer.named_parameters()]


def _members(names: Iterable[str]) -> dict[str, set[str]]:
    """The numbered members of each module."""
    members = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                members[".".join(parts[:i])].add(part)
    return members


def in_list(name: str, lists: Mapping[str, Any]) -> str | None:
    """Return the growing list that a parameter or module is in."""
    return next((path for path in lists if _index(name, path)), None)


def _index(name: str, where: str) -> re.Match[str] | None:
    """The index of the layer that the name is in."""
    return re.match(
        rf"({re.escape(where)}[.])(\d+)(?=[.]|$)" if where else r"()(\d+)(?=[.]|$)", name
    )


def pattern_of(name: str, lists: Mapping[str, Any]) -> str:
    """Return the name with a star for the index of its layer, where the number of layers grows."""
    for where in lists:
        if index := _index(name, where):
            return f"{index[1]}*{name[index.end() :]}"
    return name


def counterparts_of(name: str, base: Blueprint, lists: Mapping[str, Any]) -> list[str]:
    """Return the parameters of the base that do what this one does at the target."""
    pattern = pattern_of(name, lists)
    counterparts = [other for other in base.shapes if pattern_of(other, lists) == pattern]
    if not counterparts:
        raise ValueError(
            f"got {name} at the target, and nothing like it at the base; expected models that "
            "differ in widths and in the number of layers alone, with the layers in a list"
        )
    shapes = base.shapes
    if name in counterparts and len({shapes[other] for other in counterparts}) > 1:
        return [name]
    # The first layer of a stage may have another shape; new layers repeat the last one.
    return [other for other in counterparts if shapes[other] == shapes[counterparts[-1]]]


def _only_numbers(
    before: Blueprint,
    after: Blueprint,
    keys: Sequence[str],
    base: Mapping[str, Any],
    target: Mapping[str, Any],
) -> set[str]:
    """Names of the numbers that modules keep and that change, if nothing else does."""
    old, new = before.model, after.model
    if tensor_shapes(old) != tensor_shapes(new) or module_names(old) != module_names(new):
        return set()
    differences = changed(settings(old), settings(new))
    if not differences:
        sizes = " and ".join(f"{key}={base[key]!r} and {target[key]!r}" for key in keys)
        raise ValueError(
            f"got {sizes}, which make the same model; expected sizes that change a shape, the "
            "number of modules or a number that a module keeps (self.heads = heads). Layers that "
            "are counted in a loop belong in an nn.ModuleList"
        )
    return {name.rpartition(".")[2] for name in differences}


def _only_deepens(before: Blueprint, after: Blueprint) -> bool:
    lists = growing_lists(before.shapes, after.shapes)
    old = {pattern_of(name, lists): shape for name, shape in before.shapes.items()}
    return bool(lists) and all(
        old.get(pattern_of(name, lists)) == shape for name, shape in after.shapes.items()
    )


def _ratio(key: str, base: Mapping[str, Any], target: Mapping[str, Any]) -> float:
    for value in (base[key], target[key]):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(
                f"got {key}={base[key]!r} at the base and {target[key]!r} at the target, expected "
                "positive numbers; what is no size belongs inside `build`"
            )
    return float(target[key] / base[key])


def _check_axes(before: Blueprint, after: Blueprint, ratios: Mapping[str, float]) -> None:
    """Raise unless every axis grows as a product of the sizes that changed, or not at all."""
    lists = growing_lists(before.shapes, after.shapes)
    allowed = [
        math.prod(ratio**power for ratio, power in zip(ratios.values(), powers, strict=True))
        for powers in itertools.product((-1, 0, 1), repeat=len(ratios))
    ]
    for name, shape in after.shapes.items():
        old = before.shapes[counterparts_of(name, before, lists)[0]]
        if len(old) != len(shape):
            raise ValueError(f"got {name} with {len(shape)} axes, and {len(old)} before it grew")
        for axis, (n, m) in enumerate(zip(shape, old, strict=True)):
            rounding = [max(min(r, n / 4), 0.05 * n) for r in allowed]  # of sizes as 8 D // 3
            near = (abs(n - r * m) <= e for r, e in zip(allowed, rounding, strict=True) if r != 1)
            if n != m and not any(near):
                sizes = ", ".join(f"{key} times {ratio:.4g}" for key, ratio in ratios.items())
                raise ValueError(
                    f"got axis {axis} of {name} growing from {m} to {n} with {sizes}, expected "
                    "growth in proportion or none; make it a multiple of the size, or keep it fixed"
                )
