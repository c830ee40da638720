"""Sharpness, spectrum and Gauss-Newton split of the Hessian, and curvature along a direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steepest.curvature.jacobian import flat
from steepest.curvature.loss_function import Loss
from steepest.curvature.operators import GaussNewton, Hessian
from steepest.linalg.krylov import Eigenpairs, End, Operator, eigenpairs, start_near
from steepest.linalg.probes import Estimate, SpectralDensity, spectral_density, trace
from steepest.random_numbers import copied_generator
from steepest.results import Column, Result, ResultTable


@dataclass(frozen=True, repr=False)
class Sharpness(Result):
    """The largest eigenvalue of the Hessian, as `sharpness` returns it; `float()` gives the value.

    Attributes:
        value: λ_max.
        error: how far it can be from an eigenvalue.
        vector: `(n,)`, the unit eigenvector; the next call may start from it.
        products: how many Hessian-vector products it took.
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


def sharpness(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    parameters: Sequence[str] | None = None,
    *,
    tolerance: float = 1e-3,
    start: Sharpness | Tensor | None = None,
    max_products: int = 100,
    generator: torch.Generator | None = None,
    **how: Any,
) -> Sharpness:
    """Return the largest eigenvalue of the Hessian of the loss.

    Gradient descent of step lr is stable on the quadratic model while it is below 2 / lr.

    Args:
        model, loss, batch, parameters, how: as for `Hessian`.
        tolerance: relative error to stop at.
        start: an earlier result, or a direction `(n,)`, to need fewer products; by default the
            gradient, which lies mostly along the largest eigenvalues. Both with some noise.
        max_products: where to stop in any case.
        generator: of the noise; by default a copy of torch's.

    Raises:
        ValueError: for what `Hessian` refuses, and a start of another size.
        FloatingPointError: for a loss or products that are not finite.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> found = sharpness(model, lambda model, x: 0.5 * model(x).square().sum(), x)
    >>> round(found.value, 4)
    9.0
    """
    generator = generator or copied_generator()
    H = Hessian(model, loss, batch, parameters, **how)
    guess = start.vector if isinstance(start, Sharpness) else start
    if guess is not None and guess.shape != H.shape[1:]:
        raise ValueError(
            f"got a start of shape {tuple(guess.shape)}, expected {H.shape[1:]}: a direction of "
            "the same parameters"
        )
    x = start_near(H.gradient() if guess is None else guess.to(H.vector()), generator)
    top = eigenpairs(H, x, tolerance=tolerance, max_products=max_products, generator=generator)
    value, error = top.values[0].item(), top.errors[0].item()
    return Sharpness(value, error, top.vectors[:, 0], top.products, top.converged)


@dataclass(frozen=True, repr=False)
class Spectrum(Result):
    """The spectrum of a Hessian, as `hessian_spectrum` returns it.

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


def hessian_spectrum(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    parameters: Sequence[str] | None = None,
    *,
    count: int = 5,
    tolerance: float = 1e-3,
    probes: int = 8,
    steps: int = 30,
    generator: torch.Generator | None = None,
    **how: Any,
) -> Spectrum:
    """Return extreme eigenvalues at both ends, density, trace and nuclear norm of the Hessian.

    It takes about `probes * steps` products, and some 10 for each of the `2 * count` eigenvalues.

    Args:
        model, loss, batch, parameters, how: as for `Hessian`.
        count: eigenvalues at each end.
        tolerance: relative error of each.
        probes, steps: random vectors, and products from each, for density and nuclear norm.
        generator: of starts and probes; by default a copy of torch's.

    Raises:
        ValueError, FloatingPointError: as `Hessian`.
    """
    generator = generator or copied_generator()
    H = Hessian(model, loss, batch, parameters, **how)
    n = H.shape[0]
    count = min(count, n // 2) or 1
    ends = _ends(H, H, count, tolerance, generator)
    density = spectral_density(H, H.vector(), probes, steps, generator)
    total = _trace(H, H, 0.05, max(5, 2 * probes), generator)
    value, error = density.sum_of(torch.abs)
    nuclear = Estimate(value, error, density.products, math.isfinite(error))
    return Spectrum(ends, density, total, nuclear, n)


def effective_rank(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    parameters: Sequence[str] | None = None,
    *,
    probes: int = 8,
    steps: int = 20,
    generator: torch.Generator | None = None,
    **how: Any,
) -> Estimate:
    """Return ‖H‖_* / ‖H‖_op, how many directions share the curvature, with its standard error.

    Where it is small against the number of columns, Muon's rate beats that of gradient descent
    (Shen et al., arXiv 2505.23737, Lemma 4.6: L_* / L = ‖Λ‖_* / ‖Λ‖_op).

    Args:
        model, loss, batch, parameters, how: as for `Hessian`.
        probes, steps: random vectors, and products from each, for the nuclear norm.
        generator: of starts and probes; by default a copy of torch's.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> r = effective_rank(model, lambda model, x: 0.5 * model(x).square().sum(), x, probes=100)
    >>> abs(r.value - 1.25) < 4 * r.error
    True
    """
    generator = generator or copied_generator()
    H = Hessian(model, loss, batch, parameters, **how)
    top = eigenpairs(H, start_near(H.gradient(), generator), which="magnitude", tolerance=0.01)
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


def gauss_newton_split(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    parameters: Sequence[str] | None = None,
    *,
    tolerance: float = 1e-3,
    trace_tolerance: float = 0.05,
    generator: torch.Generator | None = None,
    **how: Any,
) -> GaussNewtonSplit:
    """Return the ends of the spectra of the Hessian and of its two parts.

    G drives sharpness late, when residuals vanish and H tends to G; R is what couples layers at
    the start (Noci et al., arXiv 2402.17457, section 4).

    Args:
        model, loss, batch, parameters, how: as for `GaussNewton`.
        tolerance: relative error of eigenvalues.
        trace_tolerance: relative standard error of traces.
        generator: of starts and probes; by default a copy of torch's.

    Raises:
        ValueError, FloatingPointError: as `GaussNewton`.
    """
    generator = generator or copied_generator()
    H = Hessian(model, loss, batch, parameters, **how)
    G = GaussNewton(model, loss, batch, parameters, **how)

    def both_ends(operator: Operator) -> Ends:
        ends = _ends(operator, H, 1, tolerance, generator)
        total = _trace(operator, H, trace_tolerance, 200, generator)
        largest, smallest = ends.values[0].item(), ends.values[-1].item()
        return Ends(largest, smallest, total, ends.products + total.products, ends.converged)

    return GaussNewtonSplit(both_ends(H), both_ends(G), both_ends(lambda v: H(v) - G(v)))


@dataclass(frozen=True, repr=False)
class DirectionalCurvature(Result):
    """What the quadratic model says of steps W - t D, as `directional_curvature` returns it.

    Attributes:
        gain: ⟨G, D⟩, what the loss falls by for a unit of t, to first order.
        curvature: ⟨D, H D⟩.
        norm: ‖D‖_F.
    """

    gain: float
    curvature: float
    norm: float

    def table(self) -> ResultTable:
        """Return gain, curvature, and what the quadratic model says of them, as one row."""
        names = ("gain", "curvature", "norm", "rayleigh", "best_step", "decrease")
        return ResultTable.of([self], names, "along a direction")

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


def directional_curvature(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    direction: Mapping[str, Tensor],
    **how: Any,
) -> DirectionalCurvature:
    """Return gain and curvature along an update, from one Hessian-vector product.

    Args:
        model, loss, batch, how: as for `Hessian`.
        direction: the update of each parameter, by its name; all others are held fixed.

    Raises:
        ValueError: for names that are none, shapes that do not fit, a direction of zero.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> D = {"weight": torch.tensor([[0.0, 1.0]])}
    >>> directional_curvature(model, lambda model, x: 0.5 * model(x).square().sum(), x, D).curvature
    1.0
    """
    H = Hessian(model, loss, batch, list(direction), **how)
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


def _ends(
    operator: Operator,
    H: Hessian,
    count: int,
    tolerance: float,
    generator: torch.Generator | None,
) -> Eigenpairs:
    which: End = "both" if H.shape[0] > 1 else "largest"
    start = start_near(H.gradient(), generator)
    return eigenpairs(operator, start, count, which, tolerance, generator=generator)


def _trace(
    operator: Operator,
    H: Hessian,
    tolerance: float,
    max_products: int,
    generator: torch.Generator | None,
) -> Estimate:
    start = start_near(H.gradient(), generator)
    return trace(operator, H.vector(), tolerance, max_products, generator, start)


def _ratio(nuclear: Estimate, ends: Eigenpairs) -> Estimate:
    largest = ends.values.abs().max().item()
    if largest == 0:
        raise ValueError("got a Hessian of zero, expected one with curvature")
    value, error = nuclear.value / largest, nuclear.error / largest
    return Estimate(value, error, nuclear.products + ends.products, ends.converged)
