"""Activation checkpointing: blocks run again in the backward pass, so that they keep nothing."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint

from steepest.lab.errors import InputError


def recompute_activations(model: nn.Module) -> int:
    """Let every repeated block of a model recompute its forward pass in the backward pass.

    A block is a child of a `ModuleList`, or one of several children of a class in a `Sequential`,
    that has modules inside. Of nested blocks the outermost recomputes. Gradients keep their bits,
    dropout draws the same again, and names of parameters stay.

    Args:
        model: changed in place.

    Returns:
        Number of blocks.

    Raises:
        InputError: for a model without repeated blocks.

    >>> model = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
    >>> recompute_activations(model)
    3
    """
    blocks = list(_blocks(model))
    if not blocks:
        raise InputError(
            "got a model without repeated blocks, so there is nothing to recompute; expected a "
            "ModuleList or Sequential of several blocks, or no checkpointing of activations"
        )
    for block in blocks:
        forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        block.forward = forward
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    counts = Counter(type(child) for child in module.children())
    for child in module.children():
        listed = isinstance(module, nn.ModuleList)
        repeated = listed or (isinstance(module, nn.Sequential) and counts[type(child)] > 1)
        runs = not isinstance(child, nn.ModuleList | nn.ModuleDict)
        if repeated and runs and any(child.children()):
            yield child
        else:
            yield from _blocks(child)
