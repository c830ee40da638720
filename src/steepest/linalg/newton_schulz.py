"""The polar factor by odd polynomials p(X) = (a I + b A + c A²) X with A = X Xᵀ.

They act on every singular value separately and need nothing but matrix products. With a fourth
coefficient d it is p(X) = (a I + b U + c U²) X with U = A² + d A, which is of degree nine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steepest.linalg.products import product, symmetric_product

Coefficients = tuple[float, ...]  # (a, b, c), or (a, b, c, d) for a polynomial of degree nine

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

# Grishina, Smirnov, Rakhuba, "Accelerating Newton-Schulz iteration for orthogonalization via
# Chebyshev-type polynomials" (arXiv 2506.10935): five polynomials, 0.88 to 1.12 on [1e-3, 1]. All
# but the first are used at x / 1.01: as published, rounding to bfloat16 can make them diverge.
CANS: tuple[Coefficients, ...] = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

# Ours: two cubics around three quintics, 13 products for a square matrix instead of 15. Found by
# minimizing the largest ratio of the error to that of five steps of JORDAN, both as run in
# bfloat16, over Gaussian matrices, spectra of 1/i and from 1 to 1e-4, rank 8 (sizes 64 to 768) and
# momenta of GPTs of width 64 to 256: first by sequential quadratic programming in exact arithmetic,
# then by random perturbations of the coefficients. Errors of 1.2 % after every step, on top of
# rounding, were allowed to raise no singular value above 1.27. For singular values over 1.01 ‖·‖_S4
# the composition has the slope 441 at 0, is 0.43 at 1e-3 and lies in [0.748, 1.199] on [2e-3, 1].
TUNED: tuple[Coefficients, ...] = (
    (5.1958, -5.1374, 0.0),
    (4.1263, -2.9339, 0.5245),
    (3.8993, -2.7753, 0.5087),
    (3.1654, -2.2321, 0.4431),
    (1.6842, -0.4930, 0.0),
)

# Ours: three polynomials of degree nine, 12 products for a square matrix, 9 of them symmetric. Each
# is the best of its form, a quadratic of a quadratic of X Xᵀ, on the interval that the one before
# leaves, from [3e-3, 1] on; 1 % longer for the second and third, against round-off. (The best of
# all of degree nine hardly differ from that form, as Chebyshev's T₉ is T₃ of T₃.) For singular
# values over 1.01 ‖·‖_S4 the composition has the slope 310 at 0, is 0.31 at 1e-3, 0.59 at 2e-3 and
# lies in [0.826, 1.174] on [3e-3, 1].
NONIC: tuple[Coefficients, ...] = (
    (14.7857, 125.0903, 266.1240, -1.151225),
    (6.31282, 3.194743, 0.4221603, -4.565014),
    (3.32397, 1.044513, 0.1028922, -4.657136),
)
SAFETY = 1.01


def _safely(p: Coefficients) -> Coefficients:
    """p, of degree five, at x / 1.01."""
    return p[0] / SAFETY, p[1] / SAFETY**3, p[2] / SAFETY**5


SCHEDULES = {
    "you": YOU,
    "cans": (CANS[0], *map(_safely, CANS[1:])),
    "tuned": TUNED,
    "nonic": NONIC,
}
# These divide by the Schatten-4 norm, which is at hand after the first product, not by the
# Frobenius norm: both bound the largest singular value, but of a Gaussian matrix of 768² the
# Frobenius norm is 14 times as large, the Schatten-4 norm 3 times.
SCHATTEN = ("cans", "tuned", "nonic")


def polynomials(method: str, steps: int | None = None) -> tuple[Coefficients, ...]:
    """Return the coefficients of each step of `method`, in the order they are applied.

    (a, b, c), or (a, b, c, d) for "nonic". Five steps by default, three of "nonic". Raises
    `ValueError` for a method without polynomials or a number of steps it does not have.

    >>> polynomials("jordan", 2)
    ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    steps = (3 if method == "nonic" else 5) if steps is None else steps
    if steps < 1:
        raise ValueError(f"got steps={steps}, expected at least 1")
    if method == "jordan":
        return (JORDAN,) * steps
    if method == "polar-express":
        safe = [_safely(p) for p in POLAR_EXPRESS[:-1]]
        return tuple((safe + [POLAR_EXPRESS[-1]] * max(1, steps - len(safe)))[:steps])
    if method not in SCHEDULES:
        raise ValueError(
            f'got method={method!r}, expected "jordan", "polar-express" or one of '
            + ", ".join(f'"{name}"' for name in SCHEDULES)
        )
    schedule = SCHEDULES[method]
    if steps > len(schedule):
        raise ValueError(
            f'got steps={steps}, but "{method}" has {len(schedule)} polynomials and does not '
            'converge by repeating the last; use "polar-express" for more steps'
        )
    return schedule[:steps]


def by_polynomials(
    X: Tensor,
    method: str,
    schedule: tuple[Coefficients, ...],
    dtype: torch.dtype,
    gram: bool,
    overwrite: bool = False,
) -> Tensor:
    """Apply `schedule` to matrices X, m <= n, of any scale.

    In half precision X is kept in full precision as well: what rounding takes from it is carried
    through the first steps (see `_plain`). Only "jordan", which is torch's to the bit, rounds X
    at once. In Gram form the result lies in the memory of X if that may be overwritten.
    """
    shape = X.shape
    X = X.reshape(-1, *shape[-2:])
    full = torch.float32 if dtype.itemsize < 4 and method != "jordan" else dtype
    if method in SCHATTEN and dtype != torch.float16:  # in which X Xᵀ could overflow
        if gram:
            return _gram(*_measured(X, full, dtype), schedule, overwrite).reshape(shape)
        return _plain(X, schedule, dtype, measure=full).reshape(shape)
    X = scaled(X).to(full)
    precise = torch.promote_types(X.dtype, torch.float32)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=precise)
    norm = norm.to(X.dtype).clamp(min=1.0)  # below 1 it is that of a zero matrix
    X = X.div_(norm * SAFETY if method == "polar-express" else norm)
    if gram:
        return _gram(X, None, None, schedule).reshape(shape)
    # "jordan" is torch's to the bit, so also in the order of its sums.
    symmetric = product if method == "jordan" else symmetric_product
    return _plain(X, schedule, dtype, symmetric).reshape(shape)


def scaled(X: Tensor) -> Tensor:
    """Each matrix over a power of two, which is exact: its largest entry is in [1, 2), or 0.

    Then no entry is too small or too large for the norms. Non-finite matrices become NaN.
    """
    return X.div(power_of_two(largest_entry(X)).to(X.dtype))


def power_of_two(size: Tensor) -> Tensor:
    """The largest power of two up to each size, which is not negative; 1 for 0, NaN for infinity.

    >>> power_of_two(torch.tensor([0.0, 0.75, 5.0]))
    tensor([1.0000, 0.5000, 4.0000])
    """
    wide = size.to(torch.promote_types(size.dtype, torch.float32))
    mantissa, _ = torch.frexp(wide)
    power = torch.where(wide > 0, wide / (2 * mantissa), 1.0)
    return power.masked_fill(~size.isfinite(), torch.nan)


def largest_entry(X: Tensor) -> Tensor:
    """The largest absolute entry of each matrix; NaN or infinite where one is."""
    high, low = (reduce(X, (-2, -1), keepdim=True) for reduce in (torch.amax, torch.amin))
    return torch.maximum(high, -low)  # abs() would be a copy


def _measured(X: Tensor, full: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """X in `full`, its Gram matrix in `dtype`, and the bound on its singular values to divide by.

    X is scaled, but on a CPU only where its fourth powers could overflow or underflow: looking at
    the norms, which would be waited for on an accelerator, costs less than three passes over X.
    """
    for careful in (False, True) if X.is_cpu else (True,):
        W = (scaled(X) if careful else X).to(full)
        Y = W.to(dtype)
        A = symmetric_product(Y, Y.mT)
        norm = _schatten_norm(A)
        if careful or bool(((norm > 1e-7) & (norm < 1e7)).all()):
            break
    return W, A, torch.where(norm > 0, norm, SAFETY)


def _plain(
    X: Tensor,
    schedule: tuple[Coefficients, ...],
    dtype: torch.dtype,
    symmetric: Callable[..., Tensor] = symmetric_product,
    measure: torch.dtype | None = None,
) -> Tensor:
    """Y <- p(Y) for each step, from Y = X, or from X over its norm measured in this precision.

    Rounding fills the null space of a low-rank X with noise, which every later step multiplies by
    its slope a at zero, by some hundred in all. The products with A keep to the row and column
    space of X, so noise enters by the term a Y alone: a times the rounding error is added, in the
    first step, and in the second where the first was not steep. That divides the noise by the
    slopes of these steps.
    """
    A = norm = None
    if measure is not None:
        X, A, norm = _measured(X, measure, dtype)
        A.mul_(norm.square().reciprocal_().to(dtype))  # of one type, as it is a copy otherwise
    Y, lost = _rounded(X, norm, dtype)
    for k, (a, b, c, *inner) in enumerate(schedule):
        A = symmetric(Y, Y.mT) if A is None else A
        for d in inner:
            A = symmetric(A, A, A, d)
        if c:
            A = symmetric(A, A, A, b, c)
        Z = product(A, Y, Y, a, 1.0 if c else b)
        A = None
        if lost is None:
            Y = Z
        elif k == 0 and not inner:
            Y = Z.add(lost, alpha=a)
            lost = Z.sub_(Y).add_(lost, alpha=a)
        else:
            Y, lost = Z.add_(lost, alpha=a), None
    return Y


def _rounded(X: Tensor, norm: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """X / norm, and in half precision what rounding takes from it."""
    if X.dtype == dtype:
        return (X if norm is None else X / norm), None
    Y, lost = (torch.empty_like(X, dtype=dtype) for _ in range(2))
    norm = X.new_ones(len(X), 1, 1) if norm is None else norm
    for x, n, y, error in zip(*(tensor.chunk(8) for tensor in (X, norm, Y, lost)), strict=True):
        exact = x / n  # in parts, as it takes twice the memory of the result
        y.copy_(exact)
        error.copy_(exact.sub_(y))
    return Y, lost


def _gram(
    X: Tensor,
    A: Tensor | None,
    norm: Tensor | None,
    schedule: tuple[Coefficients, ...],
    overwrite: bool = False,
) -> Tensor:
    """The same collected in Q, m x m, and applied to X at once: cheap for m << n.

    From X / norm, with A = X Xᵀ, where they are given. A <- P A P and Q <- P Q with p(X) = P X.
    Rounding turns the zero eigenvalues of A into noise that grows by the square of the slopes, so
    X <- Q X and A is computed afresh after five steps. In half precision that noise is fatal even
    with a fresh A every other step.
    """
    for start in range(0, len(schedule), 5):
        A = symmetric_product(X, X.mT) if A is None else A
        A = A if norm is None else A.div_(norm.square())
        Q = None
        steps = schedule[start : start + 5]
        for k, (a, b, c, *inner) in enumerate(steps):
            P = symmetric_product(A, A, A, inner[0]) if inner else A
            P = symmetric_product(P, P, P, b, c) if c else P * b
            P.diagonal(dim1=-2, dim2=-1).add_(a)
            if k + 1 < len(steps):
                A = symmetric_product(symmetric_product(A, P), P)
            Q = P if Q is None else symmetric_product(Q, P)
        assert Q is not None
        Q = Q if norm is None else Q.div_(norm)
        if overwrite:
            for x, q in zip(X.chunk(8), Q.chunk(8), strict=True):
                x.copy_(product(q, x))
        else:
            X = product(Q, X)
        A = norm = None
    return X


def _schatten_norm(A: Tensor) -> Tensor:
    """1.01 ‖A‖_F^(1/2) for A = X Xᵀ: a bound on the singular values of X."""
    precise = torch.promote_types(A.dtype, torch.float32)
    norm = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True)
    return norm.to(precise).sqrt_().mul_(SAFETY)
