"""What each weight matrix multiplies, read off a forward pass by hooks that only look."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from steepest.model.parameter_roles import ParameterRole


class Activations(NamedTuple):
    """Around one matrix.

    Attributes:
        entering: what it multiplies, `(..., in)`; of an embedding the indices, of any shape.
        leaving: what its layer gives, `(..., out)`.
    """

    entering: Tensor
    leaving: Tensor


Seen = Callable[[Activations], None]


def hook(owner: nn.Module, name: str, seen: Seen) -> RemovableHandle:
    """Call `seen` after every forward pass of the owner of a parameter that builds a graph.

    Without gradients, and in full precision also where the model runs under autocast. A forward
    pass that activation checkpointing does again in the backward pass is no second one.
    """
    leaf = name.rpartition(".")[2]
    seen_before = False  # outside backward passes

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return  # an evaluation in between, or the first pass of reentrant checkpointing
        nonlocal seen_before
        if torch._C._current_graph_task_id() == -1:
            seen_before = True
        elif seen_before:
            return
        device = next(module.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            activations = _activations(module, leaf, args, kwargs, output)
            if activations is not None:
                seen(activations)

    return owner.register_forward_hook(look, with_kwargs=True)


def owners(rows: Iterable[ParameterRole], model: nn.Module) -> list[tuple[ParameterRole, Any]]:
    """Return the matrices whose module shows what they multiply, each with that module."""
    pairs = []
    for row in rows:
        owner, _, leaf = row.name.rpartition(".")
        module = model.get_submodule(owner)
        if row.view is not None and not row.view.is_vector and _shows(module, leaf):
            pairs.append((row, module))
    return pairs


def _shows(module: nn.Module, leaf: str) -> bool:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # `nn.MultiheadAttention` reads the weight and never calls the module
    if isinstance(module, nn.MultiheadAttention):
        return leaf == "in_proj_weight"
    if isinstance(module, nn.RNNBase):  # what goes on between its layers stays inside
        last = f"_l{module.num_layers - 1}"
        return leaf.removesuffix("_reverse") in ("weight_ih_l0", f"weight_hh{last}")
    if isinstance(module, nn.Embedding):  # subclasses may take a mask, and count positions
        return type(module).forward is nn.Embedding.forward
    if isinstance(module, nn.modules.conv._ConvNd):
        return not module.transposed
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _activations(
    module: nn.Module, leaf: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Activations | None:
    entering = args[0] if args else next(iter(kwargs.values()))
    if isinstance(module, nn.RNNBase):
        return _recurrent(module, leaf, entering, (*args, kwargs.get("hx"))[1], output)
    if isinstance(module, nn.MultiheadAttention):
        names = ("query", "key", "value")
        query, key, value = (kwargs.get(n, (*args, None, None)[i]) for i, n in enumerate(names))
        return Activations(query, output[0]) if query is key and key is value else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return Activations(
            _patches(module, entering), output.movedim(-1 - len(module.kernel_size), -1)
        )
    return Activations(entering, output)


def _recurrent(
    module: nn.RNNBase, leaf: str, entering: Any, start: Any, output: Any
) -> Activations | None:
    """The inputs, or the states before each step: the outputs of the last layer, one step late."""
    packed = not isinstance(entering, Tensor)
    states = output[0].data if packed else output[0]
    backwards = leaf.endswith("_reverse")
    if module.bidirectional:
        states = states.chunk(2, dim=-1)[backwards]
    if leaf.startswith("weight_ih"):
        return Activations(entering.data if packed else entering, states)
    if packed:
        return None  # which state was before which is not told by the packing alone
    time = 1 if module.batch_first and states.ndim == 3 else 0
    before = states.narrow(time, int(backwards), states.shape[time] - 1)
    if start is not None:
        first = start[0] if isinstance(start, tuple) else start
        first = first[-1 if backwards or not module.bidirectional else -2].unsqueeze(time)
        before = torch.cat([first, before], time)
    return Activations(before, states)


def _patches(module: nn.modules.conv._ConvNd, images: Tensor) -> Tensor:
    """What a convolution multiplies: one row of `in * kh * kw` entries for each output position."""
    dims = len(module.kernel_size)
    images = images if images.ndim == dims + 2 else images[None]  # the batch axis is optional
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    images = F.pad(images, module._reversed_padding_repeated_twice, mode=mode)
    for axis in range(dims):
        dilation = module.dilation[axis]
        span = dilation * (module.kernel_size[axis] - 1) + 1
        images = images.unfold(2 + axis, span, module.stride[axis])[..., ::dilation]
    # (batch, channels, *positions, *kernel) -> (batch, *positions, channels, *kernel)
    images = images.movedim(1, 1 + dims)
    return images.flatten(1 + dims).flatten(0, dims)
