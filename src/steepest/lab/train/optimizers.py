"""The optimizers a run can name, all over the same split of the model's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from steepest import Muon, SignSGD, Signum, SpectralDescent, roles

OptimizerName = Literal["adamw", "signsgd", "signum", "spectral-descent", "muon"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


@dataclass(frozen=True)
class Family:
    """How an optimizer is called, what it is in the table of norms, and rates to start from."""

    label: str
    geometry: str
    memory: str
    rates: tuple[float, ...]


FAMILIES: dict[OptimizerName, Family] = {
    "adamw": Family("AdamW", "sign, adapted", "momentum and second moment", (4e-3, 8e-3, 1.6e-2)),
    "signsgd": Family("SignSGD", "sign", "none", (2.5e-4, 5e-4, 1e-3)),
    "signum": Family("Signum", "sign", "momentum", (5e-4, 1e-3, 2e-3)),
    "spectral-descent": Family("SpectralDescent", "spectral", "none", (0.04, 0.08, 0.16)),
    "muon": Family("Muon", "spectral", "momentum", (0.02, 0.04, 0.08)),
}


def build(
    name: OptimizerName,
    model: nn.Module,
    lr: float,
    *,
    momentum: float,
    weight_decay: float,
    adamw_lr: float,
) -> Optimizer:
    """Return the optimizer: `lr` for the matrices, AdamW at `adamw_lr` for all else.

    The second group is the same for every name, so that runs differ in the matrices alone.
    `momentum` is also the first beta of AdamW on matrices; optimizers without memory ignore it.
    """
    common: Any = {"weight_decay": weight_decay, "adamw_lr": adamw_lr}
    if name == "muon":
        return Muon(model, lr, momentum=momentum, **common)
    if name == "spectral-descent":
        return SpectralDescent(model, lr, **common)
    if name == "signum":
        return Signum(model, lr, momentum=momentum, **common)
    if name == "signsgd":
        return SignSGD(model, lr, **common)
    table = roles(model)
    matrices = {
        "params": [row.parameter for row in table.matrices],
        "betas": (momentum, 0.95),
        "weight_decay": weight_decay,
    }
    others = {"params": [row.parameter for row in table.others], "lr": adamw_lr}
    groups = [group for group in (matrices, others) if group["params"]]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
