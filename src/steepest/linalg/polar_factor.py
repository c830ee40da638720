"""The polar factor U Vᵀ of a matrix G = U S Vᵀ: the steepest direction in the spectral norm."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from steepest.linalg.decompositions import by_eigh, by_qdwh, by_svd
from steepest.linalg.newton_schulz import by_polynomials, largest_entry, polynomials, scaled
from steepest.linalg.planner import (
    DECOMPOSITIONS,
    METHODS,
    PolarMethod,
    PolarPlan,
    form_of,
    polar_plan,
)
from steepest.linalg.products import fast_products
from steepest.linalg.zolotarev import by_zolotarev

__all__ = ["Nonfinite", "PolarMethod", "polar"]

Nonfinite = Literal["raise", "nan"]
_TINY = 32  # up to here oneDNN takes longer than MKL: three times as long for 16 x 16


@torch.no_grad()
def polar(
    G: Tensor,
    method: PolarMethod = "polar-express",
    steps: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    nonfinite: Nonfinite = "raise",
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Return the polar factor U Vᵀ of G = U S Vᵀ, over the nonzero singular values.

    | method          | largest error of a singular value          | cost in n³, for n x αn        |
    |-----------------|--------------------------------------------|-------------------------------|
    | "jordan"        | 0.32 on [0.01, 1] ‖G‖_F                    | 20 α + 10                     |
    | "you"           | 0.03 on [0.01, 1] ‖G‖_F                    | 20 α + 10, or 4 α + 34 (Gram) |
    | "polar-express" | 0.13 on [0.01, 1] ‖G‖_F; 8 steps: 5e-5     | the same, each step 4 α + 2   |
    | "cans"          | 0.14 on [1e-3, 1] ‖G‖_S4                   | the same                      |
    | "tuned"         | 0.25 on [2e-3, 1] ‖G‖_S4                   | 20 α + 6, or 4 α + 30 (Gram)  |
    | "nonic"         | 0.18 on [3e-3, 1] ‖G‖_S4                   | 12 α + 12, or 4 α + 24 (Gram) |
    | "zolotarev"     | 0.11 on [1e-3, 1] ‖G‖_S4; 4 terms: 0.034   | 4 α + 1 for each term         |
    | "eigh"          | rounding / σ², from σ = 1e-3 σ_max         | 4 α + 12                      |
    | "qdwh"          | rounding / σ, from σ = 1e-4 ‖G‖_S4         | (about 7 α + 5) each of 6     |
    | "svd"           | rounding / σ, from σ = max(m, n) 1e-7      | 4 α + 30                      |

    ‖G‖_S4 = (Σσ⁴)^(1/4); ranges of the exact ones are for float32, rounding is 1e-7 σ_max. Smaller
    singular values are damped, by "svd" dropped. A product of n x n matrices costs 2 n³;
    decompositions reach a fraction of its speed. "auto" is the choice of `polar_plan`.

    Args:
        G: matrices of shape `(..., m, n)`, real floating point, any layout. Modified only with
            `overwrite`.
        method: "polar-express" (default) or another of the table; sources are in
            `steepest.linalg.newton_schulz`, `zolotarev` and `decompositions`.
        steps: number of polynomials, 5 by default and 3 of "nonic", or of terms for "zolotarev", 3
            by default and at most 4 in float32; the other methods take none. Two terms are made for
            inner products with G: a singular value of x ‖G‖_S4 has an error of up to 0.035 / √x.
        dtype: precision of the computation. By default that of the plan for "auto", else that of G,
            and float32 for half precision. `torch.bfloat16` is two to four times faster for
            polynomials and has an error of about 1e-2 of its own; the other methods need float32
            or float64 (for "auto" a smaller dtype only applies to polynomials).
        nonfinite: what to do with a matrix that has a NaN or infinite entry: "raise" a
            `ValueError` (default; on an accelerator this waits for the device), or report it by
            returning that matrix full of "nan" and all others as they should be.
        tolerance: for "auto", the error that is accepted; see `polar_plan`.

        overwrite: whether the result may take the place of G, which saves memory in Gram form.

    Returns:
        A tensor of the shape, dtype and device of G. A zero matrix gives zeros. The result does
        not depend on the scale of G, from the smallest to the largest representable entries.
        For tall matrices it may be a transposed view.

        The null space of a low-rank G stays null up to noise of spectral norm 1e-6 ("svd"), 1e-3
        ("eigh", "zolotarev" and five polynomials) or 2e-2 ("qdwh") in float32. In bfloat16 the
        noise from rounding is damped by carrying rounding errors through the first two steps, of
        "nonic" the first (not for "jordan"): the relative error at rank 8 is 0.1 to 0.4, instead
        of up to 1.1.

        Extra memory is at most twice that of G in float32, the result included, and five Gram
        matrices.

    Raises:
        TypeError: if G is not a real floating-point tensor, or dtype not a floating-point type.
        ValueError: for fewer than two dimensions, unknown methods, steps or tolerances, precisions
            that a method has not, non-finite input.
        FloatingPointError: if no solver finds a decomposition of finite input, also in float64.

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
    if method not in METHODS:
        raise ValueError(
            f"got method={method!r}, expected one of " + ", ".join(f'"{name}"' for name in METHODS)
        )
    plan = _plan(G, method, steps, dtype, tolerance)
    if G.numel() == 0:
        return G.clone()

    matrices = G.reshape(-1, *G.shape[-2:])
    if nonfinite == "raise":
        _refuse(matrices)
    faster = G.is_cpu and plan.dtype == torch.float32 and min(G.shape[-2:]) > _TINY
    switch = fast_products() if faster else nullcontext()
    with torch.autocast(G.device.type, enabled=False), switch:
        return _polar(matrices, plan, overwrite).to(G.dtype).reshape(G.shape)


def _refuse(matrices: Tensor) -> None:
    broken = ~largest_entry(matrices).isfinite()
    if bool(broken.any()):
        raise ValueError(
            f"got {int(broken.sum())} of {broken.numel()} matrices with NaN or infinite entries, "
            'expected finite ones; look for the cause upstream, or pass nonfinite="nan"'
        )


def _polar(X: Tensor, plan: PolarPlan, overwrite: bool) -> Tensor:
    """The polar factors of X, (batch, m, n)."""
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # X Xᵀ should be the smaller of the two Gram matrices
    if plan.method not in DECOMPOSITIONS:
        schedule = polynomials(plan.method, plan.steps)
        gram = plan.form == "gram"
        Q = by_polynomials(X, plan.method, schedule, plan.dtype, gram, overwrite)
        return Q.mT if tall else Q
    X = scaled(X).to(plan.dtype)
    broken = X[:, :1, :1].isnan()  # the whole matrix is; factorizations raise for any NaN
    some = bool(broken.any())
    X = X.masked_fill_(broken, 0.0) if some else X
    if plan.method == "zolotarev":
        Q = by_zolotarev(X, plan.steps or 3)
    else:
        Q = {"svd": by_svd, "eigh": by_eigh, "qdwh": by_qdwh}[plan.method](X)
    Q = Q.masked_fill_(broken, torch.nan) if some else Q
    return Q.mT if tall else Q


def _plan(
    G: Tensor,
    method: PolarMethod,
    steps: int | None,
    dtype: torch.dtype | None,
    tolerance: float | None,
) -> PolarPlan:
    """The plan that the arguments of `polar` ask for."""
    if steps is not None and steps < 1:
        raise ValueError(f"got steps={steps}, expected at least 1")
    if method == "auto":
        if steps is not None:
            raise ValueError(f'got steps={steps}, but "auto" chooses them; name a method')
        if G.numel() == 0:
            return PolarPlan("svd", None, torch.float32, None, 0.0, "Nothing to do")
        plan = polar_plan(G.shape, G.dtype, G.device, tolerance)
        if dtype is None:
            return plan
        exact = plan.method in DECOMPOSITIONS
        work = torch.promote_types(dtype, torch.float32) if exact else dtype
        form = plan.form if work.itemsize >= plan.dtype.itemsize else "plain"
        return PolarPlan(plan.method, plan.steps, work, form, plan.error, plan.reason)
    if tolerance is not None:
        raise ValueError(f'got tolerance={tolerance} for "{method}", expected method="auto"')
    work = dtype or (torch.float32 if G.dtype.itemsize < 4 else G.dtype)
    if method in DECOMPOSITIONS:
        if work.itemsize < 4:
            raise ValueError(
                f'got dtype={work}, but "{method}" needs torch.float32 or torch.float64'
            )
        most = 4 if work == torch.float32 else 6
        if method == "zolotarev" and steps is not None and steps > most:
            raise ValueError(f"got steps={steps}, expected 1 to {most} terms in {work}")
        if method != "zolotarev" and steps is not None:
            raise ValueError(f'got steps={steps}, but "{method}" is exact and takes no steps')
    else:
        polynomials(method, steps)  # complains
    return PolarPlan(method, steps, work, form_of(method, G.shape, work), torch.nan, "As asked")


def _check(G: Tensor, dtype: torch.dtype | None) -> None:
    if not G.is_floating_point():
        raise TypeError(f"got a tensor of {G.dtype}, expected a real floating-point type")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"got dtype={dtype}, expected a real floating-point type")
    if G.ndim < 2:
        raise ValueError(f"got a tensor of shape {tuple(G.shape)}, expected (..., m, n)")
