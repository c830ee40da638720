"""The preconditioners of optimizers, frozen as they are, and where steps with them grow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from steepest.curvature.jacobian import flat, split
from steepest.curvature.operators import Hessian
from steepest.linalg.krylov import Operator
from steepest.linalg.matrix_norms import frobenius_norm
from steepest.linalg.solvers import eigh, svdvals
from steepest.model.matrix_view import MatrixView
from steepest.optim.kronecker import NEVER, SECOND_MOMENT, sides_of
from steepest.optim.momentum import MOMENTUM
from steepest.optim.precision import adam_eps
from steepest.optim.scales import update_scale

Group = Mapping[str, Any]


def is_preconditioned(optimizer: Optimizer, group: Group) -> bool:
    """Whether the steps of a group are lr P⁻¹ M, P linear: not where Shampoo begins as Muon."""
    geometry = group.get("geometry")
    if type(optimizer) in (SGD, Adam, AdamW) or geometry in ("adamw", "soap"):
        return True
    return geometry in ("shampoo", "kl-shampoo") and not (
        group["length"] == "muon" and _begins(optimizer, group)
    )


def _begins(optimizer: Optimizer, group: Group) -> bool:
    """Whether a matrix that takes steps has a side whose root was never renewed."""
    for p, view in zip(group["params"], group["views"], strict=True):
        shapes = MatrixView(*view).block_shapes(group["block"])
        states = _matrix_states(optimizer.state.get(p, {}), len(shapes))
        for shape, matrix in zip(shapes, states, strict=True):
            if matrix and matrix["steps"] > 0 and not _is_ready(matrix, group, shape):
                return True
    return False


def _is_ready(matrix: Mapping[str, Any], group: Group, shape: Sequence[int]) -> bool:
    """Whether each side of a matrix of `shape` has had its root renewed."""
    return all(int(matrix[f"{side}_renewed"]) != NEVER for side in sides_of(group, shape))


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
    if group.get("geometry", "adamw") == "adamw":
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
        self._roots: list[Operator] = []
        decay: list[Tensor] = []
        stepped = False
        for group, share in zip(groups, weights, strict=True):
            for i, p in enumerate(group["params"]):
                if not p.requires_grad:
                    continue
                G, state = next(gradients), optimizer.state.get(p, {})
                stepped = stepped or bool(state) or type(optimizer) is SGD
                self._roots.append(_root(type(optimizer), group, i, state, G, share))
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


def _root(
    kind: type[Optimizer], group: Group, i: int, state: Mapping[str, Any], G: Tensor, share: float
) -> Operator:
    """X -> sqrt(share) P^-1/2 X for one parameter; G is its gradient."""
    if kind is SGD:
        return lambda X: X * math.sqrt(share)
    if not state or float(state.get("step", 1)) == 0:
        return torch.zeros_like
    if "betas" in group:
        (beta, beta2), t = map(float, group["betas"]), float(state["step"])
        V = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].to(G)
        P = (1 - beta**t) * ((V / (1 - beta2**t)).sqrt() + group["eps"])
        return _entrywise(share / P)
    view, block = MatrixView(*group["views"][i]), group.get("block")
    maps = [_matrix_root(group, matrix, share) for matrix in _matrices(group, view, state, G)]

    def apply(X: Tensor) -> Tensor:
        X = X.clone()
        for part, root in zip(view.matrices(X, block), maps, strict=True):
            part.copy_(root(part))
        return X

    return apply


def _matrix_states(state: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return what is kept for each of `count` matrices as a whole, without their numbers."""
    return [
        {key.removesuffix(f".{i}"): x for key, x in state.items() if key.endswith(f".{i}")}
        for i in range(count)
    ]


def _matrices(
    group: Group, view: MatrixView, state: Mapping[str, Any], G: Tensor
) -> Iterator[dict[str, Any]]:
    """What is kept for each matrix or block of a parameter, its size, and what it is a part of."""
    block = group.get("block")
    entries = {MOMENTUM: G if MOMENTUM not in state else state[MOMENTUM].to(G)}
    if SECOND_MOMENT in state:
        entries[SECOND_MOMENT] = state[SECOND_MOMENT].to(G)
    parts = {key: view.matrices(x.contiguous(), block) for key, x in entries.items()}
    sizes = view.sizes(block)
    for i, kept in enumerate(_matrix_states(state, len(sizes))):
        kept = {key: x.to(G) if x.ndim else x for key, x in kept.items()}
        yield {**kept, **{key: each[i] for key, each in parts.items()}, "size": sizes[i]}


def _matrix_root(group: Group, matrix: Mapping[str, Any], share: float) -> Operator:
    """X -> sqrt(share) P^-1/2 X for one matrix of Shampoo, KL-Shampoo or SOAP."""
    t = float(matrix["steps"])
    if t == 0:
        return torch.zeros_like
    correction = 1 - group["momentum"] ** t
    factor = share * update_scale(group["scale"], *matrix["size"]) / correction
    left, right, M = matrix.get("left_root"), matrix.get("right_root"), matrix[MOMENTUM]
    M = M * (1 - group["momentum"]) if group["heavy_ball"] else M
    length = factor * correction  # of a direction of length 1, whatever that of M
    if group["geometry"] == "soap":
        V = matrix[SECOND_MOMENT]
        adam = (
            factor
            * math.sqrt(1 - group["beta2"] ** t)
            / (V.sqrt() + adam_eps(group["eps"], V.dtype))
        )
        back, forth = (None if Q is None else Q.mT for Q in (left, right))
        if group["length"] == "spectral":  # the momentum is in the basis, which changes no norm
            M = M if group["momentum"] else _between(back, M, right)
            adam = adam * _ratio(length, adam * M, 2)
        middle = _entrywise(adam)
        return lambda X: _between(left, middle(_between(back, X, right)), forth)
    if group["length"] == "own":
        return _two_sided(left, right, factor)
    if group["length"] == "adam":
        V = matrix[SECOND_MOMENT] / (1 - group["graft_beta2"] ** t)
        adam = factor / (V.sqrt() + adam_eps(group["graft_eps"], V.dtype))
        if not _is_ready(matrix, group, M.shape):
            return _entrywise(adam)
        length = frobenius_norm(adam * M).item()
    else:
        length *= math.sqrt(M.numel() / max(matrix["size"]))
    return _two_sided(left, right, _ratio(length, _between(left, M, right), "fro"))


def _ratio(length: float, D: Tensor, order: Any) -> float:
    """The length over the norm of D, or zero for a zero D."""
    norm = (svdvals(D)[0] if order == 2 else frobenius_norm(D)).item()
    return length / norm if norm else 0.0


def _entrywise(inverse: Tensor) -> Operator:
    root = inverse.sqrt()
    return lambda X: root * X


def _two_sided(left: Tensor | None, right: Tensor | None, factor: float) -> Operator:
    """X -> the root of factor L X R."""
    half_left, half_right = _square_root(left), _square_root(right)
    return lambda X: math.sqrt(factor) * _between(half_left, X, half_right)


def _between(left: Tensor | None, X: Tensor, right: Tensor | None) -> Tensor:
    """L X R, with the identity for None."""
    X = X if left is None else left @ X
    return X if right is None else X @ right


def _square_root(A: Tensor | None) -> Tensor | None:
    if A is None:
        return None
    values, Q = eigh(A.double())  # in float32 it would lose half of small ones
    return (Q * values.clamp(min=0).sqrt() @ Q.mT).to(A)
