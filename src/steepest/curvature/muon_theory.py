"""What Muon's theory compares: curvature along its step, smoothness in its norm.

For a matrix with gradient G = U S Vᵀ and Hessian block H, Shen et al. ("On the convergence analysis
of Muon", arXiv 2505.23737, section 4) write J = ⟨U Vᵀ, H[U Vᵀ]⟩, L = ‖H‖_op, and L_* for the
smallest constant with ‖H[E]‖_* <= L_* ‖E‖_op. All are measured here at the weights at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.curvature.forms import of_parameters
from steepest.curvature.hessian_blocks import (
    HessianBlock,
    hessian_of_matrices,
    parameter_hessians,
)
from steepest.curvature.operators import Hessian
from steepest.geometry import Geometry, LayerwiseSpectral, Spectral
from steepest.linalg.krylov import eigenpairs, start_near
from steepest.random_numbers import copied_generator
from steepest.results import Column, Result, Results, ResultTable

EXACT_POLAR = Spectral("svd")
"""Polynomials leave singular values above 1, and bounds would be none."""


@dataclass(frozen=True, repr=False)
class MuonCondition(Result):
    """One matrix, measured on one batch, as `muon_conditions` returns it.

    Attributes:
        matrix: parameter name; `[i]` behind it counts the matrices of a fused or batched one.
        shape: (out, in).
        nuclear_norm: ‖G‖_*.
        frobenius_norm: ‖G‖_F.
        polar_curvature: J, along the polar factor of G; negative where the loss curves downwards.
        gradient_curvature: ⟨G, H[G]⟩ / ‖G‖_F², along G.
        smoothness: L, the largest magnitude of an eigenvalue of H.
        smoothness_error: how far L can be from the magnitude of an eigenvalue.
        spectral_smoothness_at_least: a lower bound of L_*, ‖H[E]‖_* of the best E that was found.
        products: how many Hessian-vector products it took.
        converged: whether the error of L is within the tolerance.
    """

    matrix: str
    shape: tuple[int, int]
    nuclear_norm: float
    frobenius_norm: float
    polar_curvature: float
    gradient_curvature: float
    smoothness: float
    smoothness_error: float
    spectral_smoothness_at_least: float
    products: int
    converged: bool

    def table(self) -> ResultTable:
        """Return both sides of the condition and the decreases as one row."""
        columns = (
            "matrix",
            "shape",
            Column("ratio", "J / L"),
            "nuclear_rank",
            "holds",
            "muon_decrease",
            "gradient_guarantee",
            "converged",
        )
        return ResultTable.of([self], columns, "Muon's condition: J / L <= nuclear rank")

    @property
    def nuclear_rank(self) -> float:
        """‖G‖_*² / ‖G‖_F²."""
        return (self.nuclear_norm / self.frobenius_norm) ** 2

    @property
    def ratio(self) -> float:
        """J / L; for least squares at most the stable rank of the input."""
        return self.polar_curvature / self.smoothness if self.smoothness else 0.0

    @property
    def holds(self) -> bool:
        """Whether J / L <= ‖G‖_*² / ‖G‖_F², condition (4): `muon_decrease` >= that guarantee."""
        return self.ratio <= self.nuclear_rank

    @property
    def muon_decrease(self) -> float:
        """‖G‖_*² / (2 J), by which the quadratic model falls at Muon's best step."""
        return decrease(self.nuclear_norm, self.polar_curvature)

    @property
    def gradient_guarantee(self) -> float:
        """‖G‖_F² / (2 L), by which it falls at least along G, at the step 1 / L."""
        return decrease(self.frobenius_norm, self.smoothness)

    @property
    def gradient_decrease(self) -> float:
        """‖G‖_F⁴ / (2 ⟨G, H[G]⟩), by which it falls at the best step along G.

        That is what `muon_decrease` is to be held against: J belongs to the gradient at hand, L to
        the worst that there could be.
        """
        return decrease(self.frobenius_norm, self.gradient_curvature)


@of_parameters(hessian_of_matrices, Hessian)
def muon_conditions(
    H: Hessian,
    *,
    tolerance: float = 1e-2,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> Results[MuonCondition]:
    """Return the constants of Muon's theory for every matrix of a model.

    Each matrix by itself, all else held fixed: H is a diagonal block of the Hessian. Along the two
    directions it takes one product each, for L some ten to thirty, for L_* some ten, with an SVD of
    the matrix each. Matrices without any gradient, as of idle experts, have no row.

    Args:
        H: the Hessian of parameters that are all matrices, such as `H.block("*.weight")`. Fused
            projections, grouped convolutions and experts give a row for each of their matrices.
            Or in its place `model, loss, batch, parameters` and settings, which make one; the
            parameters are then by default the matrices of `steepest.roles`.
        tolerance: relative error of L, and the relative gain at which the search for L_* ends.
        max_products: where the search for L, and each of the two for L_*, stops in any case.
        generator: of the start of the search for L; by default a copy of torch's.

    Raises:
        ValueError: for what `Hessian` refuses, parameters that are no matrices, models without.
        FloatingPointError: for a loss or products that are not finite.

    >>> model = torch.nn.Linear(2, 2, bias=False).double()
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> squares = lambda model, x: 0.5 * model(x).square().sum()  # H[E] = E xᵀ x
    >>> [row] = muon_conditions(Hessian(model, squares, x), tolerance=1e-6)
    >>> round(row.smoothness, 3), round(row.polar_curvature, 3), round(row.ratio, 3)
    (9.0, 10.0, 1.111)
    """
    check(tolerance, max_products)
    generator = generator or copied_generator()
    rows = []
    geometry = LayerwiseSpectral(EXACT_POLAR)
    for part, members in parameter_hessians(H):
        for place in members:
            before = part.products
            block = HessianBlock(part, [place])
            G = block.gradient
            E = geometry.direction(G)
            start = start_near(G.flatten(), generator)
            top = eigenpairs(block.flat, start, 1, "magnitude", tolerance, max_products, generator)
            V = top.vectors[:, 0].reshape(G.shape)  # from here the value is never below L
            searches = [climb(block, geometry, X, tolerance, max_products) for X in (G, V)]
            rows.append(
                MuonCondition(
                    matrix=place.label,
                    shape=(G.shape[1], G.shape[2]),
                    nuclear_norm=inner(E, G),
                    frobenius_norm=math.sqrt(inner(G, G)),
                    polar_curvature=inner(E, block(E)),
                    gradient_curvature=inner(G, block(G)) / inner(G, G),
                    smoothness=top.values[0].abs().item(),
                    smoothness_error=top.errors[0].item(),
                    spectral_smoothness_at_least=max(value for value, _ in searches),
                    products=part.products - before,
                    converged=top.converged,
                )
            )
    return Results(rows)


def climb(
    block: HessianBlock, geometry: Geometry, start: Tensor, tolerance: float, max_products: int
) -> tuple[float, Tensor]:
    """Return a lower bound of the smoothness constant in a norm, and the E of norm 1 that shows it.

    The constant is the largest ⟨F, H[E]⟩ over all E and F of norm 1. The best F for an E is the
    direction of H[E], which gives its dual norm, and as H is symmetric F may take the place of E.
    So the value never falls, though it may end in a local maximum: from the gradient and the top
    eigenvector of layers of small perceptrons 1% below the best of 20 random starts on average, 12%
    at worst. In the Euclidean norm this is power iteration.
    """
    F, value = geometry.direction(start), 0.0
    for _ in range(max_products):
        E = F
        image = block(E)
        F = geometry.direction(image)
        before, value = value, inner(F, image)
        if value <= (1 + tolerance) * before:
            break
    return value, E


def inner(X: Tensor, Y: Tensor) -> float:
    """⟨X, Y⟩."""
    return (X.double() * Y.double()).sum().item()


def decrease(dual_norm: float, curvature: float) -> float:
    """By how much a quadratic model falls at the best step along a direction of norm 1."""
    return dual_norm**2 / (2 * curvature) if curvature > 0 else math.inf


def check(tolerance: float, max_products: int) -> None:
    """Raise a `ValueError` for what no search can be asked for."""
    if not 0 < tolerance < 1:
        raise ValueError(f"got tolerance={tolerance}, expected a relative error between 0 and 1")
    if max_products < 1:
        raise ValueError(f"got max_products={max_products}, expected at least 1")
