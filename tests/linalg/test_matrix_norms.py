from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from steepest.linalg import (
    gram_singular_values,
    leading_singular_values,
    nuclear_norm,
    nuclear_rank,
    spectral_norm,
    stable_rank,
)

Function = Callable[..., Tensor]
FUNCTIONS: list[Function] = [spectral_norm, nuclear_norm, nuclear_rank, stable_rank]
RANKS: list[Function] = [nuclear_rank, stable_rank]
N = 40


def _hard(iterations: int) -> Tensor:
    """One singular value above all others, by a gap that the iterations cannot resolve."""
    values = torch.full((N,), 1 - math.log(N) / (2 * (iterations - 1)))
    values[0] = 1.0
    return values.clamp(min=0).sqrt()


SPECTRA: dict[str, Tensor] = {
    "power law": 1 / torch.arange(1, N + 1.0),
    "low rank": torch.cat([torch.tensor([1.0, 0.7, 0.2]), torch.zeros(N - 3)]),
    "identity": torch.ones(N),
    "no gap": torch.linspace(1, 0.5, N),
    "tail below 1e-3": torch.cat([torch.ones(2), torch.full((N - 2,), 4e-4)]),
    "logarithmic": torch.logspace(0, -8, N),
}


def _matrices(values: Tensor, count: int = 100, m: int = N + 15) -> Tensor:
    """Random matrices with these singular values: random starts for a fixed one."""
    n = len(values)
    U = torch.linalg.qr(torch.randn(count, m, n, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(count, n, n, dtype=torch.float64)).Q
    return (U * values.double()) @ V.mT


def _exact(A: Tensor) -> dict[Function, Tensor]:
    S = torch.linalg.svdvals(A.double())
    squares = S.square().sum(-1)
    return {
        spectral_norm: S[..., 0],
        nuclear_norm: S.sum(-1),
        nuclear_rank: S.sum(-1).square() / squares,
        stable_rank: squares / S[..., 0].square(),
    }


# ----------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 6), (6, 1), (1, 1), (2, 3, 7, 4)])
def test_exact_is_that_of_the_singular_values(function: Function, shape: tuple[int, ...]) -> None:
    A = torch.randn(shape, dtype=torch.float64)
    value = function(A)
    assert value.shape == shape[:-2]
    assert torch.allclose(value, _exact(A)[function], rtol=1e-12)


@pytest.mark.parametrize("name", SPECTRA)
def test_exact_on_known_spectra(name: str) -> None:
    S = SPECTRA[name].double()
    A = _matrices(SPECTRA[name], 2)
    expected = {
        spectral_norm: 1.0,
        nuclear_norm: S.sum(),
        nuclear_rank: S.sum() ** 2 / S.square().sum(),
        stable_rank: S.square().sum(),
    }
    for function, value in expected.items():
        assert torch.allclose(function(A), torch.as_tensor(value).double(), rtol=1e-10)


@pytest.mark.parametrize("function", RANKS)
def test_ranks_lie_between_one_and_the_rank(function: Function) -> None:
    for rank in range(1, 9):
        A = torch.randn(20, 12, rank, dtype=torch.float64) @ torch.randn(20, rank, 8).double()
        value = function(A)
        assert bool((value >= 1 - 1e-12).all())
        assert bool((value <= rank + 1e-9).all())


def test_ranks_of_isometries_and_of_one_direction() -> None:
    Q = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64)).Q
    for function in RANKS:
        assert float(function(Q)) == pytest.approx(6, rel=1e-12)
        assert float(function(torch.ones(4, 7))) == pytest.approx(1, rel=1e-6)


# ----------------------------------------------------------------------------------- invariances

ESTIMATES = [
    (spectral_norm, "power"),
    (nuclear_norm, "polar"),
    (nuclear_rank, "polar"),
    (stable_rank, "power"),
    *((function, "exact") for function in FUNCTIONS),
]


@pytest.mark.parametrize(("function", "method"), ESTIMATES)
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 7.0, 1e20, 1e37])
def test_norms_scale_and_ranks_do_not(function: Function, method: str, scale: float) -> None:
    A = torch.randn(2, 6, 5)
    A /= A.abs().amax((-2, -1), keepdim=True)
    before, after = function(A, method), function(A * scale, method)
    assert torch.allclose(after, before if function in RANKS else before * scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("function", "method"), ESTIMATES)
def test_transpose_rotation_and_layout(function: Function, method: str) -> None:
    A = torch.diag_embed(torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64))
    A = torch.nn.functional.pad(A, (0, 2)) + 0.05 * torch.randn(3, 5, dtype=torch.float64)
    V = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    expected = _exact(A)[function]
    wide = torch.zeros(6, 10, dtype=torch.float64)
    wide[::2, 1::2] = A
    for same in (A, A.mT, A @ V, -A, A[torch.tensor([2, 0, 1])], wide[::2, 1::2]):
        before = same.clone()
        assert torch.allclose(function(same, method), expected, rtol=2e-4)
        assert torch.equal(same, before)


@pytest.mark.parametrize(("function", "method"), ESTIMATES)
def test_a_batch_is_a_loop(function: Function, method: str) -> None:
    A = torch.randn(2, 3, 6, 5) * torch.logspace(-25, 25, 2)[:, None, None, None]
    A[0, 1] = 0
    batch = function(A, method)
    loop = torch.stack([function(each, method) for each in A.flatten(0, 1)]).view(2, 3)
    assert torch.allclose(batch, loop, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("function", "method"), ESTIMATES)
def test_zero_gives_exactly_zero(function: Function, method: str) -> None:
    assert torch.equal(function(torch.zeros(2, 4, 3), method), torch.zeros(2))


@pytest.mark.parametrize(("function", "method"), ESTIMATES)
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_half_precision_is_measured_in_float32(
    function: Function, method: str, dtype: torch.dtype, result: torch.dtype
) -> None:
    A = torch.randn(6, 4, requires_grad=True).to(dtype)
    value = function(A, method)
    assert value.dtype == result
    assert not value.requires_grad
    assert torch.equal(value, function(A.detach().to(result), method))


# -------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("name", ["gaussian", "hard", *SPECTRA])
@pytest.mark.parametrize("iterations", [2, 4, 10, 30])
def test_power_iteration_within_the_stated_error(name: str, iterations: int) -> None:
    """Kuczyński and Woźniakowski: below 0.871 ln(n) / (k - 1) on average over starts."""
    if name == "gaussian":
        A = torch.randn(100, N + 15, N, dtype=torch.float64)
    else:
        A = _matrices(_hard(iterations) if name == "hard" else SPECTRA[name])
    estimate, exact = spectral_norm(A, "power", iterations), _exact(A)[spectral_norm]
    assert bool((estimate <= exact * (1 + 1e-12)).all())
    error = 1 - (estimate / exact).square()
    epsilon = 0.871 * math.log(N) / (iterations - 1)
    assert float(error.mean()) < epsilon
    if name == "hard" and iterations > 2:
        assert float(error.mean()) > 0.1 * epsilon  # the bound is not idle
    if epsilon < 1:
        ratio = stable_rank(A, "power", iterations) / _exact(A)[stable_rank]
        assert bool((ratio >= 1 - 1e-12).all())
        assert float((1 / ratio).mean()) > 1 - epsilon


def test_power_iteration_is_geometric_with_a_gap() -> None:
    A, singular = _matrices(torch.logspace(0, -2, N)), torch.logspace(0, -2, N)
    error = [1 - (spectral_norm(A, "power", k) / spectral_norm(A)).square() for k in (15, 25)]
    ratio = float((error[1] / error[0]).median())
    assert ratio == pytest.approx(float(singular[1] / singular[0]) ** 40, rel=0.3)


def test_power_iteration_is_the_rayleigh_quotient_of_the_last_vector() -> None:
    A = torch.randn(7, 5, dtype=torch.float64)
    v = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for iterations in (2, 3, 6):
        z = torch.linalg.matrix_power(A.mT @ A, iterations - 1) @ v
        expected = (A @ z).norm() / z.norm()
        assert float(spectral_norm(A, "power", iterations)) == pytest.approx(float(expected))


def test_power_iteration_has_the_same_start_every_time_and_leaves_the_generator_alone() -> None:
    A = torch.randn(30, 20)
    state = torch.get_rng_state()
    first = spectral_norm(A, "power", 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(spectral_norm(A, "power", 3), first)


@pytest.mark.parametrize("name", ["gaussian", *SPECTRA])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nuclear_norm_by_polar_within_the_stated_error(name: str, dtype: torch.dtype) -> None:
    A = torch.randn(20, N + 15, N).double() if name == "gaussian" else _matrices(SPECTRA[name], 20)
    S = torch.linalg.svdvals(A)
    F = S.square().sum(-1, keepdim=True).sqrt()
    tail = (S * (S < 1e-3 * F)).sum(-1)
    estimate = nuclear_norm(A.to(dtype), "polar").double()
    error = (estimate - S.sum(-1)).abs()
    assert bool((error <= 1e-4 * S.sum(-1) + tail).all())
    relative = 1e-4 + 1e-3 * N / _exact(A)[nuclear_rank].sqrt()
    assert bool((error / S.sum(-1) <= relative).all())
    if name == "tail below 1e-3":
        assert float(error.max()) > 1e-4  # the second term is needed
    rank = nuclear_rank(A.to(dtype), "polar").double() / _exact(A)[nuclear_rank]
    assert bool(((rank - 1).abs() <= 2 * relative + relative**2).all())


def test_a_gaussian_matrix_has_the_known_ranks() -> None:
    """(8 / 3π)² n and n / 4 for square ones, as n grows."""
    A = torch.randn(4, 128, 128, dtype=torch.float64)
    assert float(nuclear_rank(A).mean()) == pytest.approx((8 / (3 * math.pi)) ** 2 * 128, rel=0.02)
    assert float(stable_rank(A).mean()) == pytest.approx(128 / 4, rel=0.1)


# ------------------------------------------------------------------------------------ the errors


@pytest.mark.parametrize(("function", "method"), ESTIMATES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_entries_raise(function: Function, method: str, bad: float) -> None:
    A = torch.randn(3, 4, 5)
    A[1, 2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        function(A, method)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_input_raises_a_sentence(function: Function) -> None:
    for shape in ((), (4,)):
        with pytest.raises(ValueError, match=r"expected \(\.\.\., m, n\)"):
            function(torch.ones(shape))
    for shape in ((0, 3), (2, 3, 0), (0, 3, 3)):
        with pytest.raises(ValueError, match="empty matrix"):
            function(torch.ones(shape))
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match=f"{dtype}, .* real"):
            function(torch.ones(3, 3, dtype=dtype))
    with pytest.raises(ValueError, match=r"method='fast'"):
        function(torch.eye(3), "fast")


@pytest.mark.parametrize("iterations", [1, 0, -3])
@pytest.mark.parametrize("function", [spectral_norm, stable_rank])
def test_too_few_iterations(function: Function, iterations: int) -> None:
    with pytest.raises(ValueError, match=f"iterations={iterations}"):
        function(torch.eye(3), "power", iterations)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (3, 40, 50)])
def test_leading_singular_values_are_exact_at_low_rank_and_never_too_large(
    shape: tuple[int, ...],
) -> None:
    *batch, m, n = shape
    low = torch.randn(*batch, m, 9, dtype=torch.double) @ torch.randn(9, n, dtype=torch.double)
    exact = torch.linalg.svdvals(low)[..., :6]
    torch.testing.assert_close(leading_singular_values(low, 6), exact, rtol=1e-10, atol=0)
    full = low + 0.3 * torch.randn(shape, dtype=torch.double)
    exact = torch.linalg.svdvals(full)[..., :6]
    found = leading_singular_values(full, 6)
    assert bool((found <= exact * (1 + 1e-12)).all())
    assert bool((found >= 0.95 * exact).all())
    assert leading_singular_values(full[..., :4, :], 6).shape == (*batch, 4)
    with pytest.raises(ValueError, match="got count=0"):
        leading_singular_values(full, 0)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("iterations", [2, 4, 6])
def test_krylov_lies_between_power_and_exact(name: str, iterations: int) -> None:
    A = _matrices(SPECTRA[name], 30)
    exact, power = spectral_norm(A), spectral_norm(A, "power", iterations)
    found = spectral_norm(A, "krylov", iterations)
    assert bool((found >= power * (1 - 1e-9)).all())
    assert bool((found <= exact * (1 + 1e-9)).all())
    if name == "no gap" and iterations > 2:  # where "power" is slow, fewer iterations do
        assert bool((found >= spectral_norm(A, "power", 3 * iterations // 2)).all())


def test_krylov_is_the_largest_value_over_the_span_of_all_iterates() -> None:
    A = torch.randn(40, 30, dtype=torch.float64)
    v = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    span = torch.stack([torch.linalg.matrix_power(A.mT @ A, k) @ v for k in range(4)], dim=1)
    expected = torch.linalg.svdvals(A @ torch.linalg.qr(span).Q)[0]
    assert float(spectral_norm(A, "krylov", 4)) == pytest.approx(float(expected))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_krylov_is_exact_where_it_is_exhausted(rank: int) -> None:
    """Beyond the rank only rounding is left to go on with."""
    A = torch.randn(5, 200, rank) @ torch.randn(5, rank, 150)
    assert torch.allclose(spectral_norm(A, "krylov", 6), spectral_norm(A), rtol=1e-5)
    assert float(stable_rank(A, "krylov", 6).max()) <= max(rank, 0) * (1 + 1e-5)


@pytest.mark.parametrize("method", ["power", "krylov"])
@pytest.mark.parametrize("exponent", range(-30, 31, 3))
def test_estimates_do_not_depend_on_the_scale_of_float32(
    method: Literal["power", "krylov"], exponent: int
) -> None:
    for A in (torch.randn(40, 30), torch.linalg.qr(torch.randn(20, 20)).Q):
        expected = float(spectral_norm(A, method, 10))
        found = float(spectral_norm(A * 10.0**exponent, method, 10) / 10.0**exponent)
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 5, 20, 100])
@pytest.mark.parametrize("iterations", [2, 10, 30])
def test_krylov_is_exact_for_few_different_singular_values(
    dtype: torch.dtype, n: int, iterations: int
) -> None:
    """The iterates have as many directions; one found twice would count twice."""
    Q = torch.linalg.qr(torch.randn(20, n, n, dtype=torch.float64)).Q.to(dtype)
    two = Q @ torch.diag(torch.arange(1.0, n + 1) > n // 2).to(dtype) * 3 - Q
    for A in (Q, Q[:, : n // 2], torch.eye(n, dtype=dtype), two):
        exact = spectral_norm(A)
        torch.testing.assert_close(spectral_norm(A, "krylov", iterations), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["gaussian", *SPECTRA])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_singular_values_from_the_gram_matrix(name: str, dtype: torch.dtype, scale: float) -> None:
    A = torch.randn(5, N + 15, N).double() if name == "gaussian" else _matrices(SPECTRA[name], 5)
    exact = torch.linalg.svdvals(A)
    for given in (A, A.mT):
        found = gram_singular_values((given * scale).to(dtype)).double() / scale
        delta = (1e-3 if dtype == torch.float32 else 3.2e-8) * exact[..., :1]
        rounding = 1e-5 * delta + 2e-6 * (dtype == torch.float32) * exact
        assert bool((exact - found <= torch.minimum(delta, delta**2 / exact) + rounding).all())
        assert bool((found - exact <= torch.where(exact < delta, delta, rounding)).all())
