"""Pure functions on tensors of matrices `(..., m, n)`: the polar factor, norms, soft ranks."""

from steepest.linalg.matrix_norms import nuclear_norm, nuclear_rank, spectral_norm, stable_rank
from steepest.linalg.polar_factor import polar, polynomials

__all__ = [
    "nuclear_norm",
    "nuclear_rank",
    "polar",
    "polynomials",
    "spectral_norm",
    "stable_rank",
]
