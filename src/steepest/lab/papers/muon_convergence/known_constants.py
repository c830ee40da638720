"""Problems whose constants are known, and the paper's Muon on them.

The loss is f(W) = Σ φ((W - W*) A) / n for a weight W (m, k), inputs A (k, n) and a function φ of
residuals with |φ''| <= 1 and φ >= φ(0) = 0. So f* = 0, and with Λ = A Aᵀ / n assumption 4.5 holds:
L = ‖Λ‖_op and L_* = ‖Λ‖_* (Lemma 4.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOAT = torch.float64


@dataclass(frozen=True)
class Residual:
    """A function φ of residuals.

    Attributes:
        value: φ.
        slope: φ'.
        curvature: φ''.
        third: the largest |φ'''|.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]
    third: float


CONVEX = {
    "square": Residual(lambda R: R.square() / 2, lambda R: R, torch.ones_like, 0.0),
    "log-cosh": Residual(
        lambda R: torch.logaddexp(R, -R) - math.log(2),
        torch.tanh,
        lambda R: 1 - torch.tanh(R).square(),
        4 / (3 * math.sqrt(3)),
    ),
}
"""Convex, so star-convex too."""
RESIDUALS = CONVEX | {
    "cosine": Residual(lambda R: 1 - torch.cos(R), torch.sin, torch.cos, 1.0),
}
"""With one that is not convex."""


@dataclass(frozen=True)
class KnownConstants:
    """A loss of one matrix.

    Attributes:
        residual: φ.
        A: inputs (k, n).
        optimum: W* (m, k).
    """

    residual: Residual
    A: Tensor
    optimum: Tensor

    def loss(self, W: Tensor) -> Tensor:
        """Return f at W (..., m, k), without f* = 0."""
        return self.residual.value((W - self.optimum) @ self.A).sum((-2, -1)) / self.A.shape[1]

    def gradient(self, W: Tensor) -> Tensor:
        """Return the gradient at W (..., m, k)."""
        return self.residual.slope((W - self.optimum) @ self.A) @ self.A.mT / self.A.shape[1]

    def curvature(self, W: Tensor, U: Tensor) -> Tensor:
        """Return ⟨U, ∇²f(W)[U]⟩."""
        bend = self.residual.curvature((W - self.optimum) @ self.A)
        return (bend * (U @ self.A).square()).sum((-2, -1)) / self.A.shape[1]

    @property
    def rank(self) -> int:
        """r, the smaller side of W."""
        return min(self.optimum.shape)

    @property
    def frobenius_smoothness(self) -> float:
        """L = ‖Λ‖_op."""
        return float(torch.linalg.matrix_norm(self.A, 2) ** 2 / self.A.shape[1])

    @property
    def spectral_smoothness(self) -> float:
        """L_* = ‖Λ‖_*."""
        return float(self.A.square().sum() / self.A.shape[1])

    @property
    def third_derivative(self) -> float:
        """s, a bound on ‖∇³f‖_op: the largest |φ'''| times the longest input times ‖A‖_op² / n."""
        longest = float(torch.linalg.vector_norm(self.A, dim=0).max())
        return self.residual.third * longest * self.frobenius_smoothness


def random_problem(residual: Residual, shape: tuple[int, int], decay: float) -> KnownConstants:
    """Return a problem whose inputs have singular values that fall from 1 like decay^i.

    Args:
        residual: φ.
        shape: (m, k).
        decay: of the singular values of A / √n, in (0, 1].
    """
    m, k = shape
    n = 2 * k
    spectrum = decay ** torch.arange(k, dtype=_FLOAT)
    Q = torch.linalg.qr(torch.randn(n, k, dtype=_FLOAT)).Q
    P = torch.linalg.qr(torch.randn(k, k, dtype=_FLOAT)).Q
    return KnownConstants(residual, math.sqrt(n) * (P * spectrum) @ Q.mT, gaussian_weight(m, k))


def gaussian_weight(*shape: int) -> Tensor:
    """Return a Gaussian matrix in double precision."""
    return torch.randn(*shape, dtype=_FLOAT)


def adaptive_rate(smoothness: float) -> Callable[[Tensor], Tensor]:
    """Return the rate ‖G‖_* / smoothness of Theorem 4.11, as a function of ‖G‖_*."""
    return lambda norm: norm / smoothness


@dataclass(frozen=True)
class Trajectory:
    """What is seen along runs; the gradients are those without noise.

    Attributes:
        losses: f(W_t) for t = 0 ... T, (T + 1, ...).
        nuclear_norms: ‖∇f(W_t)‖_* for t < T, (T, ...).
        curvatures: J_t, along the polar factor of the gradient, for t < T, (T, ...).
        distances: ‖W_t - W*‖_op for t = 0 ... T, (T + 1, ...).
    """

    losses: Tensor
    nuclear_norms: Tensor
    curvatures: Tensor
    distances: Tensor

    @property
    def gap(self) -> Tensor:
        """Δ = f(W_0) - f*."""
        return self.losses[0]


def muon_trajectory(
    problem: KnownConstants,
    W: Tensor,
    steps: int,
    rate: Tensor | Callable[[Tensor], Tensor],
    momentum: Tensor | None = None,
    noise: float = 0.0,
) -> Trajectory:
    """Run Algorithm 1, or without momentum and noise Algorithm 2, from one start or several.

    M_0 = G_0, M_t = β M_{t-1} + (1 - β) G_t, W_{t+1} = W_t - η polar(M_t): no Nesterov, no factor.

    Args:
        problem: the loss.
        W: where runs start, (..., m, k).
        steps: T.
        rate: η of every run (...), or a function of ‖G_t‖_*, which returns it.
        momentum: β of every run (...); 0 by default.
        noise: σ / √B, the root of the mean of ‖noise‖_F²; each run has its own.
    """
    losses, norms, curvatures, distances = [], [], [], []
    M = None
    for _ in range(steps):
        G = problem.gradient(W)
        U, norm = _polar_and_norm(G)
        losses.append(problem.loss(W))
        norms.append(norm)
        curvatures.append(problem.curvature(W, U))
        distances.append(torch.linalg.matrix_norm(W - problem.optimum, 2))
        if momentum is not None or noise:
            G = G + noise / math.sqrt(W.shape[-2] * W.shape[-1]) * torch.randn_like(G)
            M = G if M is None or momentum is None else torch.lerp(G, M, momentum[..., None, None])
            U, _ = _polar_and_norm(M)
        W = W - (rate if isinstance(rate, Tensor) else rate(norm))[..., None, None] * U
    losses.append(problem.loss(W))
    distances.append(torch.linalg.matrix_norm(W - problem.optimum, 2))
    return Trajectory(*map(torch.stack, (losses, norms, curvatures, distances)))


def _polar_and_norm(G: Tensor) -> tuple[Tensor, Tensor]:
    """U Vᵀ and ‖G‖_* from one decomposition: for matrices as small as these checks take longer."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh, S.sum(-1)
