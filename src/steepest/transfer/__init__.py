"""Tune small, train large: parametrizations under which a learning rate carries over."""

from steepest.transfer.coordinates import CoordinateCheck, LayerSlope, coordinate_check
from steepest.transfer.parametrization import ParameterFactors, Parametrized, parametrize

__all__ = [
    "CoordinateCheck",
    "LayerSlope",
    "ParameterFactors",
    "Parametrized",
    "coordinate_check",
    "parametrize",
]
