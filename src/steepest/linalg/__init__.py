"""Pure functions on tensors of matrices `(..., m, n)`: the polar factor, norms, soft ranks."""

from steepest.linalg.matrix_norms import (
    gram_singular_values,
    leading_singular_values,
    nuclear_norm,
    nuclear_rank,
    spectral_norm,
    stable_rank,
)
from steepest.linalg.newton_schulz import polynomials
from steepest.linalg.planner import PolarPlan, polar_plan
from steepest.linalg.polar_factor import polar
from steepest.linalg.products import fast_products

__all__ = [
    "PolarPlan",
    "fast_products",
    "gram_singular_values",
    "leading_singular_values",
    "nuclear_norm",
    "nuclear_rank",
    "polar",
    "polar_plan",
    "polynomials",
    "spectral_norm",
    "stable_rank",
]
