"""Tune small, train large: parametrizations under which a learning rate carries over."""

from steepest.transfer.coordinates import CoordinateCheck, LayerSlope, coordinate_check
from steepest.transfer.parametrization import ParameterFactors, Parametrized, parametrize
from steepest.transfer.rates import RateTransfer, SizeOptimum, rate_transfer

__all__ = [
    "CoordinateCheck",
    "LayerSlope",
    "ParameterFactors",
    "Parametrized",
    "RateTransfer",
    "SizeOptimum",
    "coordinate_check",
    "parametrize",
    "rate_transfer",
]
