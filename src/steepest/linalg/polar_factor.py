"""The polar factor U Vᵀ of a matrix G = U S Vᵀ: the steepest direction in the spectral norm.

Exact by the singular value decomposition, or approximate by a few odd polynomials
p(X) = a X + b (X Xᵀ) X + c (X Xᵀ)² X, which act on every singular value separately and need
nothing but matrix products.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PolarMethod = Literal["svd", "jordan", "you", "polar-express"]
Nonfinite = Literal["raise", "nan"]
Coefficients = tuple[float, float, float]

# K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024). One polynomial,
# repeated: steep at zero, and it never settles at 1 (after 5 steps: 0.68 to 1.13 on [0.01, 1]).
JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)

# You Jiacheng's five polynomials, as in the Gram Newton-Schulz and Emerging-Optimizers code.
YOU: tuple[Coefficients, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Amsel, Persson, Musco, Gower, "The Polar Express" (arXiv 2505.16932), listing 1: the minimax
# composition for singular values in [1e-3, 1]; further steps repeat the last one, which is exact
# to third order at 1. All but the last are used at x / 1.01, against round-off above 1.
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01


def polynomials(method: PolarMethod, steps: int | None = None) -> tuple[Coefficients, ...]:
    """Return the coefficients (a, b, c) of each step of `method`, in the order they are applied.

    Raises `ValueError` for a method without polynomials or a number of steps it does not have.

    >>> polynomials("jordan", 2)
    ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    steps = 5 if steps is None else steps
    if steps < 1:
        raise ValueError(f"got steps={steps}, expected at least 1")
    if method == "jordan":
        return (JORDAN,) * steps
    if method == "you":
        if steps > len(YOU):
            raise ValueError(
                f'got steps={steps}, but "you" has {len(YOU)} polynomials and does not converge '
                'by repeating the last; use "polar-express" for more steps'
            )
        return YOU[:steps]
    if method == "polar-express":
        safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
        return tuple((safe + [POLAR_EXPRESS[-1]] * max(1, steps - len(safe)))[:steps])
    raise ValueError(f'got method={method!r}, expected "svd", "jordan", "you" or "polar-express"')


@torch.no_grad()
def polar(
    G: Tensor,
    method: PolarMethod = "polar-express",
    steps: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    nonfinite: Nonfinite = "raise",
) -> Tensor:
    """Return the polar factor U Vᵀ of G = U S Vᵀ, over the nonzero singular values.

    Args:
        G: matrices of shape `(..., m, n)`, real floating point, any layout. Never modified.
        method: "polar-express" (default), "you" or "jordan" (see the coefficients in this file for
            their sources), or "svd", which is exact to rounding.
        steps: number of polynomials, 5 by default; "svd" takes none. Worst error of the singular
            values on [0.01, 1] times the Frobenius norm after 5 steps: 0.13 ("polar-express"),
            0.03 ("you"), 0.32 ("jordan"); after 8 steps of "polar-express": below 5e-5.
        dtype: precision of the computation. By default that of G, and float32 for half precision;
            `torch.bfloat16` is two to four times faster and has an error of about 1e-2 of its own;
            it fills the null space of a low-rank G with noise, the more the more steps.
        nonfinite: what to do with a matrix that has a NaN or infinite entry: "raise" a
            `ValueError` (default; on an accelerator this waits for the device), or report it by
            returning that matrix full of "nan" and all others as they should be.

    Returns:
        A tensor of the shape, dtype and device of G. A zero matrix gives zeros. The result does
        not depend on the scale of G, from the smallest to the largest representable entries.
        For tall matrices it may be a transposed view.

    Raises:
        TypeError: if G is not a real floating-point tensor, or dtype not a floating-point type.
        ValueError: for fewer than two dimensions, unknown methods or steps, non-finite input.

    >>> G = torch.randn(2, 5, 3, dtype=torch.float64)
    >>> Q = polar(G, "svd")
    >>> torch.allclose(Q.mT @ Q, torch.eye(3, dtype=torch.float64))
    True
    >>> torch.allclose(polar(G, steps=8), Q, atol=1e-3)
    True
    """
    _check(G, dtype)
    if nonfinite not in ("raise", "nan"):
        raise ValueError(f'got nonfinite={nonfinite!r}, expected "raise" or "nan"')
    if method == "svd" and steps is not None:
        raise ValueError(f'got steps={steps}, but "svd" is exact and takes no steps')
    schedule = () if method == "svd" else polynomials(method, steps)
    if G.numel() == 0:
        return G.clone()

    largest = G.abs().amax(dim=(-2, -1), keepdim=True)
    broken = ~largest.isfinite()
    if nonfinite == "raise" and bool(broken.any()):
        raise ValueError(
            f"got {int(broken.sum())} of {broken.numel()} matrices with NaN or infinite entries, "
            'expected finite ones; look for the cause upstream, or pass nonfinite="nan"'
        )
    # Dividing by a power of two is exact, so no entry is too small or too large for the norms.
    wide = largest.to(torch.promote_types(G.dtype, torch.float32))
    mantissa, _ = torch.frexp(wide)
    scale = torch.where(wide > 0, wide / (2 * mantissa), 1.0).masked_fill(broken, torch.nan)
    work = dtype or (torch.float32 if G.dtype.itemsize < 4 else G.dtype)
    with torch.autocast(G.device.type, enabled=False):
        X = G.div(scale.to(G.dtype)).to(work)
        Q = _by_svd(X, broken) if method == "svd" else _by_polynomials(X, schedule, method)
    return Q.to(G.dtype)


def _check(G: Tensor, dtype: torch.dtype | None) -> None:
    if not G.is_floating_point():
        raise TypeError(f"got a tensor of {G.dtype}, expected a real floating-point type")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"got dtype={dtype}, expected a real floating-point type")
    if G.ndim < 2:
        raise ValueError(f"got a tensor of shape {tuple(G.shape)}, expected (..., m, n)")


def _by_svd(X: Tensor, broken: Tensor) -> Tensor:
    if X.dtype.itemsize < 4:
        raise ValueError(f'got dtype={X.dtype}, but "svd" needs torch.float32 or torch.float64')
    U, S, Vh = torch.linalg.svd(X.masked_fill(broken, 0.0), full_matrices=False)
    cutoff = max(X.shape[-2:]) * torch.finfo(X.dtype).eps
    U = U * (cutoff * S[..., :1] < S).unsqueeze(-2)  # the null space stays null
    return (U @ Vh).masked_fill(broken, torch.nan)


def _by_polynomials(X: Tensor, schedule: tuple[Coefficients, ...], method: PolarMethod) -> Tensor:
    tall = X.shape[-2] > X.shape[-1]
    if tall:  # X Xᵀ should be the smaller of the two Gram matrices
        X = X.mT
    # The largest entry is in [1, 2), so a norm below 1 belongs to a zero matrix.
    precise = torch.promote_types(X.dtype, torch.float32)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=precise)
    norm = norm.to(X.dtype).clamp(min=1.0)
    X = X.div_(norm * SAFETY if method == "polar-express" else norm)  # X is a copy already
    shape = X.shape
    X = X.reshape(-1, *shape[-2:])
    X = X[0] if len(X) == 1 else X
    add_product = torch.addmm if X.ndim == 2 else torch.baddbmm
    for a, b, c in schedule:
        A = X @ X.mT
        B = add_product(A, A, A, beta=b, alpha=c)
        X = add_product(X, B, X, beta=a)
    X = X.reshape(shape)
    return X.mT if tall else X
