"""The step that an optimizer would take next, without taking it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from steepest.curvature.jacobian import flat, split
from steepest.curvature.operators import Hessian
from steepest.curvature.preconditioners import Group
from steepest.optim.copying import copies_of


def next_step(optimizer: Optimizer, groups: Sequence[Group], H: Hessian, G: Tensor) -> Tensor:
    """The step that a copy of the optimizer takes with the gradient G, without weight decay."""
    if isinstance(optimizer, LBFGS):
        raise ValueError("got LBFGS, whose step needs a closure, expected one that takes gradients")
    (twin,) = copies_of([optimizer])
    for group in twin.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    both = zip(optimizer.param_groups, twin.param_groups, strict=True)
    chosen = [copied for own, copied in both if any(own is group for group in groups)]
    params = [p for group in chosen for p in group["params"] if p.requires_grad]
    for p, gradient in zip(params, split(G, list(H.parameters.values())), strict=True):
        if p.dtype != H.dtype:  # of half precision, in which a step would be rounded
            p.data = p.data.to(H.dtype)
            for key, x in twin.state.get(p, {}).items():
                if isinstance(x, Tensor) and x.ndim and x.is_floating_point():
                    twin.state[p][key] = x.to(H.dtype)
        p.grad = gradient.clone()
    before = [p.detach().clone() for p in params]
    with torch.random.fork_rng([H.device] if H.device.type == "cuda" else []):
        twin.step()
    return flat([p.detach() - W for p, W in zip(params, before, strict=True)], params)
