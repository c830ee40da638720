"""SignSGD: the sign geometry without memory."""

from __future__ import annotations

from torch import Tensor

from steepest.optim.steepest_descent import OnNonfinite, Parameters, SteepestDescent


class SignSGD(SteepestDescent):
    """Sign descent, W <- (1 - lr λ) W - lr sign(G): steepest descent in the largest entry.

    Bernstein et al., "signSGD" (arXiv 1802.04434). Every entry of a matrix moves by exactly `lr`.

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: step of every entry of a matrix.
        weight_decay: λ, decoupled, for the matrices.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: AdamW for all other parameters of a
            model; the rate is `lr` unless given.
        nonfinite: "raise" (default) or "skip" a step whose gradients are not finite.

    >>> import torch
    >>> W = torch.nn.Parameter(torch.zeros(2, 2))
    >>> W.grad = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    >>> SignSGD([W], lr=0.1).step()
    >>> W.data
    tensor([[-0.1000,  0.1000],
            [-0.1000,  0.0000]])
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
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
            weight_decay=weight_decay,
            adamw_lr=adamw_lr,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            adamw_weight_decay=adamw_weight_decay,
            nonfinite=nonfinite,
        )
