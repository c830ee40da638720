"""Updates of a single matrix: how they are made, and what they are on average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

DOUBLE = torch.float64
BARE: dict[str, Any] = {"length": "own", "eps": 0.0, "interval": 1}
"""Settings of the Shampoo family that leave the formulas and nothing else."""
NO_MEMORY: dict[str, Any] = {**BARE, "momentum": 0.0, "beta2": 0.0}
"""The same for one gradient alone."""


def zero_weight(out: int, in_: int) -> nn.Parameter:
    """Return a weight (out, in) of zeros, in double precision."""
    return nn.Parameter(torch.zeros(out, in_, dtype=DOUBLE))


def gaussian_gradient(out: int, in_: int) -> Tensor:
    """Return a Gaussian gradient (out, in) whose singular values are raised by a tenth of the top.

    So it has full rank with a condition of at most eleven, and inverse roots keep their digits.
    """
    U, S, Vh = torch.linalg.svd(torch.randn(out, in_, dtype=DOUBLE), full_matrices=False)
    return (U * (S + 0.1 * S[0])) @ Vh


def update_from(optimizer: Optimizer, W: nn.Parameter, G: Tensor) -> Tensor:
    """Take a step with the gradient G (out, in); return D of W <- W - D."""
    before = W.detach().clone()
    W.grad = G.clone()
    optimizer.step()
    return before - W.detach()


def relative_error(A: Tensor, B: Tensor) -> float:
    """‖A - B‖_F / ‖B‖_F."""
    return float((A - B).norm() / B.norm())


def sine(A: Tensor, B: Tensor) -> float:
    """The sine of the angle between two matrices: how far one is from a multiple of the other."""
    cosine = float((A * B).sum() / (A.norm() * B.norm()))
    return max(0.0, 1 - cosine**2) ** 0.5


def semi_orthogonality(left: Tensor, right: Tensor) -> tuple[float, float]:
    """How far averages of U Uᵀ (out, out) and Uᵀ U (in, in) are from multiples of the identity.

    Of each A (n, n) it is ‖A n / tr A - 1‖_F / sqrt(n). Both are 0 for updates that are
    semi-orthogonal from both sides on average.
    """

    def distance(A: Tensor) -> float:
        n = len(A)
        return float((A * (n / A.trace()) - torch.eye(n).to(A)).norm()) / n**0.5

    return distance(left), distance(right)
