"""KL-Shampoo: where its factors go, how fast, and that they whiten on average from both sides."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from steepest import KLShampoo, Shampoo
from steepest.linalg import polar
from steepest.optim import reference

BARE = {"length": "own", "eps": 0.0, "interval": 1, "momentum": 0.0}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def zeros(*shape, dtype=torch.float64):
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def conditioned(rows, columns, condition):
    """A matrix with singular values from 1 down to the inverse of the condition number."""
    r = min(rows, columns)
    U, V = (torch.linalg.qr(randn(n, r, seed=n)).Q for n in (rows, columns))
    return (U * torch.logspace(0, 1, r, base=1 / condition, dtype=torch.float64)) @ V.mT


def update(optimizer, W, G):
    """How far one step with this gradient and a rate of 1 moves the weights, downhill positive."""
    before = W.detach().clone()
    W.grad = G.clone()
    optimizer.step()
    return before - W.detach()


def off_polar(D, G):
    """How far D is from the polar factor of G, apart from a constant."""
    Q = polar(G, "svd")
    D = D * (Q.norm() / D.norm())
    return float((D - Q).norm() / Q.norm())


def errors(G, steps, **settings):
    """The error of each direction for one gradient repeated."""
    W = zeros(*G.shape)
    optimizer = KLShampoo([W], 1.0, **{**BARE, **settings})
    return [off_polar(update(optimizer, W, G), G) for _ in range(steps)]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)], ids=str)
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "as it is"])
def test_it_is_the_formula_of_the_paper(shape, sequential, correct, path):
    options = {"momentum": 0.8, "beta2": 0.9, "eps": 1e-3, "relative_eps": False, "length": "own"}
    options |= {"sequential": sequential, "bias_correction": correct}
    W, gradients = zeros(*shape), [randn(*shape, seed=t) for t in range(1, 9)]
    weights = path(reference.kl_shampoo, W.detach().clone(), gradients, 1.0, **options)
    optimizer = KLShampoo([W], 1.0, interval=1, **options)
    updates = torch.stack([update(optimizer, W, G) for G in gradients])
    torch.testing.assert_close(updates, -weights.diff(dim=0), rtol=1e-8, atol=1e-8)


# One gradient repeated: towards spectral descent


@pytest.mark.parametrize("b", [0.25, 0.75, 0.9])
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "as it is"])
def test_the_error_falls_by_the_rate_of_the_theory(b, correct):
    found = errors(conditioned(6, 6, 2.0), 100, beta2=b, bias_correction=correct)
    late = [e for e in found if 1e-11 < e < 1e-4]
    rates = [after / e for e, after in itertools.pairwise(late)]
    assert len(rates) >= 10
    assert rates[-1] == pytest.approx(abs(2 * b - 1), rel=5e-3)
    assert found[-1] < 1e-8


def test_the_error_is_squared_for_one_half():
    found = errors(conditioned(6, 6, 2.0), 8, beta2=0.5, bias_correction=False)
    late = [e for e in found if 1e-15 < e < 0.1][:3]
    assert len(late) == 3
    assert all(after < 3 * e**2 + 1e-15 for e, after in itertools.pairwise(late))
    assert found[-1] < 1e-13


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)], ids=str)
def test_without_memory_it_oscillates(shape):
    G = conditioned(*shape, 10.0)
    W = zeros(*shape)
    optimizer = KLShampoo([W], 1.0, beta2=0.0, **BARE)
    ways = [update(optimizer, W, G) for _ in range(6)]
    ways = [D / D.norm() for D in ways]
    for first, second, third in zip(ways, ways[1:], ways[2:], strict=False):
        torch.testing.assert_close(first, third, rtol=0, atol=1e-7)
        assert float((first - second).norm()) > 0.5
    assert min(off_polar(D, G) for D in ways) > 0.2


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5), (1, 4)], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_without_memory_one_after_the_other_is_exact_at_once(shape, condition):
    G = conditioned(*shape, condition)
    assert max(errors(G, 5, beta2=0.0, sequential=True)) < 1e-10
    W = zeros(*shape)
    optimizer = KLShampoo([W], 1.0, beta2=0.0, sequential=True, **BARE)
    D = update(optimizer, W, G)  # L⁻¹ has the factor `in`, hence D its root
    torch.testing.assert_close(D, shape[1] ** 0.5 * polar(G, "svd"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
@pytest.mark.parametrize("rank", [5, 2])
def test_gradients_of_other_shapes_and_ranks_come_to_their_polar_factor_too(shape, rank):
    G = conditioned(*shape, 3.0) if rank == 5 else randn(shape[0], 2) @ randn(2, shape[1])
    # the larger factor is singular: its rounding leaves 1.04e-10 on some processors, at any step
    assert errors(G, 60, beta2=0.4)[-1] < 2e-10


def test_with_the_exponent_of_shampoo_inside_it_would_come_to_something_else():
    # Not a setting of KLShampoo: the exponent is 1/2 there. Of 1/4, the fixed point is U S^1/3 Vᵀ.
    G = conditioned(5, 5, 10.0)
    U, S, Vh = torch.linalg.svd(G)
    W = zeros(5, 5)
    optimizer = KLShampoo([W], 1.0, beta2=0.5, **BARE)
    assert optimizer.param_groups[0]["exponent"] == 1 / 2
    optimizer.param_groups[0]["exponent"] = 1 / 4
    for _ in range(60):
        D = update(optimizer, W, G)
    expected = (U * S ** (1 / 3)) @ Vh
    torch.testing.assert_close(D / D.norm(), expected / expected.norm(), rtol=0, atol=1e-12)
    left = right = torch.eye(5, dtype=torch.float64)  # the same by hand
    L = R = torch.eye(5, dtype=torch.float64)
    for _ in range(60):
        X, Y = left @ G, G @ right
        L, R = (L + Y @ Y.mT) / 2, (R + X.mT @ X) / 2
        left, right = (reference.inverse_root(A, 1 / 4, eps=0.0) for A in (L, R))
    torch.testing.assert_close(left @ G @ right, expected, rtol=0, atol=1e-12)


def test_the_doctest_again_for_the_default_settings():
    # Not at once, as the factors have a memory, but nearly: with grafting only the length differs.
    W, G = zeros(2, 2), torch.diag(torch.tensor([3.0, 0.1], dtype=torch.float64))
    optimizer = KLShampoo([W], 1.0, momentum=0.0, interval=1)
    for _ in range(200):
        D = update(optimizer, W, G)
    assert off_polar(D, G) < 1e-3


# A bag of gradients: semi-orthogonal on average


def play(optimizer, W, bag, sweeps):
    """Let the factors become plain means over the bag, with roots renewed at the end of a sweep.

    One sweep is then one step of the fixed-point iteration whose averages run over the bag, by
    nothing but the optimizer's own updates of its factors.
    """
    (group,) = optimizer.param_groups
    for _ in range(sweeps):
        for k, G in enumerate(bag):
            group["beta2"] = k / (k + 1)
            group["interval"] = 1 if k == len(bag) - 1 else 1000
            group["step_count"] = 500 + k  # in nobody's slot
            W.grad = G.clone()
            optimizer.step()
    state = optimizer.state[W]
    eyes = [torch.eye(k, dtype=torch.float64) for k in W.shape]
    left, right = (
        state.get(f"{side}_root.0", eye) for side, eye in zip(("left", "right"), eyes, strict=True)
    )
    return torch.stack([left @ G @ right for G in bag])


def not_semi_orthogonal(U):
    """How far means of U Uᵀ and of Uᵀ U are from multiples of the identity."""
    both = []
    for P in ((U @ U.mT).mean(0), (U.mT @ U).mean(0)):
        n = len(P)
        P = P * (n / P.trace())
        both.append(float((P - torch.eye(n, dtype=P.dtype)).norm()) / n**0.5)
    return both


@pytest.fixture
def bag():
    """Gradients with rows and columns of unequal size, and correlated."""
    mix = [randn(n, n, seed=n) + torch.diag(torch.arange(1.0, n + 1)) for n in (6, 9)]
    return [mix[0] @ randn(6, 9, seed=50 + i) @ mix[1] for i in range(40)]


PLAIN = {"lr": 0.0, "momentum": 0.0, "eps": 0.0, "length": "muon", "bias_correction": False}


def test_at_its_fixed_point_it_is_semi_orthogonal_on_average_from_both_sides(bag):
    W = zeros(6, 9)
    optimizer = KLShampoo([W], **PLAIN)
    assert max(not_semi_orthogonal(torch.stack(bag))) > 0.5
    early = max(not_semi_orthogonal(play(optimizer, W, bag, 2)))
    left, right = not_semi_orthogonal(play(optimizer, W, bag, 28))
    assert early > 1e-6  # it is no accident
    assert left < 1e-9
    assert right < 1e-9


@pytest.mark.parametrize("exponent", [1 / 4, 1 / 2], ids=["1/4", "1/2"])
def test_shampoo_is_not(bag, exponent):
    W = zeros(6, 9)
    optimizer = Shampoo([W], exponent=exponent, **PLAIN)
    left, right = not_semi_orthogonal(play(optimizer, W, bag, 1))
    assert left > 0.1
    assert right > 0.1


@pytest.mark.parametrize("sides", ["left", "right"])
def test_shampoo_of_one_side_is_from_that_side(bag, sides):
    W = zeros(6, 9)
    optimizer = Shampoo([W], exponent=1 / 2, sides=sides, **PLAIN)
    left, right = not_semi_orthogonal(play(optimizer, W, bag, 1))
    exact, other = (left, right) if sides == "left" else (right, left)
    assert exact < 1e-12
    assert other > 0.1


def test_the_average_of_an_ordinary_run_is_semi_orthogonal_too():
    """Σ w U Uᵀ = c I at every step for one side, with the weights w of the corrected average."""
    W, b = zeros(5, 8), 0.9
    optimizer = Shampoo([W], 1.0, beta2=b, exponent=1 / 2, sides="left", **BARE)
    seen = []
    for t in range(1, 25):
        seen.append(randn(5, 8, seed=t))
        update(optimizer, W, seen[-1])
        U = optimizer.state[W]["left_root.0"] @ torch.stack(seen)
        w = (1 - b) * b ** torch.arange(t - 1, -1, -1, dtype=torch.float64) / (1 - b**t)
        mean = torch.einsum("s,sij,skj->ik", w, U, U)
        torch.testing.assert_close(mean, torch.eye(5, dtype=mean.dtype), rtol=0, atol=1e-11)


# What it does not depend on


def test_any_scale_of_the_gradients_gives_the_same_updates():
    for scale in (2.0**-60, 2.0**40):
        W, V = zeros(6, 4), zeros(6, 4)
        first, second = (KLShampoo([p], 1.0, interval=3, length="own") for p in (W, V))
        for t in range(8):
            G = randn(6, 4, seed=t)
            torch.testing.assert_close(
                update(first, W, scale * G), update(second, V, G), rtol=1e-12, atol=1e-12
            )


def test_at_its_fixed_point_mixing_rows_and_columns_changes_no_singular_value(bag):
    """Unlike all the others it does not depend on the coordinates, also where they are oblique."""

    def whitened(gradients):
        W = zeros(6, 9)
        return torch.linalg.svdvals(play(KLShampoo([W], **PLAIN), W, gradients, 30))

    A, B = randn(6, 6, seed=1), randn(9, 9, seed=2)
    plain, mixed = whitened(bag), whitened([A @ G @ B for G in bag])
    mixed = mixed * (plain.norm() / mixed.norm())
    torch.testing.assert_close(mixed, plain, rtol=1e-8, atol=0)


@pytest.mark.parametrize("dead", [4, 8])
def test_inputs_that_are_always_zero_are_no_obstacle(dead):
    # The fixed point has tr(L⁻¹ E[G R⁻¹ Gᵀ]) = out in from L, and out (in - dead) from R: there is
    # none. Only the ratio of the two factors drifts, which no update depends on until it overflows.
    W = zeros(16, 16, dtype=torch.float32)
    optimizer = KLShampoo([W], 1e-3, beta2=0.5, interval=2)
    for t in range(1000):
        G = randn(16, 16, seed=t).float()
        G[:, :dead] = 0.0
        W.grad = G
        optimizer.step()
    state = optimizer.state[W]
    ratio = float(state["right.0"].trace() / state["left.0"].trace())
    assert 1e-6 < ratio < 1e6


@pytest.mark.parametrize("graft", ["adam", "muon", "none"])
def test_float32_gradients_whose_squares_underflow_are_no_obstacle(graft):
    W = zeros(8, 8, dtype=torch.float32)
    optimizer = KLShampoo([W], 1.0, graft=graft)
    for t in range(12):
        W.grad = 1e-25 * randn(8, 8, seed=t).float()
        optimizer.step()
    assert W.isfinite().all()
