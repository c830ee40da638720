"""AdamW, for everything that is no matrix: torch's own kernel, and the types of our policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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


class SameTypes(NamedTuple):
    """Parameters whose tensors have the same types, which take their step together."""

    types: tuple[torch.dtype, ...]  # of weights, gradients, and both averages
    places: list[int]
    params: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]


def take_step(
    group: Mapping[str, Any], work: Matrices, active: list[bool], assign: Assignment
) -> None:
    """M <- β₁ M + (1 - β₁) G;  V <- β₂ V + (1 - β₂) G²;  W <- (1 - lr λ) W - lr M̂ / (√V̂ + ε)."""
    everything = all(active)
    if not everything or work.parts is None:
        parts = _parts(work, active)
        work.parts = parts if everything else None
    else:
        parts = work.parts
    gradients = [[work.gradients[k] for k in part.places] for part in parts]
    fused = group["fused"] and all(map(_in_step, parts, gradients))
    for part, grads in zip(parts, gradients, strict=True):
        # The step is computed in the wider of the parameter's type and the memory's. The fused
        # kernel computes in float32 what it reads and writes in half precision, so what takes its
        # place does too.
        dtype = torch.promote_types(part.types[0], part.types[2])
        if fused != group["fused"] or assign.rounds(part.params[0]):
            dtype = full(dtype)
        _step(group, part, grads, dtype, fused, assign)


def _parts(work: Matrices, active: list[bool]) -> list[SameTypes]:
    """The active parameters, by the types of their tensors."""
    parts: dict[Any, SameTypes] = {}
    for k, (p, state) in enumerate(zip(work.params, work.kept, strict=True)):
        if active[k]:
            M, V = state["exp_avg"], state["exp_avg_sq"]
            types = p.dtype, work.dtypes[k], M.dtype, V.dtype
            part = parts.setdefault(types, SameTypes(types, [], [], [], [], []))
            part.places.append(k)
            part.params.append(p)
            part.means.append(M)
            part.squares.append(V)
            part.steps.append(state["step"])
    return list(parts.values())


def _in_step(part: SameTypes, gradients: list[Tensor]) -> bool:
    """Whether all lie in memory alike: the fused kernel walks through it, whatever the strides."""
    alike = part.params, gradients, part.means, part.squares
    if all(all(map(Tensor.is_contiguous, tensors)) for tensors in alike):
        return True
    return all(
        p.stride() == G.stride() == M.stride() == V.stride()
        for p, G, M, V in zip(*alike, strict=True)
    )


def _step(
    group: Mapping[str, Any],
    part: SameTypes,
    grads: list[Tensor],
    dtype: torch.dtype,
    fused: bool,
    assign: Assignment,
) -> None:
    """The step of parameters of the same types, computed in `dtype`."""
    _, _, params, means, squares, steps = part
    weights, gradients, M, V = (
        tensors if own is dtype else [t.to(dtype) for t in tensors]
        for own, tensors in zip(part.types, (params, grads, means, squares), strict=True)
    )
    adamw(
        weights,
        gradients,
        M,
        V,
        [],
        steps,
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
