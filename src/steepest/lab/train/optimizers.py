"""The optimizers a run can name, all over the same split of the model's parameters."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from steepest.lab.arguments import did_you_mean
from steepest.lab.errors import InputError
from steepest.lab.imports import imported
from steepest.model.parameter_roles import roles
from steepest.optim import SteepestDescent
from steepest.optim.family import FAMILY, record_of, study_names
from steepest.optim.record import Record


def named_optimizer(name: str) -> Record:
    """Return the record of an optimizer by its name, or of a user's class at its import path.

    Raises:
        InputError: for an unknown name, or a class without a record.
    """
    if ":" in name:
        kind = inspect.unwrap(imported(name))
        if not (isinstance(kind, type) and issubclass(kind, SteepestDescent)):
            raise InputError(f"got {name!r}, expected a subclass of steepest.optim.SteepestDescent")
        try:
            return record_of(kind)
        except ValueError as error:
            raise InputError(f"got {name!r}: {error}") from error
    if name not in study_names():
        raise InputError(
            f"got {name!r}{did_you_mean(name, study_names())}, expected one of "
            f"{', '.join(study_names())}, or an import path such as my_package:MyOptimizer"
        )
    return FAMILY[name]


def build(
    name: str,
    model: nn.Module,
    lr: float,
    *,
    momentum: float,
    weight_decay: float,
    adamw_lr: float,
    example: Any = None,
) -> Optimizer:
    """Return the optimizer: `lr` for the matrices, AdamW at `adamw_lr` for all else.

    The second group is the same for every name, so that runs differ in the matrices alone.
    `example` is one for `steepest.roles`, which makes the split. `momentum` is also the first beta
    of AdamW on matrices; optimizers without memory ignore it.
    """
    table = roles(model, example=example)
    record = named_optimizer(name)
    kind: Any = record.kind
    if issubclass(kind, SteepestDescent):
        own = dict(record.settings)
        if record.memory != "none":
            own["momentum"] = momentum
        return kind(table, lr, **own, weight_decay=weight_decay, adamw_lr=adamw_lr)
    matrices = {
        "params": [row.parameter for row in table.matrices],
        "betas": (momentum, 0.95),
        "weight_decay": weight_decay,
    }
    others = {"params": [row.parameter for row in table.others], "lr": adamw_lr}
    groups = [group for group in (matrices, others) if group["params"]]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
