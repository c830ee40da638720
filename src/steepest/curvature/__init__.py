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
from steepest.curvature.tracker import SharpnessTracker

__all__ = [
    "NTK",
    "Batches",
    "GaussNewton",
    "Hessian",
    "SharpnessTracker",
    "directional_curvature",
    "effective_rank",
    "gauss_newton_split",
    "hessian_spectrum",
    "sharpness",
]
