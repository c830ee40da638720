"""Signum: the sign geometry with momentum."""

from __future__ import annotations

from torch import Tensor

from steepest.optim.steepest_descent import OnNonfinite, Parameters, SteepestDescent


class Signum(SteepestDescent):
    """Sign descent on an average of gradients.

    M <- β M + (1 - β) G;  W <- (1 - lr λ) W - lr sign(M).

    Bernstein et al., "signSGD" (arXiv 1802.04434), algorithm 2. Adam is an adapted Signum, as
    Shampoo is an adapted Muon.

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: step of every entry of a matrix; about a third of a good rate for AdamW.
        momentum: β, in [0, 1).
        weight_decay: λ, decoupled, for the matrices.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: AdamW for all other parameters of a
            model; the rate is `lr` unless given.
        nonfinite: "raise" (default) or "skip" a step whose gradients are not finite.

    >>> import torch
    >>> W = torch.nn.Parameter(torch.zeros(1, 2))
    >>> optimizer = Signum([W], lr=0.1)
    >>> for gradient in ([[1.0, -1.0]], [[-0.5, -1.0]]):
    ...     W.grad = torch.tensor(gradient)
    ...     optimizer.step()
    >>> W.data  # the first entry still follows the first gradient
    tensor([[-0.2000,  0.2000]])
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        nonfinite: OnNonfinite = "raise",
    ):
        super().__init__(
            params,
            lr=lr,
            geometry="sign",
            momentum=momentum,
            weight_decay=weight_decay,
            adamw_lr=adamw_lr,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            adamw_weight_decay=adamw_weight_decay,
            nonfinite=nonfinite,
        )
