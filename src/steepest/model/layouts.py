"""Which entries of a parameter a tensor shows, from its storage, offset and strides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Which entries of a source the elements of a storage are.

    The source is a parameter, or the result of a layer, whose entries are its output columns.

    Attributes:
        source: number of the parameter.
        of_result: whether these are columns of the result of the parameter's layer.
        offset, shape, strides: of the one dense tensor that this says something about.
        base: entry of its first element.
        places: for each axis what is added to `base` along it.
    """

    source: int
    of_result: bool
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    base: int
    places: tuple[Tensor, ...]

    def entries(self, positions: Tensor) -> Tensor | None:
        """Return the entries at positions in the storage, or None for positions outside."""
        rest = positions - self.offset
        total = torch.full_like(rest, self.base)
        axes = [d for d, size in enumerate(self.shape) if size > 1]
        for d in sorted(axes, key=lambda d: -self.strides[d]):
            index, rest = rest // self.strides[d], rest % self.strides[d]
            if bool(((index < 0) | (index >= self.shape[d])).any()):
                return None
            total = total + self.places[d][index]
        return None if bool(rest.any()) else total

    def seen_by(self, view: Tensor) -> Places | None:
        """Return which entries a view of the storage shows."""
        start = int(view.storage_offset())
        if start == self.offset and (known := self._along(view)) is not None:
            return Places(self.source, self.of_result, self.base, known)
        first = self.entries(integers(1) + start)
        if first is None:
            return None
        axes: list[Tensor] = []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            along = self.entries(start + int(stride) * integers(size))
            if along is None:
                return None
            axes.append(along - first)
        return Places(self.source, self.of_result, int(first), tuple(axes))

    def _along(self, view: Tensor) -> tuple[Tensor, ...] | None:
        """The places along each axis of a view whose axes are those of the layout, in any order."""
        known = dict(zip(zip(self.shape, self.strides, strict=True), self.places, strict=True))
        axes = []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            along = integers(1) if size == 1 else known.get((int(size), int(stride)))
            if along is None:
                return None
            axes.append(along)
        return tuple(axes)


class Places(NamedTuple):
    """Which entries of a source a tensor shows: `base`, plus one number of each axis."""

    source: int
    of_result: bool
    base: int
    axes: tuple[Tensor, ...]

    def layout(self, tensor: Tensor) -> Layout:
        """Return the same for the storage of `tensor`, which has one element for each place."""
        shape, strides = tuple(tensor.shape), tensor.stride()
        offset = int(tensor.storage_offset())
        return Layout(self.source, self.of_result, offset, shape, strides, self.base, self.axes)

    def all_entries(self) -> Tensor:
        """Return the distinct entries, in order."""
        total = integers(1) + self.base
        for axis in self.axes:
            if axis.numel() and int(axis.abs().max()):
                total = (total[:, None] + axis).flatten().unique()
        return total


def integers(size: int) -> Tensor:
    """Return 0, 1, ..., on the CPU whatever the device of the model."""
    return torch.arange(size, device="cpu")


def is_progression(places: Tensor) -> bool:
    """Whether places are equally spaced."""
    steps = places.diff()
    return bool((steps == steps[:1]).all())
