"""The parameters of a group as matrices, for the length of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from steepest.model.matrix_view import MatrixView
from steepest.optim.parameter_groups import name_of
from steepest.optim.precision import memory_dtype

State = dict[str, Any]
NOTHING: State = {}
"""The memory of a parameter that has none."""

# Matrices of equal shape are stacked up to this many entries for one batched product. On a CPU a
# large product gains nothing from a batch, so there the Gram matrices are bounded too; and no more
# than half of the matrices are stacked, to bound what a step holds by what it works on. Where they
# are few and small all are, and where they are wide, so that the direction takes the place of what
# it is of and Gram matrices are small beside it.
_ENTRIES_PER_BATCH = {"cpu": 2**21, "default": 2**26}
_GRAM_ENTRIES_ON_CPU = 2**19
_FEW_ENTRIES = 2**19
_WIDE = 10


class MatrixState:
    """What is kept for one matrix beside its entries: `state["left"]`, `state["count"]`, ...

    It lives in the state of the parameter, as plain tensors named `left.0`, `left.1`, ... for its
    first and second matrix.
    """

    def __init__(self, states: Mapping[Tensor, State], p: Tensor, index: int, position: int):
        self._states = states
        self.parameter = p
        self._index = index
        self.position = position  # of the matrix among all of the group

    def __getitem__(self, key: str) -> Tensor:
        return self._states[self.parameter][f"{key}.{self._index}"]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._states[self.parameter][f"{key}.{self._index}"] = value

    def __contains__(self, key: str) -> bool:
        return f"{key}.{self._index}" in self._states[self.parameter]


@dataclass(frozen=True)
class Batch:
    """Matrices of one shape, which take a step together.

    Attributes:
        G: their gradients.
        W: their weights, to be written to.
        memory: from a name to as many matrices of a state with an entry for each weight.
        states: what is kept for each matrix as a whole.
        outputs, inputs: size of the matrices that they are, or are blocks of.
        stack: how many neighbours make a stack; 1 if each is for itself.
    """

    G: list[Tensor]
    W: list[Tensor]
    memory: Mapping[str, list[Tensor]]
    states: list[MatrixState]
    outputs: int
    inputs: int
    stack: int = 1


class Matrices:
    """The parameters of a group that have gradients, and those gradients as matrices.

    What depends on shapes alone is worked out once: `refresh` takes the gradients of another step.

    Attributes:
        group: of which they are.
        params: those with a gradient; `places` are their positions in the group.
        gradients: as matrices, those of a parameter one after the other; `dtypes` are their types.
        kept: the memory of each parameter, once it is made.
    """

    def __init__(self, group: dict[str, Any]):
        params = group["params"]
        views, stacks = (group.get(key) or [None] * len(params) for key in ("views", "stacks"))
        self.group = group
        self.params: list[Tensor] = []
        self.places: list[int] = []
        self.kept: list[State] = []
        self.parts: Any = None  # what AdamW has worked out of them
        self._idle: list[Tensor] = []
        self._views: list[_View] = []
        self._stacks: list[int | None] = []
        self._sizes: list[tuple[int, int]] = []
        self._owners: list[tuple[Tensor, int, int]] = []
        self._states: list[MatrixState] = []
        self._plan: tuple[list[bool], list[list[int]], list[int]] | None = None
        position, block = 0, group.get("block")
        for k, (p, view, stack) in enumerate(zip(params, views, stacks, strict=True)):
            seen = _view(view, block)
            count = len(seen.sizes)
            if p.grad is None or not p.numel():
                self._idle.append(p)
            else:
                self.params.append(p)
                self.places.append(k)
                self._views.append(seen)
                self._stacks += stack or seen.alone
                self._sizes += seen.sizes
                self._owners += [(p, i, position + i) for i in range(count)]
            position += count
        self._read()

    def refresh(self) -> bool:
        """Take the gradients of another step; return whether the same parameters have some."""
        if any([p.grad is None for p in self.params]):  # noqa: C419 - a list is faster
            return False
        if any(p.grad is not None and p.numel() for p in self._idle):
            return False
        before = self.dtypes
        self._read()
        return before == self.dtypes

    def _read(self) -> None:
        self.gradients: list[Tensor] = []
        for p, view in zip(self.params, self._views, strict=True):
            gradient = cast(Tensor, p.grad)
            if type(gradient) is not Tensor or gradient.is_sparse:
                self._check(p, gradient)
            self.gradients += view.of(gradient)
        self.dtypes = [G.dtype for G in self.gradients]

    def forget_gradients(self) -> None:
        """Let the gradients of this step go, which the program may set free."""
        self.gradients = []

    def name(self, i: int) -> str:
        """Return what to call the parameter of the matrix `i` in an error."""
        return self._name(self._owners[i][0])

    def _name(self, owner: Tensor) -> str:
        return name_of(
            self.group, next(k for k, p in enumerate(self.group["params"]) if p is owner)
        )

    def _check(self, p: Tensor, gradient: Tensor) -> None:
        if gradient.is_sparse:
            raise ValueError(
                f"got a sparse gradient for the {self._name(p)}, expected a dense one; build "
                "the embedding with sparse=False"
            )
        if hasattr(gradient, "full_tensor"):  # a DTensor, whose blocks would be copies
            raise NotImplementedError(
                f"got a gradient sharded over processes for the {self._name(p)}, expected the "
                "whole one; use DistributedDataParallel instead of fully_shard"
            )

    def keep(self, state: Mapping[Tensor, State]) -> None:
        """Take the memory of each parameter, which is made now."""
        self.kept = [state.get(p, NOTHING) for p in self.params]
        self._states = [MatrixState(state, *owner) for owner in self._owners]

    def entries(self, state: MutableMapping[Tensor, State], key: str) -> None:
        """Make the state `key` with an entry for each weight, of zeros, where there is none."""
        for p in self.params:
            kept = state.setdefault(p, {})
            buffer = kept.get(key)
            if buffer is None:
                layout, dtype = torch.contiguous_format, memory_dtype(self.group, p)
                buffer = torch.zeros_like(p, dtype=dtype, memory_format=layout)
            kept[key] = buffer.contiguous()

    def states(self, state: Mapping[Tensor, State]) -> list[MatrixState]:
        """Return what is kept for each matrix as a whole."""
        return [MatrixState(state, *owner) for owner in self._owners]

    def batches(self, keys: tuple[str, ...], active: list[bool]) -> Iterator[Batch]:
        """Yield the active matrices in batches of equal shape and bounded size.

        What is written to their weights arrives in the parameters when all are through.

        Args:
            keys: of the memory with an entry for each weight.
            active: whether each matrix takes a step.
        """
        W, copies = self._weights()
        memory = {
            key: [
                M
                for kept, view in zip(self.kept, self._views, strict=True)
                for M in view.of(kept[key])
            ]
            for key in keys
        }
        if self._plan is None or self._plan[0] != active:
            self._plan = (active, *self._batched(active, W))
        for positions, length in zip(*self._plan[1:], strict=True):
            outputs, inputs = self._sizes[positions[0]]
            yield Batch(
                [self.gradients[i] for i in positions],
                [W[i] for i in positions],
                {key: [tensors[i] for i in positions] for key, tensors in memory.items()},
                [self._states[i] for i in positions],
                outputs,
                inputs,
                length,
            )
        for p, dense in copies:
            p.copy_(dense)

    def _weights(self) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The weights as matrices, and parameters with the copies that stand for them."""
        matrices: list[Tensor] = []
        copies: list[tuple[Tensor, Tensor]] = []
        for p, view in zip(self.params, self._views, strict=True):
            dense = p
            if not p.is_contiguous():  # a layout such as channels_last, no matrix without a copy
                dense = p.contiguous()
                copies.append((p, dense))
            matrices += view.of(dense)
        return matrices, copies

    def _batched(self, active: list[bool], W: list[Tensor]) -> tuple[list[list[int]], list[int]]:
        """Positions of the matrices of each batch, and how many neighbours are a stack in it.

        Stacks of equal shape and kind are in one batch, of bounded size.
        """
        buckets: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        for unit in self._units(active):
            G, weight = self.gradients[unit[0]], W[unit[0]]
            key = (len(unit), G.shape, G.dtype, weight.dtype, weight.device, self._sizes[unit[0]])
            buckets.setdefault(key, []).append(unit)
        positions, lengths = [], []
        for (count, shape, _, _, device, _), bucket in buckets.items():
            size = _most(device.type, shape, count, len(bucket))
            for start in range(0, len(bucket), size):
                positions.append([i for unit in bucket[start : start + size] for i in unit])
                lengths.append(count)
        return positions, lengths

    def _units(self, active: list[bool]) -> list[tuple[int, ...]]:
        """Positions that belong together: those of a stack, or one matrix alone."""
        units: dict[tuple[str, int], tuple[int, ...]] = {}
        for i, (stack, use) in enumerate(zip(self._stacks, active, strict=True)):
            if use:
                key = ("alone", i) if stack is None else ("stack", stack)
                units[key] = (*units.get(key, ()), i)
        return list(units.values())


def stack(matrices: list[Tensor]) -> Tensor:
    """The matrices along a new first axis; a view of one alone."""
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0].unsqueeze(0)


class _View:
    """How parameters are matrices, worked out once: `view` of `MatrixView`, cut into blocks."""

    def __init__(self, view: tuple[Any, ...] | None, block: int | None):
        self._view = None if view is None else MatrixView(*view)
        self._block = block
        self._whole = view is None or (block is None and MatrixView(*view).is_plain)
        self.sizes = [(1, 1)] if self._view is None else self._view.sizes(block)
        self.alone = [None] * len(self.sizes)

    def of(self, tensor: Tensor) -> list[Tensor]:
        """The matrices of a tensor, views of it where it is contiguous."""
        if self._view is None:
            return [tensor]
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        if self._whole and tensor.ndim == 2:
            return [tensor]
        return self._view.matrices(tensor, self._block)


_view = cache(_View)


def _most(device: str, shape: torch.Size, count: int, length: int) -> int:
    """How many of `length` units of `count` matrices to stack."""
    place = device if device in _ENTRIES_PER_BATCH else "default"
    entries = max(1, count * shape.numel())
    most = _ENTRIES_PER_BATCH[place] // entries
    if place == "cpu":
        gram = count * min(shape, default=1) ** 2
        wide = max(shape, default=1) >= _WIDE * min(shape, default=1)
        half = length if wide else max(-(-length // 2), _FEW_ENTRIES // entries)
        most = min(most, _GRAM_ENTRIES_ON_CPU // gram, half)
    parts = -(-length // max(1, most))
    return -(-length // parts)  # all about as long
