"""The types of parameters, of memory, and of steps.

One policy for all groups of all optimizers, AdamW's included:

| parameters             | an entry for each weight | factors, their roots, directions |
|------------------------|--------------------------|----------------------------------|
| float64                | float64                  | float64                          |
| float32                | float32                  | float32                          |
| bfloat16               | bfloat16                 | float32                          |
| float16                | float32                  | float32                          |
| any, with state_dtype  | state_dtype              | state_dtype                      |

The second column is for momenta and second moments. Squares of usual gradients are zero in float16,
so nothing is kept in it. Directions without memory are computed in the type of the gradient, of
float16 in float32. A step is added to the weights in the wider of its type and theirs; a rate of 0
changes no bit. `torch.autocast` around a step changes nothing.

Parameters of any other type cannot be trained. Frozen ones are left out of the groups, such as the
quantized base of an adapter, in integers or float8. Others are refused when an optimizer is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def memory_dtype(group: Mapping[str, Any], p: Tensor) -> torch.dtype:
    """Return the type of momenta and second moments of `p`."""
    own = torch.float32 if p.dtype == torch.float16 else p.dtype
    return cast(torch.dtype, group["state_dtype"] or own)


def factor_dtype(group: Mapping[str, Any], p: Tensor) -> torch.dtype:
    """Return the type of the factors of `p` and of its directions."""
    return full(memory_dtype(group, p))


def gradient_dtype(group: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Return the type whose range gradients must keep to: that of the memory if it is smaller."""
    return torch.float32 if group["state_dtype"] == torch.float32 else full(dtype)


def full(dtype: torch.dtype) -> torch.dtype:
    """Return the type, or float32 for half precision."""
    return torch.float32 if dtype.itemsize < 4 else dtype


@cache
def adam_eps(eps: float, dtype: torch.dtype) -> float:
    """Return ε of Adam, at least as large as a gradient whose square underflows, 1e-19 in float32.

    With ε = 0 such an entry would move by any length, and one without a gradient by 0 / 0.

    >>> adam_eps(1e-8, torch.float32), adam_eps(0.0, torch.float32)
    (1e-08, 1.0842021724855044e-19)
    """
    return max(eps, float(torch.finfo(full(dtype)).tiny ** 0.5))


def is_frozen_base(p: Any) -> bool:
    """Whether `p` is a frozen parameter of a type that cannot be trained."""
    return isinstance(p, Tensor) and p.dtype not in TRAINABLE and not p.requires_grad


def without_frozen_base(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group without such parameters, and what it says of each of them."""
    if isinstance(group["params"], Tensor | set):  # a set is refused by torch
        return group
    params = list(group["params"])
    kept = [not is_frozen_base(p[1] if isinstance(p, tuple) else p) for p in params]
    group = {**group, "params": params}
    if all(kept):
        return group
    for key in ("params", "views", "stacks"):
        if isinstance(group.get(key), list) and len(group[key]) == len(kept):
            group[key] = [value for value, keep in zip(group[key], kept, strict=True) if keep]
    return group
