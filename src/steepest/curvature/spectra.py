"""Sharpness, spectrum and trace of operators, and what Gauss-Newton leaves of the Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.curvature.forms import of_parameters
from steepest.curvature.linear_map import CurvatureOperator, check_symmetric
from steepest.curvature.operators import Hessian
from steepest.linalg import probes as random_probes
from steepest.linalg.krylov import Eigenpairs, End, eigenpairs, start_near
from steepest.linalg.probes import Estimate, SpectralDensity, spectral_density
from steepest.random_numbers import copied_generator
from steepest.results import Column, Result, ResultTable


@dataclass(frozen=True, repr=False)
class Sharpness(Result):
    """The largest eigenvalue, as `sharpness` returns it; `float()` gives the value.

    Attributes:
        value: λ_max.
        error: how far it can be from an eigenvalue.
        vector: `(n,)`, the unit eigenvector; the next call may start from it.
        products: how many products with the operator it took.
        converged: whether the error is within the tolerance.
    """

    value: float
    error: float
    vector: Tensor
    products: int
    converged: bool

    def table(self) -> ResultTable:
        """Return the value, its error and the work it took as one row."""
        return ResultTable.of([self], ("value", "error", "products", "converged"), "sharpness")

    def __float__(self) -> float:
        return self.value


@of_parameters(Hessian)
def sharpness(
    H: CurvatureOperator,
    *,
    tolerance: float = 1e-3,
    start: Sharpness | Tensor | None = None,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> Sharpness:
    """Return the largest eigenvalue of the Hessian of the loss, or of any symmetric operator.

    Gradient descent of step lr is stable on the quadratic model while it is below 2 / lr.

    Args:
        H: the operator. Or in its place `model, loss, batch, parameters` and settings, which make
            a `Hessian`.
        tolerance: relative error to stop at.
        start: an earlier result, or a direction `(n,)`, to need fewer products; by default the
            gradient, which lies mostly along the largest eigenvalues. Both with some noise.
        max_products: where to stop in any case.
        generator: of the noise; by default a copy of torch's.

    Raises:
        ValueError: for what `Hessian` refuses, a cross block, and a start of another size.
        FloatingPointError: for a loss or products that are not finite.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> H = Hessian(model, lambda model, x: 0.5 * model(x).square().sum(), x)
    >>> round(sharpness(H).value, 4), round(sharpness(2 * H).value, 4)
    (9.0, 18.0)
    """
    check_symmetric(H)
    generator = generator or copied_generator()
    guess = start.vector if isinstance(start, Sharpness) else start
    if guess is None:
        x = H.start(generator)
    elif guess.shape == H.shape[1:]:
        x = start_near(guess.to(H.vector()), generator)
    else:
        raise ValueError(
            f"got a start of shape {tuple(guess.shape)}, expected {H.shape[1:]}: a direction of "
            "the same parameters"
        )
    top = eigenpairs(H, x, tolerance=tolerance, max_products=max_products, generator=generator)
    value, error = top.values[0].item(), top.errors[0].item()
    return Sharpness(value, error, top.vectors[:, 0], top.products, top.converged)


@dataclass(frozen=True, repr=False)
class Spectrum(Result):
    """The spectrum of an operator, as `spectrum` returns it.

    Attributes:
        extremes: the largest and the smallest eigenvalues with errors, in descending order.
        density: the whole of it, smoothed, with standard errors (`density.density(grid)`).
        trace: with its standard error.
        nuclear_norm: the sum of absolute eigenvalues, with its standard error.
        size: number of eigenvalues.
    """

    extremes: Eigenpairs
    density: SpectralDensity
    trace: Estimate
    nuclear_norm: Estimate
    size: int

    def table(self) -> ResultTable:
        """Return the extreme eigenvalues, the trace, nuclear norm and effective rank as rows."""
        ends = zip(self.extremes.values.tolist(), self.extremes.errors.tolist(), strict=True)
        rows = [(f"eigenvalue {i}", *end) for i, end in enumerate(ends, start=1)]
        sums = {"trace": self.trace, "nuclear norm": self.nuclear_norm}
        if self.extremes.values.any():
            sums["effective rank"] = self.effective_rank
        rows += [(name, estimate.value, estimate.error) for name, estimate in sums.items()]
        columns = (Column("quantity"), Column("value"), Column("error", "± error", ".2g"))
        return ResultTable(columns, tuple(rows), f"spectrum of {self.size:,} eigenvalues")

    @property
    def effective_rank(self) -> Estimate:
        """‖H‖_* / ‖H‖_op, with its standard error."""
        return _ratio(self.nuclear_norm, self.extremes)


@of_parameters(Hessian)
def spectrum(
    H: CurvatureOperator,
    *,
    count: int = 5,
    tolerance: float = 1e-3,
    probes: int = 8,
    steps: int = 30,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """Return extreme eigenvalues at both ends, density, trace and nuclear norm of an operator.

    It takes about `probes * steps` products, and some 10 for each of the `2 * count` eigenvalues.

    Args:
        H: the operator. Or in its place `model, loss, batch, parameters` and settings, which make
            a `Hessian`.
        count: eigenvalues at each end.
        tolerance: relative error of each.
        probes, steps: random vectors, and products from each, for density and nuclear norm.
        generator: of starts and probes; by default a copy of torch's.

    Raises:
        ValueError, FloatingPointError: as `sharpness`.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> H = Hessian(model, lambda model, x: 0.5 * model(x).square().sum(), x)
    >>> [round(value, 3) for value in spectrum(H).extremes.values.tolist()]
    [9.0, 1.0]
    """
    check_symmetric(H)
    generator = generator or copied_generator()
    n = H.shape[0]
    extremes = _extremes(H, H.start(generator), min(count, n // 2) or 1, tolerance, generator)
    density = spectral_density(H, H.vector(), probes, steps, generator)
    total = trace(H, max_products=max(5, 2 * probes), generator=generator)
    value, error = density.sum_of(torch.abs)
    nuclear = Estimate(value, error, density.products, math.isfinite(error))
    return Spectrum(extremes, density, total, nuclear, n)


@of_parameters(Hessian)
def trace(
    H: CurvatureOperator,
    *,
    tolerance: float = 0.05,
    max_products: int = 200,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the trace of an operator with its standard error, as `steepest.linalg.probes.trace`.

    Args:
        H: the operator. Or in its place `model, loss, batch, parameters` and settings, which make
            a `Hessian`.
        tolerance: relative standard error to stop at.
        max_products: where to stop in any case; 3 at least; n for n up to 24, which gives the
            exact trace.
        generator: of start and probes; by default a copy of torch's.

    Raises:
        ValueError, FloatingPointError: as `sharpness`.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> H = Hessian(model, lambda model, x: 0.5 * model(x).square().sum(), x)
    >>> round(trace(H).value, 3), round(trace(H - H.gauss_newton()).value, 3)
    (10.0, 0.0)
    """
    check_symmetric(H)
    generator = generator or copied_generator()
    start = H.start(generator)
    return random_probes.trace(H, H.vector(), tolerance, max_products, generator, start)


@of_parameters(Hessian)
def effective_rank(
    H: CurvatureOperator,
    *,
    probes: int = 8,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return ‖H‖_* / ‖H‖_op, how many directions share the curvature, with its standard error.

    Where it is small against the number of columns, Muon's rate beats that of gradient descent
    (Shen et al., arXiv 2505.23737, Lemma 4.6: L_* / L = ‖Λ‖_* / ‖Λ‖_op).

    Args:
        H: the operator. Or in its place `model, loss, batch, parameters` and settings, which make
            a `Hessian`.
        probes, steps: random vectors, and products from each, for the nuclear norm.
        generator: of starts and probes; by default a copy of torch's.

    Raises:
        ValueError, FloatingPointError: as `sharpness`; also for an operator of zero.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> H = Hessian(model, lambda model, x: 0.5 * model(x).square().sum(), x)
    >>> r = effective_rank(H, probes=100)
    >>> abs(r.value - 1.25) < 4 * r.error
    True
    """
    check_symmetric(H)
    generator = generator or copied_generator()
    top = eigenpairs(H, H.start(generator), which="magnitude", tolerance=0.01)
    density = spectral_density(H, H.vector(), probes, steps, generator)
    value, error = density.sum_of(torch.abs)
    return _ratio(Estimate(value, error, density.products, math.isfinite(error)), top)


@dataclass(frozen=True)
class Ends:
    """The two ends of a spectrum and its sum."""

    largest: float
    smallest: float
    trace: Estimate
    products: int
    converged: bool


@dataclass(frozen=True, repr=False)
class GaussNewtonSplit(Result):
    """H = G + R, as `gauss_newton_split` returns it.

    Attributes:
        hessian: of H.
        gauss_newton: of G, the mean of Jᵀ (∇² of the loss in the outputs) J.
        functional: of R = H - G, the curvature of the network times the residuals.
    """

    hessian: Ends
    gauss_newton: Ends
    functional: Ends

    def table(self) -> ResultTable:
        """Return the ends and the trace of H, G and R as rows."""
        parts = {"H": self.hessian, "G": self.gauss_newton, "R = H - G": self.functional}
        rows = tuple(
            (name, e.largest, e.smallest, e.trace.value, e.trace.error, e.products, e.converged)
            for name, e in parts.items()
        )
        names = ("part", "largest", "smallest", "trace", "trace_error", "products", "converged")
        return ResultTable(tuple(map(Column, names)), rows, "Hessian and its Gauss-Newton part")


@of_parameters(Hessian, Hessian)
def gauss_newton_split(
    H: Hessian,
    *,
    tolerance: float = 1e-3,
    trace_tolerance: float = 0.05,
    generator: torch.Generator | None = None,
) -> GaussNewtonSplit:
    """Return the ends of the spectra of the Hessian and of its two parts.

    G drives sharpness late, when residuals vanish and H tends to G; R is what couples layers at
    the start (Noci et al., arXiv 2402.17457, section 4).

    Args:
        H: the Hessian. Or in its place `model, loss, batch, parameters` and settings, which make
            one.
        tolerance: relative error of eigenvalues.
        trace_tolerance: relative standard error of traces.
        generator: of starts and probes; by default a copy of torch's.

    Raises:
        ValueError, FloatingPointError: as `Hessian` and `GaussNewton`; also for a cross block.
    """
    generator = generator or copied_generator()
    G = H.gauss_newton()

    def ends(A: CurvatureOperator) -> Ends:
        extremes = _extremes(A, H.start(generator), 1, tolerance, generator)
        total = random_probes.trace(
            A, H.vector(), trace_tolerance, generator=generator, start=H.start(generator)
        )
        largest, smallest = extremes.values[0].item(), extremes.values[-1].item()
        products = extremes.products + total.products
        return Ends(largest, smallest, total, products, extremes.converged)

    return GaussNewtonSplit(ends(H), ends(G), ends(H - G))


def _extremes(
    H: CurvatureOperator,
    start: Tensor,
    count: int,
    tolerance: float,
    generator: torch.Generator | None,
) -> Eigenpairs:
    """The eigenvalues at both ends."""
    which: End = "both" if H.shape[0] > 1 else "largest"
    return eigenpairs(H, start, count, which, tolerance, generator=generator)


def _ratio(nuclear: Estimate, extremes: Eigenpairs) -> Estimate:
    largest = extremes.values.abs().max().item()
    if largest == 0:
        raise ValueError("got a Hessian of zero, expected one with curvature")
    value, error = nuclear.value / largest, nuclear.error / largest
    return Estimate(value, error, nuclear.products + extremes.products, extremes.converged)
