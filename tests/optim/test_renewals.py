"""When Shampoo and its kin renew what is dear, and that a stop in between changes nothing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from steepest import SOAP, KLShampoo, MatrixView, Shampoo
from steepest.optim.kronecker import _slots

FAMILY = [Shampoo, KLShampoo, SOAP]
family = pytest.mark.parametrize("make", FAMILY)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (8, 8), (12, 8), (8, 20), (6, 5), (8, 8)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def walk(optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def renewed(optimizer) -> dict[tuple[int, str], int]:
    """The step in which each side was renewed last; -1 for never."""
    params = optimizer.param_groups[0]["params"]
    return {
        (i, key): int(value)
        for i, p in enumerate(params)
        for key, value in optimizer.state[p].items()
        if "renewed" in key
    }


@family
@pytest.mark.parametrize("interval", [1, 4, 7])
def test_every_side_is_renewed_once_in_every_interval(make, interval):
    optimizer = make(parameters(), interval=interval)
    seen: dict[tuple[int, str], list[int]] = {}
    for step in range(3 * interval):
        walk(optimizer, step, step + 1)
        for side, last in renewed(optimizer).items():
            if last == step:
                seen.setdefault(side, []).append(step)
    assert seen.keys() == renewed(optimizer).keys()
    for steps in seen.values():
        assert steps == [steps[0], steps[0] + interval, steps[0] + 2 * interval]
        assert steps[0] < interval


@family
def test_a_matrix_that_had_no_gradient_at_its_turn_is_renewed_when_it_has_one(make):
    params = parameters()
    optimizer = make(params, interval=4)
    for step in range(24):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p) if (step + i) % 2 else None
        optimizer.step()
    assert min(renewed(optimizer).values()) >= 24 - 6


def test_the_dear_ones_are_spread_evenly():
    gpt2 = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12
    views = tuple(MatrixView.of(shape) for shape in gpt2)
    slots = _slots(views, 1024, ("both", None), 10)
    shapes = [shape for view in views for shape in view.block_shapes(1024)]
    load = [0.0] * 10
    for (i, side), slot in slots.items():
        load[slot] += shapes[i][0 if side == "left" else 1] ** 3
    assert len(slots) == 2 * len(shapes)
    assert max(load) < 1.05 * sum(load) / 10


def test_ungrafted_roots_are_made_in_the_first_step():
    optimizer = Shampoo(parameters(), interval=10, length="own")
    walk(optimizer, 0, 1)
    assert min(renewed(optimizer).values()) == 0


@family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stop_within_an_interval_changes_no_bit(make, dtype):
    own = {"interval": 5, "rounding": "stochastic"}
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    others = copy.deepcopy(params)
    whole = make(params, **own)
    walk(whole, 0, 19)

    stopped = make(others, **own)
    walk(stopped, 0, 7)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = make(others, **own)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    walk(resumed, 7, 19)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert renewed(whole) == renewed(resumed)


def test_long_sides_have_no_factor_in_soap_and_are_cut_in_shampoo():
    W = [nn.Parameter(torch.randn(4, 12))]
    soap, shampoo = SOAP(W, max_side=8), Shampoo(W, block=8)
    for optimizer in (soap, shampoo):
        walk(optimizer, 0, 1)
    assert "left.0" in soap.state[W[0]]
    assert "right.0" not in soap.state[W[0]]
    assert shampoo.state[W[0]]["right.1"].shape == (6, 6)
    whole = Shampoo(W, block=None)
    walk(whole, 0, 1)
    assert whole.state[W[0]]["right.0"].shape == (12, 12)


@family
def test_a_factor_without_a_root_says_what_has_moved(make):
    optimizer = make(parameters(), interval=1)
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(2):  # the first makes the memory, the second looks at it
        optimizer.step()
    optimizer.state[params[2]]["left.0"].data.fill_(torch.nan)  # which the checks cannot see
    before = [p.detach().clone() for p in params]
    message = "12 x 8: up to 3 of 6 "
    with pytest.raises(FloatingPointError, match=message):
        walk(optimizer, 0, 1)
    moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert moved == [True, True, False, False, False, True]
