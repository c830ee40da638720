"""Run a model once and leave it, and all random generators, as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from steepest.random_numbers import generators_kept


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back, at the end, what a forward pass of `model` may change in it.

    These are buffers, modes, other attributes of its modules, gradients, and the generators of
    Python, numpy and torch on the devices of the model. Weights and tensors of the caller that are
    written to in place are the concern of `steepest.model.dataflow`.
    """
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(_put_back, module, dict(module.__dict__), _dictionaries(module))
        for buffer in model.buffers():
            stack.callback(_overwrite, buffer, buffer.detach().clone())
        for parameter in model.parameters():
            stack.callback(setattr, parameter, "grad", parameter.grad)
        stack.enter_context(generators_kept())
        yield


def _dictionaries(module: nn.Module) -> dict[str, Any]:
    """Copies of the dictionaries in a module that a forward pass may assign entries of."""
    names = ("_buffers", "_parameters", "_modules")
    entries = {name: module.__dict__.get(name) for name in names}
    return {name: dict(value) for name, value in entries.items() if isinstance(value, dict)}


def _put_back(module: nn.Module, attributes: dict[str, Any], inside: dict[str, Any]) -> None:
    module.__dict__.clear()
    module.__dict__.update(attributes)
    for name, entries in inside.items():
        module.__dict__[name].clear()
        module.__dict__[name].update(entries)


def _overwrite(tensor: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        if tensor.shape != value.shape:  # it was resized
            tensor.resize_(value.shape)
        tensor.copy_(value)
