"""A geometry is a norm, its dual norm, and its direction of steepest descent.

The direction D of a gradient G has norm 1 and the largest inner product with G that any matrix of
norm 1 has; that inner product is the dual norm: ⟨G, D⟩ = ‖G‖_dual. Everything acts on a batch of
matrices `(..., m, n)`, the last two on a batch of stacks of K layers, `(..., K, m, n)`.

| geometry           | norm                     | dual norm               | direction              |
|--------------------|--------------------------|-------------------------|------------------------|
| Euclidean          | Frobenius                | Frobenius               | G / ‖G‖_F              |
| sign               | largest entry            | sum of absolute entries | sign(G)                |
| spectral           | largest singular value   | sum of singular values  | polar(G)               |
| layerwise spectral | the same, of any layer   | the same, of all layers | polar(G_k), each layer |
| stacked spectral   | spectral of [G₁ ... G_K] | the same, its dual      | polar([G₁ ... G_K])    |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from steepest.linalg import nuclear_norm, polar, spectral_norm
from steepest.linalg.matrix_norms import frobenius_norm
from steepest.linalg.polar_factor import PolarMethod


class Geometry(Protocol):
    """What every geometry has."""

    name: ClassVar[str]
    """In groups, plans and tables."""

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

    name: ClassVar[str] = "euclidean"

    def norm(self, W: Tensor) -> Tensor:
        """Return the Frobenius norm."""
        return frobenius_norm(W)

    def dual_norm(self, G: Tensor) -> Tensor:
        """Return the Frobenius norm, which is its own dual."""
        return frobenius_norm(G)

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

    name: ClassVar[str] = "sign"

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

    name: ClassVar[str] = "spectral"

    method: PolarMethod = "polar-express"
    steps: int | None = None
    dtype: torch.dtype | None = None

    def norm(self, W: Tensor) -> Tensor:
        """Return the largest singular value."""
        return spectral_norm(W)

    def dual_norm(self, G: Tensor) -> Tensor:
        """Return the sum of the singular values."""
        return nuclear_norm(G)

    def direction(self, G: Tensor, overwrite: bool = False) -> Tensor:
        """Return the polar factor of G, in its place if it may be overwritten.

        A matrix with non-finite entries gives NaN.
        """
        method, steps, dtype = self.method, self.steps, self.dtype
        return polar(G, method, steps, dtype=dtype, nonfinite="nan", overwrite=overwrite)


@dataclass(frozen=True)
class LayerwiseSpectral:
    """The largest singular value of any layer of a stack `(..., K, m, n)`: Muon on K layers.

    TEON's theory calls it the MUON norm (arXiv 2601.23261, section 4).

    >>> stack = torch.stack([torch.eye(2), 3 * torch.eye(2)])
    >>> float(LayerwiseSpectral().norm(stack)), float(LayerwiseSpectral().dual_norm(stack))
    (3.0, 8.0)
    """

    name: ClassVar[str] = "spectral"

    spectral: Spectral = Spectral()

    def norm(self, W: Tensor) -> Tensor:
        """Return the largest spectral norm of a layer, of shape `(...)`."""
        return self.spectral.norm(W).amax(-1)

    def dual_norm(self, G: Tensor) -> Tensor:
        """Return the sum of the nuclear norms of the layers."""
        return self.spectral.dual_norm(G).sum(-1)

    def direction(self, G: Tensor) -> Tensor:
        """Return the polar factor of each layer."""
        return self.spectral.direction(G)


@dataclass(frozen=True)
class StackedSpectral:
    """The largest singular value of a stack `(..., K, m, n)` written as one matrix: TEON.

    In mode 1 the layers stand side by side, `(m, K n)`; in mode 2 below each other, `(K m, n)`.
    With `LayerwiseSpectral` it is within layerwise <= stacked <= sqrt(K) layerwise, and the duals
    within layerwise / sqrt(K) <= stacked <= layerwise (arXiv 2601.23261, section 4).

    >>> stack = torch.stack([torch.eye(2), torch.eye(2)])
    >>> round(float(StackedSpectral().norm(stack)), 4), StackedSpectral(2).matrix(stack).shape
    (1.4142, torch.Size([4, 2]))
    """

    name: ClassVar[str] = "spectral"

    mode: Literal[1, 2] = 1
    spectral: Spectral = Spectral()

    def matrix(self, X: Tensor) -> Tensor:
        """Return the stack as one matrix."""
        return X.movedim(-3, -2).flatten(-2) if self.mode == 1 else X.flatten(-3, -2)

    def norm(self, W: Tensor) -> Tensor:
        """Return the spectral norm of the matrix, of shape `(...)`."""
        return self.spectral.norm(self.matrix(W))

    def dual_norm(self, G: Tensor) -> Tensor:
        """Return the nuclear norm of the matrix."""
        return self.spectral.dual_norm(self.matrix(G))

    def direction(self, G: Tensor) -> Tensor:
        """Return the polar factor of the matrix, cut into layers again."""
        Q = self.spectral.direction(self.matrix(G))
        if self.mode == 1:
            return Q.unflatten(-1, (G.shape[-3], G.shape[-1])).movedim(-2, -3)
        return Q.unflatten(-2, (G.shape[-3], G.shape[-2]))
