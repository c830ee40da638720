"""Curvature of the loss: operators, and what they tell about steps."""

import warnings

from steepest.curvature.block_diagonal import blockwise_diagonal
from steepest.curvature.directional import directional_curvature
from steepest.curvature.loss_function import Batches
from steepest.curvature.muon_theory import muon_conditions
from steepest.curvature.ntk import label_alignment, ntk_drift, ntk_spectrum
from steepest.curvature.operators import NTK, GaussNewton, Hessian
from steepest.curvature.preconditioned import Stability, preconditioned_sharpness
from steepest.curvature.spectra import (
    effective_rank,
    gauss_newton_split,
    sharpness,
    spectrum,
    trace,
)
from steepest.curvature.teon_theory import stack_conditions
from steepest.curvature.tracker import SharpnessTracker

__all__ = [
    "NTK",
    "Batches",
    "GaussNewton",
    "Hessian",
    "SharpnessTracker",
    "Stability",
    "blockwise_diagonal",
    "directional_curvature",
    "effective_rank",
    "gauss_newton_split",
    "label_alignment",
    "muon_conditions",
    "ntk_drift",
    "ntk_spectrum",
    "preconditioned_sharpness",
    "sharpness",
    "spectrum",
    "stack_conditions",
    "trace",
]


def __getattr__(name: str) -> object:
    """Return functions under their old names, with a warning."""
    if name == "hessian_spectrum":
        sentence = "steepest.curvature.hessian_spectrum is now called spectrum"
        warnings.warn(sentence, DeprecationWarning, stacklevel=2)
        return spectrum
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
