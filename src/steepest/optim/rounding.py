"""Rounding to half precision, also stochastic."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int, device: torch.device) -> torch.Generator:
    """Return the random numbers of the step `seed`, the same every time."""
    return torch.Generator(device).manual_seed(seed)


def round_stochastically(exact: Tensor, random: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down at random so that the mean is exact.

    Returns float32 numbers that bfloat16 represents. Source: Zamirai et al., "Revisiting BFloat16
    training" (arXiv 2010.06192).

    >>> x = torch.full((10_000,), 1 + 2**-10)  # an eighth of the way from 1 to the next bfloat16
    >>> y = round_stochastically(x, generator(0, x.device))
    >>> y.unique().tolist(), bool((y.mean() - x.mean()).abs() < 1e-4)
    ([1.0, 1.0078125], True)
    """
    # A bfloat16 is the upper half of a float32: add a random lower half, and cut it off.
    bits = exact.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 2**16, bits.shape, generator=random, dtype=torch.int32, device=bits.device
    )
    return (bits + noise).bitwise_and_(-(2**16)).view(torch.float32)
