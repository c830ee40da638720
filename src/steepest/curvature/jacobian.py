"""Products with the Jacobian of a network, and gradients that can be differentiated again.

Vectors are `(n,)`, or rows of a block `(k, n)` that go through the graph together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from steepest.curvature.loss_function import twice_differentiable

TOGETHER = 8
"""Vectors that go through a graph together: a network of 92 parameters takes 0.6 ms for 8, and 2.4
ms one by one. A GPT of 0.2M parameters takes 100 ms either way, and 8 times the memory."""


class Jacobian:
    """Products with the Jacobian J of outputs: J v is the derivative of u -> Jᵀ u."""

    def __init__(self, outputs: Tensor, parameters: list[Tensor]):
        self.outputs = outputs
        self._parameters = parameters
        self._u = torch.ones_like(outputs, requires_grad=True)  # any other would do
        self._pulled = gradients(outputs, parameters, self._u)

    def jvp(self, v: Tensor, places: Sequence[int]) -> Tensor:
        """J v, `(outputs,)`, for steps v of the parameters in these places; others stay."""
        steps = split(v, [self._parameters[i] for i in places])
        pulled = [self._pulled[i] for i in places]
        return flat(pulled_back(pulled, [self._u], steps), [self._u], v.shape[:-1])

    def vjp(self, u: Tensor, places: Sequence[int]) -> Tensor:
        """The entries of Jᵀ u that belong to the parameters in these places."""
        weights = [self._parameters[i] for i in places]
        rows = u.shape[:-1]
        pulled = pulled_back([self.outputs], weights, [u.reshape(*rows, *self.outputs.shape)])
        return flat(pulled, weights, rows)

    def rows(self, rows: Tensor, into: Tensor) -> None:
        """Write rows of J into `(r, n)`, several at a time."""
        everywhere = range(len(self._parameters))
        for chosen, block in zip(rows.split(TOGETHER), into.split(TOGETHER), strict=True):
            u = self.outputs.new_zeros(len(chosen), self.outputs.numel())
            u[torch.arange(len(chosen)), chosen] = 1
            try:
                block.copy_(self.vjp(u, everywhere))
            except RuntimeError:  # some operation takes no batch of gradients
                torch.stack([self.vjp(row, everywhere) for row in u], out=block)


def split(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the pieces of a flat vector, in the shapes of `like`; of rows `(k, n)` likewise."""
    pieces = v.split([t.numel() for t in like], dim=-1)
    return [piece.reshape(*v.shape[:-1], *t.shape) for piece, t in zip(pieces, like, strict=True)]


def flat(
    tensors: Sequence[Tensor | None], like: Sequence[Tensor], rows: Sequence[int] = ()
) -> Tensor:
    """Return one vector of all entries, zeros for what is None; of `(k,)` rows a block `(k, n)`."""
    pieces = [
        t.new_zeros(*rows, t.numel()) if piece is None else piece.reshape(*rows, -1)
        for piece, t in zip(tensors, like, strict=True)
    ]
    return torch.cat(pieces, dim=-1)


def gradients(value: Tensor, inputs: Sequence[Tensor], u: Tensor | None = None) -> list[Tensor]:
    """Return gradients that can be differentiated again; zeros where an input plays no part."""
    u = torch.ones_like(value, requires_grad=True) if u is None else u
    with twice_differentiable(value):
        pieces = grad(value, inputs, u, create_graph=True, allow_unused=True)
    if all(piece is None for piece in pieces):
        raise ValueError(
            "got a loss that does not depend on these parameters, or not through what the model "
            "returns; compute it with the model that loss(model, batch) is given, and choose "
            "parameters that it uses"
        )
    return [torch.zeros_like(t) if G is None else G for G, t in zip(pieces, inputs, strict=True)]


def pulled_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Return the products of vectors with the transposed Jacobian; None where it is zero.

    Vectors with one dimension more than their outputs are several, which take the way together.
    """
    live = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not live:  # a gradient that is constant
        return [None] * len(inputs)
    outputs, vectors = zip(*live, strict=True)
    several = vectors[0].ndim > outputs[0].ndim
    with twice_differentiable():
        return grad(
            outputs, inputs, vectors, retain_graph=True, allow_unused=True, is_grads_batched=several
        )
