"""How much of the Hessian is in its diagonal blocks: across matrices, and across output rows.

Muon was first explained by a Hessian that is "low-rank and approximately blockwise diagonal" (Shen
et al., arXiv 2505.23737v1). This measures the second half of it, without the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.curvature.forms import of_parameters
from steepest.curvature.hessian_blocks import (
    Place,
    hessian_of_matrices,
    matrices,
    parameter_hessians,
    places,
)
from steepest.curvature.operators import Hessian
from steepest.linalg.krylov import gaussian
from steepest.linalg.probes import Estimate
from steepest.random_numbers import copied_generator
from steepest.results import Column, Result, ResultTable

_FEW = 8
"""Blocks with a product each; more share products, under random signs."""
_SIGNS = 4
"""Draws of signs for a probe: of 2 to 8, the least error for as many products."""
_PROBES = 8
"""At least; with 6 the error was off by more than 2.5 times itself in up to 10% of runs."""
_PATIENCE = 1.4
"""By which factor the number of probes grows between two looks at whether the error is small.

A look after every probe picks errors that are small by chance: up to 9% of runs, here up to 5%.
"""


@dataclass(frozen=True, repr=False)
class DiagonalShare(Result):
    """The share of diagonal blocks in the square of ‖H‖_F, as an estimate; `float()` gives it.

    Attributes:
        share: Σ_b ‖H_bb‖_F² / ‖H‖_F², with its standard error.
        even: the share of the entries of H that is in these blocks, hence what a Hessian without
            any such structure would have.
        blocks: how many there are.
    """

    share: Estimate
    even: float
    blocks: int

    def table(self) -> ResultTable:
        """Return the share, its standard error, and what no structure would have, as one row."""
        row = (self.share.value, self.share.error, self.even, self.blocks)
        columns = tuple(map(Column, ("share", "error", "even", "blocks")))
        return ResultTable(columns, (row,), "share of diagonal blocks in the Hessian")

    def __float__(self) -> float:
        return self.share.value


@dataclass(frozen=True, repr=False)
class BlockwiseDiagonal(Result):
    """How blockwise diagonal a Hessian is, as `blockwise_diagonal` returns it.

    Attributes:
        across_matrices: of the Hessian of all matrices, with a block for each of them.
        across_rows: of the Hessian of each matrix, by its name, with a block for each row, which is
            an output: as H = I ⊗ Λ of the theory has it.
    """

    across_matrices: DiagonalShare
    across_rows: dict[str, DiagonalShare]

    def table(self) -> ResultTable:
        """Return the share across matrices, and that across the rows of each matrix."""
        shares = {"matrices": self.across_matrices, **self.across_rows}
        tables = {name: share.table() for name, share in shares.items()}
        columns = (Column("blocks_of", "blocks of"), *self.across_matrices.table().columns)
        rows = tuple((name, *table.rows[0]) for name, table in tables.items())
        return ResultTable(columns, rows, "share of diagonal blocks in the Hessian")


@of_parameters(hessian_of_matrices, Hessian)
def blockwise_diagonal(
    H: Hessian,
    *,
    tolerance: float = 0.05,
    max_products: int = 100,
    generator: torch.Generator | None = None,
) -> BlockwiseDiagonal:
    """Return how much of the Hessian is in diagonal blocks, of matrices and of their output rows.

    Args:
        H: the Hessian of parameters that are all matrices, such as `H.block("*.weight")`. Or in
            its place `model, loss, batch, parameters` and settings, which make one; the parameters
            are then by default the matrices of `steepest.roles`.
        tolerance: standard error of each share to stop at.
        max_products: where each estimate stops in any case; at least 32, or 64 for
            eight blocks, which cost the most.
        generator: of the probes; by default a copy of torch's.

    Raises:
        ValueError: for what `Hessian` refuses, parameters that are no matrices, too few products,
            and a Hessian of zero.

    >>> model = torch.nn.Linear(3, 4, bias=False).double()
    >>> squares = lambda model, x: 0.5 * model(x).square().sum()  # H = I ⊗ x xᵀ: no row sees others
    >>> measured = blockwise_diagonal(Hessian(model, squares, torch.eye(3).double()))
    >>> measured.across_rows["weight"].even
    0.25
    >>> abs(measured.across_rows["weight"].share.value - 1) < 1e-9
    True
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"got tolerance={tolerance}, expected a standard error between 0 and 1")
    generator = generator or copied_generator()
    across = _share(H, places(H.model, H.rows), False, tolerance, max_products, generator)
    rows = {
        place.label: _share(part, [place], True, tolerance, max_products, generator)
        for part, members in parameter_hessians(H)
        for place in members
    }
    return BlockwiseDiagonal(across, rows)


def _share(
    H: Hessian,
    members: Sequence[Place],
    by_row: bool,
    tolerance: float,
    max_products: int,
    generator: torch.Generator | None,
) -> DiagonalShare:
    """The share of the blocks of these matrices, or of their rows, in the Hessian of them."""
    block = torch.full(H.shape[:1], -1, device=H.device)  # of each entry; none outside
    count = 0
    for W in matrices(H, block, members):
        W.copy_(count + torch.arange(len(W))[:, None] if by_row else torch.tensor(count))
        count += len(W) if by_row else 1
    sizes = torch.bincount(block[block >= 0]).double()
    even = (sizes.square().sum() / sizes.sum().square()).item()
    alone = count <= _FEW
    cost = count if alone else _SIGNS
    if max_products < _PROBES * cost:
        raise ValueError(
            f"got max_products={max_products}, expected {_PROBES * cost} or more: {_PROBES} probes "
            f"of {cost} products each"
        )
    samples: list[tuple[float, float]] = []
    value, error = math.nan, math.inf
    look = _PROBES
    while cost * (len(samples) + 1) <= max_products:
        z = gaussian(H.vector(), generator)
        samples.append(_alone(H, z, block) if alone else _together(H, z, block, generator))
        if len(samples) >= _PROBES:
            value, error = _ratio(samples)
        if len(samples) == look:
            if error <= tolerance:
                break
            look = math.ceil(_PATIENCE * look)
    estimate = Estimate(value, error, cost * len(samples), error <= tolerance)
    return DiagonalShare(estimate, even, count)


def _alone(H: Hessian, z: Tensor, block: Tensor) -> tuple[float, float]:
    """Σ_b ‖H_bb z_b‖² and Σ_b ‖H z_b‖² from a product for each block."""
    own = whole = 0.0
    for b in range(int(block.max()) + 1):
        image = H((block == b) * z)
        own += _square(image[block == b])
        whole += _square(image[block >= 0])
    return own, whole


def _together(
    H: Hessian, z: Tensor, block: Tensor, generator: torch.Generator | None
) -> tuple[float, float]:
    """The same on average, from a product for each draw of a sign for every block.

    In block b, S H S z = H_bb z_b + Σ_c s_b s_c H_bc z_c. Only the first part is the same in all
    draws, and the others are uncorrelated, so two images have the inner product Σ_b ‖H_bb z_b‖².
    """
    images = []
    for _ in range(_SIGNS):
        signs = 2 * torch.randint(2, (int(block.max()) + 1,), generator=generator) - 1
        S = torch.where(block >= 0, signs.to(z)[block], 0)
        images.append(S * H(S * z))
    squares = sum(_square(image) for image in images)
    pairs = _square(torch.stack(images).sum(0)) - squares
    return pairs / (_SIGNS * (_SIGNS - 1)), squares / _SIGNS


def _ratio(samples: list[tuple[float, float]]) -> tuple[float, float]:
    """The ratio of two means, and its standard error by the jackknife."""
    a, b = torch.tensor(samples, dtype=torch.float64).T
    if not b.any():
        raise ValueError("got a Hessian of zero, expected one with curvature")
    without = (a.sum() - a) / (b.sum() - b)
    k = len(a)
    few = (k - 1) / (k - 3)  # variance of Student's t
    error = (few * (k - 1) ** 2 / k * without.var()).sqrt()
    return (a.sum() / b.sum()).item(), error.item()


def _square(v: Tensor) -> float:
    return v.double().square().sum().item()
