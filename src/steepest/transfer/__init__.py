"""Tune small, train large: parametrizations under which a learning rate carries over."""

from steepest.parametrize.parameter_factors import ParameterFactors
from steepest.parametrize.parametrization import Parametrized, parametrize
from steepest.transfer.advice import Advice, advise
from steepest.transfer.check import Axis, TransferCheck, check_transfer
from steepest.transfer.consistency import SizeCurve, SuperConsistency, super_consistency
from steepest.transfer.coordinates import CoordinateCheck, LayerSlope, coordinate_check
from steepest.transfer.optima import Horizon, RateTransfer, SizeOptimum
from steepest.transfer.rates import rate_transfer

__all__ = [
    "Advice",
    "Axis",
    "CoordinateCheck",
    "Horizon",
    "LayerSlope",
    "ParameterFactors",
    "Parametrized",
    "RateTransfer",
    "SizeCurve",
    "SizeOptimum",
    "SuperConsistency",
    "TransferCheck",
    "advise",
    "check_transfer",
    "coordinate_check",
    "parametrize",
    "rate_transfer",
    "super_consistency",
]
