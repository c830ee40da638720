"""Which examples make up a batch: each epoch is a permutation of all, from the seed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Permutations:
    """The examples of all epochs in a row, as a function of the seed: there is no state to save.

    >>> order = Permutations(5, seed=0)
    >>> sorted(order.window(0, 5).tolist()), sorted(order.window(5, 5).tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    >>> bool((order.window(3, 4)[:2] == order.window(0, 5)[3:]).all())
    True
    """

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def window(self, start: int, size: int) -> NDArray[np.int64]:
        """Return the examples at `size` positions from `start` on; an epoch has `count`."""
        epochs = range(start // self.count, (start + size - 1) // self.count + 1)
        row = np.concatenate([self._epoch(epoch) for epoch in epochs])
        offset = start - epochs.start * self.count
        return row[offset : offset + size]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return generator_at(self.seed, epoch).permutation(self.count)


def generator_at(seed: int, *position: int) -> np.random.Generator:
    """Return a generator that depends on the seed and a position of up to three numbers."""
    counter: NDArray[Any] = np.zeros(4, dtype=np.uint64)
    counter[4 - len(position) :] = position[::-1]
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))
