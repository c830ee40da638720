"""Products with the Jacobian of a network, and gradients that can be differentiated again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from steepest.curvature.loss_function import twice_differentiable


class Jacobian:
    """Products with the Jacobian J of outputs: J v is the derivative of u -> Jᵀ u."""

    def __init__(self, outputs: Tensor, parameters: list[Tensor]):
        self.outputs = outputs
        self._parameters = parameters
        self._u = torch.ones_like(outputs, requires_grad=True)  # any other would do
        self._pulled = gradients(outputs, parameters, self._u)

    def jvp(self, v: Tensor) -> Tensor:
        """J v, `(outputs,)`."""
        return flat(pulled_back(self._pulled, [self._u], split(v, self._parameters)), [self._u])

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀ u, `(n,)`."""
        given = [u.reshape(self.outputs.shape)]
        return flat(pulled_back([self.outputs], self._parameters, given), self._parameters)

    def jvp_of(self, places: Sequence[int], steps: Sequence[Tensor]) -> Tensor:
        """J v for a v that is made of steps of some parameters, and zero elsewhere."""
        return flat(pulled_back([self._pulled[i] for i in places], [self._u], steps), [self._u])

    def vjp_of(self, places: Sequence[int], u: Tensor) -> list[Tensor]:
        """The parts of Jᵀ u in the places of some parameters, in their shapes."""
        weights = [self._parameters[i] for i in places]
        found = pulled_back([self.outputs], weights, [u.reshape(self.outputs.shape)])
        return [
            torch.zeros_like(W) if g is None else g for g, W in zip(found, weights, strict=True)
        ]

    def rows(self, rows: Tensor, into: Tensor) -> None:
        """Write rows of J into `(r, n)`, eight at a time: small networks take as long for one."""
        sizes = [p.numel() for p in self._parameters]
        for chosen, place in zip(rows.split(8), into.split(8), strict=True):
            u = self.outputs.new_zeros(len(chosen), self.outputs.numel())
            u[torch.arange(len(chosen)), chosen] = 1
            try:
                found = grad(
                    self.outputs,
                    self._parameters,
                    u.view(-1, *self.outputs.shape),
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
            except RuntimeError:  # some operation takes no batch of gradients
                torch.stack([self.vjp(each) for each in u], out=place)
                continue
            for g, columns in zip(found, place.split(sizes, dim=1), strict=True):
                columns.copy_(torch.zeros_like(columns) if g is None else g.flatten(1))


def split(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the pieces of a flat vector, in the shapes of `like`."""
    pieces = v.split([t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Return one vector of all entries; zeros for what is None."""
    given = zip(tensors, like, strict=True)
    return torch.cat([(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in given])


def gradients(value: Tensor, inputs: Sequence[Tensor], u: Tensor | None = None) -> list[Tensor]:
    """Return gradients that can be differentiated again; zeros where an input plays no part."""
    u = torch.ones_like(value, requires_grad=True) if u is None else u
    with twice_differentiable(value):
        found = grad(value, inputs, u, create_graph=True, allow_unused=True)
    if all(each is None for each in found):
        raise ValueError(
            "got a loss that does not depend on these parameters, or not through what the model "
            "returns; compute it with the model that loss(model, batch) is given, and choose "
            "parameters that it uses"
        )
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]


def pulled_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Return the products of vectors with the transposed Jacobian; None where it is zero."""
    live = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not live:  # a gradient that is constant
        return [None] * len(inputs)
    outputs, vectors = zip(*live, strict=True)
    with twice_differentiable():
        return grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True)
