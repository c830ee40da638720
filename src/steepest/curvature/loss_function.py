"""The loss as a function of chosen parameters that can be differentiated twice.

Networks get in the way of second derivatives: fused attention kernels have none, dropout makes
the loss random, batch norm couples the examples, compiled code and recurrent kernels of cuDNN know
first derivatives only. Here all that is put aside for the call, and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map

Loss = Callable[[Any, Any], Tensor]
BatchNorm = Literal["eval", "batch"]


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
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("got no batches, expected at least one; a generator can be read once")
        sizes = [float((size or _size)(batch)) for batch in self.batches]
        self.weights = [each / sum(sizes) for each in sizes]

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
        return Batches([batch], size=lambda _: 1.0)


def _size(batch: Any) -> float:
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return float(leaf.shape[0])
    raise ValueError(
        f"got a batch of type {type(batch).__name__} without a tensor, so its size is not known; "
        "pass Batches(batches, size=...)"
    )


class LossFunction:
    """`loss(model, batch)` as a function of copies of some parameters.

    The weights are those at the time of construction: training may go on.

    Args:
        model: any module, also compiled; unchanged.
        loss: `loss(model, batch) -> scalar`.
        parameters: names, or patterns such as "blocks.*.weight"; by default all that are trained.
        batch_norm: "eval" uses running statistics, "batch" those of the batch, without updating
            any. Dropout is off either way.
        dtype: of the computation; by default the parameters', float32 where they are of half
            precision. Buffers and floating point tensors of the batch follow.

    Raises:
        ValueError: for a model without parameters, a name that is none, or a frozen one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        parameters: Sequence[str] | None = None,
        batch_norm: BatchNorm = "eval",
        dtype: torch.dtype | None = None,
    ):
        if batch_norm not in ("eval", "batch"):
            raise ValueError(f'got batch_norm={batch_norm!r}, expected "eval" or "batch"')
        self.model = unwrapped(model)
        self._loss = loss
        self._batch_norm = batch_norm
        names = chosen_parameters(self.model, parameters)
        given = dict(self.model.named_parameters())
        self._dtype = dtype or _full_precision(given[names[0]].dtype)
        copies = {
            name: self._cast(p.detach()).clone(memory_format=torch.contiguous_format)
            for name, p in given.items()
        }
        self.parameters = {name: copies[name].requires_grad_() for name in names}
        buffers = {name: self._cast(b).clone() for name, b in self.model.named_buffers()}
        self._state = {f"model.{name}": t for name, t in {**copies, **buffers}.items()}
        self._called = _Called(self.model, loss)

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if floating else value

    def __call__(self, batch: Any) -> Tensor:
        """Return the loss, with its graph.

        Raises:
            ValueError: for a loss that is no scalar, or does not depend on the parameters.
            FloatingPointError: for a loss that is NaN or infinite.
        """
        with self._differentiable():
            value = functional_call(self._called, self._state, (tree_map(self._cast, batch),))
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"got a loss of shape {got}, expected loss(model, batch) to be a scalar"
            )
        if not value.requires_grad:
            raise ValueError(
                "got a loss without a graph, expected one that depends on the parameters; "
                "compute it with the model it is given, without no_grad, detach or item"
            )
        if not value.isfinite():
            raise FloatingPointError(f"got a loss of {value.item()}, expected a finite one")
        return value.reshape(())

    def with_outputs(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the outputs of the model in the loss, and the loss, with their graph.

        Raises:
            ValueError: if the loss does not call the model exactly once, or the model gives no
                tensor (also not as `.logits` or as the first of several).
        """
        seen: list[Tensor] = []
        hook = self.model.register_forward_hook(lambda *given: seen.append(_tensor_of(given[-1])))
        try:
            loss = self(batch)
        finally:
            hook.remove()
        if len(seen) != 1:
            raise ValueError(
                f"got a loss that calls the model {len(seen)} times, expected once: Gauss-Newton "
                "and NTK are defined by the outputs of that call"
            )
        return seen[0], loss

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        training = {module: module.training for module in self.model.modules()}
        fast_attention = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
            if any(isinstance(module, nn.RNNBase) for module in training):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast_attention)
            torch.backends.mha.set_fastpath_enabled(False)
            for module in training:
                batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
                module.training = batch_norm and self._batch_norm == "batch"
            try:
                yield
            finally:
                for module, mode in training.items():
                    module.training = mode


class _Called(nn.Module):
    """The loss as a module, so that `functional_call` can replace the model's parameters."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model behind `torch.compile`."""
    return getattr(model, "_orig_mod", model)


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
    if isinstance(wanted, str):
        wanted = [wanted]
    names = []
    for pattern in wanted:
        found = [name for name in trained if name == pattern or fnmatchcase(name, pattern)]
        if not found:
            some = ", ".join(list(trained)[:5])
            raise ValueError(
                f"got {pattern!r}, which no parameter is called; there are {some}, ... "
                "(a tied parameter goes by its first name)"
            )
        names += [name for name in found if name not in names]
    if frozen := [name for name in names if not trained[name]]:
        raise ValueError(
            f"got the frozen parameter {frozen[0]}, expected one that is trained; call "
            "requires_grad_() on it, or leave it out"
        )
    return names


def _full_precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _tensor_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise ValueError(f"got a model that returns {type(output).__name__}, expected a tensor in it")
