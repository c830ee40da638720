"""The memory of gradients that Muon and Signum have: their momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.optim.checks import Fraction
from steepest.optim.matrices import Batch, stack

MOMENTUM = "momentum_buffer"


@dataclass(frozen=True)
class Momentum:
    """M <- β M + (1 - β) G. A direction is taken of M, or with Nesterov of (1 - β) G + β M.

    Attributes:
        momentum: β, in [0, 1).
        nesterov: whether to look ahead.
    """

    momentum: Fraction
    nesterov: bool = False


def remember(group: Mapping[str, Any], batch: Batch) -> Tensor:
    """Add the gradients to the momentum; return what a direction is taken of, stacked.

    Without momentum these are the gradients. With `heavy_ball` M <- β M + G.

    Returns:
        `(matrices, out, in)`; of a single matrix it may be a view of the memory or the gradient.
    """
    G, beta = batch.G, group.get("momentum", 0.0)
    if not beta:
        N = stack(G)
        return N.float() if N.dtype == torch.float16 else N
    M = batch.memory[MOMENTUM]
    if M[0].dtype != G[0].dtype:
        G = [gradient.to(M[0].dtype) for gradient in G]
    if group["heavy_ball"]:
        torch._foreach_mul_(M, beta)
        torch._foreach_add_(M, G)
    else:
        torch._foreach_lerp_(M, G, 1 - beta)
    if not group.get("nesterov"):
        return stack(M)
    N = torch.stack(G)
    ahead = N.unbind(0)
    if group["heavy_ball"]:
        torch._foreach_add_(ahead, M, alpha=beta)
    else:
        torch._foreach_lerp_(ahead, M, beta)
    return N
