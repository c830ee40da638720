"""The optimizers a run can name, all over the same split of the model's parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from steepest import (
    SOAP,
    TEON,
    KLShampoo,
    Muon,
    Shampoo,
    SignSGD,
    Signum,
    SpectralDescent,
    roles,
)
from steepest.optim import SteepestDescent

OptimizerName = Literal[
    "adamw",
    "signsgd",
    "signum",
    "spectral-descent",
    "muon",
    "teon",
    "shampoo-quarter",
    "shampoo",
    "kl-shampoo",
    "soap",
]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


@dataclass(frozen=True)
class Family:
    """How an optimizer is called, what it is in the table of norms, and rates to start from."""

    label: str
    geometry: str
    memory: str
    rates: tuple[float, ...]
    build: Callable[..., SteepestDescent] | None = None


_ADAPTED = "momentum and second moment"
FAMILIES: dict[OptimizerName, Family] = {
    "adamw": Family("AdamW", "sign, adapted", _ADAPTED, (4e-3, 8e-3, 1.6e-2)),
    "signsgd": Family("SignSGD", "sign", "none", (2.5e-4, 5e-4, 1e-3), SignSGD),
    "signum": Family("Signum", "sign", "momentum", (5e-4, 1e-3, 2e-3), Signum),
    "spectral-descent": Family(
        "SpectralDescent", "spectral", "none", (0.04, 0.08, 0.16), SpectralDescent
    ),
    "muon": Family("Muon", "spectral", "momentum", (0.02, 0.04, 0.08), Muon),
    "teon": Family("TEON", "spectral, stacked", "momentum", (0.01, 0.02, 0.04), TEON),
    "shampoo-quarter": Family(
        "Shampoo, p = 1/4",
        "spectral, adapted",
        _ADAPTED,
        (4e-3, 8e-3, 1.6e-2),
        partial(Shampoo, exponent=1 / 4),
    ),
    "shampoo": Family(
        "Shampoo, p = 1/2", "spectral, adapted", _ADAPTED, (8e-3, 1.6e-2, 3.2e-2), Shampoo
    ),
    "kl-shampoo": Family(
        "KL-Shampoo", "spectral, adapted", _ADAPTED, (8e-3, 1.6e-2, 3.2e-2), KLShampoo
    ),
    "soap": Family("SOAP", "spectral, adapted", _ADAPTED, (8e-3, 1.6e-2, 3.2e-2), SOAP),
}


def build(
    name: OptimizerName,
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
    common: Any = {"weight_decay": weight_decay, "adamw_lr": adamw_lr}
    family = FAMILIES[name]
    if family.build is not None:
        memory = {} if family.memory == "none" else {"momentum": momentum}
        return family.build(table, lr, **memory, **common)
    matrices = {
        "params": [row.parameter for row in table.matrices],
        "betas": (momentum, 0.95),
        "weight_decay": weight_decay,
    }
    others = {"params": [row.parameter for row in table.others], "lr": adamw_lr}
    groups = [group for group in (matrices, others) if group["params"]]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
