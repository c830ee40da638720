"""Curvature of the loss: operators, and what they tell about steps."""

from steepest.curvature.loss_function import Batches
from steepest.curvature.operators import NTK, GaussNewton, Hessian
from steepest.curvature.spectra import (
    directional_curvature,
    effective_rank,
    gauss_newton_split,
    hessian_spectrum,
    sharpness,
)

__all__ = [
    "NTK",
    "Batches",
    "GaussNewton",
    "Hessian",
    "directional_curvature",
    "effective_rank",
    "gauss_newton_split",
    "hessian_spectrum",
    "sharpness",
]
