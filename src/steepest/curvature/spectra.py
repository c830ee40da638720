"""Sharpness, spectrum and trace of operators, Gauss-Newton split, curvature along a direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steepest.curvature.forms import of_argument, of_parameters
from steepest.curvature.jacobian import flat
from steepest.curvature.linear_map import CurvatureOperator, check_symmetric
from steepest.curvature.operators import Hessian
from steepest.linalg import probes as random_probes
from steepest.linalg.krylov import Eigenpairs, End, eigenpairs, start_near
from steepest.linalg.probes import Estimate, SpectralDensity, spectral_density
from steepest.random_numbers import copied_generator


@dataclass(frozen=True)
class Sharpness:
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

    >>> model = nn.Linear(2, 1, bias=False)
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


@dataclass(frozen=True)
class Spectrum:
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

    >>> model = nn.Linear(2, 1, bias=False)
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

    >>> model = nn.Linear(2, 1, bias=False)
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

    >>> model = nn.Linear(2, 1, bias=False)
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


@dataclass(frozen=True)
class GaussNewtonSplit:
    """H = G + R, as `gauss_newton_split` returns it.

    Attributes:
        hessian: of H.
        gauss_newton: of G, the mean of Jᵀ (∇² of the loss in the outputs) J.
        functional: of R = H - G, the curvature of the network times the residuals.
    """

    hessian: Ends
    gauss_newton: Ends
    functional: Ends


@of_parameters(Hessian)
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


@dataclass(frozen=True)
class DirectionalCurvature:
    """What the quadratic model says of steps W - t D, as `directional_curvature` returns it.

    Attributes:
        gain: ⟨G, D⟩, what the loss falls by for a unit of t, to first order.
        curvature: ⟨D, H D⟩.
        norm: ‖D‖_F.
    """

    gain: float
    curvature: float
    norm: float

    @property
    def rayleigh(self) -> float:
        """⟨D, H D⟩ / ‖D‖², between the ends of the spectrum."""
        return self.curvature / self.norm**2

    @property
    def best_step(self) -> float:
        """The t at which the model is lowest; infinite where it has no minimum along D."""
        if self.curvature > 0:
            return self.gain / self.curvature
        return math.copysign(math.inf, self.gain) if self.gain or self.curvature else 0.0

    @property
    def decrease(self) -> float:
        """What the loss falls by at the best step, gain² / (2 curvature); infinite without one."""
        return 0.5 * self.gain * self.best_step if self.gain else abs(self.best_step)


def _names(model: nn.Module, direction: Mapping[str, Tensor]) -> list[str]:
    return list(direction)


@of_argument(_names)
def directional_curvature(H: Hessian, direction: Mapping[str, Tensor]) -> DirectionalCurvature:
    """Return gain and curvature along an update, from one Hessian-vector product.

    Args:
        H: the Hessian. Or in its place `model, loss, batch`, and settings, which make one.
        direction: the update of each parameter, by its name; all others are held fixed.

    Raises:
        ValueError: for names that are none, shapes that do not fit, a direction of zero.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> H = Hessian(model, lambda model, x: 0.5 * model(x).square().sum(), x)
    >>> directional_curvature(H, {"weight": torch.tensor([[0.0, 1.0]])}).curvature
    1.0
    """
    H = H.block(list(direction))
    for name, p in H.parameters.items():
        if name not in direction:
            raise ValueError(f"got a pattern that matches {name}, expected names of parameters")
        if direction[name].shape != p.shape:
            raise ValueError(
                f"got a direction of shape {tuple(direction[name].shape)} for {name}, expected "
                f"{tuple(p.shape)}"
            )
    D = flat([direction[name] for name in H.parameters], list(H.parameters.values())).to(H.vector())
    norm = torch.linalg.vector_norm(D, dtype=torch.float64).item()
    if not 0 < norm < math.inf:
        raise ValueError(f"got a direction of norm {norm}, expected one that is finite and not 0")
    gain, curvature = torch.dot(H.gradient(), D).item(), torch.dot(D, H(D)).item()
    return DirectionalCurvature(gain, curvature, norm)


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
