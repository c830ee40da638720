"""The loss as a function of chosen parameters that can be differentiated twice."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from steepest.curvature.evaluation import BatchNorm, evaluation
from steepest.model.unwrapping import unwrapped
from steepest.random_numbers import generators_kept

Loss = Callable[[Any, Any], Tensor]
_SAME = 1e-4
"""How far apart, relatively, two evaluations may be: kernels of GPUs sum in any order."""


class Batches:
    """Several batches, over which losses and products are averaged, weighted by their sizes.

    Anything that is not a `Batches` or a `DataLoader` is one batch. All are kept, so that every
    product sees the same examples in the same order.

    Args:
        batches: what to iterate over, once.
        size: how much a batch weighs; by default the first size of the first tensor in it.

    Raises:
        ValueError: if there is no batch, or one without a tensor to see its size by.

    >>> Batches([(torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(1, 2), torch.zeros(1))]).weights
    [0.75, 0.25]
    """

    def __init__(self, batches: Iterable[Any], size: Callable[[Any], float] | None = None):
        self.batches = listed(batches)
        if not self.batches:
            raise ValueError("got no batches, expected at least one; a generator can be read once")
        weigh = size or _size
        sizes = [float(weigh(batch)) for batch in self.batches]
        if not all(0 < size < math.inf for size in sizes):
            raise ValueError(f"got batches of sizes {sizes}, expected positive ones")
        self.weights = [size / sum(sizes) for size in sizes]

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        return zip(self.batches, self.weights, strict=True)

    def __len__(self) -> int:
        return len(self.batches)

    @staticmethod
    def of(batch: Any) -> Batches:
        """Return the batches that `batch` stands for."""
        if isinstance(batch, Batches):
            return batch
        if isinstance(batch, torch.utils.data.DataLoader):
            return Batches(batch)
        if isinstance(batch, Iterator):
            raise ValueError(
                f"got a {type(batch).__name__} as a batch, which can be read once; pass "
                "Batches(...) of it"
            )
        return Batches([batch], size=lambda _: 1.0)


def _size(batch: Any) -> float:
    plain = dict(batch) if isinstance(batch, Mapping) else batch  # as that of a tokenizer
    for leaf in tree_flatten(plain)[0]:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return float(leaf.shape[0])
    raise ValueError(
        f"got a batch of type {type(batch).__name__} without a tensor, so its size is not known; "
        "pass Batches(batches, size=...)"
    )


def listed(batches: Iterable[Any]) -> list[Any]:
    """Return the batches; a `DataLoader` draws its order from generators that stay as they were."""
    if not isinstance(batches, torch.utils.data.DataLoader):
        return list(batches)
    with generators_kept():
        return list(batches)


class LossFunction:
    """`loss(model, batch)` as a function of copies of some parameters.

    The weights are those at the time of construction: training may go on.

    Args:
        model: any module, also compiled; unchanged.
        loss: `loss(model, batch) -> scalar`.
        parameters: names, or patterns such as "blocks.*.weight"; by default all that are trained.
        batch_norm: for normalization with running statistics: "eval" uses these, "batch" those of
            the batch, without updating any. Dropout is off either way; all other modules keep
            their mode. The same batch sees the same random numbers at every evaluation.
        dtype: of the computation; by default the parameters', float32 where they are of half
            precision. Buffers and floating point tensors of the batch follow.

    Raises:
        ValueError: for a model without parameters, a name that is none, or a frozen one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        parameters: Sequence[str] | str | None = None,
        batch_norm: BatchNorm = "eval",
        dtype: torch.dtype | None = None,
    ):
        if batch_norm not in ("eval", "batch"):
            raise ValueError(f'got batch_norm={batch_norm!r}, expected "eval" or "batch"')
        self.model = unwrapped(model)
        self.loss = loss
        self._batch_norm = batch_norm
        names = chosen_parameters(self.model, parameters)
        weights = dict(self.model.named_parameters())
        if complex_ones := [name for name in names if weights[name].is_complex()]:
            raise ValueError(
                f"got the complex parameter {complex_ones[0]}, expected real ones; keep real and "
                "imaginary parts in parameters of their own"
            )
        self.chosen_dtype = dtype
        """What `dtype` was; None for the parameters' own."""
        self._dtype = dtype or _full_precision([weights[name] for name in names])
        copies = {
            name: self._cast(p.detach()).clone(memory_format=torch.contiguous_format)
            for name, p in weights.items()
        }
        self.parameters = {name: copies[name].requires_grad_() for name in names}
        buffers = self.model.named_buffers()
        self._weights = {f"model.{name}": t for name, t in copies.items()}
        self._buffers = {f"model.{name}": self._cast(b).clone() for name, b in buffers}
        self._called = _Called(self.model, loss)
        self._repeats = False  # whether two evaluations were held against each other

    def of(self, names: Sequence[str]) -> LossFunction:
        """Return the loss as a function of some of these parameters, on the same memory.

        The other weights are held fixed, and no graph is kept for them.
        """
        names = matching(names, list(self.parameters))
        part = copy(self)
        leaves = {name: W.detach() for name, W in self.parameters.items()}
        part.parameters = {name: leaves[name].requires_grad_() for name in names}
        part._weights = self._weights | {f"model.{name}": W for name, W in leaves.items()}
        return part

    def of_model(self, model: nn.Module) -> LossFunction:
        """Return the same loss, with the same settings, of a copy of the model."""
        names = list(self.parameters)
        return LossFunction(model, self.loss, names, self._batch_norm, self.chosen_dtype)

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if floating else value

    def __call__(self, batch: Any) -> Tensor:
        """Return the loss, with its graph.

        Raises:
            ValueError: for a loss that is no scalar, does not depend on the parameters, or is not
                the same twice.
            FloatingPointError: for a loss that is NaN or infinite.
        """
        return self._repeated(batch)

    def _repeated(self, batch: Any, see: Callable[..., Any] | None = None) -> Tensor:
        """The loss, the first time evaluated twice; the last time `see` is a hook of the model."""
        once = None if self._repeats else self._evaluated(batch).item()
        hook = None if see is None else self.model.register_forward_hook(see)
        try:
            value = self._evaluated(batch)
        finally:
            if hook is not None:
                hook.remove()
        if once is not None and not math.isclose(once, value.item(), rel_tol=_SAME):
            raise ValueError(
                f"got a loss of {once:.6g} and then of {value.item():.6g} for the same batch and "
                "weights, expected the same: it draws from a generator of its own, or changes what "
                "it reads; draw from the global generators of torch, NumPy or Python, or from a "
                "torch.Generator, which are held fixed here"
            )
        self._repeats = True
        return value

    def _evaluated(self, batch: Any) -> Tensor:
        buffers = {name: b.clone() for name, b in self._buffers.items()}  # training updates some
        with evaluation(self.model, batch, self._batch_norm):
            state = {**self._weights, **buffers}
            value = checked(functional_call(self._called, state, (tree_map(self._cast, batch),)))
            if not value.isfinite():
                raise FloatingPointError(f"got a loss of {value.item()}, expected a finite one")
            return value.reshape(())

    def with_outputs(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the outputs of the model in the loss, and the loss, with their graph.

        Raises:
            ValueError: if the loss does not call the model exactly once, takes several of the
                tensors that the model returns, or the model returns none.
        """
        calls: list[tuple[list[Tensor], list[Tensor]]] = []

        def see(module: nn.Module, inputs: Any, output: Any) -> Any:
            seen = output
            if not isinstance(getattr(output, "logits", None), Tensor):
                seen = tree_map(_alias, output)  # which of them the loss takes will show
            calls.append((_tensors_of(output), _tensors_of(seen)))
            return seen

        loss = self._repeated(batch, see)
        if len(calls) != 1:
            raise ValueError(
                f"got a loss that calls the model {len(calls)} times, expected once: Gauss-Newton "
                "and NTK are defined by the outputs of that call"
            )
        outputs, aliases = calls[0]
        if not outputs:
            raise ValueError("got a model that returns no tensor with a graph, expected one")
        if len(outputs) == 1:
            return outputs[0], loss
        pulled = torch.autograd.grad(loss, aliases, retain_graph=True, allow_unused=True)
        taken = [t for t, g in zip(outputs, pulled, strict=True) if g is not None]
        if len(taken) > 1:
            raise ValueError(
                f"got a loss that takes {len(taken)} of the tensors that the model returns, "
                "expected one; let the model return them as one, or its outputs as .logits"
            )
        return (taken or outputs)[0], loss  # none: the loss was computed inside the model


class _Called(nn.Module):
    """The loss as a module, so that `functional_call` can replace the model's parameters."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


def checked(loss: Any) -> Tensor:
    """Return what a loss function returned, if it is a scalar with a graph.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"got a loss of shape {got}, expected loss(model, batch) to be a scalar")
    if not loss.requires_grad:
        raise ValueError(
            "got a loss without a graph, expected one that depends on the parameters; compute it "
            "with the model it is given, without no_grad, inference_mode, detach or item, and "
            "choose parameters that it uses"
        )
    return loss


def chosen_parameters(model: nn.Module, wanted: Sequence[str] | str | None) -> list[str]:
    """Return the names that names or patterns stand for, in the order asked for."""
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    if not trained:
        raise ValueError(f"got a {type(model).__name__} without parameters, expected some")
    if wanted is None:
        names = [name for name, trains in trained.items() if trains]
        if not names:
            raise ValueError(
                f"got a {type(model).__name__} whose {len(trained)} parameters are all frozen; "
                "call requires_grad_() on those to look at"
            )
        return names
    names = matching(wanted, list(trained))
    if frozen := [name for name in names if not trained[name]]:
        raise ValueError(
            f"got the frozen parameter {frozen[0]}, expected one that is trained; call "
            "requires_grad_() on it, or leave it out"
        )
    return names


def matching(wanted: Sequence[str] | str, known: Sequence[str]) -> list[str]:
    """Return those of the known names that are asked for, by name or pattern, in that order.

    Raises:
        ValueError: for a name or pattern that fits none of them, and for an empty list.
    """
    names: list[str] = []
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        fitting = [name for name in known if name == pattern or fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(
                f"got {pattern!r}, which no parameter is called; there are "
                f"{', '.join(known[:5])}, ... (a tied parameter goes by its first name)"
            )
        names += [name for name in fitting if name not in names]
    if not names:
        raise ValueError("got an empty list of parameters, expected names or patterns; None is all")
    return names


def _full_precision(parameters: Iterable[Tensor]) -> torch.dtype:
    """float32, or what is more precise in some parameter."""
    return reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)


def _tensors_of(output: Any) -> list[Tensor]:
    """The tensors in what a model returns that may be its outputs: its logits, else all."""
    if isinstance(getattr(output, "logits", None), Tensor):
        return [output.logits]
    leaves = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
    live = [leaf for leaf in leaves if leaf.requires_grad]
    return [leaf for leaf in live if leaf.ndim] or live  # beside others, a scalar is the loss


def _alias(leaf: Any) -> Any:
    return leaf.view_as(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


_NO_SECOND = re.compile(r"derivative .*not implemented|differentiate twice|double backward")


@contextmanager
def twice_differentiable(value: Tensor | None = None) -> Iterator[None]:
    """Refuse operations without a second derivative, also those that autograd would take for 0.

    A custom function whose backward pass is a kernel, or is marked `once_differentiable`, gives a
    gradient that does not depend on anything; the Hessian would lack its part without a word.

    Raises:
        NotImplementedError: for such an operation, in what is done or in the graph of `value`.
    """
    hooks = [node.register_hook(_refuse_cut(node)) for node in _custom_functions(value)]
    try:
        yield
    except RuntimeError as error:
        if _NO_SECOND.search(str(error)):
            raise NotImplementedError(
                f"got an operation that cannot be differentiated twice ({error}); use one that "
                'can: in place of a fused kernel the same in plain PyTorch, such as "sdpa" or '
                '"eager" attention'
            ) from error
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _custom_functions(value: Tensor | None) -> Iterator[Any]:
    """The nodes of subclasses of `torch.autograd.Function` in a graph."""
    seen: set[Any] = set()
    todo: list[Any] = [] if value is None else [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if isinstance(node, BackwardCFunction):
            yield node


def _refuse_cut(node: Any) -> Callable[[Any, Any], None]:
    name = type(node).__name__

    def check(computed: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> None:
        if not any(g is not None and g.requires_grad for g in incoming):
            return  # no second derivative is asked for
        for g in computed:
            if g is None or (g.grad_fn is None and (g.requires_grad or not g.any())):
                continue
            if g.grad_fn is None or g.grad_fn.name() == "torch::autograd::Error":
                raise RuntimeError(f"double backward of {name} is not differentiable")

    return check
