"""Copies of models and batches without data: they have shapes and types, and cost no memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_map

from steepest.model.unwrapping import unwrapped


def shadow(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Return a copy whose parameters and buffers have no data; tied ones stay tied.

    No tensor of the model is copied on the way. On the meta device nothing else is needed. For any
    other one call it within a `FakeTensorMode`: then tensors say that they are on that device, and
    choose its kernels.

    Args:
        model: any module; `torch.compile` and data parallelism around it are taken off.
        device: where the copy is said to be.

    >>> copy = shadow(nn.Linear(2, 3), "meta")
    >>> copy.weight.shape, copy.weight.is_meta
    (torch.Size([3, 2]), True)
    """
    model = unwrapped(model)
    tensors = (*model.parameters(), *model.buffers())
    without = copy.deepcopy(model, {id(tensor): _empty(tensor, device) for tensor in tensors})
    for module in without.modules():  # those of a user may keep what they see
        module._forward_hooks.clear()
        module._backward_hooks.clear()
    return without


def shadow_batch(batch: Any, device: torch.device | str) -> Any:
    """Return a batch whose tensors have no data."""
    return tree_map(lambda leaf: _empty(leaf, device) if isinstance(leaf, Tensor) else leaf, batch)


def optimizer_shadow(optimizer: Optimizer) -> Optimizer:
    """Return a copy of an optimizer without memory, with parameters and gradients without data.

    Call it within a `FakeTensorMode`.
    """
    memo: dict[int, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            empty = _empty(parameter, parameter.device)
            empty.grad = torch.empty_like(empty)
            memo[id(parameter)] = empty
    return copy.deepcopy(optimizer, memo)


def _empty(tensor: Tensor, device: torch.device | str) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
