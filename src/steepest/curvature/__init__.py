"""Curvature of the loss: operators, and what they tell about steps."""

from steepest.curvature.loss_function import Batches
from steepest.curvature.operators import NTK, GaussNewton, Hessian

__all__ = ["NTK", "Batches", "GaussNewton", "Hessian"]
