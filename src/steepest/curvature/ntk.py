"""The neural tangent kernel: its spectrum, and how far it has moved since."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.curvature.forms import of_parameters
from steepest.curvature.operators import NTK
from steepest.linalg.krylov import Eigenpairs, eigenpairs, gaussian
from steepest.linalg.probes import Estimate, trace
from steepest.linalg.solvers import eigh
from steepest.random_numbers import copied_generator
from steepest.results import Column, Result, ResultTable

_DENSE_ROWS, _DENSE_ENTRIES = 64, 2**28
"""A kernel is formed up to here: so many gradients cost what the products of a search do, and the
Jacobian takes at most a gigabyte in float32."""


@dataclass(frozen=True, repr=False)
class NTKSpectrum(Result):
    """The largest eigenvalues of Θ and its trace, as `ntk_spectrum` returns them.

    Attributes:
        largest: eigenvalues in descending order, with errors and eigenvectors `(size, count)`.
        trace: the sum of all, with its standard error; 0 where the kernel was formed.
        size: number of outputs of all examples.
    """

    largest: Eigenpairs
    trace: Estimate
    size: int

    def table(self) -> ResultTable:
        """Return the largest eigenvalues and the trace as rows."""
        ends = zip(self.largest.values.tolist(), self.largest.errors.tolist(), strict=True)
        rows = [(f"eigenvalue {i}", *end) for i, end in enumerate(ends, start=1)]
        rows.append(("trace", self.trace.value, self.trace.error))
        columns = (Column("quantity"), Column("value"), Column("error", "± error", ".2g"))
        return ResultTable(columns, tuple(rows), f"tangent kernel of {self.size:,} outputs")

    @property
    def effective_rank(self) -> float:
        """Trace over the largest eigenvalue: how many directions of the outputs learn as fast."""
        top = self.largest.values[0].item()
        if top <= 0:
            raise ValueError("got a kernel of zero, expected outputs that depend on parameters")
        return self.trace.value / top


@of_parameters(NTK, NTK)
def ntk_spectrum(
    kernel: NTK,
    *,
    count: int = 5,
    tolerance: float = 1e-3,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
) -> NTKSpectrum:
    """Return the largest eigenvalues of the neural tangent kernel Θ = J Jᵀ, and its trace.

    They are those of Θ itself, as `NTK` has it, and grow with the number of examples. Divided by
    that number P they are the nonzero eigenvalues of the Gauss-Newton matrix for the mean over
    examples of ½ ‖f - y‖² (for the mean over C outputs as well, divided by P C, and doubled without
    the ½); then 2 / λ_max bounds the stable learning rates of gradient descent.

    Up to 64 outputs the kernel is formed, and everything is exact but for rounding. Beyond,
    eigenvalues come from the Lanczos process and the trace from probes, each product at the cost of
    about three gradients.

    Args:
        kernel: Θ. Or in its place `model, loss, batch, parameters` and settings, which make one; of
            the loss only the call of the model matters.
        count: how many eigenvalues; all where there are fewer.
        tolerance: relative error of each eigenvalue. That of the trace is 0.05.
        max_products: where both stop in any case; by default as `eigenpairs`.
        generator: of start and probes; by default a copy of torch's.

    Raises:
        ValueError: for what `NTK` refuses, and counts below 1.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> kernel = NTK(model, lambda model, x: model(x).mean(), x)
    >>> spectrum = ntk_spectrum(kernel)
    >>> spectrum.largest.values.tolist(), spectrum.trace.value
    ([9.0, 1.0], 10.0)
    """
    if count < 1:
        raise ValueError(f"got count={count}, expected 1 or more eigenvalues")
    generator = generator or copied_generator()
    size = kernel.shape[0]
    count = min(count, size)
    entries = size * sum(p.numel() for p in kernel.parameters.values())
    if size <= _DENSE_ROWS and entries <= _DENSE_ENTRIES:
        K = kernel.to_dense()
        values, vectors = eigh(K.double())
        rounding = size * torch.finfo(K.dtype).eps * values.abs().max()
        largest = Eigenpairs(
            values.flip(0)[:count].cpu(),
            torch.full((count,), rounding.item(), dtype=torch.float64),
            vectors.flip(1)[:, :count].to(K),
            size,
            True,
        )
        return NTKSpectrum(largest, Estimate(values.sum().item(), 0.0, size, True), size)
    like = kernel.vector()
    start = gaussian(like, generator)
    limit = None if max_products is None else min(max_products, size)
    largest = eigenpairs(kernel, start, count, "largest", tolerance, limit, generator)
    total = trace(kernel, like, max_products=max_products or 200, generator=generator)
    return NTKSpectrum(largest, total, size)


@dataclass(frozen=True, repr=False)
class NTKDrift(Result):
    """How far a kernel Θ_t is from Θ_0, as `ntk_drift` returns it.

    Attributes:
        distance: ‖Θ_t - Θ_0‖_F / ‖Θ_0‖_F; 0 for a network that trains as a linear model.
        alignment: ⟨Θ_t, Θ_0⟩ / (‖Θ_t‖_F ‖Θ_0‖_F), at most 1; it does not see the scale.
        scale: ‖Θ_t‖_F / ‖Θ_0‖_F.
        size: rows of the kernels.
    """

    distance: float
    alignment: float
    scale: float
    size: int

    def table(self) -> ResultTable:
        """Return its numbers as one row."""
        names = ("distance", "alignment", "scale", "size")
        return ResultTable.of([self], names, "drift of the tangent kernel")


def ntk_drift(reference: NTK | Tensor, current: NTK | Tensor) -> NTKDrift:
    """Return how far a kernel has moved from an earlier one of the same examples.

    An `NTK` keeps the weights of its time, so that one made before training serves as reference.
    Both kernels are formed, from Jacobians that have to fit into memory: see `NTK.to_dense`, which
    also takes a choice of rows. For repeated calls, form the reference once.

    Of the lazy regime distance falls as width^(-1/2); under muP it is of order 1 at every width
    (Noci et al., arXiv 2402.17457). Alignment is that of Fort et al. (2020, arXiv 2010.15110).

    Args:
        reference: Θ_0, an `NTK` or the matrix `(r, r)`.
        current: Θ_t, the same of the weights of now.

    Raises:
        ValueError: for kernels of different shapes, or of zero.
        FloatingPointError: for kernels with NaN or infinite entries.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> loss = lambda model, x: model(x).square().mean()
    >>> before = NTK(model, loss, torch.eye(2))
    >>> _ = torch.nn.init.zeros_(model.weight)  # linear in its weights: the kernel stays
    >>> ntk_drift(before, NTK(model, loss, torch.eye(2))).distance
    0.0
    """
    first = _matrix(reference)
    now = _matrix(current).to(first.device)
    if first.shape != now.shape:
        raise ValueError(
            f"got kernels of shapes {tuple(first.shape)} and {tuple(now.shape)}, expected those of "
            "the same examples"
        )
    norms = first.norm().item(), now.norm().item()
    if not min(norms):
        raise ValueError("got a kernel of zero, expected outputs that depend on the parameters")
    return NTKDrift(
        distance=(now - first).norm().item() / norms[0],
        alignment=(now * first).sum().item() / (norms[0] * norms[1]),
        scale=norms[1] / norms[0],
        size=len(first),
    )


def label_alignment(kernel: NTK | Tensor, targets: Tensor) -> float:
    """Return how well a kernel fits targets: yᵀ Θ y / (‖Θ‖_F ‖y‖²), in [0, 1].

    That is the alignment of Θ with y yᵀ (Cristianini et al., "On kernel-target alignment", 2001),
    which grows as features are learned; 1 / sqrt(r) for a kernel that is the identity.

    Args:
        kernel: an `NTK` or its matrix `(r, r)`.
        targets: r entries in the order of the outputs, such as `(examples, outputs)`; one-hot for
            classes. Take off the mean to ignore what a constant explains.

    Raises:
        ValueError: for another number of targets, and kernels or targets of zero.
        FloatingPointError: for kernels with NaN or infinite entries.

    >>> y = torch.tensor([[1.0], [-1.0]])
    >>> label_alignment(y @ y.T, y), round(label_alignment(torch.eye(2), y), 4)
    (1.0, 0.7071)
    """
    K = _matrix(kernel)
    y = targets.detach().to(K).flatten()
    if len(y) != len(K):
        raise ValueError(
            f"got targets of shape {tuple(targets.shape)} for {len(K)} outputs, expected one for "
            "each; one-hot for classes"
        )
    scale = K.norm().item() * y.square().sum().item()
    if not scale:
        raise ValueError("got a kernel or targets of zero, expected others")
    return (y @ K @ y).item() / scale


def _matrix(kernel: NTK | Tensor) -> Tensor:
    K = kernel.to_dense() if isinstance(kernel, NTK) else kernel
    if K.ndim != 2 or K.shape[0] != K.shape[1]:
        raise ValueError(f"got a kernel of shape {tuple(K.shape)}, expected a square matrix")
    if not K.isfinite().all():
        raise FloatingPointError("got a kernel with NaN or infinite entries, expected finite ones")
    return K.double()
