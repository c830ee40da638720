"""What must hold for every matrix, with matrices chosen by hypothesis."""

from __future__ import annotations

import math
from typing import get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.geometry import Euclidean, Geometry, Sign, Spectral
from steepest.linalg import nuclear_norm, nuclear_rank, polar, spectral_norm, stable_rank
from steepest.linalg.polar_factor import PolarMethod
from steepest.model.matrix_view import MatrixView

LIGHT = settings(max_examples=100, deadline=None, derandomize=True)
METHODS = st.sampled_from([name for name in get_args(PolarMethod) if name != "auto"])
SIZES = st.integers(1, 9)


@st.composite
def matrices(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Tensor:
    """Any shape, batch, rank and scale; entries from the smallest to the largest."""
    m, n, batch = draw(SIZES), draw(SIZES), draw(st.integers(1, 3))
    rank = draw(st.integers(0, min(m, n)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    left = torch.randn(batch, m, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(batch, rank, n, generator=generator, dtype=torch.float64)
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    decay = torch.logspace(0, -spread, max(rank, 1), dtype=torch.float64)[:rank]
    G = (left * decay) @ right
    G = G / G.abs().amax((-2, -1), keepdim=True).clamp(min=1e-300)
    exponent = draw(st.floats(-37, 37) if dtype == torch.float32 else st.floats(-290, 290))
    return (G * 10.0**exponent).to(dtype)


def _unit(G: Tensor) -> Tensor:
    largest = G.abs().amax((-2, -1), keepdim=True)
    return G / torch.where(largest > 0, largest, 1.0)


def _noise(method: PolarMethod) -> float:
    """In the null space: rounding times the slope at zero, which is that large for two of them."""
    return 1e-6 if method in ("eigh", "qdwh") else 1e-9


@LIGHT
@given(matrices(), METHODS)
def test_polar_shrinks_or_keeps_the_inner_product_and_never_turns(
    G: Tensor, method: PolarMethod
) -> None:
    """The singular vectors stay and the values are positive: ⟨G, Q⟩ is close to ‖G‖_*."""
    Q = polar(G, method)
    norm = torch.linalg.svdvals(_unit(G)).sum(-1)
    inner = (_unit(G) * Q).sum((-2, -1))
    low, high = (1.0, 1.0) if method in ("svd", "eigh", "qdwh") else (0.5, 1.21)
    assert bool((inner <= high * norm + 1e-9).all())
    assert bool((inner >= low * norm - 1e-9).all())
    assert bool((torch.linalg.svdvals(Q)[..., 0] <= high + 1e-9).all())


@LIGHT
@given(matrices(), METHODS)
def test_polar_commutes_with_transposition_and_sign(G: Tensor, method: PolarMethod) -> None:
    Q, noise = polar(G, method), _noise(method)
    assert torch.allclose(polar(G.mT, method), Q.mT, atol=noise)
    assert torch.allclose(polar(-G, method), -Q, atol=noise)


@LIGHT
@given(matrices(torch.float32), METHODS, st.integers(-100, 100))
def test_polar_of_a_scaled_matrix_is_the_same_to_the_bit(
    G: Tensor, method: PolarMethod, exponent: int
) -> None:
    G = _unit(G)
    scaled = torch.ldexp(G, torch.tensor(exponent))
    exact = torch.equal(torch.ldexp(scaled, torch.tensor(-exponent)), G)
    if exact:  # no entry became subnormal
        assert torch.equal(polar(scaled, method), polar(G, method))


@LIGHT
@given(matrices(torch.float32), METHODS)
def test_polar_leaves_its_input_alone_and_is_finite(G: Tensor, method: PolarMethod) -> None:
    before = G.clone()
    Q = polar(G, method)
    assert torch.equal(G, before)
    assert bool(Q.isfinite().all())
    assert Q.shape == G.shape
    assert bool((Q.abs().amax((-2, -1)) > 0).equal(G.abs().amax((-2, -1)) > 0))


@LIGHT
@given(matrices(), METHODS, st.data())
def test_polar_is_equivariant_under_permutations(
    G: Tensor, method: PolarMethod, data: st.DataObject
) -> None:
    rows = data.draw(st.permutations(range(G.shape[-2])))
    columns = data.draw(st.permutations(range(G.shape[-1])))
    Q = polar(G, method)
    moved = polar(G[:, rows][:, :, columns], method)
    assert torch.allclose(moved, Q[:, rows][:, :, columns], atol=_noise(method))


@LIGHT
@given(matrices(torch.float32), st.sampled_from([None, torch.bfloat16, torch.float32]))
def test_auto_is_finite_bounded_and_close(G: Tensor, dtype: torch.dtype | None) -> None:
    """Whatever the plan: ⟨G, Q⟩ is close to ‖G‖_*, and no singular value of Q is above 1.3."""
    before = G.clone()
    Q = polar(G, "auto", dtype=dtype)
    assert torch.equal(G, before)
    assert bool((torch.linalg.svdvals(Q.double())[..., 0] <= 1.3).all())
    norm = torch.linalg.svdvals(_unit(G).double()).sum(-1)
    inner = (_unit(G).double() * Q.double()).sum((-2, -1))
    assert bool((inner >= 0.5 * norm).all())
    assert bool((inner <= 1.3 * norm).all())


@LIGHT
@given(matrices())
def test_svd_is_idempotent(G: Tensor) -> None:
    Q = polar(G, "svd")
    assert torch.allclose(polar(Q, "svd"), Q, atol=1e-10)


@LIGHT
@given(matrices())
def test_norms_are_ordered(G: Tensor) -> None:
    """‖·‖_op <= ‖·‖_F <= ‖·‖_* <= sqrt(rank) ‖·‖_F, and the ranks lie between 1 and min(m, n)."""
    G = _unit(G)
    op, star, F = spectral_norm(G), nuclear_norm(G), torch.linalg.matrix_norm(G)
    slack, size = 1 + 1e-12, min(G.shape[-2:])
    assert bool((op <= F * slack).all())
    assert bool((star * slack >= F).all())
    assert bool((star <= math.sqrt(size) * F * slack).all())
    nonzero = G.abs().amax((-2, -1)) > 0
    for rank in (nuclear_rank(G), stable_rank(G)):
        assert bool((rank[nonzero] >= 1 / slack).all())
        assert bool((rank <= size * slack).all())
        assert not rank[~nonzero].any()
    assert bool((stable_rank(G) <= nuclear_rank(G) * slack).all())  # st <= nr for every matrix


@LIGHT
@given(matrices(), st.integers(2, 12))
def test_estimates_stay_on_their_side(G: Tensor, iterations: int) -> None:
    slack = 1 + 1e-9
    assert bool((spectral_norm(G, "power", iterations) <= spectral_norm(G) * slack).all())
    assert bool((stable_rank(G, "power", iterations) * slack >= stable_rank(G)).all())
    error = (nuclear_norm(_unit(G), "polar") - nuclear_norm(_unit(G))).abs()
    frobenius = torch.linalg.matrix_norm(_unit(G))
    bound = 1e-4 * nuclear_norm(_unit(G)) + 1e-3 * min(G.shape[-2:]) * frobenius
    assert bool((error <= bound).all())


@LIGHT
@given(matrices(), st.sampled_from([Euclidean(), Sign(), Spectral("svd")]), st.integers(0, 2**31))
def test_duality(G: Tensor, geometry: Geometry, seed: int) -> None:
    G = _unit(G)
    D = geometry.direction(G)
    dual = geometry.dual_norm(G)
    assert torch.allclose((G * D).sum((-2, -1)), dual, atol=1e-10)
    assert bool((geometry.norm(D) <= 1 + 1e-10).all())
    W = torch.randn(G.shape, generator=torch.Generator().manual_seed(seed), dtype=G.dtype)
    assert bool(((G * W).sum((-2, -1)) <= dual * geometry.norm(W) * (1 + 1e-10) + 1e-12).all())


@LIGHT
@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4), SIZES, st.booleans())
def test_matrix_views_hold_every_entry_once(
    batch: int, splits: list[int], inputs: int, transposed: bool
) -> None:
    outputs = sum(splits)
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    view = MatrixView(batch, rows, columns, transposed, tuple(splits))
    view.check((batch * rows, columns))
    tensor = torch.zeros(batch * rows, columns)
    parts = view.matrices(tensor)
    assert [tuple(W.shape) for W in parts] == [(size, inputs) for size in splits] * batch
    for i, W in enumerate(parts):
        W.add_(i + 1)
    counts = torch.bincount(tensor.flatten().long(), minlength=len(parts) + 1)[1:]
    assert counts.tolist() == [size * inputs for size in splits] * batch
