"""How a loss is evaluated: as training evaluates it, but twice differentiable and without chance.

Networks get in the way of second derivatives. Fused attention kernels have none, compiled code and
recurrent kernels of cuDNN know first derivatives only. Dropout makes the loss random, batch norm
couples the examples. All that is put aside for an evaluation, and put back. What is neither dropout
nor normalization with running statistics keeps its mode. Random numbers of the loss come from a
seed that depends on the batch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from steepest.random_numbers import seed_of, seeded

BatchNorm = Literal["eval", "batch"]
_DROPOUT = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.alpha_dropout,
    torch.alpha_dropout_,
    torch.feature_dropout,
    torch.feature_dropout_,
    torch.feature_alpha_dropout,
    torch.feature_alpha_dropout_,
}
_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")
"""Attributes by which Hugging Face and timm switch it on; it changes no value."""


@contextmanager
def evaluation(model: nn.Module, batch: Any, batch_norm: BatchNorm) -> Iterator[None]:
    """Evaluate losses of a batch within the block; all is put back after it, also on errors.

    Args:
        model: whose modes are set: dropout is off, in modules and in calls of torch's functions.
        batch: as the loss takes it; equal batches see equal random numbers.
        batch_norm: what normalization with running statistics takes: these, or those of the batch.
    """
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(seeded(seed_of(batch)))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            _set(stack, torch.backends.cudnn, "enabled", False)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_Plain(stack))
        stack.enter_context(
            torch.autograd.graph.disable_saved_tensors_hooks(
                "got activation checkpointing, which would compute again in products, with "
                "weights and modes of that time; switch it off for this call"
            )
        )
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_attention)
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            _prepare(stack, module, batch_norm)
        yield


def _prepare(stack: ExitStack, module: nn.Module, batch_norm: BatchNorm) -> None:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        _set(stack, module, "training", False)
    elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        _set(stack, module, "dropout", 0.0)
    elif module._buffers.get("running_var") is not None:
        _set(stack, module, "training", batch_norm == "batch")
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        _set(stack, module, "sparse", False)
    for name in _CHECKPOINTING:
        if vars(module).get(name) is True:
            _set(stack, module, name, False)


class _Plain(TorchFunctionMode):
    """Dropout off, plain weight norm, and generators of the loss's own put back at the end.

    The kernel of weight norm has a second derivative that takes norms for constants (torch 2.13).
    """

    def __init__(self, stack: ExitStack):
        super().__init__()
        self._stack = stack
        self._seen: set[torch.Generator] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._weight_norm:
            v, g, dim = args
            return v * (g / torch.norm_except_dim(v, 2, dim))
        if func in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            elif "dropout_p" in kwargs:
                kwargs = {**kwargs, "dropout_p": 0.0}
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and generator not in self._seen:
            self._seen.add(generator)
            self._stack.callback(generator.set_state, generator.get_state())
        return func(*args, **kwargs)


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack is left."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
