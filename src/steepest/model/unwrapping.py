"""The model behind what wraps it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model behind `torch.compile` and data parallelism."""
    if isinstance(model, DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return unwrapped(compiled) if isinstance(compiled, nn.Module) else model
