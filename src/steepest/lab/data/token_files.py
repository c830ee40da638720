"""Files of tokens: `.bin`, bare or behind a header, and `.npy`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steepest.lab.errors import InputError

SUFFIXES = (".bin", ".npy")
LARGEST = 2**20
"""Token numbers are below this; a file that says otherwise is of something else."""
HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Of headers of 256 integers the first one, with the second one, a version, and the type of tokens.

The third integer is the number of tokens. Both headers are those of llm.c.
"""


class JoinedTokens:
    """Several arrays of tokens as one; only the windows that are asked for are copied.

    >>> tokens = JoinedTokens([np.arange(4, dtype=np.uint16), np.arange(3, dtype=np.uint16)])
    >>> len(tokens), tokens[2:6], tokens[5:].tolist()
    (7, array([2, 3, 0, 1], dtype=uint16), [1, 2])
    """

    def __init__(self, arrays: Sequence[NDArray[Any]]):
        self.arrays = list(arrays)
        self.dtype = np.result_type(*self.arrays)
        self.ends = np.cumsum([len(array) for array in self.arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def nbytes(self) -> int:
        """The bytes of all tokens."""
        return len(self) * self.dtype.itemsize

    def __getitem__(self, window: slice) -> NDArray[Any]:
        parts = self._parts(*window.indices(len(self))[:2])
        return np.concatenate([np.empty(0, self.dtype), *parts])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or self.dtype)

    def split(self, cut: int) -> tuple[JoinedTokens, JoinedTokens]:
        """Return what is before a position and what is behind it; nothing is copied."""
        ends = self._parts(0, cut), self._parts(cut, len(self))
        first, second = (part or [np.empty(0, self.dtype)] for part in ends)
        return JoinedTokens(first), JoinedTokens(second)

    def _parts(self, start: int, stop: int) -> list[NDArray[Any]]:
        first = int(np.searchsorted(self.ends, start, side="right"))
        parts = []
        for array, end in zip(self.arrays[first:], self.ends[first:].tolist(), strict=True):
            begin = end - len(array)
            if begin >= stop:
                break
            parts.append(array[max(start - begin, 0) : stop - begin])
        return parts


Tokens = NDArray[Any] | JoinedTokens
"""Unsigned integers, `(tokens,)`, in memory or mapped from files."""


def pieces(tokens: Tokens, size: int = 2**24) -> Iterator[NDArray[Any]]:
    """Yield tokens in arrays of at most so many."""
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]


def read_tokens(path: Path) -> NDArray[Any]:
    """Return the tokens of a `.bin` or `.npy` file, `(tokens,)`, mapped from it where possible.

    A bare `.bin` file is of 16, 32 or 64 bits, whichever makes all its numbers those of tokens.

    Raises:
        InputError: for a file that is torn or holds anything else.
    """
    tokens = _from_npy(path) if path.suffix == ".npy" else _from_bin(path)
    if not len(tokens):
        raise InputError(f"{path} has no tokens, expected some")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= LARGEST:
        raise InputError(
            f"{path} has numbers from {low} to {high}, expected tokens from 0 to {LARGEST - 1}"
        )
    return tokens if tokens.dtype in ("<u2", "<u4") else tokens.astype(np.uint32)


def _from_bin(path: Path) -> NDArray[Any]:
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) == 3 and int(header[0]) in HEADERS:
        version, kind = HEADERS[int(header[0])]
        if int(header[1]) != version:
            raise InputError(
                f"{path} has a header of version {int(header[1])}, expected {version}; write it "
                "again, or give the tokens as .npy"
            )
        dtype, promised = np.dtype(kind), int(header[2])
        if size != 1024 + dtype.itemsize * promised:
            raise InputError(f"{path} is torn: its header promises {promised} tokens")
        if size == 1024:
            raise InputError(f"{path} has a header and no tokens, expected some")
        return np.memmap(path, dtype=dtype, mode="r", offset=1024)
    if size < 4 or size % 2:
        raise InputError(f"{path} has {size} bytes, expected tokens of 16, 32 or 64 bits")
    for dtype in (np.dtype("<u8"), np.dtype("<u4")):
        if size % dtype.itemsize == 0 and _are_tokens(np.memmap(path, dtype=dtype, mode="r")):
            return np.memmap(path, dtype=dtype, mode="r")
    return np.memmap(path, dtype="<u2", mode="r")


def _are_tokens(numbers: NDArray[Any]) -> bool:
    """Whether these are tokens, rather than several tokens of 16 bits in each number.

    The upper bits of a token are nearly all zero. So they are where tokens of 16 bits count a few
    symbols; but then the lower bits are nearly all zero too, and the upper ones not all.
    """
    if int(numbers[:1024].max()) >= LARGEST or int(numbers.max()) >= LARGEST:
        return False
    words = numbers.view("<u2").reshape(len(numbers), -1)
    low, high = int(words[:, 0].max()), int(words[:, 1:].max())
    return low > 0 and (high == 0 or low > LARGEST >> 16)


def _from_npy(path: Path) -> NDArray[Any]:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(
            f"{path} is torn, or no array of numbers ({error}); write it with numpy.save"
        ) from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        shape, dtype = getattr(tokens, "shape", "?"), getattr(tokens, "dtype", "several arrays")
        raise InputError(
            f"{path} holds {dtype} of shape {shape}, expected whole numbers of shape (tokens,)"
        )
    return tokens
