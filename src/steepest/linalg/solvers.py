"""Decompositions by torch, each checked, since solvers can return NaN without an error.

`torch.linalg.eigh` does so in float32 for a Gram matrix of rows of very different sizes. What fails
its check, or raises, is decomposed again in float64 on the CPU, only those matrices of a batch.
After that follows another algorithm where there is one, and then a `FloatingPointError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steepest.linalg.autocast import without_autocast

Parts = tuple[Tensor, ...]
Solver = Callable[[Tensor], Any]
Agree = Callable[..., Tensor | list[bool]]


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of symmetric matrices `(..., n, n)`.

    Only the lower triangle counts, as for torch.

    >>> values, Q = eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> [round(value, 4) for value in values.tolist()]
    [1.0, 3.0]
    """
    solvers = (torch.linalg.eigh, _eigh_by_svd)
    values, Q = solution("eigenvectors", solvers, _are_eigenvectors, A)
    return values, Q


def eigvalsh(A: Tensor) -> Tensor:
    """Return the eigenvalues, ascending, of symmetric matrices `(..., n, n)`, as `eigh` does."""

    def solve(A: Tensor) -> Parts:
        return (torch.linalg.eigvalsh(A),)

    (values,) = solution("eigenvalues", (solve,), _have_the_norm, _symmetric(A))
    return values


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and Vᵀ of matrices `(..., m, n)`, without the vectors of their null space.

    >>> svd(torch.diag(torch.tensor([1.0, 2.0])))[1]
    tensor([2., 1.])
    """

    def solve(A: Tensor) -> Parts:
        return torch.linalg.svd(A, full_matrices=False)

    U, S, Vh = solution("singular vectors", (solve,), _are_singular_vectors, A)
    return U, S, Vh


def svdvals(A: Tensor) -> Tensor:
    """Return the singular values, descending, of matrices `(..., m, n)`."""

    def solve(A: Tensor) -> Parts:
        return (torch.linalg.svdvals(A),)

    (values,) = solution("singular values", (solve,), _have_the_norm, A)
    return values


def qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q `(..., m, k)` with orthonormal columns and R `(..., k, n)`, k = min(m, n)."""
    Q, R = solution("QR factors", (torch.linalg.qr,), _are_qr_factors, A)
    return Q, R


@without_autocast
def solution(name: str, solvers: tuple[Solver, ...], agree: Agree, A: Tensor) -> tuple[Tensor, ...]:
    """Return what the first solver makes of matrices A `(..., m, n)`, if its parts agree with A.

    Args:
        name: what is looked for, in the error.
        solvers: from matrices to a tuple of parts. Where the first fails, all are tried in float64.
        agree: from matrices and parts to whether they belong together, `(...)` or a list.

    Raises:
        FloatingPointError: if no result agrees, as for matrices that are not finite.
    """
    parts = _attempt(solvers[0], A)
    if parts is None:
        wrong = torch.ones(A.shape[:-2], dtype=torch.bool, device=A.device)
    else:
        good = agree(A, *parts)
        if all(good) if isinstance(good, list) else bool(good.all()):
            return parts
        wrong = ~torch.as_tensor(good, device=A.device).reshape(A.shape[:-2])
    for solver in solvers:
        better = _attempt(solver, A[wrong].to("cpu", torch.float64))
        if better is None:
            continue
        if parts is None:
            parts = tuple(A.new_empty(*A.shape[:-2], *part.shape[1:]) for part in better)
        good = torch.as_tensor(agree(A[wrong].to("cpu", torch.float64), *better), device=A.device)
        solved = wrong.masked_scatter(wrong, good)
        for part, new in zip(parts, better, strict=True):
            part[solved] = new.to(part)[good]
        wrong = wrong & ~solved
        if not bool(wrong.any()):
            return parts
    raise FloatingPointError(
        f"got no {name} for {int(wrong.sum())} of {wrong.numel()} matrices, in "
        f"{str(A.dtype).removeprefix('torch.')} or in float64; the largest entry is "
        f"{float(A[wrong].abs().max()):g}. Expected finite entries; look for NaN or overflow in "
        "what the matrices are made of"
    )


def _attempt(solver: Solver, A: Tensor) -> Parts | None:
    """What the solver returns, or None where it raises."""
    try:
        return tuple(solver(A))
    except torch.OutOfMemoryError:  # another attempt would need more
        raise
    except RuntimeError:  # of LAPACK, MAGMA, cuSOLVER, or of a device without this solver
        return None


def _symmetric(A: Tensor) -> Tensor:
    return A.tril() + A.tril(-1).mT


def _eigh_by_svd(A: Tensor) -> Parts:
    """By the singular vectors of A + ‖A‖ I, which has no negative eigenvalue."""
    A = _symmetric(A)
    shift = torch.linalg.matrix_norm(A)[..., None]
    U, S, _ = torch.linalg.svd(A + torch.diag_embed(shift.expand(A.shape[:-1])))
    return (S - shift).flip(-1), U.flip(-1)


def _are_eigenvectors(A: Tensor, values: Tensor, Q: Tensor) -> Tensor:
    if A.dtype == torch.float64:  # in which a product of float32 is not symmetric to rounding
        A = _symmetric(A)
    z = _probe(A)
    coordinates = Q.mT @ z
    image = Q @ (values.unsqueeze(-1) * coordinates)
    return _is_rounding(image - A @ z, values) & _is_rounding(Q @ coordinates - z)


def _are_singular_vectors(A: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    z = _probe(A)
    image = U @ (S.unsqueeze(-1) * (Vh @ z))
    return _is_rounding(image - A @ z, S) & _is_orthonormal(U) & _is_orthonormal(Vh.mT)


def _are_qr_factors(A: Tensor, Q: Tensor, R: Tensor) -> Tensor:
    z = _probe(A)
    return _is_rounding(Q @ (R @ z) - A @ z, R.flatten(-2)) & _is_orthonormal(Q)


def _is_orthonormal(Q: Tensor) -> Tensor:
    z = _probe(Q)
    return _is_rounding((Q.mT @ (Q @ z) - z) / 10)  # vectors of a null space are ten times worse


def _have_the_norm(A: Tensor, values: Tensor) -> Tensor:
    """Whether the squares of all eigenvalues or singular values add up to those of the entries."""
    size = _largest(values)
    rows = torch.linalg.vector_norm(A / size[..., None, None], dim=-1)  # one sum would round more
    expected = torch.linalg.vector_norm(rows, dim=-1)
    norm = torch.linalg.vector_norm(values / size[..., None], dim=-1)
    return (norm - expected).abs() <= 3 * _tolerance(A) * expected


def _is_rounding(error: Tensor, values: Tensor | None = None) -> Tensor:
    """Whether an error `(..., n, 4)` is rounding of the largest of the values, by default of 1."""
    if values is not None:
        error = error / _largest(values)[..., None, None]
    return torch.linalg.matrix_norm(error) <= _tolerance(error)


def _largest(values: Tensor) -> Tensor:
    largest = values.abs().amax(-1)
    return torch.where(largest == 0, 1.0, largest)


def _tolerance(A: Tensor) -> float:
    return float(30 * max(A.shape[-2:]) ** 0.5 * torch.finfo(A.dtype).eps)


def _probe(A: Tensor) -> Tensor:
    """Four random vectors of length about 1, `(n, 4)`, for matrices `(..., m, n)`."""
    n = A.shape[-1]
    z = torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z.to(A) / n**0.5
