"""What recurrent layers and self-attention multiply, against steps made one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.model.activations import Activations, hook


def _seen(module: nn.Module, name: str, *args: Any) -> list[Activations]:
    found: list[Activations] = []
    handle = hook(module, name, found.append)
    try:
        module(*args)
    finally:
        handle.remove()
    return found


def _states(core: nn.RNNBase, x: Tensor, start: Any, backwards: bool) -> list[Tensor]:
    """The states (batch, hidden) before each step, from sequences cut off one by one."""
    half = core.hidden_size
    steps = []
    for t in range(1, x.shape[1]):
        part = x[:, t:] if backwards else x[:, :t]
        out, _ = core(part, start)
        steps.append(out[:, 0, half:] if backwards else out[:, -1, :half])
    first = start[0] if isinstance(start, tuple) else start
    return [*steps, first[1 if backwards else 0]] if start is not None else steps


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_matrix_multiplies_the_states_before(
    kind: type[nn.RNNBase], bidirectional: bool, started: bool
) -> None:
    torch.manual_seed(0)
    core = kind(3, 4, batch_first=True, bidirectional=bidirectional)
    x, h = torch.randn(2, 5, 3), torch.randn(1 + bidirectional, 2, 4)
    start = None if not started else (h, torch.randn_like(h)) if kind is nn.LSTM else h
    for backwards in (False, True)[: 1 + bidirectional]:
        name = "weight_hh_l0" + "_reverse" * backwards
        [found] = _seen(core, name, x, start)
        mine = sorted(row.tolist() for row in found.entering.flatten(0, 1))
        theirs = sorted(row.tolist() for row in torch.cat(_states(core, x, start, backwards)))
        assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-6)
        [found] = _seen(core, name.replace("hh", "ih"), x, start)
        assert torch.equal(found.entering, x)
        assert found.leaving.shape == (2, 5, 4)


def test_sequences_of_different_length() -> None:
    core = nn.LSTM(3, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    [found] = _seen(core, "weight_ih_l0", packed)
    assert torch.equal(found.entering, packed.data)
    assert _seen(core, "weight_hh_l0", packed) == []


def test_self_attention_is_told_from_cross_attention() -> None:
    attention, x, y = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8), torch.randn(3, 2, 8)
    [found] = _seen(attention, "in_proj_weight", x, x, x)
    assert torch.equal(found.entering, x)
    assert _seen(attention, "in_proj_weight", x, y, y) == []


def test_evaluation_is_not_seen() -> None:
    with torch.no_grad():
        assert _seen(nn.Linear(3, 2), "weight", torch.randn(4, 3)) == []
