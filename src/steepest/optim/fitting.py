"""Before a step: whether settings, gradients and memory fit the parameters of a group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from steepest.optim.checks import check_setting, check_settings
from steepest.optim.matrices import NOTHING, Matrices
from steepest.optim.memory import Memory, memory_of
from steepest.optim.parameter_groups import name_of
from steepest.optim.precision import gradient_dtype
from steepest.optim.record import acts_on_entries
from steepest.optim.settings import has_old_names, modern

if TYPE_CHECKING:
    from steepest.optim.steepest_descent import SteepestDescent

_OFTEN = {"lr", "weight_decay", "momentum", "betas", "step_count"}  # changed, and not for memory
_ABSENT = object()


class _Seen:
    """A parameter and its memory as the step before left them."""

    __slots__ = ("dtype", "kept", "names", "parameter", "shape", "sizes", "values", "versions")

    def __init__(self, p: Tensor, kept: Mapping[str, Any], memory: Memory):
        self.parameter, self.shape, self.dtype = p, p.shape, p.dtype
        self.kept, self.names = kept, tuple(memory)
        self.values: list[Tensor] = []
        self.record()

    def record(self) -> None:
        """Note the memory: its tensors, and how often each was written to in place."""
        if not self.values or not all(map(is_, map(self.kept.get, self.names), self.values)):
            self.values = [self.kept[name] for name in self.names]
            self.sizes = [value.numel() for value in self.values]
        self.versions = [value._version for value in self.values]

    def is_as_it_was(self, p: Tensor, gradient: Tensor, kept: Mapping[str, Any]) -> bool:
        """Whether nothing but its numbers has changed, and those by no one else."""
        values = self.values
        return (
            p is self.parameter
            and kept is self.kept
            and p.dtype is self.dtype
            and p.shape == self.shape
            and gradient.shape == self.shape
            and all(map(is_, map(self.kept.get, self.names), values))
            and [value._version for value in values] == self.versions
            and [value.numel() for value in values] == self.sizes
        )


class Fit:
    """What was checked of a group, so that the next step only looks at what has changed."""

    def __init__(self, group: dict[str, Any], checked: bool = False):
        self.group = group
        self._settings: dict[str, Any] = dict(group) if checked else {}
        self._shapes: dict[int, tuple[Any, torch.Size]] = {}  # that a view was made for
        self._note_shapes()
        self._seen: list[_Seen | None] = []
        self._device: torch.device | None = None
        self.matrices: Matrices | None = None
        self._memory: dict[tuple[Any, ...], Memory] = {}
        self._keys: tuple[str, ...] | None = None
        self._optional: set[str] = set()  # what a setting changed in the middle asks for

    def move_to(self, group: dict[str, Any]) -> None:
        """Go on with the group that a loaded state has put in the place of this one."""
        self.group, self._settings, self._keys = group, {}, None
        self._forget()

    def _note_shapes(self) -> None:
        """Note for which shape each view was made, where that is new."""
        for view, p in zip(self.group.get("views") or (), self.group["params"], strict=False):
            if view is not None and id(view) not in self._shapes:
                self._shapes[id(view)] = view, p.shape

    def _forget(self) -> None:
        self._memory.clear()
        self._seen.clear()
        self.matrices = None

    def check(self, optimizer: SteepestDescent) -> bool:
        """Raise a `ValueError`, with the name of a setting or parameter, for what does not fit.

        Return whether all is as it was in the step before, so that no memory is to be made.
        """
        self._check_settings(optimizer)
        params, seen, state, same = self.group["params"], self._seen, optimizer.state, True
        if params and self._device != params[0].device:  # a model moves as a whole
            self._device = params[0].device
            seen.clear()
        if len(seen) != len(params):
            same = False
            del seen[len(params) :]
            seen += [None] * (len(params) - len(seen))
        for k, p in enumerate(params):
            gradient, known = p.grad, seen[k]
            if gradient is None:
                if known is not None and known.parameter is not p:
                    same, seen[k] = False, None
                continue
            kept = state.get(p, NOTHING)
            if known is None or not known.is_as_it_was(p, gradient, kept):
                same = False
                seen[k] = self._look(optimizer, k, p, gradient, kept)
        return same

    def record(self) -> None:
        """Note the memory as this step has left it; what writes to it later is checked again."""
        views, work = self.group.get("views"), self.matrices
        if work is None:
            return
        for k, p, kept in zip(work.places, work.params, work.kept, strict=True):
            known = self._seen[k]
            if known is not None:
                known.record()
            else:
                self._seen[k] = _seen(p, kept, self._memory[p.shape, p.dtype, views and views[k]])

    def _look(
        self,
        optimizer: SteepestDescent,
        k: int,
        p: Tensor,
        gradient: Tensor,
        kept: Mapping[str, Any],
    ) -> _Seen | None:
        """Check a parameter, its gradient and memory; return them, if no memory is to be made."""
        group, shape, views = self.group, p.shape, self.group.get("views")
        if gradient.shape != shape:
            raise ValueError(
                f"got a gradient of shape {tuple(gradient.shape)} for the {name_of(group, k)}, "
                f"which has the shape {tuple(shape)}; nothing was updated. Take the gradient "
                "anew after changing a parameter"
            )
        if gradient.dtype != p.dtype:
            _check_types(group, k, gradient)
        view = None if views is None else views[k]
        if view is not None and shape != (before := self._shapes[id(view)][1]):
            raise ValueError(
                f"got the {name_of(group, k)} with the shape {tuple(shape)}, which had the "
                f"shape {tuple(before)} when it was given to the optimizer; nothing was updated. "
                "Make the optimizer anew"
            )
        memory = self._memory.get(key := (shape, p.dtype, views and views[k]))
        if memory is None:
            memory = self._memory[key] = memory_of(optimizer, group, k)
        self._check_memory(k, p, kept, memory)
        return _seen(p, kept, memory)

    def _check_settings(self, optimizer: SteepestDescent) -> None:
        group, seen = self.group, self._settings
        if has_old_names(group):
            renamed = modern(group)
            group.clear()
            group.update(renamed)
        changed = [key for key, value in group.items() if seen.get(key, _ABSENT) is not value]
        if (changed and changed != ["step_count"]) or len(group) != len(seen):
            if missing := optimizer.settings_of(group) - group.keys():
                raise ValueError(
                    f"got a group without {sorted(missing)}, expected all settings; add groups "
                    "with add_param_group"
                )
            if group["geometry"] not in optimizer.geometries:
                raise ValueError(
                    f"got a group with geometry={group['geometry']!r}, expected one of "
                    f"{', '.join(optimizer.geometries)}; nothing was updated"
                )
            if seen and "geometry" in changed:
                raise ValueError(
                    f"got a group whose geometry has become {group['geometry']!r}, expected "
                    f"{seen['geometry']!r}; make the optimizer anew"
                )
            check_settings(group, optimizer.checks, changed)
            if not _OFTEN.issuperset(changed):
                self._forget()
        if isinstance(group["lr"], Tensor):  # whose number can change
            check_setting("lr", group["lr"], optimizer.checks)
        if not acts_on_entries(group):
            self._check_matrices(optimizer)
        if changed or len(group) != len(seen):
            self._settings = dict(group)

    def _check_matrices(self, optimizer: SteepestDescent) -> None:
        params, views = self.group["params"], self.group["views"]
        if len(views) != len(params):
            raise ValueError(
                f"got {len(params)} parameters in a group that was made with {len(views)}; "
                "nothing was updated. Add parameters with add_param_group"
            )
        self._note_shapes()
        keys = optimizer.entry_memory(self.group)
        if keys != self._keys:
            self._optional |= set(keys) - set(keys if self._keys is None else self._keys)
            self._keys = keys
            self._forget()

    def _check_memory(self, k: int, p: Tensor, kept: Mapping[str, Any], memory: Memory) -> None:
        missing = []
        for name, expected in memory.items():
            value = kept.get(name, _ABSENT)
            if value is _ABSENT:
                missing.append(name)
            elif problem := expected.problem(value, p.device):
                raise ValueError(
                    f"the memory {name!r} of the {name_of(self.group, k)} {problem}; nothing was "
                    "updated. optimizer.load_state_dict(optimizer.state_dict()) converts types "
                    "and devices; after a change of shape, delete optimizer.state[parameter]"
                )
            elif broken := _broken(name, value):
                raise FloatingPointError(
                    f"the memory {name!r} of the {name_of(self.group, k)} has {broken}; nothing "
                    "was updated. Load an earlier state, or delete optimizer.state[parameter] to "
                    "start its memory anew"
                )
        missing = [name for name in missing if name not in self._optional]
        if missing and len(missing) < len(memory):
            raise ValueError(
                f"the {name_of(self.group, k)} has lost its memory {missing[0]!r}; nothing was "
                "updated. Delete optimizer.state[parameter] to start its memory anew"
            )


def _seen(p: Tensor, kept: Mapping[str, Any], memory: Memory) -> _Seen | None:
    """What to remember of a parameter; nothing if some of its memory is still to be made."""
    return _Seen(p, kept, memory) if kept.keys() >= memory.keys() else None


def _broken(name: str, value: Tensor) -> str:
    """What is wrong with the numbers of a memory, or an empty string."""
    if not value.is_floating_point() or not value.numel() or value.is_meta:
        return ""
    low, high = torch.aminmax(value)
    if not bool((high - low).isfinite()) and not bool(value.isfinite().all()):
        return "NaN or infinite entries"
    return "negative entries" if name == "exp_avg_sq" and bool(low < 0) else ""


def _check_types(group: Mapping[str, Any], k: int, gradient: Tensor) -> None:
    types = gradient.dtype, group["params"][k].dtype
    if torch.float64 in types:
        raise ValueError(
            f"got a gradient of {types[0]} for the {name_of(group, k)} of {types[1]}; nothing was "
            "updated. Take the gradient anew after changing the type of a parameter"
        )


def broken_gradients(
    optimizer: SteepestDescent, work: Iterable[Matrices], largest: Sequence[float]
) -> str:
    """Return what is wrong with gradients that are beyond what their groups can work with.

    Args:
        optimizer: whose groups they are.
        work: the groups as matrices.
        largest: the largest entry of each gradient.

    Returns:
        An empty string if nothing is wrong.
    """
    limits: list[float] = []
    for matrices in work:
        known = {
            dtype: optimizer.largest_entry(matrices.group, gradient_dtype(matrices.group, dtype))
            for dtype in set(matrices.dtypes)
        }
        limits += [known[dtype] for dtype in matrices.dtypes]
    broken = [
        i
        for i, (limit, entry) in enumerate(zip(limits, largest, strict=True))
        if not entry <= limit  # so that NaN is broken too
    ]
    if not broken:
        return ""
    names = (matrices.name(i) for matrices in work for i in range(len(matrices.gradients)))
    name, entry = next(islice(names, broken[0], None)), largest[broken[0]]
    problem = "NaN or infinite entries"
    if math.isfinite(entry):
        problem = f"entries up to {entry:.0e}, whose squares overflow,"
    return (
        f"got {problem} in {len(broken)} of {len(largest)} gradients, the first in {name}; "
        'nothing was updated. Look at the loss, or pass nonfinite="skip" to leave such steps out'
    )


def largest_entries(gradients: list[Tensor]) -> list[float]:
    """Return the largest absolute entry of each gradient; waits once for the device."""
    if not gradients:
        return []
    devices = {G.device for G in gradients}
    if all(device.type == "cpu" for device in devices):  # where a norm takes twenty times as long
        low, high = zip(*map(torch.aminmax, gradients), strict=True)
        largest = torch.maximum(torch.stack(high), -torch.stack(low))
    else:
        norms = torch._foreach_norm(gradients, ord=math.inf)
        largest = torch.stack([norm.to(gradients[0].device) for norm in norms])
    return cast(list[float], largest.tolist())
