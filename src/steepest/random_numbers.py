"""Random numbers of a block of code: from a seed, and no trace of it in the caller's generators."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_ENTRIES = 32
"""Of a tensor in a batch that its seed depends on."""


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global generators of torch (all devices), NumPy and Python back after the block."""
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        if numpy := sys.modules.get("numpy"):
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        for generator in _generators():
            stack.callback(generator.set_state, generator.get_state())
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start the global generators from a seed below 2³² for the block, and put them back after it.

    >>> before = torch.get_rng_state()
    >>> with seeded(3):
    ...     first = torch.rand(2)
    >>> with seeded(3):
    ...     print(torch.equal(first, torch.rand(2)), torch.equal(before, torch.get_rng_state()))
    True False
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    with generators_kept():
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed)
        for generator in _generators():
            generator.manual_seed(seed)
        yield


def seed_of(batch: Any) -> int:
    """Return a seed that depends on what is in a batch: the same wherever the batch is the same.

    Of each tensor it looks at 32 entries, evenly spaced, so that large batches cost nothing.
    """
    seed = 0
    for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
        if isinstance(leaf, Tensor):
            seen: Any = (leaf.dtype, tuple(leaf.shape))
            if leaf.layout == torch.strided and not leaf.is_nested and not leaf.is_meta:
                entries = leaf.detach().flatten()
                seen = (*seen, entries[:: max(1, len(entries) // _ENTRIES)].tolist())
        else:
            seen = leaf
        seed = zlib.crc32(repr(seen).encode(), seed)
    return seed


def copied_generator() -> torch.Generator:
    """Return a generator that draws what torch's own would draw on the CPU next."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator


def _generators() -> Iterator[torch.Generator]:
    """Torch's own generators: of the CPU, and of devices that are in use."""
    yield torch.default_generator
    for module in (torch.cuda, torch.xpu):
        if module.is_initialized():
            yield from module.default_generators
    if torch.backends.mps.is_available():
        yield torch.mps._get_default_mps_generator()
