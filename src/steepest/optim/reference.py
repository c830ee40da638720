"""Each optimizer once more, in plain PyTorch: the page to read first.

Every function descends one matrix W `(out, in)` for some steps and returns where it arrives.
`gradient(W, t)` gives the gradient `(out, in)` at step t = 1, 2, ... The loops use the precision of
W, and take care of nothing: no batches, no zero or infinite gradients, no half precision. The tests
hold the optimizers of this package against these functions in float64.

λ is the weight decay, `weight_decay`; β and β₂ are the weights of the past, `momentum` and `beta2`.

>>> target = torch.eye(2)
>>> muon(torch.zeros(2, 2), lambda W, t: W - target, steps=100, lr=0.01).diagonal()
tensor([1.0000, 1.0000])
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Gradient = Callable[[Tensor, int], Tensor]


def polar(N: Tensor) -> Tensor:
    """U Vᵀ of N = U S Vᵀ: every singular value becomes 1, or stays 0."""
    U, S, Vh = torch.linalg.svd(N, full_matrices=False)
    kept = S.gt(1e-12 * S.max())
    return (U * kept) @ Vh


def inverse_root(A: Tensor, p: float, eps: float) -> Tensor:
    """(A + ε)^-p of a symmetric A `(n, n)`, with ε in units of the mean eigenvalue."""
    eigenvalues, Q = torch.linalg.eigh(A)  # (n), (n, n)
    return (Q * (eigenvalues + eps * eigenvalues.mean()) ** -p) @ Q.mT


def sign_sgd(
    W: Tensor, gradient: Gradient, steps: int, lr: float, *, weight_decay: float = 0.0
) -> Tensor:
    """Sign descent: the largest entry of a step is lr. Bernstein et al., arXiv 1802.04434."""
    for t in range(1, steps + 1):
        G = gradient(W, t)
        W = (1 - lr * weight_decay) * W - lr * G.sign()
    return W


def signum(
    W: Tensor,
    gradient: Gradient,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> Tensor:
    """SignSGD with momentum. Bernstein et al., arXiv 1802.04434, algorithm 2."""
    M = torch.zeros_like(W)
    for t in range(1, steps + 1):
        M = momentum * M + (1 - momentum) * gradient(W, t)
        W = (1 - lr * weight_decay) * W - lr * M.sign()
    return W


def adamw(
    W: Tensor,
    gradient: Gradient,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Tensor:
    """Signum, adapted entry by entry. Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    for t in range(1, steps + 1):
        G = gradient(W, t)
        M = momentum * M + (1 - momentum) * G
        V = beta2 * V + (1 - beta2) * G**2
        D = (M / (1 - momentum**t)) / ((V / (1 - beta2**t)).sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * D
    return W


def spectral_descent(
    W: Tensor, gradient: Gradient, steps: int, lr: float, *, weight_decay: float = 0.0
) -> Tensor:
    """Spectral descent: the spectral norm of a step is lr sqrt(out / in). Carlson et al. (2015)."""
    out, in_ = W.shape
    for t in range(1, steps + 1):
        D = polar(gradient(W, t))
        W = (1 - lr * weight_decay) * W - lr * math.sqrt(out / in_) * D
    return W


def muon(
    W: Tensor,
    gradient: Gradient,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
) -> Tensor:
    """Spectral descent with momentum. K. Jordan et al., "Muon" (2024)."""
    out, in_ = W.shape
    M = torch.zeros_like(W)
    for t in range(1, steps + 1):
        G = gradient(W, t)
        M = momentum * M + (1 - momentum) * G
        N = momentum * M + (1 - momentum) * G if nesterov else M
        W = (1 - lr * weight_decay) * W - lr * math.sqrt(out / in_) * polar(N)
    return W


def teon(
    W: Tensor,
    gradient: Gradient,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
) -> Tensor:
    """Muon on K layers side by side, W `(K, out, in)`. Zhang et al., arXiv 2601.23261, mode 1."""
    K, out, in_ = W.shape
    M = torch.zeros_like(W)
    for t in range(1, steps + 1):
        G = gradient(W, t)  # (K, out, in)
        M = momentum * M + (1 - momentum) * G
        N = momentum * M + (1 - momentum) * G
        Z = torch.cat(N.unbind(), dim=1)  # (out, K in)
        Q = torch.stack(polar(Z).chunk(K, dim=1))  # (K, out, in)
        W = (1 - lr * weight_decay) * W - lr * math.sqrt(out / in_) * Q
    return W


def shampoo(
    W: Tensor,
    gradient: Gradient,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.9,
    beta2: float = 0.95,
    exponent: float = 1 / 2,
    eps: float = 1e-4,
    weight_decay: float = 0.0,
) -> Tensor:
    """Muon, adapted from both sides; as long as Adam's step. Gupta et al., arXiv 1802.09568."""
    out, in_ = W.shape
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    L, R = W.new_zeros(out, out), W.new_zeros(in_, in_)
    for t in range(1, steps + 1):
        G = gradient(W, t)
        M = momentum * M + (1 - momentum) * G
        L = beta2 * L + (1 - beta2) * G @ G.mT
        R = beta2 * R + (1 - beta2) * G.mT @ G
        correction = 1 - beta2**t
        left, right = (inverse_root(A / correction, exponent, eps) for A in (L, R))
        D = left @ M @ right
        V = beta2 * V + (1 - beta2) * G**2
        A = (M / (1 - momentum**t)) / ((V / correction).sqrt() + 1e-8)  # Adam's direction
        W = (1 - lr * weight_decay) * W - lr * A.norm() * D / D.norm()
    return W


def kl_shampoo(
    W: Tensor,
    gradient: Gradient,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-4,
    weight_decay: float = 0.0,
) -> Tensor:
    """Shampoo whose factors whiten each other, no grafting. Lin et al., arXiv 2509.03378."""
    out, in_ = W.shape
    M = torch.zeros_like(W)
    L, R = W.new_zeros(out, out), W.new_zeros(in_, in_)
    for t in range(1, steps + 1):
        G = gradient(W, t)
        if t == 1:  # before there are factors: the identity times the RMS entry of G
            rms = G.square().mean().sqrt()
            left, right = (torch.eye(n, dtype=W.dtype) * rms**-0.5 for n in (out, in_))
        M = momentum * M + (1 - momentum) * G
        X, Y = left @ G, G @ right  # both with the roots of the step before
        L = beta2 * L + (1 - beta2) * Y @ Y.mT / in_
        R = beta2 * R + (1 - beta2) * X.mT @ X / out
        left, right = (inverse_root(A / (1 - beta2**t), 1 / 2, eps) for A in (L, R))
        D = left @ (M / (1 - momentum**t)) @ right
        W = (1 - lr * weight_decay) * W - lr * D
    return W


def soap(
    W: Tensor,
    gradient: Gradient,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.95,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Tensor:
    """Adam in the eigenbasis of Shampoo's factors. Vyas et al., arXiv 2409.11321, algorithm 3."""
    out, in_ = W.shape
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    L, R = W.new_zeros(out, out), W.new_zeros(in_, in_)
    Q_L, Q_R = (torch.eye(n, dtype=W.dtype) for n in (out, in_))
    for t in range(1, steps + 1):
        G = gradient(W, t)
        M = momentum * M + (1 - momentum) * G
        V = beta2 * V + (1 - beta2) * (Q_L.mT @ G @ Q_R) ** 2
        M_hat = Q_L.mT @ M @ Q_R / (1 - momentum**t)
        D = math.sqrt(1 - beta2**t) * M_hat / (V.sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * Q_L @ D @ Q_R.mT
        L = beta2 * L + (1 - beta2) * G @ G.mT
        R = beta2 * R + (1 - beta2) * G.mT @ G
        new_L, new_R = (next_basis(A, Q, first=t == 1) for A, Q in ((L, Q_L), (R, Q_R)))
        V = (Q_L.mT @ new_L).square().mT @ V @ (Q_R.mT @ new_R).square()  # variances turn
        Q_L, Q_R = new_L, new_R
    return W


def next_basis(A: Tensor, Q: Tensor, first: bool) -> Tensor:
    """Eigenvectors of A `(n, n)`, largest first; after the first by one orthogonal iteration."""
    if first:
        return torch.linalg.eigh(A).eigenvectors.flip(-1)
    order = (Q.mT @ A @ Q).diagonal().argsort(descending=True)
    return torch.linalg.qr(A @ Q[:, order]).Q
