from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.data.permutations import Permutations, generator_at


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5), st.integers(0, 99))
def test_batches_in_a_row_cover_each_epoch_exactly_once(
    count: int, size: int, parts: int, seed: int
) -> None:
    order = Permutations(count, seed)
    row = np.concatenate([order.window(i * size, size) for i in range(parts * count + 1)])
    epochs = row[: len(row) // count * count].reshape(-1, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(Permutations(50, seed).window(50 * k, 50)) for seed in (0, 1) for k in (0, 1)]
    assert len(set(orders)) == 4
    assert orders[2] == tuple(Permutations(50, 1).window(0, 50))


def test_generators_of_different_positions_differ() -> None:
    places = [(0,), (1,), (1, 0, 1), (0, 1, 1), (0, 0, 1)]
    draws = {tuple(generator_at(3, *place).integers(0, 2**30, 4).tolist()) for place in places}
    assert len(draws) == len(places)
