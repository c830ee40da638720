"""Hessian, Gauss-Newton matrix and neural tangent kernel as linear operators, without matrices.

Each keeps the graph of a gradient and differentiates it again for every product: the cheapest way
measured, near the floor of twice the cost of a gradient (`benchmarks/results`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steepest.curvature.evaluation import BatchNorm
from steepest.curvature.jacobian import Jacobian, flat, gradients, pulled_back, split
from steepest.curvature.loss_function import Batches, Loss, LossFunction, chosen_parameters
from steepest.model.unwrapping import unwrapped

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class CurvatureOperator(ABC):
    """A linear map that is known by its products: `operator @ v`, v of shape `(n,)` or `(n, k)`.

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
        parameters: Sequence[str] | None = None,
        *,
        batch_norm: BatchNorm = "eval",
        dtype: torch.dtype | None = None,
        keep_graphs: bool | None = None,
    ):
        self._batches = Batches.of(batch)
        self._function = LossFunction(model, loss, parameters, batch_norm, dtype)
        self._keep = len(self._batches) == 1 if keep_graphs is None else keep_graphs
        self._kept: dict[int, Any] = {}
        self.products = 0
        """How many products were taken."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The copies of the parameters that the map is about, by name."""
        return self._function.parameters

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def is_symmetric(self) -> bool:
        """Whether the map is its own transpose."""
        return True

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """The product with `(n,)`."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of products."""
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        """Device of products."""
        return next(iter(self.parameters.values())).device

    def __call__(self, v: Tensor) -> Tensor:
        """Return the product with one vector `(n,)`."""
        if v.shape != self.shape[1:]:
            raise ValueError(f"got a vector of shape {tuple(v.shape)}, expected {self.shape[1:]}")
        self.products += 1
        return self._product(v.to(self.device, self.dtype))

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return the product with a vector `(n,)`, or with each column of `(n, k)`."""
        if v.ndim == 2:
            return torch.stack([self(column) for column in v.T], dim=1)
        return self(v)

    def vector(self) -> Tensor:
        """Return zeros `(n,)` of the device and precision that products have."""
        return torch.zeros(self.shape[1], dtype=self.dtype, device=self.device)

    def to_dense(self) -> Tensor:
        """Return the matrix, a product for each column: for small ones."""
        columns = [self(e) for e in torch.eye(self.shape[1], dtype=self.dtype, device=self.device)]
        return torch.stack(columns, dim=1)

    def to_scipy(self) -> LinearOperator:
        """Return a `scipy.sparse.linalg.LinearOperator`, for `eigsh` and its kind.

        Raises:
            ModuleNotFoundError: without SciPy.
        """
        from scipy.sparse.linalg import LinearOperator

        def matvec(v: Any) -> Any:
            return self(torch.from_numpy(v).reshape(-1)).cpu().numpy()

        kind = torch.zeros((), dtype=self.dtype).numpy().dtype
        transposed = matvec if self.is_symmetric else None
        return LinearOperator(self.shape, matvec=matvec, rmatvec=transposed, dtype=kind)

    def _graphs(self, build: Callable[[Any], Any]) -> Iterator[tuple[Any, float]]:
        """What `build` makes of each batch, and the weight of the batch."""
        for i, (batch, weight) in enumerate(self._batches):
            graph = self._kept.get(i)
            if graph is None:
                graph = build(batch)
                if self._keep:
                    self._kept[i] = graph
            yield graph, weight


class Hessian(CurvatureOperator):
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
        parameters: Sequence[str] | None = None,
        *,
        columns: Sequence[str] | None = None,
        **how: Any,
    ):
        if columns is None:
            super().__init__(model, loss, batch, parameters, **how)
            self._rows = self._columns = list(self.parameters)
            return
        self._rows, self._columns = (
            chosen_parameters(unwrapped(model), each) for each in (parameters, columns)
        )
        super().__init__(model, loss, batch, [*self._rows, *self._columns], **how)

    @property
    def is_symmetric(self) -> bool:
        """Whether this is no cross block."""
        return self._rows == self._columns

    @property
    def shape(self) -> tuple[int, int]:
        """Number of entries of the parameters: rows and columns."""
        return _entries(self._of(self._rows)), _entries(self._of(self._columns))

    def _of(self, names: list[str]) -> list[Tensor]:
        return [self.parameters[name] for name in names]

    def _product(self, v: Tensor) -> Tensor:
        columns = self._of(self._columns)
        pieces = split(v, columns)
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for G, weight in self._graphs(self._gradient):
            rows = self._of(self._rows)
            total += weight * flat(pulled_back(G, rows, pieces), rows)
        return total

    def _gradient(self, batch: Any) -> list[Tensor]:
        return gradients(self._function(batch), self._of(self._columns))

    def block(self, steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the product with steps of some parameters, in those parameters, by name.

        Only the part of the graph between the loss and them is gone through.
        """
        places = _places(steps, self._columns)
        self.products += 1
        weights = [self.parameters[name] for name in steps]
        given = [D.to(W) for D, W in zip(steps.values(), weights, strict=True)]
        total = {name: torch.zeros_like(W) for name, W in zip(steps, weights, strict=True)}
        for G, weight in self._graphs(self._gradient):
            found = pulled_back([G[place] for place in places], weights, given)
            for name, HD in zip(steps, found, strict=True):
                total[name] += 0 if HD is None else weight * HD
        return total

    def gradient(self) -> Tensor:
        """Return the gradient of the loss `(n,)`."""
        columns = self._of(self._columns)
        total = self.vector()
        for G, weight in self._graphs(self._gradient):
            total += weight * flat([g.detach() for g in G], columns)
        return total

    def loss(self) -> float:
        """Return the loss."""
        with_weights = ((self._function(batch).item(), weight) for batch, weight in self._batches)
        return sum(value * weight for value, weight in with_weights)


class GaussNewton(CurvatureOperator):
    """The generalized Gauss-Newton matrix: the mean of Jᵀ (∇² of the loss in the outputs) J.

    J is the Jacobian of the model's outputs, which are what the model returns where `loss` calls it
    (its `.logits` if it has some). Terms of the loss that do not go through them, such as a penalty
    on the weights, have no part in it.

    Raises:
        ValueError: also if the loss calls the model more than once, or not at all.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """Number of entries of the parameters, twice."""
        n = _entries(self.parameters.values())
        return n, n

    def _product(self, v: Tensor) -> Tensor:
        total = self.vector()
        for (network, G), weight in self._graphs(self._graph):
            image = network.jvp(v).view(G.shape)
            curved = flat(pulled_back([G], [network.outputs], [image]), [G])
            total += weight * network.vjp(curved)
        return total

    def block(self, steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the product with steps of some parameters, in those parameters, by name."""
        places = _places(steps, list(self.parameters))
        self.products += 1
        weights = [self.parameters[name] for name in steps]
        given = [D.to(W) for D, W in zip(steps.values(), weights, strict=True)]
        total = {name: torch.zeros_like(W) for name, W in zip(steps, weights, strict=True)}
        for (network, G), weight in self._graphs(self._graph):
            image = network.jvp_of(places, given).view(G.shape)
            curved = flat(pulled_back([G], [network.outputs], [image]), [G])
            for name, BD in zip(steps, network.vjp_of(places, curved), strict=True):
                total[name] += weight * BD
        return total

    def _graph(self, batch: Any) -> tuple[Jacobian, Tensor]:
        outputs, loss = self._function.with_outputs(batch)
        network = Jacobian(outputs, list(self.parameters.values()))
        return network, gradients(loss, [outputs])[0]


class NTK(CurvatureOperator):
    """The empirical neural tangent kernel Θ = J Jᵀ, over all outputs of all examples.

    A row for every output of every example, `(examples * outputs,)`, in the order in which the
    model returns them; over several batches one after the other, unweighted.

    >>> model = nn.Linear(3, 2, bias=False)
    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> NTK(model, lambda model, x: model(x).sum(), x).to_dense()
    tensor([[14.,  0.],
            [ 0., 14.]])
    """

    def __init__(self, *given: Any, **how: Any):
        super().__init__(*given, **how)
        self._sizes = [network.outputs.numel() for network, _ in self._graphs(self._graph)]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of outputs of all examples, twice."""
        return sum(self._sizes), sum(self._sizes)

    def _product(self, v: Tensor) -> Tensor:
        weights: Any = 0
        pieces = v.split(self._sizes)
        for (network, _), piece in zip(self._graphs(self._graph), pieces, strict=True):
            weights = weights + network.vjp(piece)
        return torch.cat([network.jvp(weights) for network, _ in self._graphs(self._graph)])

    def to_dense(self, rows: Tensor | None = None) -> Tensor:
        """Return the matrix, or these rows and columns of it.

        The Jacobian has to fit into memory: `r (n + r)` entries for r rows and n parameters, 4 GB
        for 1000 rows of a million parameters in float32.

        Args:
            rows: positions `(r,)`, ascending; all by default.

        Raises:
            ValueError: for positions that do not ascend, or that there are not.
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
        for (network, _), outputs in zip(self._graphs(self._graph), self._sizes, strict=True):
            here = chosen[(chosen >= before) & (chosen < before + outputs)] - before
            if len(here):
                network.rows(here, J[done : done + len(here)])
            before, done = before + outputs, done + len(here)
        self.products += len(J)
        return J @ J.T

    def _graph(self, batch: Any) -> Jacobian:
        outputs, _ = self._function.with_outputs(batch)
        return Jacobian(outputs, list(self.parameters.values()))


def _places(steps: Mapping[str, Tensor], names: Sequence[str]) -> list[int]:
    for name in steps:
        if name not in names:
            raise ValueError(f"got {name!r}, expected one of {', '.join(names[:5])}, ...")
    return [names.index(name) for name in steps]


def _entries(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)
