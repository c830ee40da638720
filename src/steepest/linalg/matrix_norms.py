"""Norms and soft ranks of matrices: exact, and by cheap estimates whose error is stated.

Every function takes matrices of shape `(..., m, n)` and returns a tensor of shape `(...)`, in
float32 or better. All ranks are invariant under scaling and transposition; a zero matrix has
rank 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from steepest.linalg.autocast import without_autocast
from steepest.linalg.newton_schulz import largest_entry, power_of_two
from steepest.linalg.polar_factor import polar
from steepest.linalg.solvers import eigvalsh, qr, svdvals

_SAFE = 1e6  # of matrices with norms from 1 / _SAFE to _SAFE fourth powers, the squares of what
# iterations by AᵀA give, neither overflow nor vanish


@without_autocast
def spectral_norm(
    A: Tensor, method: Literal["exact", "power", "krylov"] = "exact", iterations: int = 30
) -> Tensor:
    """Return the largest singular value of each matrix.

    Args:
        A: `(..., m, n)`.
        method: "exact" takes all singular values. "power" iterates v <- AᵀA v from a fixed Gaussian
            start; two products with a vector each. It never exceeds the exact value (but for
            rounding), and its square is too small by a factor of at most 1 - ε with
            ε = 0.871 ln(n) / (iterations - 1) on average over starts, whatever the spectrum
            (Kuczyński and Woźniakowski 1992, theorem 3.1); with a gap in the spectrum the error
            falls geometrically. "krylov" is the largest |A v| over unit vectors v in the span of
            all these iterates, so its error is at most that of "power" with as many iterations,
            and mostly that of twice as many.
        iterations: for both; at least 2.

    Raises:
        ValueError: for non-finite entries, fewer than two dimensions or iterations.

    >>> A = torch.diag(torch.tensor([3.0, 1.0, 0.5]))
    >>> float(spectral_norm(A)), round(float(spectral_norm(A, "power")), 4)
    (3.0, 3.0)
    """
    if method == "exact":
        scaled, unit = _scaled(A)
        return svdvals(scaled)[..., 0] * unit
    if method not in ("power", "krylov"):
        raise ValueError(f'got method={method!r}, expected "exact" or "power" or "krylov"')
    if iterations < 2:
        raise ValueError(f"got iterations={iterations}, expected at least 2")
    scaled, unit = _scaled(A)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, scaled.shape[-1], generator=generator, dtype=torch.float64)
    v = start.to(scaled).expand(*scaled.shape[:-2], -1, -1)
    if method == "krylov":
        return _by_krylov(scaled, v, iterations) * unit
    for _ in range(iterations):
        w = _image(_normalized(v), scaled)
        v = w @ scaled
    return torch.linalg.vector_norm(w, dim=(-2, -1)) * unit


def _by_krylov(A: Tensor, v: Tensor, iterations: int) -> Tensor:
    """The largest Ritz value: rows of Q span v, AᵀA v, ..., orthonormal, and W = Q Aᵀ."""
    Q = _normalized(v)
    W = _image(Q, A)
    for _ in range(iterations - 1):
        v = W[..., -1:, :] @ A
        v = _normalized(v - v @ Q.mT @ Q)
        v = v - v @ Q.mT @ Q  # once leaves rounding
        # which is all there was where this took most of it: the iterates have no other direction
        new = torch.linalg.vector_norm(v, dim=-1, keepdim=True) > 1 / 2
        v = _normalized(torch.where(new, v, 0.0))
        Q, W = torch.cat([Q, v], -2), torch.cat([W, _image(v, A)], -2)
    return eigvalsh(W @ W.mT)[..., -1].clamp(min=0).sqrt()


def _image(v: Tensor, A: Tensor) -> Tensor:
    """v Aᵀ for one row v; as a product of matrices it can take ten times as long on a CPU."""
    return torch.linalg.vecdot(A, v).unsqueeze(-2)


def _normalized(v: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return v / norm.clamp(min=torch.finfo(v.dtype).tiny)


def frobenius_norm(A: Tensor, keepdim: bool = False) -> Tensor:
    """Return the Frobenius norm of each matrix, also where squares of entries vanish or overflow.

    >>> f"{frobenius_norm(torch.full((2, 2), 1e-30)):.3g}"
    '2e-30'
    """
    norm = torch.linalg.matrix_norm(A, keepdim=keepdim)
    if all(1e-15 < x < 1e15 for x in norm.flatten().tolist()):
        return norm
    unit = power_of_two(largest_entry(A)).to(A.dtype)  # no bit of an ordinary norm depends on it
    return torch.linalg.matrix_norm(A / unit, keepdim=keepdim) * (
        unit if keepdim else unit[..., 0, 0]
    )


@without_autocast
def nuclear_norm(A: Tensor, method: Literal["exact", "polar"] = "exact") -> Tensor:
    """Return the sum of the singular values of each matrix.

    Args:
        A: `(..., m, n)`.
        method: "exact" takes all singular values. "polar" is the inner product of A with its
            approximate polar factor (8 steps of "polar-express"): matrix products only. Its error
            is at most 1e-4 of the norm plus the sum of the singular values below 1e-3 of the
            Frobenius norm, hence at most 1e-4 + 1e-3 min(m, n) / sqrt(nuclear rank) relative.

    Raises:
        ValueError: for non-finite entries or fewer than two dimensions.

    >>> A = torch.diag(torch.tensor([3.0, 1.0, 0.5]))
    >>> float(nuclear_norm(A)), round(float(nuclear_norm(A, "polar")), 3)
    (4.5, 4.5)
    """
    scaled, unit = _scaled(A)
    if method == "exact":
        return svdvals(scaled).sum(-1) * unit
    if method != "polar":
        raise ValueError(f'got method={method!r}, expected "exact" or "polar"')
    return (scaled * polar(scaled, "polar-express", steps=8)).sum((-2, -1)) * unit


@without_autocast
def leading_singular_values(A: Tensor, count: int, iterations: int = 2) -> Tensor:
    """Return about the largest singular values of each matrix, `(..., min(count, m, n))`.

    By a random subspace of count + 8 dimensions after some power iterations (Halko, Martinsson and
    Tropp, arXiv 0909.4061, algorithm 4.4): 2 (2 iterations + 2) m n (count + 8) operations. None
    exceeds the exact value (but for rounding), and exact they are up to rank count + 8.

    Args:
        A: `(..., m, n)`.
        count: how many, at least 1.
        iterations: of the power method.

    Raises:
        ValueError: for non-finite entries, fewer than two dimensions, no values to return.

    >>> A = torch.diag(torch.tensor([3.0, 1.0, 0.5]))
    >>> [round(value, 4) for value in leading_singular_values(A, 2).tolist()]
    [3.0, 1.0]
    """
    if count < 1:
        raise ValueError(f"got count={count}, expected at least 1")
    scaled, unit = _scaled(A)
    *_, m, n = scaled.shape
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, min(count + 8, m, n), generator=generator, dtype=torch.float64)
    Q = qr(scaled @ start.to(scaled))[0]
    for _ in range(iterations):
        Q = qr(scaled.mT @ Q)[0]
        Q = qr(scaled @ Q)[0]
    values = svdvals(Q.mT @ scaled)
    return values[..., :count] * unit[..., None]


@without_autocast
def gram_singular_values(A: Tensor) -> Tensor:
    """Return all singular values of each matrix, `(..., min(m, n))`, from the smaller Gram matrix.

    Half the time of a singular value decomposition, of 384 x 1536 a third. Squares carry rounding:
    λ = σ² is returned as λ / sqrt(λ + δ²) with δ = 1e-3 of the largest singular value (3e-8 in
    float64). So singular values are too small by at most δ, and by δ² / 2 σ where they are large;
    and zero ones come as up to δ.

    Raises:
        ValueError: for non-finite entries or fewer than two dimensions.

    >>> A = torch.diag(torch.tensor([3.0, 1.0, 0.5]))
    >>> [round(value, 4) for value in gram_singular_values(A).tolist()]
    [3.0, 1.0, 0.5]
    """
    scaled, unit = _scaled(A)
    X = scaled.mT if scaled.shape[-2] > scaled.shape[-1] else scaled
    squares = eigvalsh(X @ X.mT).flip(-1).clamp(min=0)
    largest = squares[..., :1].clamp(min=torch.finfo(X.dtype).tiny)
    damped = squares + largest * (1e-6 if X.dtype == torch.float32 else 1e-15)
    return squares / damped.sqrt() * unit[..., None]


@without_autocast
def nuclear_rank(G: Tensor, method: Literal["exact", "polar"] = "exact") -> Tensor:
    """Return the nuclear rank ‖G‖_*² / ‖G‖_F², between 1 and rank G.

    Davis and Drusvyatskiy (arXiv 2512.04299, p. 2). With `method="polar"` the nuclear norm is
    estimated as in `nuclear_norm`, so the relative error is twice that of the norm.

    >>> float(nuclear_rank(torch.eye(4)))
    4.0
    """
    scaled, _ = _scaled(G)
    return _ratio(nuclear_norm(scaled, method), torch.linalg.matrix_norm(scaled))


@without_autocast
def stable_rank(
    A: Tensor, method: Literal["exact", "power", "krylov"] = "exact", iterations: int = 30
) -> Tensor:
    """Return the stable rank ‖A‖_F² / ‖A‖_op², between 1 and rank A.

    Davis and Drusvyatskiy (arXiv 2512.04299, p. 2). With the other methods the spectral norm is
    estimated as in `spectral_norm`: the stable rank is then an upper bound, too large by a factor
    of at most 1 / (1 - ε).

    >>> float(stable_rank(torch.eye(3))), round(float(stable_rank(torch.ones(5, 3))), 4)
    (3.0, 1.0)
    """
    scaled, _ = _scaled(A)
    norm = spectral_norm(scaled, method, iterations)
    return _ratio(torch.linalg.matrix_norm(scaled), norm)


def _scaled(A: Tensor) -> tuple[Tensor, Tensor]:
    """A over its largest entry, and that entry; A as it is, and 1, where that is safe for all."""
    if A.ndim < 2:
        raise ValueError(f"got a tensor of shape {tuple(A.shape)}, expected (..., m, n)")
    if not A.is_floating_point():
        raise TypeError(f"got a tensor of {A.dtype}, expected a real floating-point type")
    A = A.detach().to(torch.promote_types(A.dtype, torch.float32))
    if A.numel() == 0:
        raise ValueError(f"got an empty matrix of shape {tuple(A.shape)}")
    norm = torch.linalg.matrix_norm(A)
    if bool(((norm > 1 / _SAFE) & (norm < _SAFE)).all()):
        return A, torch.ones_like(norm)  # saves two passes
    unit = A.abs().amax((-2, -1))
    if not bool(unit.isfinite().all()):
        raise ValueError("got a matrix with NaN or infinite entries, expected finite ones")
    unit = torch.where(unit > 0, unit, 1.0)
    return A / unit[..., None, None], unit


def _ratio(norm: Tensor, smaller: Tensor) -> Tensor:
    """(norm / smaller)², and 0 for a zero matrix."""
    return torch.where(smaller > 0, norm / torch.where(smaller > 0, smaller, 1.0), 0.0).square()
