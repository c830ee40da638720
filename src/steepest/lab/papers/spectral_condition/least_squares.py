"""Least squares in one matrix: the loss, its two curvatures, and the two steps that they ask for.

The loss is ‖W A - Y‖² / (2 n) with W (m, k), features A (k, n) and targets Y (m, n). Its curvature
along U is ‖U A‖² / n. That is at most ‖A‖_op² / n times ‖U‖_F², and at most ‖A‖_F² / n times
‖U‖_op² (eq. 1.4). GD and SpecGD take the best step of the one bound and of the other, so nothing is
tuned. The ratio of the two bounds is the stable rank of A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.linalg import polar

DTYPE = torch.float64

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "relu": F.relu,
    "leaky-relu": lambda Z: F.leaky_relu(Z, 0.1),
    "relu-squared": lambda Z: F.relu(Z).square(),
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
GATED = "swiglu"
"""SiLU of one matrix times another one; the only activation with two matrices."""


@dataclass(frozen=True)
class LeastSquares:
    """Features A (k, n) and targets Y (m, n)."""

    A: Tensor
    Y: Tensor

    def loss(self, W: Tensor) -> float:
        """The loss at W (m, k)."""
        return float((W @ self.A - self.Y).square().sum() / (2 * self.A.shape[1]))

    def gradient(self, W: Tensor) -> Tensor:
        """The gradient at W, from the residual: other forms lose digits where the loss is small."""
        return (W @ self.A - self.Y) @ self.A.T / self.A.shape[1]

    def curvature(self, U: Tensor) -> float:
        """The curvature along U (m, k)."""
        return float((U @ self.A).square().sum() / self.A.shape[1])

    @property
    def frobenius_curvature(self) -> float:
        """The largest curvature over ‖U‖_F = 1."""
        return float(torch.linalg.matrix_norm(self.A, 2) ** 2 / self.A.shape[1])

    @property
    def spectral_curvature(self) -> float:
        """The bound on the curvature over ‖U‖_op = 1."""
        return float(self.A.square().sum() / self.A.shape[1])


def gd_step(G: Tensor, curvature: float) -> Tensor:
    """The step of GD: the gradient over the curvature in the Frobenius norm."""
    return -G / curvature


def spectral_step(G: Tensor, curvature: float) -> Tensor:
    """The step of SpecGD: ‖G‖_* over the curvature in the spectral norm, along the polar factor."""
    return -torch.linalg.matrix_norm(G, "nuc") / curvature * polar(G, "svd")


def features(activation: str, width: int, inputs: int, samples: int) -> Tensor:
    """Return features (width, samples) of Gaussian inputs, scaled as in the paper's code.

    Args:
        activation: one of `ACTIVATIONS`, or `GATED`.
        width: number of features.
        inputs: number of coordinates of an input.
        samples: number of inputs.
    """
    X = torch.randn(inputs, samples, dtype=DTYPE)
    V, gate = torch.randn(2, width, inputs, dtype=DTYPE) / math.sqrt(inputs)
    if activation == GATED:
        return F.silu(V @ X) * (gate @ X)
    return ACTIVATIONS[activation](V @ X)


def with_teacher(A: Tensor) -> LeastSquares:
    """Return the problem whose targets a Gaussian matrix makes from the features."""
    width = len(A)
    return LeastSquares(A, torch.randn(width, width, dtype=A.dtype) / math.sqrt(width) @ A)
