"""What an optimizer keeps for a parameter: names, shapes and types, described once.

The description checks a state that is loaded (`loading`) and the memory at each step (`fitting`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steepest.optim.matrices import Matrices

if TYPE_CHECKING:
    from steepest.optim.steepest_descent import SteepestDescent


class Kept(NamedTuple):
    """One tensor of the memory of a parameter.

    Attributes:
        shape, dtype: its shape and type.
        beside: whether it is on the device of the parameter; a counter can be anywhere.
    """

    shape: torch.Size
    dtype: torch.dtype
    beside: bool

    def problem(self, value: Any, device: torch.device | None = None) -> str:
        """Return what is wrong with a value, or an empty string; any device is right for None."""
        if not isinstance(value, Tensor):
            return f"is {value!r}, expected a tensor"
        if value.shape != self.shape:
            return f"has the shape {tuple(value.shape)}, expected {tuple(self.shape)}"
        if value.dtype != self.dtype:
            return f"is of {value.dtype}, expected {self.dtype}"
        if device is not None and self.beside and value.device != device:
            return f"is on {value.device}, expected {device}"
        return ""


Memory = Mapping[str, Kept]


def memory_of(optimizer: SteepestDescent, group: Mapping[str, Any], k: int) -> Memory:
    """Return what `optimizer` keeps for parameter `k` of a group, by name.

    It is what a first step makes for a parameter without data.
    """
    p = group["params"][k]
    empty = torch.empty(p.shape, dtype=p.dtype, device="meta")
    empty.grad = torch.empty_like(empty)
    views = group.get("views")
    alone = {**group, "params": [empty], "views": views and [views[k]], "stacks": None}
    try:
        optimizer.make_memory(alone, Matrices(alone))
    except Exception:
        # A subclass that looks at numbers, which there are none of; what it made so far is right.
        if of_this_package(optimizer):
            raise
    finally:
        made = optimizer.state.pop(empty, {})
    return {key: Kept(t.shape, t.dtype, t.is_meta) for key, t in made.items()}


def without_memory(optimizer: SteepestDescent) -> list[int]:
    """Return the positions of parameters that the optimizer keeps nothing for.

    An empty state of any other comes from looking at it, and is removed.
    """
    params = [(group, k) for group in optimizer.param_groups for k in range(len(group["params"]))]
    empty = []
    for i, (group, k) in enumerate(params):
        p = group["params"][k]
        if optimizer.state.get(p):
            continue
        if not memory_of(optimizer, group, k):
            empty.append(i)
        else:
            optimizer.state.pop(p, None)
    return empty


def of_this_package(optimizer: SteepestDescent) -> bool:
    """Whether the class is one of this package, whose memory is known, and no subclass of them."""
    return type(optimizer).__module__.partition(".")[0] == __name__.partition(".")[0]
