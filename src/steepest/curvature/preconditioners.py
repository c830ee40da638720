"""The preconditioners of optimizers, frozen as they are, and where steps with them grow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from steepest.curvature.jacobian import flat, split
from steepest.curvature.operators import Hessian
from steepest.optim.linearization import Map, of_adam
from steepest.optim.record import acts_on_entries
from steepest.optim.steepest_descent import SteepestDescent

Group = Mapping[str, Any]


def is_preconditioned(optimizer: Optimizer, group: Group) -> bool:
    """Whether the steps of a group are lr P⁻¹ M with a linear P."""
    if isinstance(optimizer, SteepestDescent):
        return optimizer.is_linear(group)
    return type(optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def inverse_threshold(group: Group) -> float:
    """Return 1 over the curvature at which steps of a group begin to grow: lr / 2 without memory.

    With M <- β M + w G and W <- (1 - s) W - lr U, where U = M or, with Nesterov, w G + β M, and
    G = λ W, an eigenvalue of the iteration is -1 at λ = (2 - s) (1 + β) / (w lr), with Nesterov at
    that over 1 + 2β.
    """
    lr = float(group["lr"])
    beta, nesterov = float(group.get("momentum", 0.0)), group.get("nesterov", False)
    weight = 1 - beta  # an average, which `unbiased` makes of a heavy ball too
    if "betas" in group:
        beta, nesterov = float(group["betas"][0]), False
        weight = 1 - beta
    elif "dampening" in group:
        weight = 1 - float(group["dampening"]) if beta else 1.0
    shrink = _shrink(group)
    if shrink >= 2:
        raise ValueError(
            f"got a weight decay that multiplies weights by {1 - shrink:g} in every step, so that "
            "they grow without any gradient; expected less than 2 / lr"
        )
    return lr * weight * (1 + 2 * beta * nesterov) / ((2 - shrink) * (1 + beta))


def _shrink(group: Group) -> float:
    """What decoupled decay takes off the weights; cautious decay, which is not linear, left out."""
    decay = float(group["weight_decay"])
    if "geometry" not in group or acts_on_entries(group):
        return 0.0 if _coupled(group) else decay * float(group["lr"])
    if group["decay"] == "independent":
        return decay * float(group["lr"]) / group["base_lr"] if group["base_lr"] else 0.0
    return decay * float(group["lr"]) if group["decay"] == "decoupled" else 0.0


def _coupled(group: Group) -> float:
    """The decay that is added to the gradient."""
    decoupled = "geometry" in group or group.get("decoupled_weight_decay", False)
    return 0.0 if decoupled else float(group["weight_decay"])


def shares(groups: Sequence[Group]) -> tuple[list[float], float]:
    """Return each group's inverse threshold over the largest one, and the threshold of that group.

    If all rates are zero the threshold is infinite, and all shares are 1.
    """
    each = [inverse_threshold(group) for group in groups]
    largest = max(each)
    return ([x / largest for x in each], 1 / largest) if largest else ([1.0] * len(each), math.inf)


def ascends(groups: Sequence[Group]) -> bool:
    """Whether the groups maximize the loss.

    Raises:
        ValueError: if only some do.
    """
    found = {bool(group.get("maximize")) for group in groups}
    if len(found) > 1:
        raise ValueError(
            "got groups of which some maximize the loss and some minimize it, expected all to do "
            "the same: the stability of a game is not told by a largest eigenvalue"
        )
    return found == {True}


class Preconditioner:
    """P^-1/2 of all groups on vectors `(n,)`, times the root of each group's share.

    Args:
        optimizer: for its states.
        groups: those that it is about.
        H: of their parameters, in their order.

    Raises:
        ValueError: if there is no P yet, or groups differ in what they do with the loss.
    """

    def __init__(self, optimizer: Optimizer, groups: Sequence[Group], H: Hessian):
        weights, self.threshold = shares(groups)
        self._H, self._sign = H, -1 if ascends(groups) else 1
        self._like = list(H.parameters.values())
        self.gradient = H.gradient()
        gradients = iter(split(self.gradient, self._like))
        self._roots: list[Map] = []
        decay: list[Tensor] = []
        stepped = False
        for group, share in zip(groups, weights, strict=True):
            for i, p in enumerate(group["params"]):
                if not p.requires_grad:
                    continue
                G, state = next(gradients), optimizer.state.get(p, {})
                stepped = stepped or bool(state) or type(optimizer) is torch.optim.SGD
                self._roots.append(_root(optimizer, group, i, G, share))
                decay.append(torch.full_like(G, _coupled(group)))
        if not stepped:
            raise ValueError(
                f"got a {type(optimizer).__name__} before its first step, expected one that has "
                "taken a step: its preconditioner is made of gradients"
            )
        self._decay = flat(decay, self._like)

    def root(self, v: Tensor) -> Tensor:
        """P^-1/2 v, which is zero for what has had no gradient so far and does not move."""
        pieces = split(v, self._like)
        rooted = [root(X) for root, X in zip(self._roots, pieces, strict=True)]
        return flat(rooted, self._like)

    def curvature(self, v: Tensor) -> Tensor:
        """P^-1/2 (H + λ) P^-1/2 v, with λ the coupled decay."""
        x = self.root(v)
        return self.root(self._sign * self._H(x) + self._decay * x)


def _root(optimizer: Optimizer, group: Group, i: int, G: Tensor, share: float) -> Map:
    """X -> sqrt(share) P^-1/2 X for one parameter; G is its gradient."""
    if isinstance(optimizer, SteepestDescent):
        return optimizer.linear_root(group, i, G, share)
    if type(optimizer) is torch.optim.SGD:
        return lambda X: X * math.sqrt(share)
    return of_adam(group, optimizer.state.get(group["params"][i], {}), share, G)
