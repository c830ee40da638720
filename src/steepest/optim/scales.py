"""How far an update goes for a learning rate of 1: the conventions, side by side."""

from __future__ import annotations

import math
from typing import Literal

Scale = Literal["spectral", "original", "match-rms-adamw", "none"]


def update_scale(scale: Scale, outputs: int, inputs: int) -> float:
    """Return the factor on the direction of an `(outputs, inputs)` matrix, for a rate of 1.

    A spectral direction of full rank has root-mean-square entry 1 / sqrt(max(outputs, inputs)) and
    spectral norm 1. With the factor, the update of a matrix with `out` outputs and `in` inputs has:

    | scale             | factor                 | spectral norm          | RMS entry         |
    |-------------------|------------------------|------------------------|-------------------|
    | "spectral"        | sqrt(out / in)         | sqrt(out / in)         | min(√in, √out)/in |
    | "original"        | sqrt(max(1, out / in)) | sqrt(max(1, out / in)) | 1/√in             |
    | "match-rms-adamw" | 0.2 sqrt(max(out, in)) | 0.2 sqrt(max(out, in)) | 0.2               |
    | "none"            | 1                      | 1                      | 1/√max(out, in)   |

    Sources: "spectral", Yang, Simon and Bernstein (arXiv 2310.17813): changes every layer's output
    by as much at any width; "original", K. Jordan's Muon; "match-rms-adamw", Moonlight (arXiv
    2502.16982): the entries move as far as AdamW's, so its learning rate can be used.

    >>> update_scale("spectral", 1024, 256), update_scale("match-rms-adamw", 100, 25)
    (2.0, 2.0)
    """
    if scale == "spectral":
        return math.sqrt(outputs / inputs)
    if scale == "original":
        return math.sqrt(max(1.0, outputs / inputs))
    if scale == "match-rms-adamw":
        return 0.2 * math.sqrt(max(outputs, inputs))
    if scale == "none":
        return 1.0
    raise ValueError(
        f'got scale={scale!r}, expected "spectral", "original", "match-rms-adamw" or "none"'
    )


def stacked_rank(m: int, n: int, K: int, mode: int) -> int:
    """Return the largest rank of K matrices `(m, n)` side by side, or below each other."""
    return min(m, K * n) if mode == 1 else min(K * m, n)


def adamw_ratio(scale: Scale) -> float:
    """Return the rate of an AdamW group over that of spectral updates, where none is given.

    The same for "match-rms-adamw", whose updates are as large as AdamW's; otherwise 0.15 times it.
    """
    return 1.0 if scale == "match-rms-adamw" else 0.15
