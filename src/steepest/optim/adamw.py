"""AdamW, for everything that is no matrix: torch's own kernel, and the types of our policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from steepest.optim.matrices import Matrices, State
from steepest.optim.precision import adam_eps, full, memory_dtype
from steepest.optim.record import ADAMW, ENTRIES, Record, Update
from steepest.optim.rounding import Assignment

RECORD = Record(
    name=ADAMW,
    label="AdamW",
    geometry="sign, adapted",
    memory="momentum and second moment",
    rates=(4e-3, 8e-3, 1.6e-2),
    kind=torch.optim.AdamW,
    update=lambda settings, free: Update(
        ADAMW,
        ENTRIES._replace(source="TP-V Table 3"),
        eps="eps",
        depth={"depth-mup": "TP-VI", "completep": "CompleteP Table 1"},
    ),
)
RMS = 0.2
"""Of an entry of Adam's direction, as Liu et al. measured it (arXiv 2502.16982, section 2.2)."""


def expected_rms(group: Mapping[str, Any], share: float) -> float:
    """Return the root-mean-square entry of an update; `share` is what ε leaves of it."""
    return float(group["lr"]) * RMS * share


def start(group: Mapping[str, Any], p: Tensor, state: State) -> None:
    """Make the memory of a parameter, of zeros, where there is none."""
    if "step" not in state:
        dtype = memory_dtype(group, p)
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)


def take_step(
    group: Mapping[str, Any], work: Matrices, active: list[bool], assign: Assignment
) -> None:
    """M <- β₁ M + (1 - β₁) G;  V <- β₂ V + (1 - β₂) G²;  W <- (1 - lr λ) W - lr M̂ / (√V̂ + ε)."""
    rows = list(zip(work.params, work.gradients, work.kept, strict=True))
    if not all(active):
        rows = [row for row, moves in zip(rows, active, strict=True) if moves]
    fused = group["fused"] and all(_in_step(*row) for row in rows)
    parts: dict[Any, list[tuple[Tensor, Tensor, State]]] = {}
    for row in rows:
        p, G, state = row
        types = p.dtype, G.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype
        parts.setdefault(types, []).append(row)
    for types, part in parts.items():
        # The step is computed in the wider of the parameter's type and the memory's. The fused
        # kernel computes in float32 what it reads and writes in half precision, so what takes its
        # place does too.
        dtype = torch.promote_types(types[0], types[2])
        if fused != group["fused"] or assign.rounds(part[0][0]):
            dtype = full(dtype)
        _step(group, part, dtype, types, fused, assign)


def _in_step(p: Tensor, G: Tensor, state: State) -> bool:
    """Whether all lie in memory alike: the fused kernel walks through it, whatever the strides."""
    M, V = state["exp_avg"], state["exp_avg_sq"]
    if p.is_contiguous() and G.is_contiguous() and M.is_contiguous() and V.is_contiguous():
        return True
    return p.stride() == G.stride() == M.stride() == V.stride()


def _step(
    group: Mapping[str, Any],
    rows: list[tuple[Tensor, Tensor, State]],
    dtype: torch.dtype,
    types: tuple[torch.dtype, ...],
    fused: bool,
    assign: Assignment,
) -> None:
    """The step of parameters of the same types, computed in `dtype`."""
    params, grads = [row[0] for row in rows], [row[1] for row in rows]
    means, squares = ([row[2][key] for row in rows] for key in ("exp_avg", "exp_avg_sq"))
    weights, gradients, M, V = (
        tensors if own is dtype else [t.to(dtype) for t in tensors]
        for own, tensors in zip(types, (params, grads, means, squares), strict=True)
    )
    adamw(
        weights,
        gradients,
        M,
        V,
        [],
        [row[2]["step"] for row in rows],
        fused=fused,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=adam_eps(group["eps"], dtype),
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        amsgrad=False,
        maximize=group["maximize"],
    )
    if M is not means or V is not squares:
        for kept, exact in zip(means + squares, M + V, strict=True):
            kept.copy_(exact)
    if weights is not params:
        for p, exact in zip(params, weights, strict=True):
            assign(p, exact)
