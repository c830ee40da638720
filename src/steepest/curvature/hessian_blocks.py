"""Blocks of the Hessian that belong to matrices, rather than to parameters as they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steepest.curvature.evaluation import BatchNorm
from steepest.curvature.jacobian import split
from steepest.curvature.loss_function import Loss, chosen_parameters
from steepest.curvature.operators import Hessian
from steepest.model.matrix_view import MatrixView, matrix_label
from steepest.model.parameter_roles import roles
from steepest.model.unwrapping import unwrapped


@dataclass(frozen=True)
class Place:
    """Where a matrix is: in which parameter, how that is seen, and its number there."""

    name: str
    view: MatrixView
    index: int

    @property
    def label(self) -> str:
        """The name, with the number where there are several: `qkv.weight[2]`."""
        return matrix_label(self.name, self.index, len(self.view.sizes()))


def places(model: nn.Module, parameters: Sequence[str] | str | None = None) -> list[Place]:
    """Return the matrices of these parameters, by default of all that are hidden ones.

    Raises:
        ValueError: for parameters that are no matrices, and models without any.
    """
    model = unwrapped(model)
    table = roles(model)
    if parameters is None:
        names = [row.name for row in table.matrices if row.parameter.requires_grad]
        if not names:
            raise ValueError(
                f"got a {type(model).__name__} without hidden matrices that are trained, expected "
                "some; name the parameters to look at"
            )
    else:
        names = chosen_parameters(model, parameters)
    members = []
    for row in (table[name] for name in names):
        if row.view is None:
            raise ValueError(f"got {row.name} ({row.reason}), expected matrices; leave it out")
        members += [Place(row.name, row.view, i) for i in range(len(row.view.sizes()))]
    return members


class HessianBlock:
    """The Hessian over K matrices of equal shape, all else held fixed, as a map of `(K, m, n)`."""

    def __init__(self, H: Hessian, members: Sequence[Place]):
        self._H = H
        self._members = members
        self.gradient = torch.stack(matrices(H, H.gradient(), members))
        """Of the loss, `(K, m, n)`."""

    def __call__(self, X: Tensor) -> Tensor:
        """Return H[X], `(K, m, n)`."""
        v = self._H.vector()
        for W, part in zip(matrices(self._H, v, self._members), X, strict=True):
            W.copy_(part)
        return torch.stack(matrices(self._H, self._H(v), self._members))

    def flat(self, v: Tensor) -> Tensor:
        """Return the product with a vector `(K m n,)`."""
        return self(v.view(self.gradient.shape)).flatten()


def matrices(H: Hessian, v: Tensor, members: Sequence[Place]) -> list[Tensor]:
    """Return these matrices in a vector of the Hessian; writing to them writes to the vector."""
    pieces = dict(zip(H.parameters, split(v, list(H.parameters.values())), strict=True))
    return [place.view.matrices(pieces[place.name])[place.index] for place in members]


def hessian_of_matrices(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    parameters: Sequence[str] | str | None = None,
    *,
    batch_norm: BatchNorm = "eval",
    dtype: torch.dtype | None = None,
    keep_graphs: bool | None = None,
) -> Hessian:
    """Return the Hessian of parameters that are matrices, by default of all hidden ones.

    Args:
        model, loss, batch, batch_norm, dtype, keep_graphs: as for `Hessian`.
        parameters: names or patterns; by default the matrices of `steepest.roles`.
    """
    names = parameter_names(places(model, parameters))
    return Hessian(
        model, loss, batch, names, batch_norm=batch_norm, dtype=dtype, keep_graphs=keep_graphs
    )


def parameter_names(members: Sequence[Place]) -> list[str]:
    """Return the parameters that matrices are in."""
    return list(dict.fromkeys(place.name for place in members))


def parameter_hessians(H: Hessian) -> Iterator[tuple[Hessian, list[Place]]]:
    """Yield the block of each parameter, and its matrices; of those with any gradient."""
    gradient = H.gradient()
    members = places(H.model, H.rows)
    used = [place for place in members if matrices(H, gradient, [place])[0].any()]
    for name in parameter_names(used):
        yield H.block([name]), [place for place in used if place.name == name]
