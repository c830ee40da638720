"""What all optimizers of this package take beside their own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from steepest.model.parameter_roles import Role

OnNonfinite = Literal["raise", "skip"]
Decay = Literal["decoupled", "independent", "cautious"]
Rounding = Literal["nearest", "stochastic"]


class Settings(TypedDict, total=False):
    """What all optimizers of this package take beside their own settings; all by keyword.

    Attributes:
        weight_decay: λ of the matrices, 0 by default.
        decay: "decoupled" (default), W <- (1 - lr λ) W; "independent", W <- (1 - λ lr/lr₀) W with
            lr₀ the rate the group was made with (its key "base_lr"), so that λ means the same at
            any rate; "cautious", decoupled, but only for the entries that the update shrinks too
            (Chen et al., arXiv 2510.12402).
        heavy_ball: remember M <- β M + G instead of the average β M + (1 - β) G. Directions that do
            not depend on the scale of a gradient are the same.
        maximize: ascend.
        roles: settings of the group of a role of a model, such as `{"conv": {"lr": 0.01},
            "embedding": {"lr": 3e-3, "weight_decay": 0.1}, "qkv": {"geometry": "adamw"}}`.
        adamw_lr: rate of AdamW for all parameters of a model that are no matrices.
        adamw_betas, adamw_eps, adamw_weight_decay: its other settings; (0.9, 0.95), 1e-8, 0.
        nonfinite: what a NaN or infinite gradient does: "raise" (default), or "skip" the step.
        state_dtype: precision of the memory, `torch.float32` for instance; by default that of the
            parameter, and float32 for float16 (see `steepest.optim.precision`). With it bfloat16
            parameters forget no small gradient.
        rounding: how half-precision parameters take a step: to the "nearest" number (default), or
            "stochastic", which makes steps too small for their precision right on average. The same
            seed every time, so a run can be repeated and resumed bit for bit.
    """

    weight_decay: float
    decay: Decay
    heavy_ball: bool
    maximize: bool
    roles: Mapping[Role, Mapping[str, Any]]
    adamw_lr: float | Tensor | None
    adamw_betas: tuple[float, float]
    adamw_eps: float
    adamw_weight_decay: float
    nonfinite: OnNonfinite
    state_dtype: torch.dtype | None
    rounding: Rounding
