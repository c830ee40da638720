"""What two sizes of a model differ in, apart from the shapes of parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str)


def module_names(model: nn.Module) -> list[str]:
    """Names of all modules, of those that come again too."""
    return [name for name, _ in model.named_modules(remove_duplicate=False)]


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def uses(model: nn.Module) -> dict[str, int]:
    """How often each parameter is somewhere in the model."""
    names = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return dict(Counter(names[id(p)] for _, p in every))


def settings(model: nn.Module) -> dict[str, Any]:
    """Numbers and strings that modules keep, of their own and in their configs."""
    values: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in {**vars(type(module)), **vars(module)}.items():
            if not name.startswith("_") and name != "training":
                values |= _flat(f"{path}.{name}", value)
    return values


def _flat(name: str, value: Any, depth: int = 3) -> dict[str, Any]:
    if isinstance(value, _PLAIN):
        return {name: value}
    if depth == 0 or isinstance(value, nn.Module):
        return {}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    elif not isinstance(value, Mapping):
        slots = {
            name: getattr(value, name, None) for name in getattr(value, "__slots__", None) or ()
        }
        value = getattr(value, "__dict__", slots)
    parts = [_flat(f"{name}.{key}", entry, depth - 1) for key, entry in value.items()]
    return {key: entry for part in parts for key, entry in part.items()}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Return the keys whose values differ."""
    return {key for key in {*before, *after} if before.get(key) != after.get(key)}
