"""How each kind of optimizer that a run can name is built.

Every function here takes what is named, the model, the learning rate of the matrices, the options
of the name, what all optimizers of a run share (`momentum` where there is a memory, `weight_decay`,
`adamw_lr`), and an example for `steepest.roles`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from steepest.lab.errors import InputError
from steepest.lab.train.optimizer_options import LR, arguments_of
from steepest.lab.train.split_optimizer import SplitOptimizer
from steepest.lab.user_code import guarded, sentences_for_errors
from steepest.model.parameter_roles import roles

Builder = Callable[[Any, nn.Module, float, dict[str, Any], dict[str, float], Any], Optimizer]
ADAMW_BETAS = (0.9, 0.95)
"""Of AdamW for all that is no matrix."""


def of_family(
    kind: Any,
    model: nn.Module,
    lr: float,
    settings: dict[str, Any],
    shared: dict[str, float],
    example: Any,
) -> Optimizer:
    """Return a subclass of `SteepestDescent`, which has a group of AdamW of its own."""
    table = roles(model, example=example)
    with sentences_for_errors():
        optimizer: Optimizer = kind(table, lr, **(shared | settings))
    return optimizer


def adamw_for_all(
    kind: Any,
    model: nn.Module,
    lr: float,
    settings: dict[str, Any],
    shared: dict[str, float],
    example: Any,
) -> Optimizer:
    """Return torch's own AdamW; options are settings of the group of the matrices."""
    table = roles(model, example=example)
    matrices = {
        "params": [row.parameter for row in table.matrices],
        "betas": (shared["momentum"], ADAMW_BETAS[1]),
        "weight_decay": shared["weight_decay"],
        **settings,
    }
    others = {"params": [row.parameter for row in table.others], "lr": shared["adamw_lr"]}
    groups = [group for group in (matrices, others) if group["params"]]
    with sentences_for_errors():
        optimizer: Optimizer = kind(groups, lr, betas=ADAMW_BETAS, weight_decay=0.0, fused=True)
    return optimizer


def beside_adamw(
    kind: Any,
    model: nn.Module,
    lr: float,
    settings: dict[str, Any],
    shared: dict[str, float],
    example: Any,
) -> Optimizer:
    """Return a class of the user's for the matrices and AdamW for all else, as one optimizer."""
    table = roles(model, example=example)
    matrices = [row.parameter for row in table.matrices]
    others = [row.parameter for row in table.others]
    taken = arguments_of(kind).keys() & {"momentum", "weight_decay"}
    own = {key: shared[key] for key in taken}
    parts: list[Optimizer] = []
    with sentences_for_errors():
        if matrices:
            parts.append(guarded(kind.__name__, kind)(matrices, **{LR: lr, **own, **settings}))
        if others:
            adamw_lr = shared["adamw_lr"]
            parts.append(
                torch.optim.AdamW(others, adamw_lr, betas=ADAMW_BETAS, weight_decay=0.0, fused=True)
            )
        return SplitOptimizer(parts)


def by_function(
    function: Any,
    model: nn.Module,
    lr: float,
    settings: dict[str, Any],
    shared: dict[str, float],
    example: Any,
) -> Optimizer:
    """Return what a function of the user's does, as it is.

    Raises:
        InputError: if that is no optimizer.
    """
    path = f"{function.__module__}:{function.__qualname__}"
    with sentences_for_errors():
        optimizer = guarded(path, function)(model, **{LR: lr, **settings})
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            f"got a {type(optimizer).__name__} from {path}, expected a torch.optim.Optimizer"
        )
    if needed := needed_by_step(type(optimizer)):
        raise InputError(
            f"got a {type(optimizer).__name__} from {path}, whose step needs {', '.join(needed)}; "
            "expected one that is called as step()"
        )
    return optimizer


def needed_by_step(kind: type[Optimizer]) -> list[str]:
    """Return the names of what the step of an optimizer cannot do without."""
    taken = list(inspect.signature(kind.step).parameters.values())[1:]
    return [p.name for p in taken if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
