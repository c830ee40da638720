"""Copies of optimizers that step without a trace on the originals."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch.optim import Optimizer


def copies_of(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Return copies with parameters of their own; the copies share what the originals share.

    torch copies groups and state alone. What else an optimizer keeps is added, but for `step` where
    a scheduler wrapped it, which ties it to the original. Hooks and gradients are not copied.

    >>> import torch
    >>> original = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    >>> twin, = copies_of([original])
    >>> p = twin.param_groups[0]["params"][0]
    >>> p.grad = torch.ones(2)
    >>> twin.step()
    >>> p.tolist(), original.param_groups[0]["params"][0].tolist()
    ([0.8999999761581421, 0.8999999761581421], [1.0, 1.0])
    """
    memo: dict[int, Any] = {}
    copies = [deepcopy(optimizer, memo) for optimizer in optimizers]
    for optimizer, twin in zip(optimizers, copies, strict=True):
        for key in vars(optimizer).keys() - vars(twin).keys() - {"step"}:
            setattr(twin, key, deepcopy(vars(optimizer)[key], memo))
    return copies
