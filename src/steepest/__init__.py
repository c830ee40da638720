"""steepest: in which norm should each weight matrix descend?"""

from steepest import curvature, linalg, transfer
from steepest.diagnosis import Monitor, diagnose
from steepest.model.matrix_view import MatrixView
from steepest.model.parameter_roles import roles
from steepest.optim import (
    SOAP,
    TEON,
    KLShampoo,
    Muon,
    Shampoo,
    SignSGD,
    Signum,
    SpectralDescent,
)

__version__ = "0.1.0"
__all__ = [
    "SOAP",
    "TEON",
    "KLShampoo",
    "MatrixView",
    "Monitor",
    "Muon",
    "Shampoo",
    "SignSGD",
    "Signum",
    "SpectralDescent",
    "curvature",
    "diagnose",
    "linalg",
    "roles",
    "transfer",
]
