from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steepest.linalg import polar
from steepest.linalg.zolotarev import LOWEST, TWO_TERMS, terms


def _function(x: Tensor, r: int, low: float = LOWEST) -> Tensor:
    a, c, _ = terms(r, low)
    return sum((w * x / (x * x + p) for w, p in zip(a, c, strict=True)), torch.zeros_like(x))


@pytest.mark.parametrize("r", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("low", [1e-4, 1e-3, 3e-3, 0.1, 0.9])
def test_error_is_that_of_the_theory(r: int, low: float) -> None:
    """It takes ± E alternately 2 r + 1 times or more: by Chebyshev nothing of the degree is
    better."""
    x = torch.logspace(math.log10(low), 0, 200_001, dtype=torch.float64)
    error, E = _function(x, r, low) - 1, terms(r, low)[2]
    assert float(error.max()) == pytest.approx(E, rel=1e-4, abs=1e-12)
    assert float(-error.min()) == pytest.approx(E, rel=1e-4, abs=1e-12)
    if E > 1e-9:
        extremes = error[error.abs() > 0.9999 * E].sign()
        assert int((extremes[1:] != extremes[:-1]).sum()) + 1 >= 2 * r


@pytest.mark.parametrize("low", [1e-4, 1e-2, 0.5])
def test_one_term_has_a_closed_form(low: float) -> None:
    a, c, E = terms(1, low)
    root = math.sqrt(low)
    assert c[0] == pytest.approx(low)
    assert pytest.approx(((1 - root) / (1 + root)) ** 2) == E
    assert a[0] == pytest.approx(2 / (1 / (1 + low) + 1 / (2 * root)))  # means of both extremes


@pytest.mark.parametrize(
    ("low", "r", "error"), [(3e-3, 2, 0.253), (1e-3, 3, 0.112), (1e-3, 4, 0.034)]
)
def test_published_errors(low: float, r: int, error: float) -> None:
    assert terms(r, low)[2] == pytest.approx(error, abs=5e-4)


def test_the_function_rises_below_the_interval() -> None:
    x = torch.logspace(-9, math.log10(LOWEST), 1000, dtype=torch.float64)
    for r in (1, 2, 3, 4):
        y = _function(x, r)
        assert bool((y.diff() > 0).all())
        assert float(y[0]) < 1e-5


def _two(x: Tensor) -> Tensor:
    a, c, b = TWO_TERMS
    return sum((w * x / (x * x + p) for w, p in zip(a, c, strict=True)), b * x)


def test_two_terms_have_the_stated_error() -> None:
    """It takes its bound alternately six times, once more than there are coefficients, so nothing
    of the form has a smaller one; up to the digits that are kept."""
    x = torch.logspace(math.log10(3e-3), 0, 200_001, dtype=torch.float64)
    error = (_two(x) - 1) * x.sqrt()
    assert 0.0275 < float(error.abs().max()) < 0.0345
    assert bool((_two(torch.logspace(-9, -2.6, 1000, dtype=torch.float64)).diff() > 0).all())


@pytest.mark.parametrize("shape", [(96, 96), (3, 200, 500), (500, 200)])
def test_two_terms_in_float32(shape: tuple[int, ...]) -> None:
    """What they are for: inner products with a matrix and with others of its singular vectors."""
    *batch, m, n = shape
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(*batch, m, k, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(*batch, n, k, dtype=torch.float64)).Q
    for values in (torch.ones(k), torch.logspace(0, -2, k), 1 / torch.arange(1.0, k + 1)):
        G = (U * values.double()) @ V.mT
        Q = polar(G.float(), "zolotarev", 2).double()
        gain = (G * Q).sum((-2, -1)) / values.double().sum()
        x = values.double() / values.double().norm(4)
        stated = (values * 0.035 / x.sqrt()).sum() / values.sum()  # all of them at their largest
        assert float((gain - 1).abs().max()) < float(stated) + 0.002
    G = U[..., :1] @ V[..., :1].mT
    assert float(((G * polar(G.float(), "zolotarev", 2)).sum((-2, -1)) - 1).abs().max()) < 0.035


@pytest.mark.parametrize("shape", [(12, 12), (3, 9, 30), (30, 9), (1, 5)])
@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_it_acts_on_each_singular_value(shape: tuple[int, ...], r: int) -> None:
    G = torch.randn(shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    x = S / torch.linalg.vector_norm(S, 4, dim=-1, keepdim=True)
    f = _two(x) if r == 2 else _function(x, r)
    expected = (U * f.unsqueeze(-2)) @ Vh
    assert torch.allclose(polar(G, "zolotarev", r), expected, atol=1e-9)


def test_failed_factorizations_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    G = torch.randn(3, 20, 30)
    expected = polar(G, "zolotarev")
    factorize = torch.linalg.cholesky_ex

    def fails_for_the_second(A: Tensor) -> tuple[Tensor, Tensor]:
        L, info = factorize(A)
        L[1] = torch.nan
        info[1] = 7
        return L, info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_for_the_second)
    assert torch.allclose(polar(G, "zolotarev"), expected, atol=1e-4)


def test_a_matrix_that_defeats_cholesky_in_float32() -> None:
    """All directions but one are rounding: R + c_1 I is indefinite if c_1 is too small."""
    G = torch.ones(900, 900) + 1e-7 * torch.randn(900, 900)
    for r in (3, 4):
        Q = polar(G, "zolotarev", r)
        assert bool(Q.isfinite().all())
        assert float(torch.linalg.matrix_norm(Q, 2)) < 1.13
