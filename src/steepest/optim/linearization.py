"""Steps as linear maps of the momentum, W <- W - lr P⁻¹ M, with what an optimizer keeps held fixed.

Each optimizer that adapts its steps says here what P^-1/2 is; the curvature along P^-1/2 H P^-1/2
decides whether its steps grow (`steepest.curvature.preconditioned_sharpness`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.linalg.matrix_norms import frobenius_norm
from steepest.linalg.solvers import eigh, svdvals
from steepest.model.matrix_view import MatrixView
from steepest.optim.momentum import MOMENTUM
from steepest.optim.precision import adam_eps

Map = Callable[[Tensor], Tensor]
SECOND_MOMENT = "exp_avg_sq"


def of_adam(group: Mapping[str, Any], state: Mapping[str, Any], share: float, like: Tensor) -> Map:
    """Return X -> sqrt(share) P^-1/2 X of Adam or AdamW, torch's or ours, for one parameter."""
    if not state or float(state.get("step", 1)) == 0:
        return torch.zeros_like
    (beta, beta2), t = map(float, group["betas"]), float(state["step"])
    V = state["max_exp_avg_sq" if group.get("amsgrad") else SECOND_MOMENT].to(like)
    P = (1 - beta**t) * ((V / (1 - beta2**t)).sqrt() + group["eps"])
    return entrywise(share / P)


def of_matrices(
    group: Mapping[str, Any],
    i: int,
    state: Mapping[str, Any],
    G: Tensor,
    matrix_root: Callable[[Mapping[str, Any]], Map],
) -> Map:
    """Return X -> sqrt(share) P^-1/2 X for parameter `i`, put together from those of its matrices.

    Args:
        group: of the parameter.
        i: its position.
        state: what is kept for it.
        G: its gradient, which stands for the momentum where there is none.
        matrix_root: from what is kept for a matrix to its map.
    """
    if not state:
        return torch.zeros_like
    view, block = MatrixView(*group["views"][i]), group.get("block")
    maps = [matrix_root(matrix) for matrix in _matrices(group, view, state, G)]

    def apply(X: Tensor) -> Tensor:
        X = X.clone()
        for part, root in zip(view.matrices(X, block), maps, strict=True):
            part.copy_(root(part))
        return X

    return apply


def matrix_states(state: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return what is kept for each of `count` matrices as a whole, without their numbers."""
    return [
        {key.removesuffix(f".{i}"): x for key, x in state.items() if key.endswith(f".{i}")}
        for i in range(count)
    ]


def _matrices(
    group: Mapping[str, Any], view: MatrixView, state: Mapping[str, Any], G: Tensor
) -> Iterator[dict[str, Any]]:
    """What is kept for each matrix or block of a parameter, its size, and what it is a part of."""
    block = group.get("block")
    entries = {MOMENTUM: G if MOMENTUM not in state else state[MOMENTUM].to(G)}
    if SECOND_MOMENT in state:
        entries[SECOND_MOMENT] = state[SECOND_MOMENT].to(G)
    parts = {key: view.matrices(x.contiguous(), block) for key, x in entries.items()}
    sizes = view.sizes(block)
    for i, kept in enumerate(matrix_states(state, len(sizes))):
        kept = {key: x.to(G) if x.ndim else x for key, x in kept.items()}
        yield {**kept, **{key: each[i] for key, each in parts.items()}, "size": sizes[i]}


def momentum_of(group: Mapping[str, Any], matrix: Mapping[str, Any]) -> Tensor:
    """The momentum of a matrix as an average."""
    M: Tensor = matrix[MOMENTUM]
    return M * (1 - group["momentum"]) if group["heavy_ball"] else M


def adam_entries(V: Tensor, eps: float) -> Tensor:
    """1 / (sqrt(V) + ε)."""
    return 1 / (V.sqrt() + adam_eps(eps, V.dtype))


def ratio(length: float, D: Tensor, order: Any) -> float:
    """The length over the norm of D, or zero for a zero D."""
    norm = (svdvals(D)[0] if order == 2 else frobenius_norm(D)).item()
    return length / norm if norm else 0.0


def entrywise(inverse: Tensor) -> Map:
    """X -> sqrt(inverse) X, entry by entry."""
    root = inverse.sqrt()
    return lambda X: root * X


def two_sided(left: Tensor | None, right: Tensor | None, factor: float) -> Map:
    """X -> the root of factor L X R."""
    half_left, half_right = _square_root(left), _square_root(right)
    return lambda X: math.sqrt(factor) * between(half_left, X, half_right)


def between(left: Tensor | None, X: Tensor, right: Tensor | None) -> Tensor:
    """L X R, with the identity for None."""
    X = X if left is None else left @ X
    return X if right is None else X @ right


def _square_root(A: Tensor | None) -> Tensor | None:
    if A is None:
        return None
    values, Q = eigh(A.double())  # in float32 it would lose half of small ones
    return (Q * values.clamp(min=0).sqrt() @ Q.mT).to(A)
