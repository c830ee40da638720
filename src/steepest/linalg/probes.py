"""What random probes tell of a symmetric operator: its spectral density and its trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steepest.linalg.krylov import Lanczos, Operator, gaussian, norm_of


@dataclass(frozen=True)
class SpectralDensity:
    """A spectrum seen through Gaussian quadratures, one from each random probe.

    Attributes:
        nodes: `(probes, steps)`, float64, where the spectrum is.
        weights: `(probes, steps)`, float64, how much of it is there; each row sums to 1.
        size: n, the number of eigenvalues.
        products: how many products with the operator it took.
    """

    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    size: int
    products: int

    def sum_of(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Return the sum of a function over all eigenvalues, and its standard error.

        `sum_of(torch.abs)` is the nuclear norm, `sum_of(torch.square)` the squared Frobenius norm.
        """
        sums = self.size * (self.weights * function(self.nodes)).sum(-1)
        return sums.mean().item(), _standard_error(sums)

    def density(self, grid: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        """Return the density on a grid `(g,)`, smoothed by a Gaussian, and its standard error.

        The area below it is 1. `width` is the deviation of the Gaussian, a hundredth of the range
        of the nodes by default.
        """
        nodes = self.nodes
        low, high = float(nodes.min()), float(nodes.max())
        width = width or max((high - low) / 100, 1e-6 * max(-low, high)) or 1e-12
        distance = (grid.double()[:, None, None] - nodes) / width
        bells = torch.exp(-0.5 * distance.square()) / (width * math.sqrt(2 * math.pi))
        curves = (bells * self.weights).sum(-1)  # (grid, probes)
        mean = curves.mean(-1)
        deviation = curves.std(-1) if curves.shape[1] > 1 else torch.full_like(mean, math.nan)
        return mean, deviation / math.sqrt(curves.shape[1])


def spectral_density(
    operator: Operator,
    like: Tensor,
    probes: int = 8,
    steps: int = 30,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Return the spectral density by stochastic Lanczos quadrature.

    From each of `probes` random vectors `steps` products; see Ghorbani et al. (2019), arXiv
    1901.10159, and Ubaru, Chen and Saad (2017).

    Args:
        operator: the symmetric map of `(n,)`.
        like: `(n,)`, for device and precision.
        probes: number of random vectors; the standard errors come from them.
        steps: of the Lanczos process; the quadrature is exact to the degree 2 steps - 1.
        generator: of the probes.
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"got probes={probes}, steps={steps}, expected at least 1 of each")
    n = like.numel()
    nodes = torch.zeros(probes, min(steps, n), dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    products = 0
    for i in range(probes):
        process = Lanczos(operator, gaussian(like, generator), generator)
        while process.size < nodes.shape[1]:
            process.step()
        nodes[i], _, coefficients = process.ritz()
        weights[i] = coefficients[0].square()
        products += process.products
    return SpectralDensity(nodes, weights, n, products)


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, the products it took, and whether that was enough."""

    value: float
    error: float
    products: int
    converged: bool

    def __float__(self) -> float:
        return self.value


def trace(
    operator: Operator,
    like: Tensor,
    tolerance: float = 0.05,
    max_products: int = 200,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Estimate:
    """Return the trace, from few products where few eigenvalues are large.

    In the span of a Lanczos process it is exact. What lies outside, B, is sampled by random probes,
    projected anew whenever the process goes on, which it does as long as more of them are missing
    than it has made steps. It ends when the standard error is at most `tolerance` times the trace.
    Hutch++ (Meyer et al., 2021, arXiv 2010.09649) has the same two parts, but draws new probes for
    a new subspace.

    For k probes ω on a sphere of radius √n the standard error is √(2 / k) ‖B - (tr B / n) I‖_F.
    The mean of |Bω|² is ‖B‖_F². Few probes know that mean badly: of one large eigenvalue they have
    a χ² of k degrees. Where it is small by chance, the trace that they find is small too. So the
    error is that of Student's t, with k - 2 in place of k. It is right for one eigenvalue, and too
    large by √(k / (k - 2)) for many. A step of the process can leave what the probes at hand do not
    see. An error that such a step makes small enough is therefore held against one more probe.

    Args:
        operator: the symmetric map of `(n,)`.
        like: `(n,)`, for device and precision.
        tolerance: relative standard error to stop at.
        max_products: where to stop in any case; 3 at least; n for n up to 24,
            which gives the exact trace.
        generator: of the probes.
        start: `(n,)`, where the process starts; a direction along large eigenvalues saves a product
            or two, as long as the probes do not depend on it. Random by default.

    Raises:
        ValueError: for too few products, or a start that is zero.
        FloatingPointError: for an operator that returns NaN or infinite entries.

    >>> values = torch.tensor([50.0, 20.0, 10.0] + 97 * [0.1])
    >>> estimate = trace(lambda v: values * v, values, tolerance=0.01)
    >>> abs(estimate.value - 89.7) < 3 * max(estimate.error, 0.1), estimate.products < 40
    (True, True)
    """
    n = like.numel()
    first = 0 if n <= 24 else 3  # probes first; small operators go without
    if max_products < (least := first or n):
        raise ValueError(
            f"got max_products={max_products}, expected at least {least}, which the first estimate "
            f"of a trace of {n} x {n} takes; raise max_products"
        )
    process = Lanczos(operator, gaussian(like, generator) if start is None else start, generator)
    probes: list[Tensor] = []  # outside the span of the process
    images: list[Tensor] = []
    value, error = math.nan, math.inf
    missing = math.inf  # probes until the error is as small as asked for, if nothing else is done
    small = False  # whether it is
    while (products := process.products + len(probes)) < max_products:
        missing = min(missing, max_products - products)
        probing = len(probes) < first or (first > 0 and (small or missing <= max(process.size, 1)))
        if probing:
            w, Q = gaussian(like, generator), process.basis
            probes.append(w - Q.T @ (Q @ w))
            images.append(operator(probes[-1]).clone())
            if not math.isfinite(images[-1].sum().item()):
                raise FloatingPointError(
                    f"got NaN or infinite entries from product {products + 1}, expected finite "
                    "ones; look at the loss and its gradient"
                )
        else:
            image = process.step()
            q = process.basis[-1]
            for w, Aw in zip(probes, images, strict=True):
                inside = torch.dot(q, w).item()
                w -= inside * q
                Aw -= inside * image
        T = process.tridiagonal()
        if process.full:
            return Estimate(T.trace().item(), 0.0, products + 1, True)
        if len(probes) >= max(first, 1):
            size = n - process.size
            sums, squares = _outside(process, probes, images)
            outside = size * sums.mean().item()
            value = T.trace().item() + outside
            spread = 2 * size / (size + 2) * (size * squares.mean().item() - outside**2 / size)
            error = math.sqrt(max(spread, 0.0) / (len(probes) - 2))
            floor = 10 * torch.finfo(like.dtype).eps * float(T.abs().max()) if len(T) else 0
            allowed = max(tolerance * abs(value), floor)
            small = error <= allowed
            if small and (probing or error <= floor):
                return Estimate(value, error, products + 1, True)
            missing = len(probes) * ((error / allowed) ** 2 - 1) if allowed else math.inf
    return Estimate(value, error, products, small)


def _outside(
    process: Lanczos, probes: Sequence[Tensor], images: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """ωᵀBω / ωᵀω and |Bω|² / ωᵀω of each probe; of Aω only what lies along the last q is inside."""
    products, squares = [], []
    for w, Aw in zip(probes, images, strict=True):
        length = norm_of(w)
        inside = process.below[-1] * torch.dot(process.next, w).item() if process.size else 0.0
        products.append(torch.dot(w, Aw).item() / length**2)
        squares.append((norm_of(Aw) / length) ** 2 - (inside / length) ** 2)
    return torch.tensor(products, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64)


def _standard_error(samples: Tensor) -> float:
    return samples.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
