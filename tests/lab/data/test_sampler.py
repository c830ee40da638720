from __future__ import annotations

import numpy as np
import pytest
import torch

from steepest.lab.data import Sampler, validation_batches
from steepest.lab.errors import InputError


def _tokens(n: int) -> np.ndarray:
    return (np.arange(n) % 251).astype(np.uint8)


def test_a_batch_depends_on_seed_step_and_part_alone() -> None:
    first, again = Sampler(_tokens(5000), 4, 16, seed=3), Sampler(_tokens(5000), 4, 16, seed=3)
    first.batch(0)
    first.batch(1)
    assert torch.equal(first.batch(7, 2)[0], again.batch(7, 2)[0])
    others = [
        again.batch(8, 2)[0],
        again.batch(7, 1)[0],
        Sampler(_tokens(5000), 4, 16, 4).batch(7, 2)[0],
    ]
    assert not any(torch.equal(first.batch(7, 2)[0], other) for other in others)


def test_targets_are_the_next_tokens_and_every_position_can_be_drawn() -> None:
    sampler = Sampler(_tokens(40), 64, 8, seed=0)
    seen = set()
    for step in range(50):
        inputs, targets = sampler.batch(step)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        seen |= set(inputs[:, 0].tolist())
    assert seen == set(range(32))  # 40 tokens hold 32 windows of 8 + 1


def test_validation_windows_do_not_overlap_and_spread_over_the_text() -> None:
    rows = torch.cat(
        [x for x, _ in validation_batches(np.arange(1000, dtype=np.uint16), 4, 10, 20)]
    )
    assert rows.shape == (20, 10)
    flat = rows.flatten().tolist()
    assert len(set(flat)) == len(flat)
    assert max(flat) > 900


def test_too_little_text_gets_a_sentence() -> None:
    with pytest.raises(InputError, match="more than the context"):
        Sampler(_tokens(8), 1, 8, 0)
    with pytest.raises(InputError, match="more than the context"):
        list(validation_batches(_tokens(8), 1, 8, 4))
