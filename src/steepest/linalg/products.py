"""Matrix products at the speed the processor has.

PyTorch hands float32 products on a CPU to MKL, which on processors of other makers than its own
takes a slow path. oneDNN, which is part of PyTorch too, can be two times faster there at the same
precision. The only public switch to it is `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`:
"bfloat16 is precise enough". On a processor with bfloat16 matrix units oneDNN then really rounds to
bfloat16; on all others it still computes in float32. So the error is measured, once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_settings: Any = getattr(torch.backends.mkldnn, "matmul", None)

# Blocks of a symmetric product are cut until they have at most this many rows; smaller products
# take no less time for being cut.
_LEAF, _WORTH_CUTTING = 200, 448

# How often `fast_products` is entered, over all threads, and the setting before the first time.
_lock = threading.Lock()
_depth = 0
_before = "none"


@contextmanager
def fast_products() -> Iterator[None]:
    """Compute float32 products on the CPU through oneDNN where that is as exact.

    Inside, `A @ B` and its relatives in float32 on the CPU are faster on some processors (about
    2.2 times on an AMD Zen 5), and the same on others; other dtypes and devices never change.
    Results differ by rounding from those outside, relative error 1e-6 or less as before. The first
    use takes a few milliseconds to decide (see `oneDNN_is_exact`); the decision lasts for the
    life of the process.

    The switch is one of the process, so while any thread is inside, products of other threads go
    the same way, with the same precision; the setting from before is back once the last thread has
    left, also after an exception. Code that `torch.compile` traces is left alone: there the context
    does nothing, and compiled code run inside an eager context follows it.

    >>> A = torch.eye(3)
    >>> with fast_products():
    ...     print(A @ A)
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    global _depth, _before
    if torch.compiler.is_compiling() or not oneDNN_is_exact():
        yield
        return
    with _lock:
        if _depth == 0:
            _before = _settings.fp32_precision
            _settings.fp32_precision = "bf16"
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _settings.fp32_precision = _before


def product(
    A: Tensor, B: Tensor, C: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return A B, or beta C + alpha A B, for matrices or batches `(batch, ...)` of equal length.

    Without the detours of `A @ B` for small matrices and for batches of one.

    >>> product(torch.eye(2)[None], torch.ones(1, 2, 3)).shape
    torch.Size([1, 2, 3])
    """
    if len(A) == A.ndim - 2 == 1:
        return product(A[0], B[0], None if C is None else C[0], beta, alpha).unsqueeze(0)
    if C is None:
        return torch.mm(A, B) if A.ndim == 2 else torch.bmm(A, B)
    add = torch.addmm if A.ndim == 2 else torch.baddbmm
    return add(C, A, B, beta=beta, alpha=alpha)


def symmetric_product(
    A: Tensor, B: Tensor, C: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return what `product` does, known to be symmetric, as A Aᵀ is.

    Large ones on a CPU by halves: the diagonal blocks in the same way, and only one of the other
    two. That is 0.7 of the time at 768 rows, and 0.6 at thousands; batches are taken one by one. On
    other devices it is the usual product.

    Args:
        A, B: `(n, k)` and `(k, n)`, or batches of them.
        C: symmetric, `(n, n)`.

    >>> A = torch.randn(500, 300, dtype=torch.float64)
    >>> torch.allclose(symmetric_product(A, A.mT), A @ A.mT)
    True
    """
    if len(A) == A.ndim - 2 == 1:
        whole = None if C is None else C[0]
        return symmetric_product(A[0], B[0], whole, beta, alpha).unsqueeze(0)
    if A.shape[-2] < _WORTH_CUTTING or not A.is_cpu:
        return product(A, B, C, beta, alpha)
    if A.ndim > 2:
        triples = zip(A, B, [None] * len(A) if C is None else C, strict=True)
        return torch.stack([symmetric_product(*one, beta, alpha) for one in triples])
    out = A.new_empty(len(A), len(A))
    _fill(out, A, B, C, beta, alpha)
    return out


def _fill(out: Tensor, A: Tensor, B: Tensor, C: Tensor | None, beta: float, alpha: float) -> None:
    n, half = len(A), len(A) // 2
    if n <= _LEAF:
        out.copy_(product(A, B, C, beta, alpha))
        return
    upper, lower = slice(half), slice(half, n)
    for part in (upper, lower):
        block = None if C is None else C[part, part]
        _fill(out[part, part], A[part], B[:, part], block, beta, alpha)
    block = None if C is None else C[upper, lower]
    other = product(A[upper], B[:, lower], block, beta, alpha)
    out[upper, lower] = other
    out[lower, upper] = other.mT


@cache
def oneDNN_is_exact() -> bool:
    """Return whether oneDNN computes float32 products in float32 when it need not.

    Decided by the error of one 256 x 256 product, not by its time, so that the answer and hence
    every bit of a result is the same in every process on a machine.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(_settings, "fp32_precision"):
        return False
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 256, 256, generator=generator, dtype=torch.float32, device="cpu")
    exact = A.double() @ B.double()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        before = _settings.fp32_precision
        try:
            _settings.fp32_precision = "bf16"
            C = A @ B
        finally:
            _settings.fp32_precision = before
    error = torch.linalg.matrix_norm(C - exact) / torch.linalg.matrix_norm(exact)
    return bool(error < 2e-6)
