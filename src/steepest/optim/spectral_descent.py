"""Spectral descent: the spectral geometry without memory."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.linalg.polar_factor import PolarMethod
from steepest.optim.scales import Scale, default_adamw_lr
from steepest.optim.steepest_descent import OnNonfinite, Parameters, SteepestDescent


class SpectralDescent(SteepestDescent):
    """Spectral descent, W <- (1 - lr λ) W - lr s polar(G): steepest descent in the spectral norm.

    Carlson et al., "Preconditioned spectral descent for deep learning" (NeurIPS 2015), with a step
    of constant length. It is Muon without momentum.

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: length of the step, times s.
        weight_decay: λ, decoupled, for the matrices.
        scale: shape factor s, see `update_scale`: "spectral" sqrt(out/in) (default), "original"
            sqrt(max(1, out/in)), "match-rms-adamw" 0.2 sqrt(max(out, in)), or "none".
        method, steps: how the polar factor is computed, see `steepest.linalg.polar`.
        dtype: precision of that computation, `torch.bfloat16` by default; `None` for the
            parameters' own.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: AdamW for all other parameters of a
            model; unless given, its rate is 0.15 lr, or lr with "match-rms-adamw".
        nonfinite: "raise" (default) or "skip" a step whose gradients are not finite.

    >>> W = torch.nn.Parameter(torch.zeros(2, 2))
    >>> W.grad = torch.diag(torch.tensor([3.0, 0.1]))
    >>> SpectralDescent([W], lr=0.1, method="svd", dtype=None).step()
    >>> W.data
    tensor([[-0.1000,  0.0000],
            [ 0.0000, -0.1000]])
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 0.02,
        *,
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
