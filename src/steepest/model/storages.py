"""What is known of tensors during a forward pass, told apart by their storage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from steepest.model.layouts import Layout, Places, integers

Nature = Literal["data", "weight", "constant"]
NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Contents:
    """What is known of a storage.

    Attributes:
        nature: "weight" if computed of parameters alone, "constant" if of no example either.
        layers: the last layers with weights whose results are in it, by number of a parameter.
        parameters: what a weight is computed of.
        layouts: how it shows the entries of parameters, or the columns of layers.
    """

    nature: Nature
    layers: frozenset[int] = NONE
    parameters: frozenset[int] = NONE
    layouts: tuple[Layout, ...] = ()


class Storages:
    """A record for each storage, and copies of those from before that are written to.

    Args:
        model: whose parameters are numbered in their order; its buffers are constant.
    """

    def __init__(self, model: nn.Module):
        self._records: dict[int, Contents] = {}
        self._alive: dict[int, StorageWeakRef] = {}  # an address is not used again while it is here
        self._fresh: set[int] = set()
        self._before: list[tuple[Tensor, Tensor]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        for module in model.modules():
            for value in (*module._buffers.values(), *module.__dict__.values()):
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    self.set(value, Contents("constant"))
        for number, p in enumerate(model.parameters()):
            logical = torch.empty(p.shape, device="meta").stride()
            places = tuple(s * integers(n) for n, s in zip(p.shape, logical, strict=True))
            layout = Places(number, False, 0, places).layout(p)
            known = self.of(p) if (key := key_of(p)) in self._records else Contents("weight")
            if key is not None:
                layouts = (*known.layouts, layout)
                both = known.parameters | {number}
                self.set(p, Contents("weight", parameters=both, layouts=layouts))

    def keep(self, tensor: Tensor) -> None:
        """Copy a tensor from before, which is about to be written to."""
        key = key_of(tensor)
        if key is None or key in self._fresh:
            return
        whole = tensor.detach()
        if not any(key_of(kept) == key for kept, _ in self._before):
            size = whole.untyped_storage().nbytes() // whole.element_size()
            whole = whole.as_strided((size,), (1,), 0)
            self._before.append((whole, whole.clone()))

    def set(self, tensor: Tensor, record: Contents) -> None:
        """Note what is known of a tensor, and of all that share its storage."""
        key = key_of(tensor)
        if key is not None:
            self._records[key] = record
            self._alive.setdefault(key, StorageWeakRef(tensor.untyped_storage()))

    def of(self, tensor: Tensor) -> Contents:
        """Return what is known of a tensor; one from outside the model is data."""
        key = key_of(tensor)
        return self._records.get(key, Contents("data")) if key is not None else Contents("data")

    def places(self, tensor: Tensor, of_result: bool) -> list[Places]:
        """Return which entries of parameters, or columns of results, a tensor shows."""
        layouts = [layout for layout in self.of(tensor).layouts if layout.of_result == of_result]
        return [seen for layout in layouts if (seen := layout.seen_by(tensor)) is not None]

    def shown(self, tensor: Tensor, record: Contents) -> frozenset[int]:
        """Return the parameters behind a weight: of several in one storage those that it shows."""
        several = len(record.parameters) > 1
        if several and record.parameters == {layout.source for layout in record.layouts}:
            return frozenset(places.source for places in self.places(tensor, False))
        return record.parameters

    def put_back(self) -> None:
        """Undo what was written in place to tensors that were there before."""
        with torch.no_grad():
            for tensor, value in reversed(self._before):
                tensor.copy_(value)
        for generator, state in self._generators:
            generator.set_state(state)

    def keep_generators(self, values: Any) -> None:
        """Note the state of generators that an operation is given."""
        for value in values:
            known = any(value is generator for generator, _ in self._generators)
            if isinstance(value, torch.Generator) and not known:
                self._generators.append((value, value.get_state()))

    def add(self, tensors: list[Tensor]) -> None:
        """Note tensors that were made just now."""
        self._fresh |= {key for tensor in tensors if (key := key_of(tensor)) is not None}

    def is_fresh(self, tensor: Tensor) -> bool:
        """Whether a tensor was made since the start."""
        return key_of(tensor) in self._fresh


def key_of(tensor: Tensor) -> int | None:
    """Return the identity of a storage; None for sparse tensors, which have none."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return written


def tensors_in(output: Any, depth: int = 4) -> Iterator[Tensor]:
    """Yield the tensors in what a model returns: containers, dataclasses, distributions."""
    if isinstance(output, Tensor):
        yield output
    elif depth and not isinstance(output, nn.Module | str | bytes | type | None):
        inside = output
        if isinstance(output, dict):
            inside = list(output.values())
        elif not isinstance(output, list | tuple | set):
            inside = list(getattr(output, "__dict__", {}).values())
        for value in inside:
            yield from tensors_in(value, depth - 1)
