"""Decompositions whose solver fails: without an error, with any error, for some of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steepest.linalg import (
    gram_singular_values,
    leading_singular_values,
    nuclear_norm,
    polar,
    solvers,
    spectral_norm,
)
from steepest.linalg.krylov import eigenpairs
from steepest.linalg.matrix_roots import follow_eigenvectors, inverse_root


def symmetric(*shape: int) -> Tensor:
    G = torch.randn(*shape)
    return G + G.mT


def rebuilt(name: str, A: Tensor) -> tuple[Tensor, Tensor]:
    """What the parts of a decomposition make, and what they should."""
    if name == "eigh":
        values, Q = solvers.eigh(A)
        return (Q * values.unsqueeze(-2)) @ Q.mT, A
    if name == "svd":
        U, S, Vh = solvers.svd(A)
        return (U * S.unsqueeze(-2)) @ Vh, A
    if name == "qr":
        Q, R = solvers.qr(A)
        return Q @ R, A
    if name == "eigvalsh":
        return solvers.eigvalsh(A), torch.linalg.eigvalsh(A.double()).to(A)
    return solvers.svdvals(A), torch.linalg.svdvals(A.double()).to(A)


NAMES = ["eigh", "eigvalsh", "svd", "svdvals", "qr"]
FAILURES = ["NaN", "wrong", "LinAlgError", "RuntimeError", "NotImplementedError"]


@pytest.fixture
def break_solver(monkeypatch):
    """Makes a function of torch.linalg fail in float32, and says in which types it was called."""

    def broken(name: str, failure: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)):
        solve, calls = getattr(torch.linalg, name), []

        def fails(A: Tensor, *args, **kwargs):
            calls.append(A.dtype)
            result = solve(A, *args, **kwargs)
            if A.dtype not in dtypes:
                return result
            if failure == "LinAlgError":
                raise torch.linalg.LinAlgError("did not converge")
            if failure == "RuntimeError":
                raise RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")
            if failure == "NotImplementedError":
                raise NotImplementedError("not on this device")
            if failure == "OutOfMemoryError":
                raise torch.OutOfMemoryError("no memory")
            parts = (result,) if isinstance(result, Tensor) else tuple(result)
            parts = tuple(
                part * torch.nan
                if failure == "NaN"
                else part * torch.linspace(1, 1.1, part.shape[-1])
                for part in parts
            )
            return parts[0] if isinstance(result, Tensor) else parts

        monkeypatch.setattr(torch.linalg, name, fails)
        return calls

    return broken


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("shape", [(6, 6), (3, 6, 6), (2, 2, 5, 5)], ids=str)
def test_what_fails_in_float32_is_done_in_float64(name, failure, shape, break_solver):
    A = symmetric(*shape)
    calls = break_solver(name, failure)
    actual, expected = rebuilt(name, A)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.dtype == torch.float32
    assert calls[:2] == [torch.float32, torch.float64]


@pytest.mark.parametrize("name", NAMES)
def test_a_good_result_is_that_of_torch_to_the_bit(name):
    A = symmetric(3, 9, 9)
    ours, theirs = getattr(solvers, name)(A), getattr(torch.linalg, name)(A)
    pairs = [(ours, theirs)] if isinstance(ours, Tensor) else zip(ours, theirs, strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def test_only_the_matrices_that_fail_are_done_again(monkeypatch):
    solve, asked = torch.linalg.eigh, []

    def fails(A: Tensor):
        asked.append(len(A))
        values, Q = (part.clone() for part in solve(A))
        if A.dtype == torch.float32:
            Q[1] = torch.nan
        return values, Q

    A = symmetric(4, 6, 6)
    values, Q = solve(A)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    ours = solvers.eigh(A)
    assert asked == [4, 1]
    others = [0, 2, 3]
    assert torch.equal(ours[0][others], values[others])
    assert torch.equal(ours[1][others], Q[others])
    torch.testing.assert_close(ours[0][1], values[1])
    assert ours[1].isfinite().all()


def test_eigenvectors_by_singular_vectors_where_eigh_fails_in_every_type(break_solver):
    break_solver("eigh", "RuntimeError", (torch.float32, torch.float64))
    A = symmetric(3, 7, 7)  # of eigenvalues of both signs
    values, Q = solvers.eigh(A)
    torch.testing.assert_close((Q * values.unsqueeze(-2)) @ Q.mT, A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(A), rtol=1e-4, atol=1e-4)


def test_of_sums_in_float32_one_triangle_counts():
    G = torch.randn(40, 30)
    K = (G @ G.mT).double() * (1 + 1e-7 * torch.rand(40, 40))
    values, Q = solvers.eigh(K)
    assert torch.equal(values, torch.linalg.eigh(K)[0])
    assert torch.equal(solvers.eigvalsh(K), torch.linalg.eigvalsh(K))
    assert (Q.mT @ Q - torch.eye(40)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["svd", "svdvals", "qr", "eigvalsh"])
def test_what_cannot_be_found_is_a_sentence(name, break_solver):
    break_solver(name, "NaN", (torch.float32, torch.float64))
    with pytest.raises(FloatingPointError, match=r"no .* for 2 of 2"):
        getattr(solvers, name)(symmetric(2, 4, 4))


@pytest.mark.parametrize("name", NAMES)
def test_entries_that_are_not_finite_are_a_sentence(name):
    A = symmetric(3, 4, 4)
    A[1, 2, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="Expected finite entries"):
        getattr(solvers, name)(A)


def test_a_lack_of_memory_is_not_tried_again(break_solver):
    calls = break_solver("svd", "OutOfMemoryError")
    with pytest.raises(torch.OutOfMemoryError):
        solvers.svd(symmetric(4, 4))
    assert calls == [torch.float32]


# What is made of decompositions


@pytest.mark.parametrize("failure", ["NaN", "wrong", "LinAlgError", "RuntimeError"])
@pytest.mark.parametrize(
    ("solver", "method"),
    [("svd", "svd"), ("eigh", "eigh"), ("qr", "qdwh"), ("cholesky", "qdwh")],
)
def test_a_polar_factor_survives_its_solver(solver, method, failure, break_solver):
    G = torch.randn(3, 6, 10)
    expected = polar(G.double(), "svd").float()
    if solver == "cholesky" and failure == "wrong":
        pytest.skip("the next iteration corrects it")
    break_solver(solver, failure)
    torch.testing.assert_close(polar(G, method), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("failure", ["raises", "not finite"])
def test_zolotarev_survives_cholesky(failure, monkeypatch):
    G = torch.randn(3, 6, 10)
    expected = polar(G, "zolotarev")
    factorize = torch.linalg.cholesky_ex

    def fails(A: Tensor):
        if failure == "raises":
            raise RuntimeError("magma: no")
        L, info = factorize(A)
        return L * torch.nan, info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    torch.testing.assert_close(polar(G, "zolotarev"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("solver", "function"),
    [
        ("svdvals", spectral_norm),
        ("svdvals", nuclear_norm),
        ("eigvalsh", lambda A: spectral_norm(A, "krylov")),
        ("eigvalsh", gram_singular_values),
        ("svdvals", lambda A: leading_singular_values(A, 2)),
        ("qr", lambda A: leading_singular_values(A, 2)),
        ("eigh", lambda A: inverse_root(A @ A.mT, 1 / 2, eps=0.1)),
        ("qr", lambda A: follow_eigenvectors(A[:1].mT @ A[:1], torch.eye(7))[:, :1]),
    ],
)
@pytest.mark.parametrize("failure", ["NaN", "RuntimeError"])
def test_norms_and_roots_survive_their_solver(solver, function, failure, break_solver):
    A = torch.randn(5, 7)
    expected = function(A)
    break_solver(solver, failure)
    torch.testing.assert_close(function(A), expected, rtol=1e-2, atol=1e-3)


def test_lanczos_survives_its_solver(monkeypatch):
    values = torch.linspace(1, 100, 50, dtype=torch.float64)
    solve = torch.linalg.eigh

    def fails(A: Tensor):
        if A.ndim == 2:  # not those that are done again, of a batch
            raise torch.linalg.LinAlgError("did not converge")
        return solve(A)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    top = eigenpairs(lambda v: values * v, torch.ones(50, dtype=torch.float64))
    assert float(top.values) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("method", ["eigh", "svd", "qdwh", "zolotarev", "auto"])
@pytest.mark.parametrize("graded", ["rows", "columns", "both", "entries"])
def test_polar_factors_of_graded_matrices_are_finite_and_of_norm_one(method, graded):
    generator = torch.Generator().manual_seed(5)

    def spread(*shape: int) -> Tensor:
        return 10.0 ** (32 * torch.rand(*shape, generator=generator) - 16)

    for trial in range(40):
        m, n = [(8, 16), (6, 6), (16, 8), (1, 9), (33, 40)][trial % 5]
        G = torch.randn(m, n, generator=generator)
        if graded == "entries":
            G *= spread(m, n)
        if graded in ("rows", "both"):
            G *= spread(m, 1) ** (0.5 if graded == "both" else 1)
        if graded in ("columns", "both"):
            G *= spread(1, n) ** (0.5 if graded == "both" else 1)
        Q = polar(G, method)
        assert 0.5 < float(torch.linalg.matrix_norm(Q, 2)) < 1.3
