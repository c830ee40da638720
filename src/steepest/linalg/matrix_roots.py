"""Inverse roots and eigenvectors of symmetric positive semidefinite matrices.

By the symmetric eigendecomposition, whose result is checked; or, for eigenvectors that are nearly
known, by one step of orthogonal iteration, which needs little more than matrix products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steepest.linalg.autocast import without_autocast
from steepest.linalg.newton_schulz import largest_entry, scaled
from steepest.linalg.products import fast_products
from steepest.linalg.solvers import eigh, solution


@without_autocast
def inverse_root(
    A: Tensor, power: float, *, eps: float | Tensor = 0.0, cutoff: float | None = None
) -> Tensor:
    """Return (A + eps I)^(-power) on the range of A, and zero on its null space.

    The eigendecomposition is checked against A on a few random vectors; where it fails in float32
    it is done again in float64.

    Args:
        A: symmetric positive semidefinite, `(..., n, n)`. Never modified.
        power: for instance 1/4 or 1/2.
        eps: added to the eigenvalues; a number, or one for each matrix.
        cutoff: eigenvalues of A + eps I up to this share of the largest belong to the null space;
            sqrt(n) times the precision by default, below which they are rounding noise.

    Returns:
        Of the shape and dtype of A. A zero matrix without eps gives zeros.

    Raises:
        ValueError: for anything but square matrices of float32 or float64.
        FloatingPointError: if no eigendecomposition is found, as for non-finite entries, or a root
            is beyond the range of its type.

    >>> A = torch.diag(torch.tensor([16.0, 1.0, 0.0]))
    >>> inverse_root(A, 1 / 4).diagonal()
    tensor([0.5000, 1.0000, 0.0000])
    """
    values, Q = eigendecomposition(A)
    values = values.clamp(min=0.0) + torch.as_tensor(eps, dtype=A.dtype, device=A.device)[..., None]
    if cutoff is None:
        cutoff = A.shape[-1] ** 0.5 * torch.finfo(A.dtype).eps
    kept = values > cutoff * values[..., -1:]
    roots = torch.where(kept, torch.where(kept, values, 1.0) ** -power, 0.0)
    if not bool(roots.isfinite().all()):
        raise FloatingPointError(
            f"got an eigenvalue of {float(values[kept].min()):g} whose power -{power:g} is beyond "
            f"the range of {A.dtype}, expected larger ones; pass a larger eps"
        )
    with fast_products():
        return (Q * roots.unsqueeze(-2)) @ Q.mT


@without_autocast
def eigendecomposition(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and eigenvectors of symmetric matrices `(..., n, n)`.

    Checked, and done again in float64 where float32 fails; errors as for `inverse_root`.

    >>> values, Q = eigendecomposition(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> [round(value, 4) for value in values.tolist()]
    [1.0, 3.0]
    """
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"got a tensor of shape {tuple(A.shape)} and {A.dtype}, expected symmetric matrices "
            "(..., n, n) of torch.float32 or torch.float64"
        )
    # A power of two makes the largest entry about 1, exactly, so that nothing under- or overflows.
    largest = A.abs().amax((-2, -1))
    unit = torch.where(largest > 0, torch.frexp(largest).exponent, 0)
    B = torch.ldexp(A, -unit[..., None, None])
    values, Q = eigh(B)
    return torch.ldexp(values, unit[..., None]), Q


@without_autocast
def follow_eigenvectors(A: Tensor, Q: Tensor) -> Tensor:
    """Take one step of orthogonal iteration from nearly known eigenvectors.

    The columns are put in the order of their Rayleigh quotients qᵀ A q, descending, and Q' is the
    orthogonal factor of A Q. That is the refresh of SOAP (Vyas et al., arXiv 2409.11321). For A = 0
    Q' is Q.

    Args:
        A: symmetric positive semidefinite `(..., n, n)`.
        Q: orthogonal `(..., n, n)`.

    Raises:
        FloatingPointError: for non-finite entries.

    >>> A = torch.diag(torch.tensor([1.0, 4.0]))
    >>> follow_eigenvectors(A, torch.eye(2))
    tensor([[0., 1.],
            [1., 0.]])
    """
    with fast_products():
        largest = largest_entry(A)
        sizes = largest.flatten().tolist()
        safe = all(1e-12 < size < 1e12 for size in sizes)  # so that no square vanishes or overflows
        AQ = (A if safe else scaled(A)) @ Q
        order = (Q * AQ).sum(-2).argsort(dim=-1, descending=True, stable=True)
        B = AQ.gather(-1, order.unsqueeze(-2).expand_as(AQ))
        new = _orthonormalized(B.flatten(0, -3) if B.ndim > 2 else B[None]).view_as(B)
        return torch.where(largest == 0, Q, new) if 0.0 in sizes else new


def _orthonormalized(B: Tensor) -> Tensor:
    """The orthogonal factors of B = Q R, `(matrices, n, n)`, with positive diagonals of R."""
    B = B / torch.linalg.vector_norm(B, dim=-2, keepdim=True).clamp(min=torch.finfo(B.dtype).tiny)
    # By Cholesky of the Gram matrix: products, where Householder reflections are not.
    R, failed = torch.linalg.cholesky_ex(B.mT @ B, upper=True)
    Q = torch.linalg.solve_triangular(R, B, upper=True, left=False)
    error = Q.mT @ Q
    error.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    good = (failed == 0) & (error.abs().amax((-2, -1)) <= 100 * torch.finfo(B.dtype).eps)
    if not good.all():
        Q[~good] = _by_reflections(B[~good])
    return Q


def _by_reflections(B: Tensor) -> Tensor:
    if not math.isfinite(B.sum()):
        raise FloatingPointError(
            "got a matrix with NaN or infinite entries, expected finite ones to follow eigenvectors"
        )
    Q, R = solution("QR factors", (torch.linalg.qr,), _have_equal_columns, B)
    return Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(B).unsqueeze(-2)


def _have_equal_columns(B: Tensor, Q: Tensor, R: Tensor) -> Tensor:
    """Whether columns of R are as long as those of B = Q R, and those of Q 1, at a low price."""
    lengths, other, unit = (torch.linalg.vector_norm(X, dim=-2) for X in (B, R, Q))
    wrong = torch.stack([(other - lengths) / lengths.clamp(min=1.0), unit - 1.0])
    return wrong.abs_().amax((0, -1)) <= 100 * B.shape[-1] * torch.finfo(B.dtype).eps
