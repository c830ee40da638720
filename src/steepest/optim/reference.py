"""Each optimizer once more, in plain PyTorch: the page to read first.

Every function descends one matrix W `(out, in)` for some steps and returns where it arrives.
`gradient(W, t)` gives the gradient `(out, in)` at step t = 1, 2, ... The loops use the precision of
W, and take care of nothing: no batches, no zero or infinite gradients, no half precision. The tests
hold the optimizers of this package against these functions in float64.

β and β₂ are the weights of the past, `momentum` and `beta2`; λ is the weight decay. Options have
the names and values that they have in the optimizers. All functions take those of `DecaySettings`.

>>> target = torch.eye(2)
>>> muon(torch.zeros(2, 2), lambda W, t: W - target, steps=100, lr=0.01).diagonal()
tensor([1.0000, 1.0000])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

GradientAt = Callable[[Tensor, int], Tensor]
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda out, in_: math.sqrt(out / in_),
    "original": lambda out, in_: math.sqrt(max(1, out / in_)),
    "match-rms-adamw": lambda out, in_: 0.2 * math.sqrt(max(out, in_)),
    "none": lambda out, in_: 1.0,
}


class DecaySettings(TypedDict, total=False):
    """The weight decay λ, 0 by default, and the way it acts; see `decayed`."""

    weight_decay: float
    decay: Literal["decoupled", "independent", "cautious"]


def decayed(
    W: Tensor, D: Tensor, lr: float, *, weight_decay: float = 0.0, decay: str = "decoupled"
) -> Tensor:
    """What decay leaves of W before a step along -D: (1 - lr λ) W.

    With "independent" it is (1 - λ) W; with "cautious" only entries that the step shrinks decay.
    """
    rate = weight_decay if decay == "independent" else lr * weight_decay
    less = (1 - rate) * W
    return torch.where(D * W > 0, less, W) if decay == "cautious" else less


def polar(N: Tensor) -> Tensor:
    """U Vᵀ of N = U S Vᵀ `(out, in)`: every singular value becomes 1, or stays 0."""
    U, S, Vh = torch.linalg.svd(N, full_matrices=False)
    kept = S.gt(1e-12 * S.max())
    return (U * kept) @ Vh


def inverse_root(A: Tensor, p: float, eps: float, relative: bool = True) -> Tensor:
    """(A + ε)^-p of a symmetric A `(n, n)`, with ε in units of the mean eigenvalue or as it is."""
    eigenvalues, Q = torch.linalg.eigh(A)  # (n), (n, n)
    unit = eigenvalues.mean() if relative else 1.0
    return (Q * (eigenvalues + eps * unit) ** -p) @ Q.mT


def sign_sgd(
    W: Tensor, gradient: GradientAt, steps: int, lr: float, **decay: Unpack[DecaySettings]
) -> Tensor:
    """Sign descent: the largest entry of a step is lr. Bernstein et al., arXiv 1802.04434."""
    for t in range(1, steps + 1):
        D = gradient(W, t).sign()
        W = decayed(W, D, lr, **decay) - lr * D
    return W


def signum(
    W: Tensor,
    gradient: GradientAt,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.9,
    **decay: Unpack[DecaySettings],
) -> Tensor:
    """SignSGD with momentum. Bernstein et al., arXiv 1802.04434, algorithm 2."""
    M = torch.zeros_like(W)
    for t in range(1, steps + 1):
        M = momentum * M + (1 - momentum) * gradient(W, t)
        D = M.sign()
        W = decayed(W, D, lr, **decay) - lr * D
    return W


def adam_direction(
    M: Tensor, V: Tensor, t: int, momentum: float, beta2: float, eps: float
) -> Tensor:
    """M / sqrt(V), where both averages `(out, in)` are corrected for their start from zero."""
    return (M / (1 - momentum**t)) / ((V / (1 - beta2**t)).sqrt() + eps)


def adamw(
    W: Tensor,
    gradient: GradientAt,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    **decay: Unpack[DecaySettings],
) -> Tensor:
    """Signum, adapted entry by entry. Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    for t in range(1, steps + 1):
        G = gradient(W, t)
        M = momentum * M + (1 - momentum) * G
        V = beta2 * V + (1 - beta2) * G**2
        D = adam_direction(M, V, t, momentum, beta2, eps)
        W = decayed(W, D, lr, **decay) - lr * D
    return W


def spectral_descent(
    W: Tensor,
    gradient: GradientAt,
    steps: int,
    lr: float,
    *,
    length: Literal["own", "dual"] = "own",
    scale: str = "spectral",
    **decay: Unpack[DecaySettings],
) -> Tensor:
    """Spectral descent: the spectral norm of a step is lr sqrt(out / in). Carlson et al. (2015).

    With length="dual" it is the step of the theory: as long as the gradient in the dual norm.
    """
    for t in range(1, steps + 1):
        G = gradient(W, t)
        D = SCALES[scale](*W.shape) * polar(G)
        D = D * (G * D).sum() if length == "dual" else D
        W = decayed(W, D, lr, **decay) - lr * D
    return W


def muon(
    W: Tensor,
    gradient: GradientAt,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    scale: str = "spectral",
    **decay: Unpack[DecaySettings],
) -> Tensor:
    """Spectral descent with momentum. K. Jordan et al., "Muon" (2024)."""
    M = torch.zeros_like(W)
    for t in range(1, steps + 1):
        G = gradient(W, t)
        M = momentum * M + (1 - momentum) * G
        N = momentum * M + (1 - momentum) * G if nesterov else M  # (out, in)
        D = SCALES[scale](*W.shape) * polar(N)  # by default sqrt(out / in) polar(N)
        W = decayed(W, D, lr, **decay) - lr * D
    return W


def teon(
    W: Tensor,
    gradient: GradientAt,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    mode: Literal[1, 2] = 1,
    length: Literal["own", "muon"] = "own",
    scale: str = "spectral",
    **decay: Unpack[DecaySettings],
) -> Tensor:
    """Muon on K layers side by side, W `(K, out, in)`. Zhang et al., arXiv 2601.23261.

    In mode 2 the layers are below each other. With length="muon" Q is as long as K polar factors.
    """
    K, out, in_ = W.shape
    M = torch.zeros_like(W)
    for t in range(1, steps + 1):
        G = gradient(W, t)  # (K, out, in)
        M = momentum * M + (1 - momentum) * G
        N = momentum * M + (1 - momentum) * G if nesterov else M
        Z = torch.cat(N.unbind(), dim=2 - mode)  # (out, K in), in mode 2 (K out, in)
        Q = torch.stack(polar(Z).chunk(K, dim=2 - mode))  # (K, out, in)
        Q = Q * math.sqrt(K * min(out, in_)) / Q.norm() if length == "muon" else Q
        D = SCALES[scale](out, in_) * Q
        W = decayed(W, D, lr, **decay) - lr * D
    return W


def with_length(D: Tensor, length: str, adam: Tensor) -> Tensor:
    """D `(out, in)` as long as Adam's direction or as Muon's, or with the length of its own."""
    lengths = {"adam": adam.norm(), "muon": math.sqrt(min(D.shape)), "own": D.norm()}
    return D * lengths[length] / D.norm()


def shampoo(
    W: Tensor,
    gradient: GradientAt,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.9,
    beta2: float = 0.95,
    exponent: float = 1 / 2,
    sides: Literal["both", "left", "right"] = "both",
    eps: float = 1e-4,
    relative_eps: bool = True,
    bias_correction: bool = True,
    length: Literal["adam", "muon", "own"] = "adam",
    **decay: Unpack[DecaySettings],
) -> Tensor:
    """Muon, adapted from both sides; as long as Adam's step. Gupta et al., arXiv 1802.09568."""
    out, in_ = W.shape
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    L, R = W.new_zeros(out, out), W.new_zeros(in_, in_)
    for t in range(1, steps + 1):
        G = gradient(W, t)  # (out, in)
        M = momentum * M + (1 - momentum) * G
        V = beta2 * V + (1 - beta2) * G**2
        L = beta2 * L + (1 - beta2) * G @ G.mT
        R = beta2 * R + (1 - beta2) * G.mT @ G
        correction = 1 - beta2**t if bias_correction else 1.0
        D = M / (1 - momentum**t)
        if sides != "right":
            D = inverse_root(L / correction, exponent, eps, relative_eps) @ D
        if sides != "left":
            D = D @ inverse_root(R / correction, exponent, eps, relative_eps)
        D = with_length(D, length, adam_direction(M, V, t, momentum, beta2, eps=1e-8))
        W = decayed(W, D, lr, **decay) - lr * D
    return W


def kl_shampoo(
    W: Tensor,
    gradient: GradientAt,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.9,
    beta2: float = 0.95,
    sequential: bool = False,
    eps: float = 1e-4,
    relative_eps: bool = True,
    bias_correction: bool = True,
    length: Literal["adam", "muon", "own"] = "adam",
    **decay: Unpack[DecaySettings],
) -> Tensor:
    """Shampoo whose factors whiten each other. Lin et al., arXiv 2509.03378.

    With `sequential`, L takes in gradients that the new root of R whitens, not the one before.
    """
    out, in_ = W.shape
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    L, R = W.new_zeros(out, out), W.new_zeros(in_, in_)
    for t in range(1, steps + 1):
        G = gradient(W, t)  # (out, in)
        M = momentum * M + (1 - momentum) * G
        V = beta2 * V + (1 - beta2) * G**2
        if t == 1:  # before there are factors: roots of the identity times the RMS entry of G
            left, right = (G.square().mean() ** -0.25 * torch.eye(n).to(G) for n in (out, in_))
        correction = 1 - beta2**t if bias_correction else 1.0
        X, Y = left @ G, G @ right  # both with the roots of the step before
        R = beta2 * R + (1 - beta2) * X.mT @ X / out
        right = inverse_root(R / correction, 1 / 2, eps, relative_eps)
        Y = G @ right if sequential else Y
        L = beta2 * L + (1 - beta2) * Y @ Y.mT / in_
        left = inverse_root(L / correction, 1 / 2, eps, relative_eps)
        D = left @ (M / (1 - momentum**t)) @ right
        D = with_length(D, length, adam_direction(M, V, t, momentum, beta2, eps=1e-8))
        W = decayed(W, D, lr, **decay) - lr * D
    return W


def soap(
    W: Tensor,
    gradient: GradientAt,
    steps: int,
    lr: float,
    *,
    momentum: float = 0.95,
    beta2: float = 0.95,
    eps: float = 1e-8,
    interval: int = 1,
    slots: tuple[int | None, int | None] = (0, 0),
    length: Literal["own", "spectral"] = "own",
    factors: tuple[Tensor, Tensor] | None = None,
    **decay: Unpack[DecaySettings],
) -> Tensor:
    """Adam in the eigenbasis of Shampoo's factors. Vyas et al., arXiv 2409.11321, algorithm 3.

    In each interval one step renews the left basis, and one the right; `slots` says which. A side
    of `None` keeps the basis of the weights. `factors` are an L and an R to begin with.
    """
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    L, R = factors or (W.new_zeros(n, n) for n in W.shape)  # (out, out), (in, in)
    Q_L, Q_R = (eigenvectors(A) if factors else torch.eye(len(A)).to(A) for A in (L, R))
    for t in range(1, steps + 1):
        G = gradient(W, t)
        M = momentum * M + (1 - momentum) * G
        V = beta2 * V + (1 - beta2) * (Q_L.mT @ G @ Q_R) ** 2  # (out, in), in the basis
        N = Q_L.mT @ M @ Q_R / (1 - momentum**t)
        D = Q_L @ (math.sqrt(1 - beta2**t) * N / (V.sqrt() + eps)) @ Q_R.mT
        D = D / torch.linalg.matrix_norm(D, 2) if length == "spectral" else D
        W = decayed(W, D, lr, **decay) - lr * D
        L = beta2 * L + (1 - beta2) * G @ G.mT
        R = beta2 * R + (1 - beta2) * G.mT @ G
        if (t - 1) % interval == slots[0]:
            Q_L, P = next_basis(L, Q_L)
            V = P.mT @ V
        if (t - 1) % interval == slots[1]:
            Q_R, P = next_basis(R, Q_R)
            V = V @ P
    return W


def eigenvectors(A: Tensor) -> Tensor:
    """The eigenvectors of a symmetric A `(n, n)`, that of the largest eigenvalue first."""
    return torch.linalg.eigh(A).eigenvectors.flip(-1)


def next_basis(A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors of A `(n, n)`, from those before by one step of orthogonal iteration.

    Also P `(n, n)`: variances in the new basis are Pᵀ times those in the old one.
    """
    if torch.equal(Q, torch.eye(len(Q)).to(Q)):  # the first time there are none before
        new = eigenvectors(A)
    else:
        order = (Q.mT @ A @ Q).diagonal().argsort(descending=True)
        new = torch.linalg.qr(A @ Q[:, order]).Q
    return new, (Q.mT @ new).square()
