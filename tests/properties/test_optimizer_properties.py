"""Symmetries of the steps, for any shape, scale and seed."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steepest import (
    SOAP,
    TEON,
    KLShampoo,
    MatrixView,
    Muon,
    Shampoo,
    SignSGD,
    Signum,
    SpectralDescent,
)

settings.register_profile("optimizers", max_examples=25, deadline=None, derandomize=True)
quick = settings.get_profile("optimizers")

EXACT = {"method": "svd", "dtype": None}
SIGN = {"sign": (SignSGD, {}), "signum": (Signum, {})}
SPECTRAL = {
    "spectral": (SpectralDescent, EXACT),
    "muon": (Muon, EXACT),
    "teon": (TEON, {**EXACT, "stack": 1}),
}
KRONECKER = {
    "shampoo": (Shampoo, {"interval": 2, "length": "muon"}),
    "shampoo of Adam's length": (Shampoo, {"interval": 1, "block": 4, "graft_eps": 0.0}),
    "shampoo from the left": (Shampoo, {"sides": "left", "exponent": 1 / 4, "length": "muon"}),
    "kl-shampoo": (KLShampoo, {"interval": 1, "length": "muon"}),
    "soap": (SOAP, {"interval": 2, "eps": 0.0}),
}
EVERY = SIGN | SPECTRAL | KRONECKER
seeds = st.integers(0, 2**16)
sides = st.integers(1, 12)
every_name = st.sampled_from([*EVERY])
without_curvature = st.sampled_from([*SIGN, *SPECTRAL])


def make(name, params, **arguments):
    """The optimizer of that name in float64 accuracy."""
    optimizer, settings = EVERY[name]
    return optimizer(params, **settings, **arguments)


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(name, gradients, **arguments):
    """The way that a matrix of zeros takes under these gradients."""
    W = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = make(name, [W], lr=0.5, **arguments)
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
    return W.detach()


def orthogonal(seed, n):
    return torch.linalg.qr(randn(seed, n, n)).Q


@quick
@given(without_curvature, sides, sides, seeds, st.integers(-900, 900))
def test_scaling_all_gradients_by_a_power_of_two_changes_no_bit(name, rows, columns, seed, power):
    gradients = [randn(seed + i, rows, columns) for i in range(3)]
    scaled = [G * 2.0**power for G in gradients]
    assert torch.equal(steps(name, scaled), steps(name, gradients))


@quick
@given(st.sampled_from([*KRONECKER]), sides, sides, seeds, st.integers(-50, 50))
def test_scaling_all_gradients_changes_nothing_where_their_squares_are_averaged(
    name, rows, columns, seed, power
):
    gradients = [randn(seed + i, rows, columns) for i in range(5)]
    scaled = [G * 4.0**power for G in gradients]
    there, here = steps(name, scaled), steps(name, gradients)
    torch.testing.assert_close(there, here, rtol=0, atol=1e-9)


@quick
@given(every_name, sides, sides, seeds)
def test_negative_gradients_take_the_opposite_way(name, rows, columns, seed):
    gradients = [randn(seed + i, rows, columns) for i in range(3)]
    assert torch.equal(steps(name, [-G for G in gradients]), -steps(name, gradients))


@quick
@given(without_curvature, sides, sides, seeds)
def test_transposed_gradients_take_the_transposed_way(name, rows, columns, seed):
    gradients = [randn(seed + i, rows, columns) for i in range(3)]
    scale = {"scale": "none"} if name in SPECTRAL else {}
    there = steps(name, gradients, **scale)
    back = steps(name, [G.mT for G in gradients], **scale)
    torch.testing.assert_close(back.mT, there, rtol=0, atol=1e-9)


@quick
@given(st.sampled_from([*SPECTRAL]), sides, sides, seeds)
def test_spectral_steps_rotate_with_the_gradients(name, rows, columns, seed):
    gradients = [randn(seed + i, rows, columns) for i in range(3)]
    U, V = orthogonal(seed + 7, rows), orthogonal(seed + 8, columns)
    rotated = steps(name, [U @ G @ V for G in gradients])
    torch.testing.assert_close(rotated, U @ steps(name, gradients) @ V, rtol=0, atol=1e-8)


@quick
@given(st.sampled_from([*SIGN]), sides, sides, seeds)
def test_sign_steps_are_permuted_with_the_gradients(name, rows, columns, seed):
    gradients = [randn(seed + i, rows, columns) for i in range(3)]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows * columns, generator=generator)

    def permute(G):
        return G.flatten()[order].reshape(rows, columns)

    assert torch.equal(
        steps(name, [permute(G) for G in gradients]), permute(steps(name, gradients))
    )


@quick
@given(without_curvature, sides, sides, seeds)
def test_no_step_is_longer_than_the_learning_rate_in_its_norm(name, rows, columns, seed):
    W = nn.Parameter(randn(seed, rows, columns))
    scale = {"scale": "none"} if name in SPECTRAL else {}
    optimizer = make(name, [W], lr=0.5, **scale)
    for i in range(3):
        before = W.detach().clone()
        W.grad = randn(seed + i, rows, columns)
        optimizer.step()
        moved = W.detach() - before
        norm = moved.abs().max() if name in SIGN else torch.linalg.matrix_norm(moved, 2)
        assert norm <= 0.5 * (1 + 1e-9)
        if name in ("sign", "spectral"):
            assert (moved * W.grad).sum() < 0  # without memory, always downhill
            assert norm >= 0.5 * (1 - 1e-9)


@quick
@given(every_name, st.integers(1, 4), sides, sides, st.booleans(), seeds)
def test_matrices_in_one_tensor_take_the_steps_of_separate_parameters(
    name, batch, rows, columns, transposed, seed
):
    together = nn.Parameter(randn(seed, batch, rows, columns))
    apart = [nn.Parameter((W.mT if transposed else W).clone()) for W in together.detach()]
    view = MatrixView(batch, rows, columns, transposed)
    arguments = {"lr": 0.1, "weight_decay": 0.2}
    one = make(name, [{"params": [together], "views": [view]}], **arguments)
    many = make(name, apart, **arguments)
    for i in range(3):
        G = randn(seed + 10 + i, batch, rows, columns)
        together.grad = G.clone()
        for W, part in zip(apart, G, strict=True):
            W.grad = part.mT.contiguous() if transposed else part.clone()
        one.step()
        many.step()
    for W, part in zip(apart, together.detach(), strict=True):
        torch.testing.assert_close(part.mT if transposed else part, W, rtol=0, atol=1e-8)


@quick
@given(every_name, seeds, st.lists(st.sampled_from(["step", "idle", "nan", "none"]), max_size=6))
def test_any_history_can_be_saved_and_continued_bit_for_bit(name, seed, history):
    def run(optimizer, params, events, offset):
        for i, event in enumerate(events):
            for j, W in enumerate(params):
                G = randn(seed + 100 * (offset + i) + j, *W.shape)
                if event == "idle" and j == 0:
                    G.zero_()
                if event == "nan" and j == 1:
                    G.view(-1)[0] = torch.nan
                W.grad = None if event == "none" and j == 0 else G
            optimizer.step()

    def build():
        params = [nn.Parameter(randn(seed, 3, 4)), nn.Parameter(randn(seed, 5))]
        groups = [{"params": params[:1]}, {"params": params[1:], "geometry": "adamw"}]
        return params, make(name, groups, lr=0.1, weight_decay=0.1, nonfinite="skip")

    first, optimizer = build()
    run(optimizer, first, history, 0)
    assert all(W.isfinite().all() for W in first)
    assert optimizer.skipped_steps == history.count("nan")
    second, resumed = build()
    for W, V in zip(second, first, strict=True):
        W.data.copy_(V)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for params, each in ((first, optimizer), (second, resumed)):
        run(each, params, ["step", "idle", "step"], 50)
    for W, V in zip(first, second, strict=True):
        assert torch.equal(W, V)
