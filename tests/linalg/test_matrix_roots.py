"""Roots and eigenvectors against float64, and what happens where they fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steepest.linalg.matrix_roots import (
    eigendecomposition,
    follow_eigenvectors,
    inverse_root,
)


def positive(n: int, rank: int | None = None, batch: int = 1, low: float = 1e-2) -> Tensor:
    """Positive semidefinite matrices in float64 with eigenvalues from `low` to 1, then zeros."""
    Q = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64)).Q
    values = torch.zeros(n, dtype=torch.float64)
    rank = n if rank is None else rank
    values[:rank] = torch.logspace(0, torch.tensor(low).log10().item(), rank, dtype=torch.float64)
    return (Q * values) @ Q.mT


def exact(A: Tensor, power: float, eps: float = 0.0) -> Tensor:
    values, Q = torch.linalg.eigh(A)
    values = values.clamp(min=0) + eps
    kept = values > 1e-12 * values.max()
    roots = torch.where(kept, torch.where(kept, values, 1.0) ** -power, 0.0)
    return (Q * roots[..., None, :]) @ Q.mT


def distance(A: Tensor, B: Tensor) -> float:
    return float((A.double() - B).norm() / B.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [1 / 4, 1 / 2, 1.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_roots_are_exact_at_any_scale(dtype, power, scale):
    A = positive(20, batch=3)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    unit = scale**-power
    found = inverse_root((A * scale).to(dtype), power)
    assert distance(found.double() / unit, exact(A, power)) < tolerance


def test_the_null_space_stays_null_and_eps_fills_it():
    A = positive(16, rank=5)[0]
    root = inverse_root(A.float(), 1 / 2)
    assert distance(root, exact(A, 1 / 2)) < 1e-4
    assert torch.linalg.matrix_rank(root, rtol=1e-4) == 5
    assert distance(inverse_root(A.float(), 1 / 2, eps=0.1), exact(A, 1 / 2, eps=0.1)) < 1e-5
    assert not inverse_root(torch.zeros(4, 4), 1 / 2).any()
    assert torch.linalg.matrix_rank(inverse_root(A, 1 / 2, cutoff=0.5)) < 5


def test_input_is_not_modified():
    A = positive(6)[0]
    before = A.clone()
    inverse_root(A, 1 / 4, eps=0.1)
    follow_eigenvectors(A, torch.eye(6, dtype=torch.float64))
    assert torch.equal(A, before)


@pytest.mark.parametrize("failure", ["raises", "wrong values", "oblique vectors"])
def test_what_fails_in_float32_is_done_again_in_float64(failure, monkeypatch):
    eigh, asked = torch.linalg.eigh, []

    def broken(A: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(A.dtype)
        values, Q = eigh(A)
        if A.dtype == torch.float64:
            return values, Q
        if failure == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        if failure == "wrong values":
            return values * (1 + 1e-2 * torch.arange(len(values))), Q
        return values, Q + 1e-2

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    A = positive(12)[0]
    assert distance(inverse_root(A.float(), 1 / 2), exact(A, 1 / 2)) < 1e-4
    assert asked[:2] == [torch.float32, torch.float64]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_matrices_that_are_not_finite_raise(value):
    A = torch.eye(4)
    A[1, 2] = A[2, 1] = value
    with pytest.raises(FloatingPointError, match=r"no eigen.* 1 of 1"):
        eigendecomposition(A)


@pytest.mark.parametrize("A", [torch.ones(3), torch.ones(2, 3), torch.eye(2).bfloat16()])
def test_anything_but_square_matrices_in_full_precision_is_refused(A):
    with pytest.raises(ValueError, match="symmetric matrices"):
        eigendecomposition(A)


@pytest.mark.parametrize("rank", [None, 3])
def test_following_is_a_step_of_orthogonal_iteration(rank):
    A = positive(9, rank=rank)[0]
    Q = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    new = follow_eigenvectors(A, Q)
    assert torch.allclose(new.mT @ new, torch.eye(9, dtype=torch.float64), atol=1e-12)
    order = (Q * (A @ Q)).sum(0).argsort(descending=True, stable=True)
    if rank is None:
        reference, R = torch.linalg.qr(A @ Q[:, order])
        assert torch.allclose(new, reference * R.diagonal().sign(), atol=1e-9)


def test_following_again_and_again_finds_the_eigenvectors():
    A = positive(8, low=1e-3)[0]
    Q = torch.eye(8, dtype=torch.float64)
    for _ in range(200):
        Q = follow_eigenvectors(A, Q)
    D = Q.mT @ A @ Q
    assert (D - torch.diag(D.diagonal())).norm() < 1e-9
    assert torch.equal(D.diagonal(), D.diagonal().sort(descending=True).values)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_eigenvectors_of_what_is_not_finite_are_not_followed(value: float) -> None:
    A = torch.eye(5)
    A[2, 3] = A[3, 2] = value
    with pytest.raises(FloatingPointError, match="NaN or infinite entries"):
        follow_eigenvectors(A, torch.eye(5))


def test_several_are_followed_as_each_alone() -> None:
    """Also where some of them need reflections, as of low rank, and others do not."""
    A = torch.cat([positive(7), positive(7, rank=2), torch.zeros(1, 7, 7), positive(7, low=0.5)])
    Q = torch.linalg.qr(torch.randn(4, 7, 7, dtype=torch.float64)).Q
    together = follow_eigenvectors(A.view(2, 2, 7, 7), Q.view(2, 2, 7, 7)).view(4, 7, 7)
    for i, new in enumerate(together):
        alone = follow_eigenvectors(A[i], Q[i])
        kept = 2 if i == 1 else 0 if i == 2 else 7  # what lies in a null space is arbitrary
        assert torch.allclose(new[:, :kept], alone[:, :kept], rtol=0, atol=1e-10)
        assert torch.allclose(new.mT @ new, torch.eye(7, dtype=torch.float64), atol=1e-12)


def test_one_of_several_that_is_not_finite_is_an_error() -> None:
    A = torch.eye(5).repeat(3, 1, 1)
    A[1, 2, 3] = A[1, 3, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite entries"):
        follow_eigenvectors(A, torch.eye(5).repeat(3, 1, 1))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_eigenvectors_of_factors_of_any_scale_are_followed(size):
    """Also where squares of small columns vanish, or those of large ones overflow."""
    values = torch.logspace(0, -44, 12, dtype=torch.float64)
    A = (size * values.diag()).float()
    A[0, 1:] = A[1:, 0] = A.diagonal()[1:] / 2
    Q = follow_eigenvectors(A, torch.eye(12))
    torch.testing.assert_close(Q.mT @ Q, torch.eye(12), rtol=0, atol=1e-5)
    assert torch.equal(follow_eigenvectors(0 * A, Q), Q)
