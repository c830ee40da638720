"""Muon: the spectral geometry with momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.linalg.polar_factor import PolarMethod
from steepest.optim.scales import Scale, default_adamw_lr
from steepest.optim.steepest_descent import OnNonfinite, Parameters, SteepestDescent


class Muon(SteepestDescent):
    """Spectral descent on an average of gradients.

    M <- β M + (1 - β) G;  N = (1 - β) G + β M with Nesterov, else M;
    W <- (1 - lr λ) W - lr s polar(N).

    K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). With
    `scale="original", method="jordan"` it is `torch.optim.Muon`, step for step.

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: spectral norm of the step, times s.
        momentum: β, in [0, 1).
        nesterov: whether to look ahead.
        weight_decay: λ, decoupled, for the matrices.
        scale: shape factor s, see `update_scale`: "spectral" sqrt(out/in) (default), "original"
            sqrt(max(1, out/in)), "match-rms-adamw" 0.2 sqrt(max(out, in)), or "none".
        method, steps: how the polar factor is computed, see `steepest.linalg.polar`.
        dtype: precision of that computation, `torch.bfloat16` by default; `None` for the
            parameters' own.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: AdamW for all other parameters of a
            model; unless given, its rate is 0.15 lr, or lr with "match-rms-adamw".
        nonfinite: "raise" (default) or "skip" a step whose gradients are not finite.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> optimizer = Muon(model, lr=0.02)
    >>> [(g["geometry"], g["lr"], g["param_names"]) for g in optimizer.param_groups]
    [('spectral', 0.02, ['0.weight']), ('adamw', 0.003, ['0.bias', '2.weight', '2.bias'])]
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: Scale = "spectral",
        method: PolarMethod = "polar-express",
        steps: int | None = None,
        dtype: torch.dtype | None = torch.bfloat16,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        nonfinite: OnNonfinite = "raise",
    ):
        super().__init__(
            params,
            lr=lr,
            geometry="spectral",
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            scale=scale,
            method=method,
            steps=steps,
            dtype=dtype,
            adamw_lr=default_adamw_lr(lr, scale) if adamw_lr is None else adamw_lr,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            adamw_weight_decay=adamw_weight_decay,
            nonfinite=nonfinite,
        )
