"""Which method for the polar factor: a function of shape, dtype, device and tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

from steepest.linalg.newton_schulz import polynomials

PolarMethod = Literal[
    "svd",
    "jordan",
    "you",
    "polar-express",
    "cans",
    "tuned",
    "nonic",
    "zolotarev",
    "eigh",
    "qdwh",
    "auto",
]
DECOMPOSITIONS = ("svd", "zolotarev", "eigh", "qdwh")


@dataclass(frozen=True)
class PolarPlan:
    """How `polar` computes: what `polar_plan` returns.

    `steps` is the number of polynomials, or of terms for "zolotarev", else None. `dtype` is that of
    the computation. `form` is "plain", "gram" (polynomials collected in the small Gram matrix) or
    None. `error` is the relative Frobenius error to expect, see `polar_plan`; `reason` a sentence.
    """

    method: PolarMethod
    steps: int | None
    dtype: torch.dtype
    form: Literal["plain", "gram"] | None
    error: float
    reason: str

    def __str__(self) -> str:
        unit = "terms" if self.method == "zolotarev" else "steps"
        steps = "" if self.steps is None else f", {self.steps} {unit}"
        form = "" if self.form is None else f", {self.form} form"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.method}{steps}, {dtype}{form}: error {self.error:.1g}. {self.reason}."


def polar_plan(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tolerance: float | None = None,
) -> PolarPlan:
    """Return how `polar(G, "auto")` computes for G of this shape `(..., m, n)`, dtype and device.

    Without a tolerance: the fastest method found whose error is at most that of five steps of
    "jordan" in bfloat16, which is what `torch.optim.Muon` does, on Gaussian, power-law, ill-
    conditioned (1e4) and low-rank matrices and on momenta of a GPT. On a CPU, with errors (torch's
    in brackets) and the time over torch's, CPU time of one thread of an AMD Zen 4:

    | batch, m, n           | method                 | Gauss     | 1/i       | rank 8    | time |
    |-----------------------|------------------------|-----------|-----------|-----------|------|
    | 1, 768, 768           | "tuned", bfloat16      | .14 (.20) | .24 (.29) | .29 (.48) | 0.79 |
    | 96, 64, 64; to 128    | "nonic", bfloat16      | .13 (.21) | .12 (.18) | .12 (.41) | 0.14 |
    | 1, 3072, 768; any 3:2 | "zolotarev", 3 terms   | .08 (.16) | .08 (.29) | .09 (.48) | 0.47 |
    | 36, 64, 768; to 128   | "nonic", float32, Gram | .12 (.25) | .12 (.18) | .12 (.44) | 0.32 |
    | 48, 16, 768           | the same               | .12 (.27) | .14 (.20) | .12 (.33) | 0.11 |
    | 96, 8, 768            | "eigh"                 | 0 (.08)   | 0 (.23)   | 0 (.06)   | 0.09 |
    | 96, 1, 256            | "eigh"                 | 0 (.32)   | 0 (.32)   |           | 0.12 |

    "nonic" has fewer products than "tuned" and needs the singular values to be a little larger,
    which they are in small matrices: a 1/i spectrum of 768 goes below what it is made for.

    Where the CPU has no bfloat16 arithmetic the polynomials run in float32. On an accelerator
    always "tuned" in bfloat16: factorizations are slow there, and the Gram form needs float32.

    With a tolerance: the largest relative error ‖X - UVᵀ‖_F / ‖UVᵀ‖_F accepted for matrices all
    of whose singular values are at least 1e-3 of the Schatten-4 norm (Σσ⁴)^(1/4).

    Args:
        shape: `(..., m, n)`; the batch plays no part in the choice.
        dtype: of the input; it plays no part yet, half precision is computed in float32.
        device: of the input.
        tolerance: from 1e-9 to 1, or `None`.

    Returns:
        The plan. Its `error` is what to expect on Gaussian and 1/i spectra without a tolerance,
        and the bound promised with one.

    Raises:
        ValueError: for a shape without two positive last sizes, or a tolerance out of range.

    >>> print(polar_plan((48, 16, 768)))
    nonic, 3 steps, float32, gram form: error 0.2. All steps with the small Gram matrix.
    """
    if len(shape) < 2 or min(shape[-2:]) < 1:
        raise ValueError(f"got shape={tuple(shape)}, expected (..., m, n) with m and n positive")
    m, n = sorted(shape[-2:])
    on_cpu = torch.device(device).type == "cpu"
    if tolerance is not None:
        return _plan_for(tolerance, m, on_cpu)
    full = torch.float32
    if not on_cpu:
        why = "Products in half precision are what an accelerator does best"
        return PolarPlan("tuned", 5, torch.bfloat16, "plain", 0.25, why)
    if m == 1 or (m < 16 and n >= 2 * m):
        why = "Exact at the cost of two products, as the Gram matrix is small"
        return PolarPlan("eigh", None, full, None, 1e-3, why)
    if m <= 128 and n >= 2 * m:
        why = "All steps with the small Gram matrix"
        return PolarPlan("nonic", 3, full, "gram", 0.2, why)
    if n >= 1.5 * m:
        why = "Two products with the long side instead of two in every step"
        return PolarPlan("zolotarev", 3, full, None, 0.1, why)
    work, why = full, "Nearly square, and half precision would gain nothing"
    if m > 16 and has_bfloat16():
        work, why = torch.bfloat16, "Nearly square, so products in half precision are cheapest"
    if 32 <= m <= 128:
        return PolarPlan("nonic", 3, work, "plain", 0.2, why)
    return PolarPlan("tuned", 5, work, "plain", 0.25, why)


def _plan_for(tolerance: float, m: int, on_cpu: bool) -> PolarPlan:
    if not 1e-9 <= tolerance <= 1:
        raise ValueError(f"got tolerance={tolerance}, expected 1e-9 to 1, or None")
    if on_cpu and tolerance >= 0.04:
        terms, error = (3, 0.12) if tolerance >= 0.12 else (4, 0.04)
        why = "One Gram matrix and few Cholesky inverses reach this tolerance"
        return PolarPlan("zolotarev", terms, torch.float32, None, error, why)
    if not on_cpu and tolerance >= 1e-3:
        steps = next(k for k in range(1, 99) if _worst_error(m, k) < tolerance / 2)
        why = "Products alone reach this tolerance, in full precision"
        return PolarPlan("polar-express", steps, torch.float32, "plain", tolerance, why)
    precision, error = (torch.float32, 1e-3) if tolerance >= 1e-3 else (torch.float64, 1e-9)
    if m <= 1024:
        why = "Only a decomposition is this exact"
        return PolarPlan("svd", None, precision, None, error, why)
    why = "Only a decomposition is this exact, and this one is the fastest at this size"
    return PolarPlan("qdwh", None, precision, None, error, why)


@cache
def _worst_error(m: int, steps: int) -> float:
    """Of "polar-express" for singular values from 1e-3 of the Schatten-4 norm, which is at least
    m^(-1/4) of the Frobenius norm that it divides by."""
    low = torch.tensor(1e-3 * m**-0.25, dtype=torch.float64)
    x = torch.logspace(float(low.log10()), 0, 5000, dtype=torch.float64) / 1.01
    for a, b, c in polynomials("polar-express", steps):
        x = a * x + b * x**3 + c * x**5
    return float((x - 1).abs().max())


@cache
def has_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 arithmetic; without it those products are slow."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def form_of(
    method: str, shape: Sequence[int], dtype: torch.dtype
) -> Literal["plain", "gram"] | None:
    """How an explicit method runs: in Gram form where that saves work and loses no precision."""
    if method in DECOMPOSITIONS:
        return None
    m, n = sorted(shape[-2:])
    return "gram" if n >= 2 * m and dtype.itemsize >= 4 and method != "jordan" else "plain"


METHODS: tuple[PolarMethod, ...] = get_args(PolarMethod)
