"""The parameters of a group as matrices, for the length of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from steepest.model.matrix_view import MatrixView
from steepest.optim.parameter_groups import name_of
from steepest.optim.precision import memory_dtype

State = dict[str, Any]

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
    """The parameters of a group that have gradients, and those gradients as matrices."""

    def __init__(self, group: Mapping[str, Any]):
        params = group["params"]
        views, stacks = (group.get(key) or [None] * len(params) for key in ("views", "stacks"))
        self.params: list[Tensor] = []
        self.views: list[_View] = []
        self.gradients: list[Tensor] = []
        self.stacks: list[int | None] = []
        self._group = group
        self._sizes: list[tuple[int, int]] = []
        self._owners: list[tuple[Tensor, int, int]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        position, block = 0, group.get("block")
        for p, view, stack in zip(params, views, stacks, strict=True):
            seen = _view(view, block)
            count = len(seen.sizes)
            gradient = p.grad
            if gradient is not None and p.numel():
                self._owners.append((p, 0, position))
                if count > 1:
                    self._owners += [(p, i, position + i) for i in range(1, count)]
                self._check(gradient)
                self.params.append(p)
                self.views.append(seen)
                self.gradients += seen.of(gradient.contiguous() if view else gradient)
                self.stacks += stack or seen.alone
                self._sizes += seen.sizes
            position += count

    def name(self, i: int) -> str:
        """Return what to call the parameter of the matrix `i` in an error."""
        owner = self._owners[i][0]
        return name_of(
            self._group, next(k for k, p in enumerate(self._group["params"]) if p is owner)
        )

    def _check(self, gradient: Tensor) -> None:
        if gradient.is_sparse:
            raise ValueError(
                f"got a sparse gradient for the {self.name(-1)}, expected a dense one; build "
                "the embedding with sparse=False"
            )
        if type(gradient) is not Tensor and hasattr(
            gradient, "full_tensor"
        ):  # a DTensor, whose blocks would be copies
            raise NotImplementedError(
                f"got a gradient sharded over processes for the {self.name(-1)}, expected the "
                "whole one; use DistributedDataParallel instead of fully_shard"
            )

    def entries(self, state: MutableMapping[Tensor, State], key: str) -> None:
        """Make the state `key` with an entry for each weight, of zeros, where there is none."""
        for p in self.params:
            kept = state.setdefault(p, {})
            buffer = kept.get(key)
            if buffer is None:
                layout, dtype = torch.contiguous_format, memory_dtype(self._group, p)
                buffer = torch.zeros_like(p, dtype=dtype, memory_format=layout)
            kept[key] = buffer.contiguous()

    def states(self, state: Mapping[Tensor, State]) -> list[MatrixState]:
        """Return what is kept for each matrix as a whole."""
        return [MatrixState(state, *owner) for owner in self._owners]

    def batches(
        self, state: Mapping[Tensor, State], keys: tuple[str, ...], active: list[bool]
    ) -> Iterator[Batch]:
        """Yield the active matrices in batches of equal shape and bounded size.

        What is written to their weights arrives in the parameters when all are through.
        """
        W = self._weights()
        memory = {
            key: [
                M
                for p, view in zip(self.params, self.views, strict=True)
                for M in view.of(state[p][key])
            ]
            for key in keys
        }
        for unit in _batched(self._units(active), self.gradients, W, self._sizes):
            positions = [i for stack in unit for i in stack]
            outputs, inputs = self._sizes[positions[0]]
            yield Batch(
                [self.gradients[i] for i in positions],
                [W[i] for i in positions],
                {key: [each[i] for i in positions] for key, each in memory.items()},
                [MatrixState(state, *self._owners[i]) for i in positions],
                outputs,
                inputs,
                len(unit[0]),
            )
        for p, dense in self._copies:
            p.copy_(dense)

    def _units(self, active: list[bool]) -> list[tuple[int, ...]]:
        """Positions that belong together: those of a stack, or one matrix alone."""
        units: dict[tuple[str, int], tuple[int, ...]] = {}
        for i, (stack, use) in enumerate(zip(self.stacks, active, strict=True)):
            if use:
                key = ("alone", i) if stack is None else ("stack", stack)
                units[key] = (*units.get(key, ()), i)
        return list(units.values())

    def _weights(self) -> list[Tensor]:
        matrices: list[Tensor] = []
        for p, view in zip(self.params, self.views, strict=True):
            dense = p.contiguous()
            if dense is not p:  # a layout such as channels_last, which cannot be seen as a matrix
                self._copies.append((p, dense))
            matrices += view.of(dense)
        return matrices


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
        if self._view is None or (self._whole and tensor.ndim == 2):
            return [tensor]
        return self._view.matrices(tensor, self._block)


_view = cache(_View)


def _batched(
    units: list[tuple[int, ...]],
    gradients: list[Tensor],
    weights: list[Tensor],
    sizes: list[tuple[int, int]],
) -> Iterator[list[tuple[int, ...]]]:
    """Units of equal shape and kind, in batches of bounded size."""
    buckets: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    for unit in units:
        G, W = gradients[unit[0]], weights[unit[0]]
        key = (len(unit), G.shape, G.dtype, W.dtype, W.device, sizes[unit[0]])
        buckets.setdefault(key, []).append(unit)
    for (count, shape, _, _, device, _), bucket in buckets.items():
        size = _most(device.type, shape, count, len(bucket))
        for start in range(0, len(bucket), size):
            yield bucket[start : start + size]


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
