"""The optimizers, one file each; `steepest_descent` holds the step they share."""

from steepest.optim.muon import Muon
from steepest.optim.scales import update_scale
from steepest.optim.sign_sgd import SignSGD
from steepest.optim.signum import Signum
from steepest.optim.spectral_descent import SpectralDescent
from steepest.optim.steepest_descent import SteepestDescent

__all__ = ["Muon", "SignSGD", "Signum", "SpectralDescent", "SteepestDescent", "update_scale"]
