"""A geometry is a norm, its dual norm, and its direction of steepest descent.

The direction D of a gradient G has norm 1 and the largest inner product with G that any matrix of
norm 1 has; that inner product is the dual norm: ⟨G, D⟩ = ‖G‖_dual. Everything acts on a batch of
matrices `(..., m, n)`.

| geometry  | norm                   | dual norm                 | direction  |
|-----------|------------------------|---------------------------|------------|
| Euclidean | Frobenius              | Frobenius                 | G / ‖G‖_F  |
| sign      | largest entry          | sum of absolute entries   | sign(G)    |
| spectral  | largest singular value | sum of singular values    | polar(G)   |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from steepest.linalg import nuclear_norm, polar, spectral_norm
from steepest.linalg.polar_factor import PolarMethod


class Geometry(Protocol):
    """What every geometry has."""

    def norm(self, W: Tensor) -> Tensor:
        """Return the norm of each matrix, of shape `(...)`."""
        ...

    def dual_norm(self, G: Tensor) -> Tensor:
        """Return the dual norm of each matrix, of shape `(...)`."""
        ...

    def direction(self, G: Tensor) -> Tensor:
        """Return the direction of steepest ascent of norm 1; zeros for a zero matrix."""
        ...


@dataclass(frozen=True)
class Euclidean:
    """The Frobenius norm: gradient descent.

    >>> Euclidean().direction(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    def norm(self, W: Tensor) -> Tensor:
        """Return the Frobenius norm."""
        return torch.linalg.matrix_norm(W)

    def dual_norm(self, G: Tensor) -> Tensor:
        """Return the Frobenius norm, which is its own dual."""
        return torch.linalg.matrix_norm(G)

    def direction(self, G: Tensor) -> Tensor:
        """Return G / ‖G‖_F; a matrix with non-finite entries gives NaN."""
        largest = G.abs().amax((-2, -1), keepdim=True)
        scaled = G / torch.where(largest == 0, 1.0, largest)
        norm = torch.linalg.matrix_norm(scaled, keepdim=True)
        return scaled / torch.where(norm == 0, 1.0, norm)


@dataclass(frozen=True)
class Sign:
    """The largest entry: sign descent, Signum, and Adam without its averages.

    >>> Sign().direction(torch.tensor([[3.0, -4.0, 0.0]]))
    tensor([[ 1., -1.,  0.]])
    """

    def norm(self, W: Tensor) -> Tensor:
        """Return the largest absolute entry."""
        return W.abs().amax((-2, -1))

    def dual_norm(self, G: Tensor) -> Tensor:
        """Return the sum of the absolute entries."""
        return G.abs().sum((-2, -1))

    def direction(self, G: Tensor) -> Tensor:
        """Return sign(G)."""
        return G.sign()


@dataclass(frozen=True)
class Spectral:
    """The largest singular value: spectral descent and Muon.

    The direction is `steepest.linalg.polar` with this `method`, `steps` and `dtype`, hence of norm
    1 only as exactly as the method says; the two norms are exact.

    >>> Spectral("svd").direction(torch.diag(torch.tensor([2.0, 0.5])))
    tensor([[1., 0.],
            [0., 1.]])
    """

    method: PolarMethod = "polar-express"
    steps: int | None = None
    dtype: torch.dtype | None = None

    def norm(self, W: Tensor) -> Tensor:
        """Return the largest singular value."""
        return spectral_norm(W)

    def dual_norm(self, G: Tensor) -> Tensor:
        """Return the sum of the singular values."""
        return nuclear_norm(G)

    def direction(self, G: Tensor) -> Tensor:
        """Return the polar factor of G; a matrix with non-finite entries gives NaN."""
        return polar(G, self.method, self.steps, dtype=self.dtype, nonfinite="nan")
