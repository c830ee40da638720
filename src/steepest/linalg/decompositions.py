"""The exact polar factor: by singular values, by the eigenvalues of the Gram matrix, by QDWH.

All take X with m <= n in float32 or float64, whose largest entry is in [1, 2) or 0.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from steepest.linalg.products import product, symmetric_product
from steepest.linalg.solvers import solution, svd

# The eigenvalues of a Gram matrix are exact to about eps of the largest, so singular values are
# known down to sqrt(eps) of the largest; below sqrt(8 eps) they are damped in proportion.
GRAM_CUTOFF = 8.0

# QDWH treats singular values from here to 1 alike; smaller ones are damped in proportion.
QDWH_LOWEST = {torch.float32: 1e-4, torch.float64: 1e-8}


def by_svd(X: Tensor) -> Tensor:
    """U Vᵀ over the singular values above max(m, n) eps of the largest."""
    U, S, Vh = svd(X)
    cutoff = max(X.shape[-2:]) * torch.finfo(X.dtype).eps
    U = U * (cutoff * S[..., :1] < S).unsqueeze(-2)  # the null space stays null
    return U @ Vh


def by_eigh(X: Tensor) -> Tensor:
    """(X Xᵀ)^(-1/2) X, with eigenvalues below 8 eps of the largest raised to that."""
    A = symmetric_product(X, X.mT)
    P, _ = solution("inverse root", (_root_by_eigh, _root_by_svd), _is_root, A)
    return product(P, X)


def _root_by_eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    return _root(*torch.linalg.eigh(A))


def _root_by_svd(A: Tensor) -> tuple[Tensor, Tensor]:
    U, S, _ = torch.linalg.svd(A)
    return _root(S.flip(-1), U.flip(-1))


def _root(values: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """P = A^(-1/2), and tr(P A) from the eigenvalues alone."""
    cutoff = GRAM_CUTOFF * torch.finfo(V.dtype).eps * values[..., -1:]
    power = torch.maximum(values, cutoff.clamp(min=1e-12)).rsqrt()
    return product(V * power.unsqueeze(-2), V.mT), (power * values).sum(-1)


def _is_root(A: Tensor, P: Tensor, trace: Tensor) -> list[bool]:
    """Whether tr(P A) is what the eigenvalues say: for small A all other checks take too long."""
    pairs = zip((P * A).sum((-2, -1)).tolist(), trace.tolist(), strict=True)
    tolerance = 1e-3 * A.shape[-1] ** 0.5
    return [abs(first - second) <= tolerance * second for first, second in pairs]


def by_qdwh(X: Tensor) -> Tensor:
    """X <- X (a I + b XᵀX) (I + c XᵀX)⁻¹ until every singular value is 1.

    Nakatsukasa, Bai and Gygi, "Optimizing Halley's iteration for computing the matrix polar
    decomposition" (SIAM J. Matrix Anal. 2010), equations 3.4 and 3.5: the best such function for
    the interval that the singular values are in after each step. With c > 100 by a QR
    factorization, which loses nothing whatever the condition, later by Cholesky.
    """
    (Q,) = solution("polar factor", (_qdwh, lambda X: (by_svd(X),)), _is_contraction, X)
    return Q


def _is_contraction(X: Tensor, Q: Tensor) -> Tensor:
    """Whether no row of Q, the polar factor of X, is longer than 1; NaN is not."""
    return torch.linalg.vector_norm(Q, dim=-1).amax(-1) <= 1 + 1e-3


def _qdwh(X: Tensor) -> tuple[Tensor]:
    norm = torch.linalg.matrix_norm(X @ X.mT, keepdim=True).clamp(min=1.0).sqrt()
    Y = (X / norm).mT
    m, n = Y.shape[-2:]
    eye = torch.eye(n, dtype=Y.dtype, device=Y.device).expand(*Y.shape[:-2], n, n)
    for a, b, c in _qdwh_weights(QDWH_LOWEST[Y.dtype], torch.finfo(Y.dtype).eps):
        if c > 100:
            Q = torch.linalg.qr(torch.cat([math.sqrt(c) * Y, eye], -2))[0]
            quotient = Q[..., :m, :] @ Q[..., m:, :].mT / math.sqrt(c)
        else:
            L = torch.linalg.cholesky(eye + c * (Y.mT @ Y))  # condition at most 101
            quotient = torch.cholesky_solve(Y.mT, L).mT
        Y = (b / c) * Y + (a - b / c) * quotient
    return (Y.mT,)


@cache
def _qdwh_weights(low: float, eps: float) -> tuple[tuple[float, float, float], ...]:
    weights = []
    while 1 - low > 10 * eps:
        square = low * low
        d = (4 * (1 - square) / square**2) ** (1 / 3)
        root = math.sqrt(1 + d)
        a = root + math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * root)) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        weights.append((a, b, c))
        low = min(1.0, low * (a + b * square) / (1 + c * square))
    return tuple(weights)
