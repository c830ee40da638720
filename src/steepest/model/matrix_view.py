"""How a parameter is a batch of matrices, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import NamedTuple, SupportsIndex

from torch import Size, Tensor


class _Fields(NamedTuple):
    batch: int
    rows: int
    columns: int
    transposed: bool
    splits: tuple[int, ...]


class MatrixView(_Fields):
    """A parameter seen as `batch` independent matrices, each of `rows` x `columns` as stored.

    Attributes:
        batch: number of independent matrices along the leading axis (experts, groups of a
            convolution).
        rows: stored rows of each matrix.
        columns: stored columns; all remaining axes flattened (`in * kh * kw` of a convolution).
        transposed: False where the rows are the outputs (`nn.Linear`), True where the columns are
            (`nn.ConvTranspose2d`, Hugging Face's `Conv1D`).
        splits: sizes of blocks along the output axis that are matrices of their own (the query, key
            and value of a fused projection); empty for one block. Nothing but ones for outputs
            that take turns: `(1, 1)` for two matrices of every other output.

    Raises:
        ValueError: for sizes that are not whole numbers of at least 1, and `transposed` that is not
            True or False. `check` raises for sizes that do not fit a parameter.

    >>> import torch
    >>> [tuple(W.shape) for W in MatrixView(1, 4, 12, True, (4, 4, 4)).matrices(torch.ones(4, 12))]
    [(4, 4), (4, 4), (4, 4)]
    """

    __slots__ = ()

    def __new__(
        cls,
        batch: int,
        rows: int,
        columns: int,
        transposed: bool = False,
        splits: Sequence[int] = (),
    ) -> MatrixView:
        """Refuse what can be the view of no parameter."""
        batch, rows, columns = _size("batch", batch), _size("rows", rows), _size("columns", columns)
        if type(transposed) is not bool:
            raise _wrong("transposed", transposed, "True or False")
        if not isinstance(splits, (tuple, list)):
            raise _wrong("splits", splits, "a tuple of whole numbers")
        if splits:
            splits = [_size("splits", splits, size) for size in splits]
        return super().__new__(cls, batch, rows, columns, transposed, tuple(splits))

    @classmethod
    def of(
        cls,
        shape: Size | tuple[int, ...],
        *,
        batch: int = 1,
        transposed: bool = False,
        splits: Sequence[int] = (),
    ) -> MatrixView:
        """View a tensor of `shape` with rows along its first axis (its second after a batch axis).

        `batch` splits the first axis into that many groups of rows.
        """
        elements = math.prod(shape)
        if len(shape) < 2 or elements == 0:
            raise ValueError(f"got a parameter of shape {tuple(shape)}, expected a matrix or more")
        if type(batch) is not int or batch < 1 or shape[0] % batch:
            raise ValueError(f"got batch={batch}, expected a divisor of {shape[0]} rows")
        experts = len(shape) == 3 and batch == shape[0]
        rows = shape[1] if experts else shape[0] // batch
        view = cls(batch, rows, elements // (batch * rows), transposed, splits)
        view.check(shape)
        return view

    @property
    def outputs(self) -> int:
        """Number of outputs of each matrix, over all its splits."""
        return self.columns if self.transposed else self.rows

    @property
    def inputs(self) -> int:
        """Number of inputs of each matrix."""
        return self.rows if self.transposed else self.columns

    @property
    def is_interleaved(self) -> bool:
        """Whether the splits take turns: an output of the first, one of the second, and again."""
        return set(self.splits) == {1} and self.outputs % len(self.splits) == 0

    @property
    def is_plain(self) -> bool:
        """Whether it is one matrix, stored as it is."""
        return self.batch == 1 and not self.transposed and not self.splits

    @property
    def is_vector(self) -> bool:
        """Whether the matrices have a single row or column, so that no matrix norm differs."""
        return min(self.rows, self.columns) == 1

    def check(self, shape: Size | tuple[int, ...]) -> None:
        """Raise a `ValueError` unless a tensor of `shape` can be seen this way."""
        if self.batch * self.rows * self.columns != math.prod(shape):
            raise ValueError(
                f"got the view {self.batch} x ({self.rows}, {self.columns}) for a parameter of "
                f"shape {tuple(shape)}, expected the same number of entries"
            )
        if self.splits and sum(self.splits) != self.outputs and not self.is_interleaved:
            raise ValueError(
                f"got splits {self.splits}, expected sizes that add up to {self.outputs} outputs"
            )

    def matrices(self, tensor: Tensor, block: int | None = None) -> list[Tensor]:
        """Return the matrices of `tensor` as `(out, in)`; writing to them writes to `tensor`.

        With `block`, each is cut into equal parts of at most `block` rows and columns. The tensor
        must be contiguous; a `ValueError` or `RuntimeError` says if it does not fit.
        """
        if tensor.ndim == 2 and block is None and self.is_plain:
            return [tensor]
        matrices = tensor.view(self.batch, self.rows, self.columns)
        if self.transposed:
            matrices = matrices.mT
        whole = [part for matrix in matrices.unbind(0) for part in self._split(matrix)]
        return whole if block is None else [part for W in whole for part in _cut(W, block)]

    def _split_sizes(self) -> tuple[int, ...]:
        if self.is_interleaved:
            return (self.outputs // len(self.splits),) * len(self.splits)
        return self.splits or (self.outputs,)

    def _split(self, matrix: Tensor) -> Sequence[Tensor]:
        if self.is_interleaved:
            return [matrix[first :: len(self.splits)] for first in range(len(self.splits))]
        return matrix.split(list(self.splits)) if self.splits else (matrix,)

    def sizes(self, block: int | None = None) -> list[tuple[int, int]]:
        """Return `(out, in)` of what `matrices` returns, of whole matrices also for their parts."""
        if block is None and self.is_plain:
            return [(self.rows, self.columns)]
        shapes = [(outputs, self.inputs) for outputs in self._split_sizes()] * self.batch
        if block is None:
            return shapes
        return [size for size in shapes for _ in range(math.prod(-(-n // block) for n in size))]

    def block_shapes(self, block: int | None = None) -> list[tuple[int, int]]:
        """Return the shape of each of what `matrices` returns."""
        if block is None:
            return self.sizes()
        return [
            (rows, columns)
            for outputs, inputs in self.sizes()
            for rows in _parts(outputs, block)
            for columns in _parts(inputs, block)
        ]

    def __str__(self) -> str:
        """Return for instance `8 x (64, 32)` or `(3 x 64, 64)`, outputs first."""
        out = f"{self.outputs}"
        if self.splits:
            sizes = self._split_sizes()
            equal = len(set(sizes)) == 1
            out = f"{len(sizes)} x {sizes[0]}" if equal else "+".join(map(str, sizes))
        matrix = f"({out}, {self.inputs})"
        return matrix if self.batch == 1 else f"{self.batch} x {matrix}"


def _size(name: str, value: object, size: object = None) -> int:
    """Return the size as an int, `value` or one of its entries; raise if it is none."""
    size = value if size is None else size
    if type(size) is int and size > 0:
        return size
    if isinstance(size, SupportsIndex) and not isinstance(size, bool) and index(size) > 0:
        return index(size)
    raise _wrong(name, value, "whole numbers of at least 1")


def _wrong(name: str, value: object, expected: str) -> ValueError:
    return ValueError(f"got {name}={value!r} for a MatrixView, expected {expected}")


def _parts(size: int, block: int) -> list[int]:
    """Sizes of the fewest equal parts of at most `block`; the first may be longer by one."""
    count = -(-size // block)
    return [size // count + (i < size % count) for i in range(count)]


def _cut(matrix: Tensor, block: int) -> list[Tensor]:
    rows, columns = (_parts(n, block) for n in matrix.shape)
    return [part for band in matrix.split(rows) for part in band.split(columns, dim=1)]


def matrix_label(name: str, which: int | str, count: int) -> str:
    """Return the name of one of a parameter's `count` matrices.

    >>> matrix_label("up.weight", 0, 1), matrix_label("qkv.weight", 2, 3)
    ('up.weight', 'qkv.weight[2]')
    """
    return name if count == 1 else f"{name}[{which}]"
