"""The optimizers, one file each; `steepest_descent` holds the step they share."""

from steepest.optim.kl_shampoo import KLShampoo
from steepest.optim.muon import Muon
from steepest.optim.scales import update_scale
from steepest.optim.settings import Settings
from steepest.optim.shampoo import Shampoo
from steepest.optim.sign_sgd import SignSGD
from steepest.optim.signum import Signum
from steepest.optim.soap import SOAP
from steepest.optim.spectral_descent import SpectralDescent
from steepest.optim.steepest_descent import SteepestDescent
from steepest.optim.teon import TEON

__all__ = [
    "SOAP",
    "TEON",
    "KLShampoo",
    "Muon",
    "Settings",
    "Shampoo",
    "SignSGD",
    "Signum",
    "SpectralDescent",
    "SteepestDescent",
    "update_scale",
]
