"""The polar factor by one rational function: Zolotarev's best inverse square root.

X (XᵀX)^(-1/2) with y^(-1/2) replaced by a_1 / (y + c_1) + ... + a_r / (y + c_r): one Gram matrix,
r Cholesky inverses and one product. Zolotarev (1877); Nakatsukasa and Freund, "Computing
fundamental matrix decompositions accurately via the matrix sign function in two iterations"
(SIAM Review 2016), section 3.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from steepest.linalg.products import product, symmetric_product
from steepest.linalg.solvers import eigh

LOWEST = 1e-3  # singular values from here to 1 are approximated; smaller ones are damped

# Ours, for inner products with X, where a singular value counts by its size: two terms and a
# constant, which costs nothing. f(x) = x (b + Σ_j a_j / (x² + c_j)) has the smallest largest error
# times √x on [3e-3, 1]: it is at most 0.0345 / √x, and f rises from 0 at 0. (Zolotarev's two terms
# err by 0.25 on that interval, also where x = 1, on which all depends if one value is above all.)
TWO_TERMS = ((0.03117856, 0.36101462), (0.00019554, 0.0550407), 0.65524217)


@cache
def terms(r: int, low: float = LOWEST) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Return a, c and E: x Σ_j a_j / (x² + c_j) lies in [1 - E, 1 + E] for x in [low, 1].

    No rational function of this degree has a smaller E; the function rises from 0 at 0.
    c_j = low² sc²((2j - 1) K' / 2r; k'), with zeros between the poles at even multiples, where sc
    is Jacobi's elliptic function of modulus k' = sqrt(1 - low²).

    >>> a, c, E = terms(3)
    >>> round(E, 4)
    0.1123
    """
    K = math.pi / 2 / _arithmetic_geometric_mean(1.0, low)
    points = [(low * _elliptic_sc(j * K / (2 * r), low)) ** 2 for j in range(1, 2 * r)]
    c, zeros = points[::2], points[1::2]
    a = [
        math.prod(zero - pole for zero in zeros)
        / math.prod(other - pole for other in c if other != pole)
        for pole in c
    ]
    # The extrema alternate; x = low is the first (a minimum), and the first maximum is of the same
    # height as all others, so two values settle the scale: at low, and at the image of K / 2r.
    x_high = low / _elliptic_dn(K / (2 * r), low)
    value = [x * sum(w / (x * x + p) for w, p in zip(a, c, strict=True)) for x in (low, x_high)]
    scale, E = 2 / (value[0] + value[1]), (value[1] - value[0]) / (value[0] + value[1])
    return tuple(scale * w for w in a), tuple(c), E


def by_zolotarev(X: Tensor, r: int) -> Tensor:
    """Return X (XᵀX)^(-1/2) for m <= n in X's precision; the largest entry of X is in [1, 2).

    A Cholesky factorization may fail, as rounding can make R + c_1 I indefinite, or its inverse may
    not be finite. The same function is then applied to the eigenvalues of R, with 0 for negative
    ones. Two terms are those of `TWO_TERMS`.
    """
    a, c, b = TWO_TERMS if r == 2 else (*terms(r)[:2], 0.0)
    R = symmetric_product(X, X.mT)
    bound = torch.linalg.matrix_norm(R, keepdim=True).clamp(min=1.0)  # of the largest eigenvalue
    R.div_(bound)
    W = torch.zeros_like(R)
    W.diagonal(dim1=-2, dim2=-1).fill_(b)
    failed = torch.zeros(R.shape[:-2], dtype=torch.bool, device=R.device)
    for weight, shift in zip(a, c, strict=True):
        shifted = R.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
        try:
            L, info = torch.linalg.cholesky_ex(shifted)
            failed |= info > 0
            W.add_(torch.cholesky_inverse(L), alpha=weight)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # of the solver
            failed.fill_(True)
    failed |= ~W.sum((-2, -1)).isfinite()
    if bool(failed.any()):
        values, V = eigh(R[failed])
        values = values.clamp(min=0.0).unsqueeze(-2)
        f = sum((w / (values + shift) for w, shift in zip(a, c, strict=True)), b + 0 * values)
        W[failed] = (V * f) @ V.mT
    return product(W.div_(bound.sqrt()), X)


def _arithmetic_geometric_mean(a: float, b: float) -> float:
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a


def _elliptic_sn(u: float, other: float) -> float:
    """sn(u; k) for k = sqrt(1 - other²), by Gauss's descending transformation."""
    a, b, c = [1.0], other, [0.0]
    while abs(a[-1] - b) > 1e-15 * a[-1]:
        c.append((a[-1] - b) / 2)
        a, b = [*a, (a[-1] + b) / 2], math.sqrt(a[-1] * b)
    phi = 2 ** (len(a) - 1) * a[-1] * u
    for mean, half in zip(a[:0:-1], c[:0:-1], strict=True):
        phi = (math.asin(half / mean * math.sin(phi)) + phi) / 2
    return math.sin(phi)


def _elliptic_sc(u: float, other: float) -> float:
    sn = _elliptic_sn(u, other)
    return sn / math.sqrt(1 - sn * sn)


def _elliptic_dn(u: float, other: float) -> float:
    sn = _elliptic_sn(u, other)
    return math.sqrt(1 - (1 - other * other) * sn * sn)
