"""Parametrizations: what each parameter gets, so that a learning rate carries over."""

from steepest.parametrize.parameter_factors import ParameterFactors
from steepest.parametrize.parametrization import Parametrized, parametrize

__all__ = ["ParameterFactors", "Parametrized", "parametrize"]
