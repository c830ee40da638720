"""How many bytes a training step takes, part by part, without taking them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_leaves

from steepest.lab.memory import bytes_of
from steepest.lab.train.cost import state_bytes
from steepest.lab.train.shadows import optimizer_shadow, shadow, shadow_batch
from steepest.lab.train.split_optimizer import SplitOptimizer
from steepest.model.parameter_roles import all_roles
from steepest.model.untouched import untouched
from steepest.model.unwrapping import unwrapped
from steepest.optim import SteepestDescent
from steepest.optim.memory import memory_of
from steepest.random_numbers import generators_kept


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training step.

    Attributes:
        weights: parameters and buffers.
        gradients: of all parameters that are trained.
        optimizer: what it keeps between steps; None where that cannot be told before a step.
        activations: what the forward pass keeps for the backward pass.
        batch: inputs and targets.
    """

    weights: int
    gradients: int
    optimizer: int | None
    activations: int
    batch: int

    @property
    def total(self) -> int:
        """All parts together, as if none were freed before the others are there."""
        return sum(getattr(self, field.name) or 0 for field in fields(self))


def memory_plan(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    optimizer: Optimizer | None = None,
    device: torch.device | str | None = None,
) -> MemoryPlan:
    """Return the bytes that a training step of a model takes, part by part.

    Activations are all that autograd keeps of a forward pass of a copy without data, with the
    kernels of `device`. Where a model cannot run without data, its own forward pass is taken, which
    leaves the model and the random generators as they were. What kernels and the optimizer take for
    the time of a step, and what a memory pool holds beyond that, does not count.

    Args:
        model: any module; it can be on the meta device.
        batch: what `loss` takes.
        loss: `loss(model, batch) -> scalar`, with autocast inside if the run has it.
        optimizer: of the run, before its first step or after it; None counts nothing for it.
        device: where the run will be; by default where the model is.

    Raises:
        whatever the model does, if it runs neither without data nor with the batch.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    >>> plan = memory_plan(model, torch.ones(3, 4), lambda model, batch: model(batch).sum())
    >>> plan.weights, plan.gradients, plan.activations, plan.batch  # kept: the hidden units
    (232, 232, 96, 48)
    """
    model = unwrapped(model)
    if device is None:
        device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    parameters = list(model.parameters())
    return MemoryPlan(
        weights=bytes_of([parameters, list(model.buffers())]),
        gradients=bytes_of([p for p in parameters if p.requires_grad]),
        optimizer=0 if optimizer is None else kept_bytes(optimizer),
        activations=_activations(model, batch, loss, device),
        batch=bytes_of(batch),
    )


def _activations(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor], device: torch.device | str
) -> int:
    try:
        with generators_kept(), FakeTensorMode():
            return _kept_for_backward(shadow(model, device), shadow_batch(batch, device), loss)
    except Exception:  # whatever a model of the user's raises without data
        if any(p.is_meta for p in model.parameters()):
            raise
        with untouched(model):
            return _kept_for_backward(model, batch, loss)


def _kept_for_backward(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor]) -> int:
    """Bytes of the storages that a forward pass keeps, without those of weights and batch."""
    known = {_storage(t) for t in _tensors([*model.parameters(), *model.buffers(), batch])}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(model, batch)  # its graph has to live until all is counted
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del value
    return total


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def kept_bytes(optimizer: Optimizer) -> int | None:
    """Return the bytes that an optimizer keeps between steps, also before its first one.

    Optimizers of this package say what they keep. Of any other one a copy without data takes a
    step. None where that fails before the copy has made its memory.

    >>> weight = nn.Parameter(torch.ones(5, 3))
    >>> kept_bytes(torch.optim.SGD([weight], 0.1, momentum=0.9))
    60
    """
    if isinstance(optimizer, SplitOptimizer):
        parts = [kept_bytes(part) for part in optimizer.parts]
        return None if None in parts else sum(part or 0 for part in parts)
    if optimizer.state:
        return state_bytes(optimizer)
    if isinstance(optimizer, SteepestDescent):
        kept = [
            tensor
            for group in optimizer.param_groups
            for k in range(len(group["params"]))
            for tensor in memory_of(optimizer, group, k).values()
        ]
        return sum(tensor.shape.numel() * tensor.dtype.itemsize for tensor in kept)
    with generators_kept(), FakeTensorMode():
        copy = optimizer_shadow(optimizer)
        try:
            copy.step()
        except Exception:  # it looked at numbers, or is not made for tensors without data
            return state_bytes(copy) or None
        return state_bytes(copy)


def parameters_by_role(model: nn.Module, example: Any = None) -> dict[str, int]:
    """Return how many numbers the parameters of each role have, the largest first.

    Args:
        model: any module; with an example, not on the meta device.
        example: one for `steepest.roles`.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> parameters_by_role(model)
    {'hidden': 96, 'vector': 18, 'head': 16}
    """
    counts: Counter[str] = Counter()
    for row in all_roles(model, example=example):
        counts[row.role] += row.parameter.numel()
    return dict(counts.most_common())
