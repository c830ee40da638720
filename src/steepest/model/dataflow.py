"""What one forward pass says of each weight: how it is multiplied, and where its result goes.

A `TorchDispatchMode` sees every operation below autograd, where `F.linear`, `einsum`, `@` and the
modules of torch all come down to a few products. Tensors are told apart by their storage, so that
views need no bookkeeping: offset and strides of a view say which entries of a parameter it shows.
Copies, casts and products entry by entry get a `Layout`, which says the same of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steepest.model.layouts import Layout, Places, integers, is_progression
from steepest.model.storages import NONE, Contents, Nature, Storages, key_of, tensors_in, written_by

# Operands of products: (left, right), and what is added to the product.
_PRODUCTS = {
    "mm": (0, 1, None),
    "bmm": (0, 1, None),
    "mv": (0, 1, None),
    "dot": (0, 1, None),
    "vdot": (0, 1, None),
    "matmul": (0, 1, None),
    "_grouped_mm": (0, 1, None),
    "_scaled_mm": (0, 1, None),
    "addmm": (1, 2, 0),
    "baddbmm": (1, 2, 0),
    "addmv": (1, 2, 0),
    "_sparse_addmm": (1, 2, 0),
    "_addmm_activation": (1, 2, 0),
}
_KERNELS = ("rnn", "lstm", "gru", "trilinear")
_LOOKUPS = {"embedding", "_embedding_bag", "_embedding_bag_forward_only", "index", "index_select"}
_LOOKUPS |= {"gather", "take", "embedding_renorm_"}
_KEEP_PLACES = {"clone", "_to_copy", "_weight_norm_interface", "native_dropout", "tril", "triu"}
_OVERWRITE = {"copy_", "zero_", "fill_", "uniform_", "normal_", "bernoulli_", "exponential_"}


class Use(NamedTuple):
    """One product with a parameter: the entries along inputs, outputs, and a batch of matrices."""

    base: int
    inputs: Tensor
    outputs: Tensor
    batch: Tensor


class Convolved(NamedTuple):
    """One convolution with a parameter."""

    transposed: bool
    groups: int


class Dataflow(TorchDispatchMode):
    """Within the `with` block, operations are followed; then `finish` with what came out.

    Args:
        model: whose parameters are numbered in their order.
        layers: numbers of parameters of known layers, such as `nn.Linear`.
        tables: numbers of parameters that are embedding tables.

    Attributes:
        uses: products with each parameter; `constant_uses` those with no data.
        feeds: the layers that the result of a layer goes into, without another one in between.
        outputs: layers whose results reach the output through no other layer.
        residual: layers whose results are added to something that they were computed from.
        read, added, entered, computed: parameters that were indexed; that were added or multiplied
            entry by entry; that were put into a layer as data; from which others were computed.
        widths: for each layer the number of columns of its result.
        parts: for each layer the columns of its result that were split off.
        blocks: how many blocks of a result were multiplied by a matrix each.
        chosen: layers whose results were sorted or compared, to choose.
        met: the layers whose results a layer's result was multiplied with, as queries with keys.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, layers: Iterable[int], tables: Iterable[int]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._known, self._tables = frozenset(layers), frozenset(tables)
        self._storages = Storages(model)
        self._above: dict[int, frozenset[int]] = defaultdict(frozenset)
        self._trained: set[int] = set()
        self.widths: dict[int, int] = {}
        self.uses: dict[int, list[Use | Convolved]] = defaultdict(list)
        self.constant_uses: dict[int, list[Use | Convolved]] = defaultdict(list)
        self.feeds: dict[int, set[int]] = defaultdict(set)
        self.outputs: set[int] = set()
        self.layers: set[int] = set()
        self.residual: set[int] = set()
        self.read: set[int] = set()
        self.added: set[int] = set()
        self.entered: set[int] = set()
        self.computed: set[int] = set()
        self.parts: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        self.blocks: dict[int, int] = {}
        self.chosen: set[int] = set()
        self.met: dict[int, set[int]] = defaultdict(set)

    def put_back(self) -> None:
        """Undo what was written in place to tensors that were there before."""
        self._storages.put_back()

    def finish(self, output: Any) -> None:
        """Note which layers reach the output.

        Raises:
            TypeError: for an output without a tensor.
        """
        tensors = list(tensors_in(output))
        if not tensors:
            raise TypeError(f"it gives a {type(output).__name__} without a tensor")
        self.outputs |= NONE.union(*map(self._layers, tensors))
        if not self.outputs:  # all were computed without gradients
            self.outputs |= NONE.union(*(self._storages.of(tensor).layers for tensor in tensors))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        written = written_by(func, args, kwargs)
        for tensor in written:
            self._storages.keep(tensor)
        self._storages.keep_generators(kwargs.values())
        output = func(*args, **kwargs)
        self._follow(func, args, kwargs, written, output)
        return output

    # ------------------------------------------------------------------------------- bookkeeping

    def _layers(self, tensor: Tensor) -> frozenset[int]:
        """The last layers in a tensor, none if it was detached from them."""
        record = self._storages.of(tensor)
        if record.nature != "data" or not (tensor.is_floating_point() or tensor.is_complex()):
            return NONE
        detached = torch.is_grad_enabled() and not tensor.requires_grad
        return NONE if detached and record.layers & self._trained else record.layers

    # --------------------------------------------------------------------------------- operations

    def _follow(
        self, func: Any, args: Any, kwargs: Any, written: Sequence[Tensor], output: Any
    ) -> None:
        name = _name(func)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        before = {key_of(tensor) for tensor in inputs}
        fresh = [tensor for tensor in outputs if key_of(tensor) not in before]
        if not fresh and not written:  # a view
            for tensor in outputs:
                self._split_off(inputs[0], tensor)
            return
        if name == "glu":
            for half in inputs[0].chunk(2, dim=args[1] if len(args) > 1 else -1):
                self._split_off(inputs[0], half)
        self._storages.add(fresh)
        if torch._C._current_graph_task_id() != -1:  # a backward pass, whose products are no layers
            result = self._generic(name, func, inputs)
            result = replace(result, layers=NONE, layouts=())
        else:
            result = self._result(name, func, args, inputs, fresh)
        for tensor in fresh:
            layouts = tuple(
                layout for layout in result.layouts if layout.shape == tuple(tensor.shape)
            )
            layouts = tuple(
                Places(layout.source, layout.of_result, layout.base, layout.places).layout(tensor)
                for layout in layouts
            )
            self._storages.set(tensor, replace(result, layouts=layouts))
        for tensor in written:
            self._write(name, tensor, result)

    def _write(self, name: str, tensor: Tensor, result: Contents) -> None:
        """Note that a result was written into a tensor, which keeps what else is in it."""
        key, old = key_of(tensor), self._storages.of(tensor)
        whole = (
            key is not None
            and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        )
        if name in _OVERWRITE and whole:
            self._storages.set(tensor, replace(result, layouts=()))
            return
        natures = {old.nature, result.nature}
        nature: Nature = "data" if "data" in natures else "weight"
        nature = "constant" if natures == {"constant"} else nature
        both = old.parameters | result.parameters
        layouts = old.layouts if whole else ()
        if old.nature == "weight" and not self._storages.is_fresh(tensor):
            return  # a parameter stays one
        self._storages.set(tensor, Contents(nature, old.layers | result.layers, both, layouts))

    def _result(
        self, name: str, func: Any, args: Any, inputs: list[Tensor], fresh: list[Tensor]
    ) -> Contents:
        if name in _PRODUCTS and len(fresh) == 1:
            left, right, plus = _PRODUCTS[name]
            product = self._product(args[left], args[right], fresh[0])
            if plus is None or product.nature != "data":
                return product
            return self._sum(args[plus], fresh[0], self._layers(args[plus]), product)
        if name in ("convolution", "linear") and isinstance(args[1], Tensor) and fresh:
            record = self._storages.of(args[1])
            if record.nature == "weight" and name == "linear":
                return self._layer(args[1], 1, 0, args[0], fresh[0], -1)
            if record.nature == "weight":
                convolved = Convolved(bool(args[6]), int(args[8]))
                return self._convolution(args[1], args[0], fresh[0], convolved)
        if func.namespace != "aten" or any(part in name for part in _KERNELS):
            weights = [t for t in inputs if self._weights(t) & self._known]
            if weights:  # a kernel of its own with weights of a layer
                return self._kernel(inputs, weights)
        if "attention" in name:
            self._meet(*inputs[:3])
        if name in ("topk", "sort", "argmax", "max", "argmin"):
            layers = self._layers(inputs[0])
            self.chosen |= layers if len(layers) == 1 else NONE
        return self._generic(name, func, inputs)

    def _weights(self, tensor: Tensor) -> frozenset[int]:
        record = self._storages.of(tensor)
        return record.parameters if record.nature == "weight" and tensor.ndim > 1 else NONE

    def _product(self, left: Tensor, right: Tensor, result: Tensor) -> Contents:
        first, second = self._storages.of(left), self._storages.of(right)
        if first.nature == second.nature == "weight":
            ranks = [self._rank(first), self._rank(second)]
            known, other = (left, right) if ranks[0] > ranks[1] else (right, left)
            square = other.ndim > 1 and other.shape[-1] == other.shape[-2]
            turned = square and known.shape == result.shape and not self._storages.of(other).layouts
            if ranks[0] == ranks[1] or turned:  # by a rotation that is computed, as in BOFT
                both = self._storages.shown(left, first) | self._storages.shown(right, second)
                self.computed |= both
                return Contents("weight", parameters=both)
            weight = ranks[1] > ranks[0]
        else:
            weight = second.nature == "weight"
            if not weight and first.nature != "weight":
                return Contents("data", self._meet(left, right))
        if weight:
            inner, outer = (-2, -1) if right.ndim > 1 else (-1, None)
            return self._layer(right, inner, outer, left, result, -1)
        outer = -2 if left.ndim > 1 else None
        return self._layer(left, -1, outer, right, result, -2 if right.ndim > 1 else -1)

    def _meet(self, *results: Tensor) -> frozenset[int]:
        """Note a product of results with each other, and return the layers in it."""
        layers = [self._layers(tensor) for tensor in results]
        for i, some in enumerate(layers):
            for layer in some:
                self.met[layer].update(*layers[:i], *layers[i + 1 :])
        return NONE.union(*layers)

    def _rank(self, record: Contents) -> int:
        """How surely a weight is that of a layer, and no data."""
        if record.parameters & self._known:
            return 2
        return 0 if record.parameters <= self._tables else 1

    def _layer(
        self, W: Tensor, inner: int, outer: int | None, data: Tensor, result: Tensor, axis: int
    ) -> Contents:
        """A product of data with a weight, whose axis `inner` is summed over."""
        record = self._storages.of(W)
        nodes = self._storages.shown(W, record)
        layouts = []
        for places in self._storages.places(W, False):
            axes = [n % W.ndim for n in (inner, outer) if n is not None]
            batch = integers(1)
            for n in range(W.ndim):
                if n not in axes and int(places.axes[n].abs().max()):
                    batch = (batch[:, None] + places.axes[n]).flatten()
            outputs = integers(1) if outer is None else places.axes[outer]
            use = Use(places.base, places.axes[inner], outputs, batch)
            uses = self.constant_uses if self._is_constant(data) else self.uses
            uses[places.source].append(use)
            order = outputs.argsort().argsort()  # as `MatrixView` counts them
            if is_progression(outputs[outputs.argsort()]):
                layouts.append(self._columns(places.source, result, axis, order))
            if len(batch) > 1:
                self._note_blocks(data)
        return self._enter(nodes, data, W.requires_grad, tuple(layouts))

    def _convolution(self, W: Tensor, data: Tensor, result: Tensor, use: Convolved) -> Contents:
        nodes = self._storages.shown(W, self._storages.of(W))
        for places in self._storages.places(W, False):
            self.uses[places.source].append(use)
        layouts = []
        axis = result.ndim - W.ndim + 1
        if use.groups == 1:
            layouts = [
                self._columns(node, result, axis, integers(result.shape[axis])) for node in nodes
            ]
        depthwise = use.groups > 1 and use.groups == data.shape[axis]
        if depthwise:  # which acts channel by channel: no matrix, and no layer
            self.layers |= nodes
            return Contents("data", self._layers(data))
        return self._enter(nodes, data, W.requires_grad, tuple(layouts))

    def _kernel(self, inputs: list[Tensor], weights: list[Tensor]) -> Contents:
        nodes = frozenset().union(*(self._storages.shown(t, self._storages.of(t)) for t in weights))
        entering = frozenset().union(*(self._layers(t) for t in inputs))
        trained = any(t.requires_grad for t in weights)
        return self._enter(nodes, None, trained, (), entering)

    def _enter(
        self,
        nodes: frozenset[int],
        data: Tensor | None,
        trained: bool,
        layouts: tuple[Layout, ...],
        entering: frozenset[int] = NONE,
    ) -> Contents:
        """Note which results enter layers, and return what is known of their own."""
        if data is not None:
            entering = self._layers(data)
            if (record := self._storages.of(data)).nature == "weight":
                self.entered |= record.parameters
            trained |= data.requires_grad
        for layer in entering:  # but for an iteration for a norm, without gradients
            self.feeds[layer] |= nodes if torch.is_grad_enabled() else nodes - {layer}
        above = entering.union(*(self._above[layer] for layer in entering))
        for node in nodes:
            self._above[node] |= above
        self.layers |= nodes
        self._trained |= nodes if trained else NONE
        return Contents("data", nodes, layouts=layouts)

    def _sum(
        self, term: Tensor, result: Tensor, layers: frozenset[int], other: Contents
    ) -> Contents:
        """The sum of two results; a layer that adds to what it was computed from is residual."""
        if term.shape == result.shape and result.numel() > 1:
            self._note_residual(layers, other.layers)
        return replace(other, layers=other.layers | layers)

    def _note_residual(self, some: frozenset[int], others: frozenset[int]) -> None:
        for here, there in ((some, others), (others, some)):
            self.residual |= {layer for layer in here if there & self._above[layer]}

    def _is_constant(self, tensor: Tensor) -> bool:
        return self._storages.of(tensor).nature != "data"

    def _generic(self, name: str, func: Any, inputs: list[Tensor]) -> Contents:
        """All other operations: what is in the result is what is in the inputs."""
        pointwise = torch.Tag.pointwise in getattr(func, "tags", ())
        read = inputs[1:] if name in _OVERWRITE else inputs
        records = [self._storages.of(t) for t in read]
        weights = [
            (t, r) for t, r in zip(read, records, strict=True) if r.nature == "weight" and t.ndim
        ]
        looked_up = name in _LOOKUPS and bool(weights) and weights[0][0] is read[0]
        if looked_up and name.startswith("index") and read[0].ndim > 2 and len(read) == 2:
            return self._chosen_matrices(*weights[0], read[1])
        if looked_up:
            self.read |= self._storages.shown(*weights[0])
        data = [t for t, r in zip(read, records, strict=True) if r.nature == "data"]
        matrix = any(t.ndim > 1 for t, _ in weights)
        scaled = pointwise and matrix and all(t.ndim == 0 for t in data)  # by a norm of its own
        if data and not scaled:
            if pointwise:
                for tensor, record in weights:
                    self.added |= self._storages.shown(tensor, record)
            if name in ("cat", "stack"):
                self._joined(data)
                self.entered |= frozenset().union(*(r.parameters for _, r in weights))
            layers = [self._layers(t) for t in data]
            same = len(data) == 2 and data[0].shape == data[1].shape and data[0].numel() > 1
            if name in ("add", "add_", "sub", "sub_") and same:
                self._note_residual(*layers)
            layouts = self._kept(name, pointwise, data, True)
            return Contents("data", frozenset().union(*layers), layouts=layouts)
        if weights:
            parameters = frozenset().union(*(self._storages.shown(t, r) for t, r in weights))
            keeps = pointwise or name in _KEEP_PLACES
            if not keeps and name not in _LOOKUPS:
                self.computed |= parameters
            layouts = self._kept(name, pointwise, [t for t, _ in weights], False)
            return Contents("weight", parameters=parameters, layouts=layouts)
        return Contents("constant")

    def _chosen_matrices(self, weight: Tensor, record: Contents, index: Tensor) -> Contents:
        """Some of the matrices in a parameter of three axes or more, such as some experts."""
        layouts = []
        for places in self._storages.places(weight, False):
            if index.dtype in (torch.int32, torch.int64) and not index.is_meta:
                first = places.axes[0][index.flatten().cpu()]
                shape = (*index.shape, *weight.shape[1:])
                copy = torch.empty(shape, device="meta")
                axes = (first, *places.axes[1:]) if index.ndim else places.axes[1:]
                base = places.base if index.ndim else places.base + int(first)
                if index.ndim < 2:
                    layouts.append(places._replace(base=base, axes=axes).layout(copy))
        return replace(record, layouts=tuple(layouts))

    def _kept(
        self, name: str, pointwise: bool, tensors: list[Tensor], of_result: bool
    ) -> tuple[Layout, ...]:
        """The places in the inputs, for results of the same shape, entry by entry."""
        if not (pointwise or name in _KEEP_PLACES):
            return ()
        return tuple(
            places.layout(tensor)
            for tensor in tensors
            for places in self._storages.places(tensor, of_result)
        )

    def _split_off(self, whole: Tensor, part: Tensor) -> None:
        """Note a view that shows some of the columns of a layer's result, where `whole` has all."""
        if part.numel() == whole.numel():
            return
        if part.ndim == whole.ndim > 3 and part.shape[:-1] == whole.shape[:-1]:
            return  # halves of a head, as rotary embeddings take them
        for after in self._storages.places(part, True):
            columns = after.all_entries()
            if not len(columns):
                continue
            for before in self._storages.places(whole, True):
                size = len(before.all_entries())
                same = before.source == after.source
                if same and len(columns) < size == self.widths[after.source]:
                    self.parts[after.source].add(tuple(columns.tolist()))

    def _note_blocks(self, data: Tensor) -> None:
        """Note a result that is multiplied in blocks of columns, by a matrix for each."""
        for places in self._storages.places(data, True):
            first = places.axes[0]
            if places.source not in self._known and len(first) > 1 and int(first.abs().max()):
                self.blocks[places.source] = len(first)

    def _columns(self, source: int, result: Tensor, axis: int, order: Tensor) -> Layout:
        """The layout of a layer's result, whose columns are along one axis in this order."""
        axes = [torch.zeros_like(integers(n)) for n in result.shape]
        axes[axis] = order
        self.widths[source] = result.shape[axis]
        return Places(source, True, 0, tuple(axes)).layout(result)

    def _joined(self, tensors: list[Tensor]) -> None:
        """Forget the parts of a result that are put together again, such as heads of attention."""
        parts: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        for tensor in tensors:
            for places in self._storages.places(tensor, True):
                parts[places.source].add(tuple(places.all_entries().tolist()))
        for source, joined in parts.items():
            if len(joined) > 1 and joined == self.parts.get(source):
                del self.parts[source]


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else ""
