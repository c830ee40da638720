from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.linalg.krylov import End, Lanczos, eigenpairs, gaussian
from steepest.linalg.probes import spectral_density, trace

ENDS: list[End] = ["largest", "smallest", "magnitude", "both"]
DOUBLE, SINGLE = torch.float64, torch.float32


def _dense(values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues, in float64."""
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE)).Q
    return Q @ torch.diag(values.to(DOUBLE)) @ Q.T


def _products(A: Tensor, dtype: torch.dtype = DOUBLE) -> Callable[[Tensor], Tensor]:
    A = A.to(dtype)
    return lambda v: A @ v


def _start(n: int, dtype: torch.dtype = DOUBLE, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=DOUBLE).to(dtype)


def _expected(values: Tensor, count: int, which: End) -> Tensor:
    values = values.to(DOUBLE).sort(descending=True).values
    if which == "both":
        return torch.cat([values[:count], values[-count:]])
    if which == "magnitude":
        kept = values[values.abs().argsort(descending=True)[:count]]
        return kept.sort(descending=True).values
    return values[:count] if which == "largest" else values[-count:]


def _line(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=DOUBLE)


def _with(n: int, *some: float, rest: float = 0.0) -> Tensor:
    return torch.tensor([*some, *([rest] * (n - len(some)))], dtype=DOUBLE)


SPECTRA = {
    "line": _line(-1, 2, 80),
    "decay": torch.logspace(0, -8, 80, dtype=DOUBLE),
    "clusters": torch.cat([_line(10, 10.001, 5), _line(5, 5.001, 5), _line(-3, 0, 60)]),
    "negative definite": -torch.logspace(-1, 1, 60, dtype=DOUBLE),
    "outlier": torch.cat([torch.tensor([1000.0], dtype=DOUBLE), _line(-1, 1, 79)]),
    "two outliers": torch.cat([torch.tensor([-900.0, 1000], dtype=DOUBLE), _line(-1, 1, 78)]),
    "network": torch.cat([torch.tensor([50.0, 30, 29.5, 8], dtype=DOUBLE), _line(-0.5, 1, 200)]),
    "low rank": _with(90, 4.0, 3.0, 2.0),
    "low rank, indefinite": _with(90, 4.0, -3.0, 2.0, -1.0),
    "multiple": torch.tensor([7.0] * 3 + [5.0] * 10 + [1.0] * 20 + [-4.0] * 2, dtype=DOUBLE),
    "identity": torch.ones(30, dtype=DOUBLE),
    "zero": torch.zeros(30, dtype=DOUBLE),
    "one": torch.tensor([-3.0], dtype=DOUBLE),
    "three": torch.tensor([-3.0, 2.0, 5.0], dtype=DOUBLE),
}


# ------------------------------------------------------------------------------------- eigenpairs


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize(
    ("name", "which"),
    [(name, which) for name in SPECTRA for which in ENDS if (name, which) != ("one", "both")],
)
def test_eigenpairs(name: str, dtype: torch.dtype, count: int, which: End) -> None:
    values = SPECTRA[name]
    n = len(values)
    count = min(count, n // (1 + (which == "both")))
    tolerance = 1e-4
    found = eigenpairs(
        _products(_dense(values), dtype),
        _start(n, dtype),
        count,
        which,
        tolerance,
        max_products=n,
        generator=torch.Generator().manual_seed(0),
    )
    expected = _expected(values, count, which)
    rounding = 50 * torch.finfo(dtype).eps * float(values.abs().max())
    assert found.converged
    assert found.products <= n
    assert found.values.dtype == found.errors.dtype == DOUBLE
    assert found.vectors.dtype == dtype
    allowed = tolerance * expected.abs() + rounding
    if name == "clusters":  # one of a cluster may stand for another of it
        allowed += 1e-3
    assert bool(((found.values - expected).abs() <= allowed).all())
    assert found.values.tolist() == sorted(found.values.tolist(), reverse=True)
    V = found.vectors.double()
    assert V.shape == (n, len(expected))
    torch.testing.assert_close(V.T @ V, torch.eye(len(expected)).double(), rtol=0, atol=1e-3)
    residuals = (_dense(values) @ V - V * found.values).norm(dim=0)
    assert bool((residuals <= 0.1 * values.abs().max() + rounding).all())


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("which", ENDS)
def test_small_spaces_are_exact(n: int, which: End, dtype: torch.dtype) -> None:
    A = _start(n * n).view(n, n)
    A = A + A.T
    expected = torch.linalg.eigvalsh(A)
    count = n // 2 if which == "both" else n
    if not count:
        with pytest.raises(ValueError, match=r"count=1 at 'both'"):
            eigenpairs(_products(A, dtype), _start(n, dtype), 1, which)
        return
    found = eigenpairs(_products(A, dtype), _start(n, dtype), count, which)
    assert found.converged
    assert found.products == n
    tolerance = 100 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(
        found.values, _expected(expected, count, which), rtol=0, atol=tolerance
    )
    assert float(found.errors.max()) <= tolerance


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("name", ["network", "low rank", "line", "negative definite"])
def test_scales(name: str, dtype: torch.dtype, scale: float) -> None:
    """Squares of these overflow, or vanish, in float32."""
    values = SPECTRA[name]
    n = len(values)
    operator = _products(_dense(values) * scale, dtype)
    found = eigenpairs(operator, _start(n, dtype), 2, "both", 1e-4, max_products=n)
    unit = eigenpairs(_products(_dense(values), dtype), _start(n, dtype), 2, "both", 1e-4, n)
    assert found.converged
    assert found.products <= unit.products + 2
    torch.testing.assert_close(found.values / scale, unit.values, rtol=3e-4, atol=1e-4)
    by_start = eigenpairs(operator, _start(n, dtype) * scale, 2, "both", 1e-4, max_products=n)
    torch.testing.assert_close(by_start.values / scale, unit.values, rtol=3e-4, atol=1e-4)


@pytest.mark.parametrize("count", [2, 4, 6])
@pytest.mark.parametrize("which", ENDS)
def test_what_lies_outside_an_exhausted_space_is_found(which: End, count: int) -> None:
    """A start with a part in one copy of each eigenvalue alone; a space that is soon exhausted."""
    values = torch.tensor([5.0, 4.0, 3.0, -6.0] + 2 * [5.0] + 14 * [0.0] + 20 * [2.0], dtype=DOUBLE)
    start = torch.zeros(40, dtype=DOUBLE)
    start[:4] = 1
    found = eigenpairs(lambda v: values * v, start, count, which, max_products=40)
    assert found.converged
    torch.testing.assert_close(found.values, _expected(values, count, which))


def test_start_at_an_eigenvector_of_no_interest() -> None:
    values = _line(1, 10, 300)
    start = torch.zeros(300, dtype=DOUBLE)
    start[0] = 1
    for which in ("largest", "both"):
        found = eigenpairs(lambda v: values * v, start, 1, which, max_products=200)
        assert found.converged
        assert found.products < 150
        torch.testing.assert_close(found.values, _expected(values, 1, which), rtol=1e-3, atol=0)


def test_start_near_the_eigenvector_saves_products() -> None:
    values = SPECTRA["network"]
    n = len(values)
    cold = eigenpairs(lambda v: values * v, _start(n), 1)
    guess = torch.zeros(n, dtype=DOUBLE)
    guess[0] = 1
    warm = eigenpairs(lambda v: values * v, guess + 1e-3 * _start(n) / n**0.5, 1)
    assert warm.products < cold.products
    assert abs(float(warm.values) - 50) < 0.05


def test_low_rank_takes_few_products() -> None:
    values = _with(1000, 4.0, 3.0, 2.0)
    found = eigenpairs(lambda v: values * v, _start(1000), 3)
    assert found.products <= 6
    assert found.converged
    zero = eigenpairs(torch.zeros_like, _start(1000), 3, "both")
    assert zero.products <= 8
    assert zero.converged
    assert float(zero.values.abs().max()) == 0


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
def test_error_bounds_hold(dtype: torch.dtype) -> None:
    """Over random spectra of many kinds, ends, and numbers of products; and they are not idle."""
    generator = torch.Generator().manual_seed(5)
    held: list[bool] = []
    ratios: list[float] = []
    for trial in range(150):
        n = int(torch.randint(20, 120, (), generator=generator))
        draws = torch.randn(n, generator=generator, dtype=DOUBLE)
        values = [draws, draws.exp(), draws**3, draws.sign() * draws.abs().log2().exp2()][trial % 4]
        which = ENDS[trial % 3]
        found = eigenpairs(
            partial(torch.mul, values.to(dtype)),
            torch.randn(n, generator=generator, dtype=DOUBLE).to(dtype),
            3,
            which,
            tolerance=float(10 ** -torch.randint(1, 7, (), generator=generator)),
            max_products=int(torch.randint(6, 60, (), generator=generator)),
            generator=generator,
        )
        true = (found.values[:, None] - values).abs().min(1).values
        rounding = 20 * torch.finfo(dtype).eps * float(values.abs().max())
        held += (true <= found.errors + rounding).tolist()
        ratios += (found.errors / true.clamp(min=rounding)).tolist()
    assert len(held) == 450
    assert sum(held) >= 0.98 * len(held)
    assert sorted(ratios)[len(ratios) // 2] < 100


def test_one_product_bounds_by_the_residual() -> None:
    values = _line(0, 1, 50)
    found = eigenpairs(lambda v: values * v, _start(50), max_products=1)
    assert not found.converged
    q = _start(50) / _start(50).norm()
    residual = values * q - torch.dot(values * q, q) * q
    assert float(found.errors) == pytest.approx(float(residual.norm()))


def test_converged_is_said_only_where_it_is_so() -> None:
    values = _line(0, 1, 500)
    found = eigenpairs(lambda v: values * v, _start(500), 3, tolerance=1e-8, max_products=20)
    assert not found.converged
    assert found.products == 20
    assert float(found.errors.max()) > 1e-8
    assert eigenpairs(lambda v: values * v, _start(500), 3, tolerance=1e-3).converged


def test_tighter_tolerances_take_more_products() -> None:
    values = SPECTRA["line"]
    taken = []
    for tolerance in (1e-1, 1e-3, 1e-6, 1e-9):
        found = eigenpairs(lambda v: values * v, _start(80), 2, tolerance=tolerance)
        assert float((found.values - _expected(values, 2, "largest")).abs().max()) < 3 * tolerance
        taken.append(found.products)
    assert taken == sorted(taken)
    assert taken[0] < taken[-1]


def test_same_generator_same_bits() -> None:
    def once(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        values = _with(60, 3.0, 2.0)
        return eigenpairs(lambda v: values * v, _start(60), 4, "both", generator=generator)

    first, again, other = once(0), once(0), once(1)
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.vectors, other.vectors)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 4])
def test_entries_that_are_not_finite_raise(bad: float, at: int) -> None:
    calls = []

    def operator(v: Tensor) -> Tensor:
        calls.append(v)
        w = _line(1, 2, 30) * v
        if len(calls) == at:
            w[3] = bad
        return w

    message = r"entries from"
    with pytest.raises(FloatingPointError, match=message + rf" product {at},"):
        eigenpairs(operator, _start(30))
    calls.clear()
    with pytest.raises(FloatingPointError, match=message):
        spectral_density(operator, _start(30))
    calls.clear()
    with pytest.raises(FloatingPointError, match=message):
        trace(operator, _start(30), 0)


def test_input_that_cannot_be() -> None:
    operator = _products(torch.eye(5, dtype=DOUBLE))
    for count in (0, 6, -1):
        with pytest.raises(ValueError, match=rf"count={count} .*n=5"):
            eigenpairs(operator, _start(5), count)
    with pytest.raises(ValueError, match=r"got count=3 at 'both'"):
        eigenpairs(operator, _start(5), 3, "both")
    with pytest.raises(ValueError, match=r"max_products=2, .* 3"):
        eigenpairs(operator, _start(5), 3, max_products=2)
    with pytest.raises(ValueError, match=r"which='top'"):
        eigenpairs(operator, _start(5), 1, "top")  # type: ignore[arg-type]
    for start in (torch.zeros(5), torch.full((5,), math.nan), torch.ones(5, 1)):
        with pytest.raises(ValueError, match=r"start .* not zero"):
            eigenpairs(operator, start.double())
    with pytest.raises(ValueError, match=r"probes=0, steps=3"):
        spectral_density(operator, _start(5), probes=0, steps=3)
    with pytest.raises(ValueError, match=r"probes=1, steps=0"):
        spectral_density(operator, _start(5), probes=1, steps=0)
    for n, least in ((4, 4), (50, 3)):
        with pytest.raises(ValueError, match=rf"products=1, .*{least}"):
            trace(operator, _start(n), max_products=1)
    with pytest.raises(ValueError, match=r"start .* norm 0\.0"):
        trace(operator, _start(50), start=torch.zeros(50).double())


# ------------------------------------------------------------------------------- the process itself


def _basis(process: Lanczos) -> Tensor:
    return process.vectors(torch.eye(process.size, dtype=DOUBLE)).double()


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_the_basis_stays_orthogonal(dtype: torch.dtype) -> None:
    """To the root of the precision, where the plain process has lost it all; and has no ghosts."""
    values = torch.cat([torch.tensor([1e3, 800.0, 500, -400], dtype=DOUBLE), _line(-1, 1, 296)])
    process = Lanczos(lambda v: values.to(dtype) * v, _start(300, dtype))
    for _ in range(200):
        process.step()
    Q = _basis(process)
    off = Q.T @ Q - torch.eye(200).double()
    assert float(off.abs().max()) < 10 * torch.finfo(dtype).eps ** 0.5
    ritz, residuals, _ = process.ritz()
    tolerance = 1e3 * torch.finfo(dtype).eps * 1e3
    for value in (1e3, 800.0, 500, -400):  # each once
        assert int(((ritz - value).abs() < 1).sum()) == 1
        assert float((ritz - value).abs().min()) < tolerance
    assert int((ritz.abs() > 1 + tolerance).sum()) == 4
    converged = ritz[residuals < 1e-9 * 1e3]
    assert float(converged.diff().min()) > 1e-6  # of distinct values 1 / 148 apart
    T = process.vectors(torch.eye(200, dtype=DOUBLE)).double()
    torch.testing.assert_close(
        torch.linalg.eigvalsh(T.T @ (values[:, None] * T)), ritz, rtol=0, atol=1e-3
    )


def test_the_plain_process_has_ghosts_there() -> None:
    """So that the test above can fail: with the three terms of the recurrence alone."""
    values = torch.cat([torch.tensor([1e3, 800.0, 500, -400], dtype=DOUBLE), _line(-1, 1, 296)])
    before, q, b = torch.zeros(300), _start(300, SINGLE), 0.0
    q /= q.norm()
    T = torch.zeros(201, 201, dtype=DOUBLE)
    for k in range(200):
        w = values.float() * q - b * before
        T[k, k] = a = torch.dot(w, q).item()
        w -= a * q
        T[k, k + 1] = T[k + 1, k] = b = w.norm().item()
        before, q = q, w / b
    ritz = torch.linalg.eigvalsh(T[:200, :200])
    assert int(((ritz - 1e3).abs() < 1).sum()) > 1


def test_the_operator_is_tridiagonal_in_the_basis() -> None:
    A = _dense(SPECTRA["network"])
    process = Lanczos(_products(A), _start(len(A)))
    for _ in range(40):
        process.step()
    Q = _basis(process)
    T = torch.diag(torch.tensor(process.diagonal))
    T = T + torch.diag(torch.tensor(process.below[:-1]), 1)
    T = T + torch.diag(torch.tensor(process.below[:-1]), -1)
    torch.testing.assert_close(Q.T @ A @ Q, T.double(), rtol=0, atol=1e-5)
    values, residuals, coefficients = process.ritz()
    V = process.vectors(coefficients)
    torch.testing.assert_close((A @ V - V * values).norm(dim=0), residuals, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("name", ["multiple", "low rank", "identity", "zero", "clusters", "line"])
def test_all_eigenvalues_of_the_full_space(name: str, dtype: torch.dtype) -> None:
    values = SPECTRA[name]
    process = Lanczos(_products(_dense(values), dtype), _start(len(values), dtype))
    while not process.full:
        process.step()
    assert process.products == process.size == len(values)
    tolerance = 100 * torch.finfo(dtype).eps * max(float(values.abs().max()), 1)
    if dtype == DOUBLE:
        tolerance = 1e-11
    ritz, residuals, _ = process.ritz()
    torch.testing.assert_close(ritz, values.sort().values, rtol=0, atol=tolerance)
    assert float(residuals.abs().max()) == 0


def test_a_failed_product_leaves_the_basis() -> None:
    fine = True
    process = Lanczos(lambda v: _line(1, 2, 30) * (v if fine else math.nan), _start(30))
    for _ in range(5):
        process.step()
    before = process.ritz()[0]
    fine = False
    with pytest.raises(FloatingPointError):
        process.step()
    assert torch.equal(process.ritz()[0], before)
    fine = True
    process.step()
    assert process.size == 6
    assert process.products == 7


# ---------------------------------------------------------------------------------- the quadrature


@pytest.mark.parametrize("name", ["line", "network", "multiple", "negative definite", "three"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_moments_are_exact(name: str, steps: int) -> None:
    """Of the measure that the probe sees, up to the degree 2 steps - 1."""
    values = SPECTRA[name] / SPECTRA[name].abs().max()
    n = len(values)
    found = spectral_density(
        lambda v: values * v, _start(n), 1, steps, torch.Generator().manual_seed(3)
    )
    v = gaussian(values, torch.Generator().manual_seed(3))
    seen = v.square() / v.square().sum()
    for degree in range(2 * min(steps, n)):
        moment = (found.weights * found.nodes**degree).sum()
        torch.testing.assert_close(moment, (seen * values**degree).sum(), rtol=0, atol=1e-13)
    if steps < len(values.unique()):
        degree = 2 * steps
        moment = (found.weights * found.nodes**degree).sum()
        assert abs(float(moment - (seen * values**degree).sum())) > 1e-12


def test_weights_are_a_distribution() -> None:
    found = spectral_density(lambda v: SPECTRA["network"] * v, _start(204), 4, 12)
    assert found.nodes.shape == found.weights.shape == (4, 12)
    assert found.size == 204
    assert found.products == 48
    assert bool((found.weights >= 0).all())
    torch.testing.assert_close(found.weights.sum(1), torch.ones(4, dtype=DOUBLE))
    inside = (found.nodes >= -0.5 - 1e-9) & (found.nodes <= 50 + 1e-9)
    assert bool(inside.all())


@pytest.mark.parametrize(
    "function", [torch.abs, torch.square, torch.exp, lambda x: (x > 0).double()]
)
def test_sums_over_eigenvalues_are_within_their_errors(function: Callable[..., Tensor]) -> None:
    """Three standard errors, from eight probes each, in at least 95 of 100."""
    values = _line(-1, 1, 200)
    true = float(function(values).sum())
    within, deviations = 0, []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        found = spectral_density(lambda v: values * v, values, 8, 20, generator)
        value, error = found.sum_of(function)
        within += abs(value - true) <= 3 * error + 0.01 * abs(true)
        deviations.append((value - true) / error)
    assert within >= 95
    assert sum(abs(d) < 0.1 for d in deviations) < 50  # errors are not just large


def test_one_probe_has_no_error() -> None:
    found = spectral_density(lambda v: SPECTRA["line"] * v, _start(80), 1, 10)
    assert math.isnan(found.sum_of(torch.square)[1])
    assert bool(found.density(torch.linspace(-1, 2, 5))[1].isnan().all())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("name", ["line", "network", "low rank", "identity"])
def test_densities_integrate_to_one(name: str, scale: float) -> None:
    values = SPECTRA[name] * scale
    found = spectral_density(lambda v: values * v, values, 5, 20)
    low, high = float(values.min()), float(values.max())
    for width in (None, 0.05 * (high - low) or 0.1 * scale):
        margin = 10 * (width or max((high - low) / 100, 1e-6 * scale))
        grid = torch.linspace(low - margin, high + margin, 20001, dtype=DOUBLE)
        mean, error = found.density(grid, width)
        assert bool((mean >= 0).all())
        assert bool((error >= 0).all())
        assert float(torch.trapezoid(mean, grid)) == pytest.approx(1, abs=1e-3)


def test_density_is_where_the_eigenvalues_are() -> None:
    values = torch.tensor([1.0] * 30 + [4.0] * 10, dtype=DOUBLE)
    found = spectral_density(lambda v: values * v, values, 200, 5)
    grid = torch.tensor([1.0, 2.5, 4.0], dtype=DOUBLE)
    mean, error = found.density(grid, 0.1)
    peak = 1 / (0.1 * math.sqrt(2 * math.pi))
    expected = torch.tensor([0.75 * peak, 0, 0.25 * peak], dtype=DOUBLE)
    assert bool(((mean - expected).abs() <= 4 * error + 1e-9).all())
    assert float(error[0]) < 0.05 * peak


def test_quadrature_of_exhausted_spaces() -> None:
    """What goes on from a random vector has no weight."""
    values = _with(50, 3.0, -2.0)
    found = spectral_density(lambda v: values * v, values, 6, 20)
    assert found.nodes.shape == (6, 20)
    assert sorted({round(x, 6) + 0.0 for x in found.nodes[found.weights > 1e-9].tolist()}) == [
        -2.0,
        0.0,
        3.0,
    ]
    assert spectral_density(torch.clone, values, 2, 60).nodes.shape == (2, 50)


# -------------------------------------------------------------------------------------- the trace

TRACES = {
    "flat": _line(0.5, 1.5, 100),
    "decay": torch.logspace(0, -6, 100, dtype=DOUBLE),
    "indefinite": torch.cat([_line(-1, 1, 96), torch.tensor([20.0, 12, -9, 6], dtype=DOUBLE)]),
    "network": torch.cat([torch.tensor([50.0, 30, 8], dtype=DOUBLE), 0.05 * _line(0, 1, 97)]),
}


@pytest.mark.parametrize("name", TRACES)
def test_trace_is_unbiased_and_its_error_is_calibrated(name: str) -> None:
    """Over 150 seeds: the mean, and three of the standard errors that are stated."""
    A = _dense(TRACES[name])
    true = float(TRACES[name].sum())
    found = [
        trace(_products(A), A[0], 0, 24, torch.Generator().manual_seed(seed)) for seed in range(150)
    ]
    assert all(each.products == 24 and not each.converged for each in found)
    values = torch.tensor([each.value for each in found], dtype=DOUBLE)
    errors = torch.tensor([each.error for each in found], dtype=DOUBLE)
    assert abs(float(values.mean()) - true) < 4 * float(values.std()) / math.sqrt(150)
    assert int(((values - true).abs() <= 3 * errors).sum()) >= 130
    stated, actual = (float(each.square().mean().sqrt()) for each in (errors, values - true))
    assert 0.85 < stated / actual < 1.3


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("tolerance", [0.1, 0.02])
def test_trace_to_a_tolerance(name: str, tolerance: float) -> None:
    """Stopping where the error looks small must not pick out those that only look so."""
    A = _dense(TRACES[name])
    true = float(TRACES[name].sum())
    off = []
    for seed in range(40):
        found = trace(_products(A), A[0], tolerance, 200, torch.Generator().manual_seed(seed))
        assert found.converged
        assert float(found) == found.value
        off.append(abs(found.value - true) / (tolerance * abs(true)))
    assert sum(each <= 3 for each in off) >= 35


def test_trace_beats_plain_probes_where_few_eigenvalues_are_large() -> None:
    A = _dense(TRACES["network"])
    errors, plain = [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        errors.append(trace(_products(A), A[0], 0, 24, generator).value - 90.425)
        probes = torch.randn(100, 24, generator=generator, dtype=DOUBLE).sign()
        plain.append(float((probes * (A @ probes)).sum() / 24) - 90.425)
    assert torch.tensor(errors).norm() < 0.02 * torch.tensor(plain).norm()


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 7, 20])
def test_trace_is_exact_for_low_rank(rank: int, dtype: torch.dtype) -> None:
    values = torch.zeros(300, dtype=DOUBLE)
    values[:rank] = _line(-1, 3, rank) if rank > 1 else 2.0
    found = trace(_products(_dense(values), dtype), values.to(dtype), 1e-9)
    rounding = 300 * torch.finfo(dtype).eps * 3
    assert abs(found.value - float(values.sum())) <= rounding
    assert found.error <= rounding
    assert found.converged
    assert found.products <= 2 * rank + 8


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 24])
def test_trace_of_tiny_operators_is_exact(n: int, dtype: torch.dtype) -> None:
    A = _start(n * n).view(n, n)
    A = A + A.T
    found = trace(_products(A, dtype), A[0].to(dtype), 0)
    assert found.value == pytest.approx(float(A.trace()), rel=1e-4 if dtype == SINGLE else 1e-10)
    assert found.error == 0
    assert found.converged
    assert found.products == n


@pytest.mark.parametrize("n", [1, 2, 3, 100])
def test_trace_of_zero(n: int) -> None:
    found = trace(torch.zeros_like, torch.ones(n))
    assert (found.value, found.error, found.converged) == (0.0, 0.0, True)
    assert found.products == (n if n <= 24 else 3)


def test_the_error_of_a_trace_is_known_from_three_probes() -> None:
    """By the norms of their images; the spread of three says next to nothing.

    Too large by √3: it has to hold for one large eigenvalue too.
    """
    values = TRACES["flat"]
    A, true = _dense(values), float(values.sum())
    found = [
        trace(_products(A), A[0], 10, generator=torch.Generator().manual_seed(seed))
        for seed in range(200)
    ]
    assert {each.products for each in found} == {3}
    actual = torch.tensor([each.value - true for each in found]).double().square().mean().sqrt()
    stated = torch.tensor([each.error for each in found])
    assert 0.85 < float(stated.median() / actual) / math.sqrt(3) < 1.15
    assert float(stated.max() / stated.min()) < 2
    exact = math.sqrt(2) * (values - values.mean()).norm()  # 2 / (k - 2) of its square
    assert float(stated.median()) == pytest.approx(float(exact), rel=0.05)


CLAIMS = {
    "low rank": _with(300, 5.0, 4.0, 3.0, 2.0, 1.0),
    "rank two": _with(300, 1.0, 1.0),
    "equal, low rank": _with(300, *[1.0] * 5),
    "low rank, both signs": _with(300, 8.0, 5.0, -4.0, 3.0, -2.0),
    "power law": 1 / torch.arange(1, 301, dtype=DOUBLE),
    "steep power law": torch.arange(1, 301, dtype=DOUBLE) ** -2,
    "geometric": 0.6 ** torch.arange(300, dtype=DOUBLE),
    "flat": _line(0.5, 1.5, 300),
    "outliers on a bulk": _with(300, 50.0, 20.0, 10.0, rest=0.1),
    "bulk of both signs": torch.cat([_line(-1, 1, 296), _with(4, 100.0, 60.0, -45.0, 30.0)]),
}


@pytest.mark.parametrize("tolerance", [0.05, 0.15])
@pytest.mark.parametrize("name", CLAIMS)
def test_stopping_picks_no_lucky_trace(name: str, tolerance: float) -> None:
    """At most 5% of 250 runs are off by 2.5 of the errors they state; none states too much."""
    values = CLAIMS[name]
    true = float(values.sum())
    found = [
        trace(
            partial(torch.mul, values),
            values,
            tolerance,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(250)
    ]
    rounding = 1e-9 * abs(true)
    assert all(each.converged for each in found)
    assert sum(abs(each.value - true) > 2.5 * each.error + rounding for each in found) <= 12
    stated = torch.tensor([each.error for each in found]).double().square().mean().sqrt()
    actual = torch.tensor([each.value - true for each in found]).double().square().mean().sqrt()
    assert float(stated) <= 2 * float(actual) + rounding


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_trace_of_multiples_of_the_identity(value: float) -> None:
    """Every probe gives it, so that three state no error."""
    values = torch.full((300,), value, dtype=DOUBLE)
    found = trace(partial(torch.mul, values), values)
    assert found.value == pytest.approx(300 * value, rel=1e-12)
    assert found.error <= 1e-6 * abs(found.value)
    assert (found.products, found.converged) == (3, True)


@pytest.mark.parametrize("tolerance", [0.1, 0.05])
@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_an_outlier_that_probes_can_miss(size: float, tolerance: float) -> None:
    """A tenth or half of the trace in one eigenvalue, which two probes may hardly touch."""
    values = _with(1000, size, rest=1.0)
    true = float(values.sum())
    misses = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        found = trace(partial(torch.mul, values), values, tolerance, generator=generator)
        misses += abs(found.value - true) > 3 * tolerance * true
    assert misses <= 4


def test_where_the_process_of_a_trace_starts() -> None:
    """At the large eigenvalues: fewer products, no other value."""
    values = torch.cat([_line(20, 60, 12), 0.5 * _line(0, 1, 488)])
    start = values.square() * _start(500)
    near, far = (
        [
            trace(
                partial(torch.mul, values),
                values,
                0.02,
                generator=torch.Generator().manual_seed(seed),
                start=each,
            )
            for seed in range(30)
        ]
        for each in (start, None)
    )
    assert sum(each.products for each in near) < sum(each.products for each in far) - 30
    for found in (near, far):
        off = torch.tensor([each.value / float(values.sum()) - 1 for each in found])
        assert float(off.square().mean().sqrt()) < 0.03


def test_traceless_operators_end() -> None:
    """No error is small beside a trace of zero."""
    values = torch.cat([_line(0.5, 1, 100), -_line(0.5, 1, 100)])
    found = trace(lambda v: values * v, values, max_products=60)
    assert found.products == 60
    assert not found.converged
    assert abs(found.value) <= 4 * found.error
    whole = trace(lambda v: values * v, values, max_products=10_000)
    assert whole.products <= 410
    assert abs(whole.value) <= max(3 * whole.error, 1e-9)


@pytest.mark.parametrize("most", [3, 4, 7, 10, 20, 51])
def test_products_are_respected_and_counted(most: int) -> None:
    calls = []

    def operator(v: Tensor) -> Tensor:
        calls.append(v)
        return _line(-1, 1.1, 90) * v

    found = trace(operator, _start(90), 0, most)
    assert len(calls) == found.products == most
    assert math.isfinite(found.value)
    assert math.isfinite(found.error)
    assert not found.converged


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
def test_trace_at_any_scale(dtype: torch.dtype, scale: float) -> None:
    A = _dense(TRACES["network"])
    found = trace(_products(A * scale, dtype), A[0].to(dtype), 0.01)
    assert found.converged
    assert found.error > 0
    assert abs(found.value / scale - 90.425) < 5
    assert found.products > 4


def test_trace_of_an_operator_that_returns_its_argument() -> None:
    """The identity may return the very vector that it got."""
    assert trace(lambda v: v, torch.ones(50), 0.01).value == pytest.approx(50, rel=1e-5)
    assert float(eigenpairs(lambda v: v, _start(50)).values) == pytest.approx(1)


def test_trace_with_one_generator_is_one_number() -> None:
    def once(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return trace(lambda v: TRACES["flat"] * v, TRACES["flat"], generator=generator).value

    assert once(0) == once(0)
    assert once(0) != once(1)


def test_random_vectors_are_the_same_in_every_precision() -> None:
    wide = gaussian(torch.zeros(50, dtype=DOUBLE), torch.Generator().manual_seed(2))
    narrow = gaussian(torch.zeros(50), torch.Generator().manual_seed(2))
    assert torch.equal(wide.float(), narrow)


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("count", [1, 3])
def test_errors_are_at_least_the_rounding_of_products(which: End, count: int) -> None:
    """A residual of zero says nothing of what float32 has rounded away."""
    values = torch.tensor([5.0, 2.0, 1.0, 0.3, 0.1, -1.0], dtype=DOUBLE)
    pairs = eigenpairs(_products(_dense(values), SINGLE), _start(6, SINGLE), count, which)
    eps = torch.finfo(SINGLE).eps * pairs.values.abs().max()
    assert (pairs.errors >= eps).all()
    assert ((pairs.values - _expected(values, count, which)).abs() <= pairs.errors).all()


def test_text_of_eigenpairs_has_no_vectors() -> None:
    pairs = eigenpairs(_products(torch.eye(50)), _start(50))
    assert "errors=" in repr(pairs)
    assert "vectors" not in repr(pairs)
    assert "nodes" not in repr(spectral_density(_products(torch.eye(50)), _start(50)))
