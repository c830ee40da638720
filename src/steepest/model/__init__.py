"""What is known of a model: roles of parameters, matrices, stacks of layers, activations."""

from steepest.model.matrix_view import MatrixView
from steepest.model.parameter_roles import ParameterRole, Role, RoleTable, roles
from steepest.model.stacks import find_stacks
from steepest.model.unwrapping import unwrapped

__all__ = [
    "MatrixView",
    "ParameterRole",
    "Role",
    "RoleTable",
    "find_stacks",
    "roles",
    "unwrapped",
]
