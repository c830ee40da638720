"""Hessian, Gauss-Newton matrix and neural tangent kernel as linear operators, without matrices.

Each keeps the graph of a gradient and differentiates it again for every product: the cheapest way
measured, near the floor of twice the cost of a gradient (`benchmarks/results`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from steepest.curvature.evaluation import BatchNorm
from steepest.curvature.jacobian import Jacobian, flat, gradients, pulled_back, split
from steepest.curvature.linear_map import CurvatureOperator, check_symmetric
from steepest.curvature.loss_function import (
    Batches,
    Loss,
    LossFunction,
    chosen_parameters,
    matching,
)
from steepest.linalg.krylov import start_near
from steepest.model.unwrapping import unwrapped


class LossOperator(CurvatureOperator):
    """A map made of the derivatives of a loss.

    The map is that of the weights at the time of construction, in their precision, half precision
    raised to float32 (`dtype` chooses another one). Over several batches (`Batches` or a
    `DataLoader`) it is the mean, weighted by their sizes; products then build the graph of each
    batch anew, unless `keep_graphs`, which costs the memory of a forward and a backward pass per
    batch. With one batch the graph is kept.

    Args:
        model: any module, also compiled; it is not changed.
        loss: `loss(model, batch) -> scalar`, the mean over examples.
        batch: one batch as `loss` takes it, or `Batches`, or a `DataLoader`.
        parameters: names or patterns of those that the map is about; all trained ones by default.
        batch_norm: "eval" (running statistics) or "batch" (those of the batch). Dropout is off, all
            other modules keep their mode, and the same batch sees the same random numbers always.
        dtype: of the computation.
        keep_graphs: whether graphs are kept between products.

    Raises:
        ValueError: for losses without a graph or that differ when they are evaluated twice, models
            without parameters, frozen parameters.
        FloatingPointError: for a loss that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Any,
        parameters: Sequence[str] | str | None = None,
        *,
        batch_norm: BatchNorm = "eval",
        dtype: torch.dtype | None = None,
        keep_graphs: bool | None = None,
    ):
        self._set(LossFunction(model, loss, parameters, batch_norm, dtype), batch, keep_graphs)

    @classmethod
    def of(cls, function: LossFunction, batch: Any, keep_graphs: bool | None = None) -> Self:
        """Return the map of a loss function, in all of its parameters, on the same memory."""
        operator = cls.__new__(cls)
        operator._set(function, batch, keep_graphs)
        return operator

    def _set(self, function: LossFunction, batch: Any, keep_graphs: bool | None) -> None:
        self._function = function
        self._batches = Batches.of(batch)
        self._keep = len(self._batches) == 1 if keep_graphs is None else keep_graphs
        self._kept: dict[int, Any] = {}
        self.rows = self.columns = self._graphed = list(function.parameters)
        self._places: Sequence[int] = range(len(self.rows))  # of the parameters in the graph
        one = next(iter(function.parameters.values()))
        self.dtype, self.device = one.dtype, one.device

    @property
    def model(self) -> nn.Module:
        """The module, without wrappers."""
        return self._function.model

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The copies of the parameters that the map is about, by name."""
        names = dict.fromkeys([*self.rows, *self.columns])
        return {name: self._function.parameters[name] for name in names}

    @property
    def shape(self) -> tuple[int, int]:
        """Number of entries of the parameters: rows and columns."""
        return _entries(self._weights(self.rows)), _entries(self._weights(self.columns))

    def block(self, names: Sequence[str] | str) -> Self:
        """Return the diagonal block of some of the parameters, in the order of the names.

        It takes graphs from the whole, if those are kept, and counts its own products.

        Args:
            names: or patterns.

        Raises:
            ValueError: for a name that is not in the map, and for a cross block.
        """
        check_symmetric(self)
        part = copy(self)
        part.products = 0
        part.rows = part.columns = matching(names, self.rows)
        if not self._keep:
            part._graphed = part.rows
            part._function = self._function.of(part.rows)
        part._places = [part._graphed.index(name) for name in part.rows]
        return part

    def _weights(self, names: Sequence[str]) -> list[Tensor]:
        return [self._function.parameters[name] for name in names]

    def _graphs(self) -> Iterator[tuple[Any, float]]:
        """The graph of each batch, and the weight of the batch."""
        for i, (batch, weight) in enumerate(self._batches):
            graph = self._kept.get(i)
            if graph is None:
                graph = self._graph(batch)
                if self._keep:
                    self._kept[i] = graph
            yield graph, weight

    @abstractmethod
    def _graph(self, batch: Any) -> Any:
        """What products of one batch go through, for the parameters in `_graphed`."""


class Gradient(NamedTuple):
    """A loss, and its gradient in each parameter with the graph that products go through."""

    loss: Tensor
    parts: dict[str, Tensor]


class Hessian(LossOperator):
    """The Hessian of the loss, or a block of it.

    `Hessian(..., parameters=["fc.weight"])` is a diagonal block; `columns` makes a cross block,
    which maps directions of those parameters to changes in the gradient of `parameters`.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> H = Hessian(model, lambda model, x: 0.5 * model(x).square().mean(), x)
    >>> torch.equal(H.to_dense(), x.T @ x)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Any,
        parameters: Sequence[str] | str | None = None,
        *,
        columns: Sequence[str] | str | None = None,
        batch_norm: BatchNorm = "eval",
        dtype: torch.dtype | None = None,
        keep_graphs: bool | None = None,
    ):
        names = parameters
        if columns is not None:
            rows = chosen_parameters(unwrapped(model), parameters)
            columns = chosen_parameters(unwrapped(model), columns)
            names = [*rows, *columns]
        super().__init__(
            model, loss, batch, names, batch_norm=batch_norm, dtype=dtype, keep_graphs=keep_graphs
        )
        if columns is not None:
            self.rows, self.columns = rows, columns
            self._graphed = columns

    def _product(self, v: Tensor) -> Tensor:
        rows = self._weights(self.rows)
        pieces = split(v, self._weights(self.columns))
        total = torch.zeros(*v.shape[:-1], self.shape[0], dtype=self.dtype, device=self.device)
        for graph, weight in self._graphs():
            G = [graph.parts[name] for name in self.columns]
            total += weight * flat(pulled_back(G, rows, pieces), rows, v.shape[:-1])
        return total

    def _graph(self, batch: Any) -> Gradient:
        loss = self._function(batch)
        parts = gradients(loss, self._weights(self._graphed))
        return Gradient(loss.detach(), dict(zip(self._graphed, parts, strict=True)))

    def gradient(self) -> Tensor:
        """Return the gradient of the loss `(n,)`."""
        columns = self._weights(self.columns)
        total = self.vector()
        for graph, weight in self._graphs():
            total += weight * flat([graph.parts[name].detach() for name in self.columns], columns)
        return total

    def start(self, generator: torch.Generator | None = None) -> Tensor:
        """Return where a search for large eigenvalues begins: near the gradient.

        That lies mostly along the largest eigenvalues.
        """
        return start_near(self.gradient(), generator)

    def loss(self) -> float:
        """Return the loss."""
        total = 0.0
        for i, (batch, weight) in enumerate(self._batches):
            value = self._kept[i].loss if i in self._kept else self._function(batch)
            total += weight * value.item()
        return total

    def gauss_newton(self) -> GaussNewton:
        """Return the Gauss-Newton matrix of the same loss and parameters, on the same memory.

        Raises:
            ValueError: for a cross block, and as `GaussNewton`.
        """
        check_symmetric(self)
        return GaussNewton.of(self._function.of(self.rows), self._batches, self._keep)


class GaussNewton(LossOperator):
    """The generalized Gauss-Newton matrix: the mean of Jᵀ (∇² of the loss in the outputs) J.

    J is the Jacobian of the model's outputs, which are what the model returns where `loss` calls it
    (its `.logits` if it has some). Terms of the loss that do not go through them, such as a penalty
    on the weights, have no part in it.

    Raises:
        ValueError: also if the loss calls the model more than once, or not at all.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> squares = lambda model, x: 0.5 * model(x).square().mean()
    >>> H, G = Hessian(model, squares, x), GaussNewton(model, squares, x)
    >>> (H - G).to_dense().norm()  # of a linear model they are the same
    tensor(0.)
    """

    def _product(self, v: Tensor) -> Tensor:
        rows = v.shape[:-1]
        total = torch.zeros_like(v)
        for (network, G), weight in self._graphs():
            image = network.jvp(v, self._places).view(*rows, *G.shape)
            curved = pulled_back([G], [network.outputs], [image])
            total += weight * network.vjp(flat(curved, [G], rows), self._places)
        return total

    def _graph(self, batch: Any) -> tuple[Jacobian, Tensor]:
        outputs, loss = self._function.with_outputs(batch)
        network = Jacobian(outputs, self._weights(self._graphed))
        return network, gradients(loss, [outputs])[0]

    def start(self, generator: torch.Generator | None = None) -> Tensor:
        """Return where a search for large eigenvalues begins: near the gradient."""
        total = self.vector()
        for (network, G), weight in self._graphs():
            total += weight * network.vjp(G.detach().flatten(), self._places)
        return start_near(total, generator)


class NTK(LossOperator):
    """The empirical neural tangent kernel Θ = J Jᵀ, over all outputs of all examples.

    A row for every output of every example, `(examples * outputs,)`, in the order in which the
    model returns them; over several batches one after the other, unweighted.

    >>> model = nn.Linear(3, 2, bias=False)
    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> NTK(model, lambda model, x: model(x).sum(), x).to_dense()
    tensor([[14.,  0.],
            [ 0., 14.]])
    """

    def _set(self, function: LossFunction, batch: Any, keep_graphs: bool | None) -> None:
        super()._set(function, batch, keep_graphs)
        self._sizes = [network.outputs.numel() for network, _ in self._graphs()]
        self.rows = self.columns = ["all outputs"]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The copies of the parameters that the Jacobian is about, by name."""
        return self._function.parameters

    @property
    def shape(self) -> tuple[int, int]:
        """Number of outputs of all examples, twice."""
        return sum(self._sizes), sum(self._sizes)

    def block(self, names: Sequence[str] | str) -> Self:
        """Refuse: the rows of a kernel are outputs.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"got the parameters {names} for a block of an NTK, whose rows are outputs; make the "
            "kernel of these parameters: NTK(model, loss, batch, parameters)"
        )

    def _product(self, v: Tensor) -> Tensor:
        pieces = v.split(self._sizes, dim=-1)
        weights: Any = 0
        for (network, _), piece in zip(self._graphs(), pieces, strict=True):
            weights = weights + network.vjp(piece, self._places)
        return torch.cat([network.jvp(weights, self._places) for network, _ in self._graphs()], -1)

    def to_dense(self, rows: Tensor | None = None) -> Tensor:
        """Return the matrix, or these rows and columns of it.

        The Jacobian has to fit into memory: `r (n + r)` entries for r rows and n parameters, 4 GB
        for 1000 rows of a million parameters in float32.

        Args:
            rows: positions `(r,)`, ascending; all by default.

        Raises:
            ValueError: for positions that do not ascend, or lie outside the matrix.
        """
        size = self.shape[0]
        chosen = torch.arange(size) if rows is None else rows.cpu()
        if chosen.ndim != 1 or not len(chosen) or chosen.is_floating_point():
            raise ValueError(f"got rows {tuple(chosen.shape)} of {chosen.dtype}, expected (r,) int")
        if chosen[0] < 0 or chosen[-1] >= size or bool((chosen.diff() <= 0).any()):
            raise ValueError(f"got rows {chosen.tolist()}, expected ascending ones below {size}")
        n = _entries(self.parameters.values())
        J = torch.empty(len(chosen), n, dtype=self.dtype, device=self.device)
        before = done = 0
        for (network, _), outputs in zip(self._graphs(), self._sizes, strict=True):
            here = chosen[(chosen >= before) & (chosen < before + outputs)] - before
            if len(here):
                network.rows(here, J[done : done + len(here)])
            before, done = before + outputs, done + len(here)
        self.products += len(J)
        return J @ J.T

    def _graph(self, batch: Any) -> Jacobian:
        outputs, _ = self._function.with_outputs(batch)
        return Jacobian(outputs, self._weights(self._graphed))


def _entries(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)
