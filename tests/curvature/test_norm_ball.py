"""The largest curvature over a norm ball, against brute force and what is known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from steepest.curvature.norm_ball import NormBall, Part, largest_curvature
from steepest.geometry import Geometry, Sign, Spectral
from steepest.model.matrix_view import MatrixView

SVD = Spectral("svd")


def _ball(*shapes: tuple[int, ...], s: Sequence[float] = (), norm: Geometry = SVD) -> NormBall:
    views = [MatrixView.of(shape) if norm is SVD else None for shape in shapes]
    each = s or [1.0] * len(shapes)
    like = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    return NormBall([Part(p, v, norm, [x]) for p, v, x in zip(like, views, each, strict=True)])


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _symmetric(n: int, seed: int, rank: int | None = None) -> Tensor:
    """Positive semidefinite if there is a rank."""
    A = _random(n, rank or n, seed=seed)
    return A @ A.T if rank else A + A.T


def _largest(H: Tensor, ball: NormBall, starts: int = 6, tolerance: float = 1e-9) -> float:
    guesses = [_random(len(H), seed=seed) for seed in range(starts)]
    value, D = largest_curvature(lambda v: H @ v, ball, guesses, tolerance, 1000)
    assert ball.norm(D) <= 1 + 1e-12
    assert value == pytest.approx(max(0.0, float(D @ H @ D)), rel=1e-9)
    return value


def _rotations(count: int) -> Tensor:
    """All orthogonal 2 x 2 matrices, nearly: `(2 count, 4)`."""
    angle = torch.arange(count, dtype=torch.float64) * 2 * math.pi / count
    c, s = angle.cos(), angle.sin()
    turns = torch.stack([c, -s, s, c], dim=1)
    return torch.cat([turns, turns * torch.tensor([1.0, -1.0, 1.0, -1.0])])


# A ball of norms


def test_furthest_has_the_largest_inner_product() -> None:
    ball, M = _ball((3, 2), (2, 4), s=[0.5, 3.0]), _random(14)
    D = ball.furthest(M)
    dual = math.sqrt(
        0.5 * torch.linalg.matrix_norm(M[:6].view(3, 2), "nuc") ** 2
        + 3.0 * torch.linalg.matrix_norm(M[6:].view(2, 4), "nuc") ** 2
    )
    assert ball.norm(D) == pytest.approx(1.0)
    assert float(M @ D) == pytest.approx(dual)
    for seed in range(200):
        other = _random(14, seed=seed)
        assert M @ other / ball.norm(other) < dual


def test_norm() -> None:
    D = torch.tensor([3.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 2.0])
    assert _ball((2, 2), (2, 2), s=[9.0, 2.0]).norm(D) == pytest.approx(math.sqrt(9 / 9 + 4 / 2))


def test_zero_gradient_has_no_direction() -> None:
    assert not _ball((2, 3)).furthest(torch.zeros(6)).any()


def test_a_part_of_weight_zero_does_not_move() -> None:
    D = _ball((2, 2), (2, 2), s=[0.0, 1.0]).furthest(_random(8))
    assert not D[:4].any()
    assert D[4:].any()


# Against brute force


@pytest.mark.parametrize("seed", range(8))
def test_one_matrix_against_all_orthogonal_ones(seed: int) -> None:
    H = _symmetric(4, seed, rank=1 + seed % 4)  # the maximum is at an extreme point
    D = _rotations(20000)
    expected = float(((D @ H) * D).sum(1).max())
    assert _largest(H, _ball((2, 2))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_two_matrices_against_all_orthogonal_ones(seed: int) -> None:
    H = _symmetric(8, seed, rank=5)
    s = torch.tensor([1.0, 2.5], dtype=torch.float64)
    D = _rotations(400)
    within = torch.stack([((D @ B) * D).sum(1) for B in (H[:4, :4], H[4:, 4:])])
    between = D @ H[:4, 4:] @ D.T
    # The best t of t₁² a + t₂² b + 2 t₁ t₂ c with Σ t² / s = 1 is an eigenvector of size 2.
    a, b = s[0] * within[0][:, None], s[1] * within[1][None, :]
    c = (s[0] * s[1]).sqrt() * between
    expected = float(((a + b) / 2 + (((a - b) / 2).square() + c.square()).sqrt()).max())
    found = _largest(H, _ball((2, 2), (2, 2), s=s.tolist()))
    assert expected * (1 - 1e-9) <= found <= expected * 1.001  # the grid is coarse


@pytest.mark.parametrize("seed", range(4))
def test_indefinite_against_many_points(seed: int) -> None:
    H, ball = _symmetric(4, seed), _ball((2, 2))
    found = _largest(H, ball, tolerance=1e-5)
    points = _random(4000, 2, 2, seed=seed + 100)
    U, S, V = torch.linalg.svd(points)
    S = torch.stack([torch.ones_like(S[:, 0]), S[:, 1] / S[:, 0]], dim=1)
    inside = ((U * S[:, None]) @ V).flatten(1)
    outside = _rotations(20000)
    best = max(float(((D @ H) * D).sum(1).max()) for D in (inside, outside))
    assert best * 0.999 <= found <= best * 1.02  # inside the ball the ascent ends slowly


@pytest.mark.parametrize("seed", range(4))
def test_sign_norm_against_all_corners(seed: int) -> None:
    H = _symmetric(8, seed, rank=3)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)
    expected = float(((corners @ H) * corners).sum(1).max())
    assert _largest(H, _ball((8,), norm=Sign()), starts=30) == pytest.approx(expected, rel=1e-9)


def test_few_starts_reach_most_of_it() -> None:
    for seed in range(3):
        H, ball = _symmetric(48, seed, rank=6), _ball((6, 8))
        assert _largest(H, ball, 4, 1e-3) >= 0.9 * _largest(H, ball, 60, 1e-6)


# Analytic


def test_identity() -> None:
    assert _largest(torch.eye(12, dtype=torch.float64), _ball((3, 4))) == pytest.approx(3)
    both = _ball((3, 4), (2, 2), s=[1.0, 5.0])
    assert _largest(torch.eye(16, dtype=torch.float64), both) == pytest.approx(5 * 2)


def test_curvature_of_single_entries() -> None:
    h = torch.tensor([7.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    # Of the orthogonal matrices the diagonal or the antidiagonal ones; here h₁ + h₄ is larger.
    assert _largest(torch.diag(h), _ball((2, 2))) == pytest.approx(10)
    assert _largest(torch.diag(h[[1, 0, 3, 2]]), _ball((2, 2))) == pytest.approx(10)


def test_curvature_of_inputs_alone() -> None:
    C = _symmetric(5, 1, rank=5)
    H = torch.kron(torch.eye(3, dtype=torch.float64), C)  # ½ tr(W C Wᵀ), as of least squares
    expected = float(torch.linalg.eigvalsh(C)[-3:].sum())
    assert _largest(H, _ball((3, 5))) == pytest.approx(expected, rel=1e-6)


def test_a_vector_is_in_the_euclidean_norm() -> None:
    H = _symmetric(5, 2)
    largest = float(torch.linalg.eigvalsh(H)[-1])
    assert _largest(H, _ball((5, 1)), 3, 1e-12) == pytest.approx(largest, rel=1e-6)


def test_curvature_that_is_nowhere_positive() -> None:
    assert _largest(-torch.eye(4, dtype=torch.float64), _ball((2, 2))) == 0.0
    assert _largest(torch.zeros(4, 4, dtype=torch.float64), _ball((2, 2))) == 0.0


def test_one_negative_singular_direction_is_left_out() -> None:
    # D = diag(1, x): 1 - x² is largest inside the ball, at x = 0.
    H = torch.diag(torch.tensor([1.0, -9.0, -9.0, -1.0], dtype=torch.float64))
    assert _largest(H, _ball((2, 2)), 20, 1e-10) == pytest.approx(1.0, rel=1e-3)


def test_little_positive_curvature_is_found() -> None:
    """Ascents that pass near zero go on at the boundary."""
    for seed in range(3):
        Q = torch.linalg.qr(_random(4, 4, seed=seed))[0]
        H = Q @ torch.diag(torch.tensor([0.05, -1.0, -1.0, -1.0], dtype=torch.float64)) @ Q.T
        guesses = [_random(4, seed=i) for i in range(4)]
        value = largest_curvature(lambda v, H=H: H @ v, _ball((2, 2)), guesses, 1e-6)[0]
        v = Q[:, 0].view(2, 2)
        assert value > 0.9 * 0.05 / float(torch.linalg.matrix_norm(v, 2)) ** 2


def test_value_never_falls() -> None:
    H, ball, start = _symmetric(12, 3), _ball((3, 4)), [_random(12)]
    values = [
        largest_curvature(lambda v: H @ v, ball, start, 0.0, products)[0]
        for products in range(1, 30)
    ]
    assert values == sorted(values)
    assert values[-1] > 1.1 * values[0]
