"""An optimizer of the user's for the matrices and AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class SplitOptimizer(Optimizer):
    """Several optimizers, each with parameters of its own, as one.

    `param_groups` are the very groups of the parts, so schedules and settings reach them. `state`
    shows what all of them keep. The state dict has the form of every `torch.optim` optimizer, with
    parameters numbered through. What else the first part puts into its own is kept beside that.

    Args:
        parts: optimizers, made already. Only the first may keep more than what is of parameters.

    >>> weight, bias = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    >>> both = SplitOptimizer([torch.optim.SGD([weight], 0.1), torch.optim.AdamW([bias], 0.2)])
    >>> [group["lr"] for group in both.param_groups]
    [0.1, 0.2]
    """

    def __init__(self, parts: Sequence[Optimizer]):
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """What all parts keep, by parameter."""
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in self.parts:
            state.update(part.state)
        return state

    @state.setter
    def state(self, state: Any) -> None:
        """Nothing: every part keeps its own."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Show a group of one of the parts.

        Raises:
            NotImplementedError: for any other group.
        """
        if not any(param_group is group for part in self.parts for group in part.param_groups):
            raise NotImplementedError(
                "got a group that no part of this optimizer has; make the optimizer again, with "
                "all parameters"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the step of every part; a closure is called once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states and groups of all parts, with parameters numbered through."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        more: dict[str, Any] = {}
        first = 0
        for part in self.parts:
            own = part.state_dict()
            state |= {_moved(key, first): value for key, value in own.pop("state").items()}
            groups += [
                {**group, "params": [_moved(key, first) for key in group["params"]]}
                for group in own.pop("param_groups")
            ]
            first += _count(part)
            more |= own
        merged = {"state": state, "param_groups": groups, **more}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, merged)
            merged = merged if changed is None else changed
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: for a state of other groups or parameters.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        more = dict(state_dict)
        state, groups = more.pop("state"), list(more.pop("param_groups"))
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(
                f"got a state of groups with {sizes} parameters, expected those of this optimizer, "
                f"{[len(group['params']) for group in self.param_groups]}"
            )
        first = 0
        for part in self.parts:
            own = [groups.pop(0) for _ in part.param_groups]
            keys = {key for group in own for key in group["params"]}
            part.load_state_dict(
                {
                    "state": {
                        _moved(key, -first): value
                        for key, value in state.items()
                        if key in keys or (first == 0 and not isinstance(key, int))
                    },
                    "param_groups": [
                        {**group, "params": [_moved(key, -first) for key in group["params"]]}
                        for group in own
                    ],
                    **(more if first == 0 else {}),
                }
            )
            first += _count(part)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs."""
        return {"defaults": self.defaults, "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be a copy."""
        super().__setstate__(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _moved(key: Any, by: int) -> Any:
    """The number of a parameter among those of more parts; other keys as they are."""
    return key + by if isinstance(key, int) else key


def _count(part: Optimizer) -> int:
    return sum(len(group["params"]) for group in part.param_groups)
