"""Writing numbers of full precision to weights in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


class Assignment:
    """Assigns with the rounding asked for: to the nearest number, or at random.

    The random numbers follow from the seed, so that a step can be repeated.
    """

    def __init__(self, rounding: str, seed: int):
        self._at_random = rounding == "stochastic"
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def rounds(self, weight: Tensor) -> bool:
        """Whether this weight is rounded at random, hence needs a step in full precision."""
        return self._at_random and weight.dtype == torch.bfloat16

    def __call__(self, weight: Tensor, exact: Tensor) -> None:
        """Write `exact` to `weight`."""
        if self.rounds(weight):
            if weight.device not in self._generators:
                generator = torch.Generator(weight.device).manual_seed(self._seed)
                self._generators[weight.device] = generator
            exact = rounded_at_random(exact.float(), self._generators[weight.device])
        weight.copy_(exact)


def rounded_at_random(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down at random so that the mean is exact.

    Returns float32 numbers that bfloat16 represents. Source: Zamirai et al., "Revisiting BFloat16
    training" (arXiv 2010.06192).

    >>> x = torch.full((10_000,), 1 + 2**-10)  # an eighth of the way from 1 to the next bfloat16
    >>> y = rounded_at_random(x, torch.Generator().manual_seed(0))
    >>> y.unique().tolist(), bool((y.mean() - x.mean()).abs() < 1e-4)
    ([1.0, 1.0078125], True)
    """
    # A bfloat16 is the upper half of a float32: add a random lower half, and cut it off.
    bits = exact.contiguous().view(torch.int32)
    noise = torch.empty_like(bits).random_(2**16, generator=generator)
    return (bits + noise).bitwise_and_(-(2**16)).view(torch.float32)
