"""Inverse roots and eigenvectors, against float64, from 1e-30 to 1e30, and where float32 fails."""

from __future__ import annotations

import pytest
import torch

from steepest.linalg.matrix_roots import eigendecomposition, follow_eigenvectors, inverse_root

EIGH = torch.linalg.eigh
POWERS = [1 / 4, 1 / 2]
powers = pytest.mark.parametrize("power", POWERS, ids=["1/4", "1/2"])


def semidefinite(n, rank=None, condition=1e3, batch=(), seed=0):
    """A matrix of that rank whose eigenvalues are spread over the condition number."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(
        torch.randn(*batch, n, n, generator=generator, dtype=torch.float64)
    ).Q
    values = torch.logspace(0, 1, n, base=1 / condition, dtype=torch.float64)
    values[rank or n :] = 0.0
    return (Q * values) @ Q.mT


def reference(A, power, eps=0.0, kept=None):
    """(A + eps I)^(-power) by eigenvalues in float64, on the largest `kept` of them."""
    values, Q = EIGH(A.double())
    roots = (values.clamp(min=0) + eps) ** -power
    if kept is not None:
        roots[..., : A.shape[-1] - kept] = 0.0
    return (Q * roots.unsqueeze(-2)) @ Q.mT


def error(X, Y):
    """The relative error, of the worst matrix."""
    return float((torch.linalg.matrix_norm(X.double() - Y) / torch.linalg.matrix_norm(Y)).max())


@powers
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)], ids=str
)
def test_roots_are_those_of_float64(dtype, tolerance, scale, power):
    A = semidefinite(20) * scale
    assert error(inverse_root(A.to(dtype), power), reference(A, power)) < tolerance


@powers
@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_roots_at_the_ends_of_float32(scale, power):
    A = semidefinite(6, condition=10.0) * scale
    assert error(inverse_root(A.float(), power), reference(A, power)) < 1e-5


@powers
@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3)], ids=str)
def test_batches_are_handled_matrix_by_matrix(batch, power):
    A = semidefinite(7, batch=batch) * torch.logspace(-9, 9, batch[-1], dtype=torch.float64)[
        :, None, None
    ]
    together = inverse_root(A, power)
    assert together.shape == A.shape
    for X, B in zip(together.flatten(0, -3), A.flatten(0, -3), strict=True):
        assert error(X, reference(B, power)) < 1e-12


@powers
def test_p_powers_of_the_root_give_the_inverse(power):
    A = semidefinite(12, condition=100)
    product = torch.linalg.matrix_power(inverse_root(A, power), round(1 / power)) @ A
    torch.testing.assert_close(product, torch.eye(12, dtype=A.dtype), rtol=0, atol=1e-12)


@powers
@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str
)
def test_the_null_space_stays_null(dtype, tolerance, rank, power):
    A = semidefinite(12, rank, condition=10)
    X = inverse_root(A.to(dtype), power)
    assert error(X, reference(A, power, kept=rank)) < tolerance
    assert int(torch.linalg.matrix_rank(X.double(), atol=1e-3)) == rank


@powers
def test_a_zero_matrix_has_a_zero_root_without_eps_and_that_of_eps_with(power):
    zero, eye = torch.zeros(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    assert torch.equal(inverse_root(zero, power), zero)
    torch.testing.assert_close(inverse_root(zero, power, eps=1e-8), 1e-8**-power * eye)


@powers
@pytest.mark.parametrize("eps", [1e-9, 1e-2, 10.0])
def test_eps_is_added_to_the_eigenvalues_also_of_the_null_space(eps, power):
    A = semidefinite(9, 4, condition=10)
    assert error(inverse_root(A, power, eps=eps), reference(A, power, eps)) < 1e-6
    assert error(inverse_root(A, power, eps=torch.tensor(eps)), reference(A, power, eps)) < 1e-6


@powers
def test_each_matrix_of_a_batch_can_have_an_eps_of_its_own(power):
    A, eps = semidefinite(5, batch=(3,)), torch.tensor([1e-3, 1e-1, 10.0], dtype=torch.float64)
    X = inverse_root(A, power, eps=eps)
    for x, a, e in zip(X, A, eps, strict=True):
        assert error(x, reference(a, power, float(e))) < 1e-12


def test_a_larger_eps_gives_a_smaller_root():
    A = semidefinite(8)
    sizes = [
        float(torch.linalg.matrix_norm(inverse_root(A, 1 / 2, eps=10.0**k), 2))
        for k in range(-6, 3)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_eigenvalues_up_to_the_cutoff_are_null():
    A = torch.diag(torch.tensor([1.0, 1e-2, 1e-4, 1e-6], dtype=torch.float64))
    for cutoff, kept in ((1e-3, 2), (1e-5, 3), (1e-9, 4), (1e-1, 1)):
        roots = inverse_root(A, 1 / 2, cutoff=cutoff).diagonal()
        expected = torch.tensor([1.0, 1e1, 1e2, 1e3], dtype=torch.float64)
        expected[kept:] = 0.0
        torch.testing.assert_close(roots, expected)


def test_negative_eigenvalues_of_rounding_count_as_zero():
    A = torch.diag(torch.tensor([1.0, -1e-17], dtype=torch.float64))
    torch.testing.assert_close(
        inverse_root(A, 1 / 2), torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_input_is_never_modified(dtype):
    A = semidefinite(6, batch=(2,)).to(dtype)
    before = A.clone()
    inverse_root(A, 1 / 4, eps=0.1)
    eigendecomposition(A)
    assert torch.equal(A, before)
    Q = eigendecomposition(A)[1]
    copy = Q.clone()
    follow_eigenvectors(A[0], Q[0])
    assert torch.equal(A, before)
    assert torch.equal(Q, copy)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_entries_that_are_not_finite_raise(dtype, bad):
    A = torch.eye(4, dtype=dtype).repeat(2, 1, 1)
    A[1, 2, 1] = A[1, 1, 2] = bad
    for function in (lambda: inverse_root(A, 1 / 2), lambda: eigendecomposition(A)):
        with pytest.raises(FloatingPointError, match="finite entries"):
            function()


@pytest.mark.parametrize(
    "A",
    [
        torch.zeros(3),
        torch.zeros(2, 3),
        torch.zeros(2, 2, dtype=torch.bfloat16),
        torch.zeros(2, 2, dtype=torch.long),
    ],
    ids=["vector", "not square", "half", "integer"],
)
def test_anything_but_square_matrices_of_full_precision_is_refused(A):
    with pytest.raises(ValueError, match="expected symmetric matrices"):
        inverse_root(A, 1 / 2)


# Where float32 fails


def failing(how):
    """An `eigh` that fails in float32, each time in this way."""
    calls = []

    def eigh(A):
        calls.append(A.dtype)
        if A.dtype == torch.float64:
            return EIGH(A)
        if how == "raises":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        values, Q = EIGH(A)
        if how == "wrong eigenvalue":
            values = values.clone()
            values[..., 0] += 0.01 * values[..., -1]
        elif how == "wrong eigenvectors":
            Q = Q.flip(-1)
        elif how == "not orthogonal":
            Q = Q * 1.001
        elif how == "nan":
            Q = Q * torch.nan
        return values, Q

    return eigh, calls


@pytest.mark.parametrize(
    "how", ["raises", "wrong eigenvalue", "wrong eigenvectors", "not orthogonal", "nan"]
)
def test_float64_takes_over_where_float32_fails(monkeypatch, how):
    A = semidefinite(16, condition=50)
    eigh, calls = failing(how)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    X = inverse_root(A.float(), 1 / 2)
    assert X.dtype == torch.float32
    assert calls == [torch.float32, torch.float64]
    assert error(X, reference(A, 1 / 2)) < 1e-4


def test_what_fails_in_float64_too_raises(monkeypatch):
    def eigh(A):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(FloatingPointError, match="float32 or float64"):
            inverse_root(torch.eye(3, dtype=dtype), 1 / 2)


def test_a_good_result_is_not_computed_twice(monkeypatch):
    eigh, calls = failing("not")
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    for n in (1, 2, 7, 64, 200):
        calls.clear()
        generator = torch.Generator().manual_seed(n)
        X = torch.randn(n, n // 2 + 1, generator=generator)
        for A in (X @ X.mT, 1e20 * torch.eye(n), torch.zeros(n, n), torch.ones(n, n)):
            inverse_root(A, 1 / 4)
        assert calls == [torch.float32] * 4


# Eigenvectors that are followed


def orthogonal(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_a_step_is_that_of_torchs_qr(n):
    A, Q = semidefinite(n, condition=30), orthogonal(n)
    new, order = follow_eigenvectors(A, Q)
    AQ = A @ Q
    expected_order = (Q * AQ).sum(0).argsort(descending=True)
    expected, R = torch.linalg.qr(AQ[:, expected_order])
    assert torch.equal(order, expected_order)
    torch.testing.assert_close(new, expected * R.diagonal().sign(), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)], ids=str
)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e12])
def test_what_it_returns_is_orthogonal(condition, scale, dtype, tolerance):
    A = (semidefinite(24, condition=condition) * scale).to(dtype)
    Q = orthogonal(24).to(dtype)
    for _ in range(3):
        Q, order = follow_eigenvectors(A, Q)
        assert Q.dtype == dtype
        assert sorted(order.tolist()) == list(range(24))
        torch.testing.assert_close(Q.mT @ Q, torch.eye(24, dtype=dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_matrix_of_low_rank_still_has_a_whole_basis(rank):
    A, Q = semidefinite(12, rank, condition=10), orthogonal(12)
    if rank == 0:
        A = torch.zeros_like(A)
    for _ in range(60):
        Q, _ = follow_eigenvectors(A, Q)
        torch.testing.assert_close(Q.mT @ Q, torch.eye(12, dtype=A.dtype), rtol=0, atol=1e-13)
    values = (Q * (A @ Q)).sum(0)
    torch.testing.assert_close(values, EIGH(A)[0].flip(0), rtol=0, atol=1e-10)


def test_columns_are_put_in_the_order_of_their_rayleigh_quotients():
    values = torch.tensor([2.0, 5.0, 1.0, 3.0], dtype=torch.float64)
    Q, order = follow_eigenvectors(torch.diag(values), torch.eye(4, dtype=torch.float64))
    assert order.tolist() == [1, 3, 0, 2]
    assert torch.equal(Q, torch.eye(4, dtype=torch.float64)[:, order])


def test_ties_keep_their_order():
    Q, order = follow_eigenvectors(torch.eye(5), torch.eye(5))
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(Q, torch.eye(5))


def test_followed_eigenvectors_converge_to_the_eigenvectors():
    A = semidefinite(8, condition=2.0**7)  # neighbours differ by a factor of 2
    values, exact = EIGH(A)
    Q = orthogonal(8)
    errors = []
    for _ in range(50):
        Q, _ = follow_eigenvectors(A, Q)
        off = Q.mT @ A @ Q
        errors.append(float((off - torch.diag(off.diagonal())).abs().max()))
    assert errors[-1] < 1e-13
    assert errors[20] < 1e-4 * errors[0]
    overlap = (Q.mT @ exact.flip(-1)).abs()
    torch.testing.assert_close(overlap, torch.eye(8, dtype=A.dtype), rtol=0, atol=1e-10)
    torch.testing.assert_close((Q * (A @ Q)).sum(0), values.flip(0), rtol=1e-12, atol=0)


def test_eigenvectors_that_are_known_stay():
    A = semidefinite(10)
    Q = EIGH(A)[1].flip(-1)
    new, order = follow_eigenvectors(A, Q)
    assert order.tolist() == list(range(10))
    torch.testing.assert_close(new, Q, rtol=0, atol=1e-12)
