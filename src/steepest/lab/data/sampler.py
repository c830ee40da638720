"""Which windows of the text make up a batch: a function of seed and step, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steepest.lab.data.token_files import Tokens
from steepest.lab.errors import InputError


class Sampler:
    """Random windows for training, by a counter-based generator: there is no state to save.

    >>> import numpy as np
    >>> sampler = Sampler(np.arange(100, dtype=np.uint8), batch=2, context=8, seed=0)
    >>> inputs, targets = sampler.batch(step=5)
    >>> inputs.shape, bool((targets == inputs + 1).all())
    (torch.Size([2, 8]), True)
    >>> bool((sampler.batch(step=5)[0] == inputs).all())
    True
    """

    def __init__(self, tokens: Tokens, batch: int, context: int, seed: int):
        if len(tokens) < context + 1:
            raise InputError(
                f"got {len(tokens)} training tokens, expected more than the context of {context}; "
                "give more text or a smaller context"
            )
        self.tokens, self.size, self.context, self.seed = tokens, batch, context, seed

    def batch(self, step: int, part: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, `(batch, context)` each, for a part of a step."""
        counter = np.array([0, 0, part, step], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=counter))
        starts = generator.integers(0, len(self.tokens) - self.context, size=self.size)
        return _windows(self.tokens, starts, self.context)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: seed and step say all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


def validation_batches(
    tokens: Tokens, batch: int, context: int, windows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield fixed windows without overlap, spread evenly over the validation text."""
    available = (len(tokens) - 1) // context
    if available < 1:
        raise InputError(
            f"got {len(tokens)} validation tokens, expected more than the context of {context}; "
            "give more text or a smaller context"
        )
    windows = min(windows, available)
    starts = np.linspace(0, available, windows, endpoint=False).astype(np.int64) * context
    for i in range(0, windows, batch):
        yield _windows(tokens, starts[i : i + batch], context)


def _windows(tokens: Tokens, starts: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1], both[:, 1:]
