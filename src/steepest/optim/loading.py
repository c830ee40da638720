"""A state belongs to its parameter: matched by name, and checked before anything changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steepest.optim.checks import check_settings
from steepest.optim.memory import Memory, memory_of, of_this_package
from steepest.optim.parameter_groups import name_of
from steepest.optim.precision import memory_dtype
from steepest.optim.settings import modern
from steepest.optim.stored_groups import override_for

if TYPE_CHECKING:
    from steepest.optim.steepest_descent import SteepestDescent

StoredGroup = dict[str, Any]
_OF_THE_MODEL = ("views", "stacks")  # how parameters are matrices stays as constructed
_WIDEST = {"momentum": 0.5, "length": "adam", "sides": "both", "max_side": None}
"""Settings with which a class keeps the most: what an earlier setting has left is its own too."""


class Loading:
    """One call of `load_state_dict`: `check` before torch changes anything, `convert` after.

    Both are hooks, so that what a user's hooks return is checked, and what they change stays.
    """

    def __init__(self, optimizer: SteepestDescent):
        self._optimizer = optimizer
        self._groups: list[StoredGroup] = optimizer.param_groups
        self._states: list[tuple[StoredGroup, Tensor, Mapping[str, Any], Memory]] = []

    def check(self, _: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state with parameters in the order of the optimizer; raise if it is wrong."""
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
            raise ValueError(
                "got no state of an optimizer, expected the keys 'state' and 'param_groups'; pass "
                "what optimizer.state_dict() returned"
            )
        saved = [modern(group, warn=False) for group in state_dict["param_groups"]]
        states = state_dict["state"].values()
        of_matrices = any("." in str(key) for state in states for key in state)
        _check_roles(self._groups, saved, of_matrices)
        _check_groups(self._groups, saved)
        ordered = []
        for i, (own, group) in enumerate(zip(self._groups, saved, strict=True)):
            group = _in_order(own, group, i, self._optimizer.checks)
            ordered.append(group)
            merged = _merged(own, group)
            check_settings(merged, self._optimizer.checks)
            self._check_states(merged, group["params"], state_dict["state"])
        return {**state_dict, "param_groups": ordered}

    def _check_states(
        self, group: StoredGroup, ids: list[Any], states: Mapping[Any, Mapping[str, Any]]
    ) -> None:
        known: dict[tuple[Any, ...], Memory] = {}
        for k, (i, p) in enumerate(zip(ids, group["params"], strict=True)):
            state = states.get(i)
            if state is None:
                continue
            if not isinstance(state, Mapping):
                raise ValueError(
                    f"got the state {state!r} for the {name_of(group, k)}, expected a dictionary"
                )
            key = (p.shape, p.dtype, group.get("views") and group["views"][k])
            if key not in known:
                known[key] = memory_of(self._optimizer, group, k)
            if self._check_state(group, k, state, known[key], untouched=isinstance(i, str)):
                self._states.append((group, p, state, known[key]))

    def _check_state(
        self, group: StoredGroup, k: int, state: Mapping[str, Any], memory: Memory, untouched: bool
    ) -> bool:
        """Whether the state is to be loaded; raises if it does not fit."""
        for key, expected in memory.items():
            if key in state and (problem := _problem(expected.shape, state[key])):
                raise ValueError(
                    f"got a state in which the memory {key!r} of the {name_of(group, k)} "
                    f"{problem}; nothing was loaded. Leave the state of that parameter out to "
                    "start its memory anew"
                )
        own = memory
        if any(isinstance(value, Tensor) and key not in memory for key, value in state.items()):
            own = {**memory, **self._widest(group, k)}
        foreign = [k for k, value in state.items() if isinstance(value, Tensor) and k not in own]
        if foreign and of_this_package(self._optimizer):
            raise ValueError(
                f"got a state with the memory {foreign[0]!r} for the {name_of(group, k)}, which "
                f"{type(self._optimizer).__name__} does not keep; nothing was loaded. Expected "
                "the state of the same optimizer"
            )
        missing = [key for key in memory if key not in state]
        if not missing or (not state and untouched):
            return True
        raise ValueError(
            f"got a state without the memory {missing[0]!r} of the {name_of(group, k)}; nothing "
            f"was loaded. Expected the state of {type(self._optimizer).__name__}; leave the state "
            "of that parameter out to start its memory anew"
        )

    def _widest(self, group: StoredGroup, k: int) -> Memory:
        widest = {key: value for key, value in _WIDEST.items() if key in group}
        return memory_of(self._optimizer, {**group, **widest}, k)

    def convert(self, _: Any = None) -> None:
        """Give memory its own types, as torch has given it those of the parameters."""
        for own, loaded in zip(self._groups, self._optimizer.param_groups, strict=True):
            for key in own.keys() - loaded.keys() | own.keys() & set(_OF_THE_MODEL):
                loaded[key] = own[key]
        for group, p, state, memory in self._states:
            mine = self._optimizer.state[p]
            for key, value in state.items():
                if key in memory:
                    mine[key] = _converted(value, p, memory[key].shape, memory[key].dtype)
                elif isinstance(value, (str, bytes)):  # which torch takes for a list
                    mine[key] = value
                elif isinstance(value, Tensor) and "." in key:  # of a matrix as a whole
                    mine[key] = _converted(value, p, value.shape, value.dtype)
                elif isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                    mine[key] = _converted(value, p, value.shape, memory_dtype(group, p))


def _problem(shape: torch.Size, value: Any) -> str:
    """What is wrong with a value for a memory of this shape; its type is converted."""
    if shape == () and isinstance(value, (int, float)):
        return ""
    if not isinstance(value, Tensor):
        return f"is {value!r}, expected a tensor"
    if value.shape != shape and not (shape == () and value.numel() == 1):
        return f"has the shape {tuple(value.shape)}, expected {tuple(shape)}"
    if value.is_complex() or (shape and not value.is_floating_point()):
        return f"is of {value.dtype}, expected a real floating-point type"
    return ""


def _converted(value: Any, p: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A copy beside the parameter; a counter stays where it is."""
    value = torch.as_tensor(value)
    counter = value.numel() == 1 and not dtype.is_floating_point
    return value.to(value.device if counter else p.device, dtype, copy=True).reshape(shape)


def _merged(own: StoredGroup, loaded: StoredGroup) -> StoredGroup:
    """The group as it will be: settings of the state, and what the state does not have."""
    kept = {key: own[key] for key in ("params", *_OF_THE_MODEL) if key in own}
    return {**own, **loaded, **kept}


def _check_groups(groups: list[StoredGroup], saved: list[StoredGroup]) -> None:
    """Raise unless there are as many groups, of the same geometries and sizes."""
    if len(groups) != len(saved):
        raise ValueError(
            f"got a state with another number of parameter groups, {len(saved)}, expected "
            f"{len(groups)}; build the optimizer as it was when it was saved"
        )
    for i, (own, group) in enumerate(zip(groups, saved, strict=True)):
        if group.get("geometry") != own["geometry"]:
            raise ValueError(
                f"got a state whose group {i} has the geometry {group.get('geometry')!r}, expected "
                f"{own['geometry']!r}; build the optimizer as it was when it was saved"
            )
        if len(own["params"]) != len(group["params"]):
            raise ValueError(
                f"got a state whose group {i} has another size, {len(group['params'])} parameters, "
                f"expected {len(own['params'])}; build the optimizer as it was when it was saved"
                f""
            )


def _check_roles(groups: list[StoredGroup], saved: list[StoredGroup], whole: bool) -> None:
    """Raise if other parameters are matrices; with `whole`, also if they are other matrices."""
    own = {_plain(name): name for group in groups for name in _names(group) or ()}
    stored = [
        {**group, "param_names": [own.get(_plain(name), name) for name in _names(group) or ()]}
        for group in saved
    ]
    if call := override_for(groups, stored, views=whole):
        raise ValueError(
            "got a state in which other parameters are matrices than in this optimizer, "
            f"expected the roles it was saved with; pass {call} in place of the model"
        )


def _names(group: StoredGroup) -> list[str] | None:
    """Names of the parameters of a group, where they are known."""
    params = group["params"]
    if params and all(isinstance(p, str) for p in params):
        return list(params)  # as torch.distributed.checkpoint has it
    names = group.get("param_names")
    return list(names) if names is not None and len(names) == len(params) else None


def _unwrapped(names: list[str]) -> list[str]:
    """The names without the prefixes that all of them have from a wrapper."""
    while names and all(name.startswith(("module.", "_orig_mod.")) for name in names):
        names = [name.partition(".")[2] for name in names]
    return names


def _plain(name: str) -> str:
    """The name without what wrappers add."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _in_order(
    own: StoredGroup, saved: StoredGroup, i: int, settings: Container[str]
) -> StoredGroup:
    """The group of a state with its parameters in the order of the optimizer's, matched by name."""
    saved = {
        key: value
        for key, value in saved.items()
        if key in own or not (key in settings or key in _OF_THE_MODEL)  # settings of others
    }
    names, there = _names(own), _names(saved)
    if names is None or there is None:
        return saved
    if set(names) != set(there):
        names, there = _unwrapped(names), _unwrapped(there)
    if set(names) != set(there):
        names, there = [_plain(name) for name in names], [_plain(name) for name in there]
    twice = [name for name, count in Counter(there).items() if count > 1]
    if twice or set(names) != set(there):
        lacking = sorted(set(names) - set(there)) or sorted(set(there) - set(names)) or twice
        raise ValueError(
            f"got a state whose group {i} has not the same parameters as the optimizer's, the "
            f"first that is on one side only is {lacking[0]!r}; nothing was loaded. Build the "
            "optimizer as it was when it was saved, or rename in a hook "
            '(register_load_state_dict_pre_hook); without "param_names" in the groups of the '
            "state, order decides"
        )
    positions = {name: j for j, name in enumerate(there)}
    params = [saved["params"][positions[name]] for name in names]
    return {**saved, "params": params, "param_names": list(own["param_names"])}
