"""The largest curvature over the steps of norm 1, in the norm that each matrix descends in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steepest.curvature.jacobian import split
from steepest.geometry import Geometry, Sign, Spectral
from steepest.linalg.krylov import Operator
from steepest.model.matrix_view import MatrixView
from steepest.optim.scales import update_scale


class Part(NamedTuple):
    """A parameter in a norm ball: s for each of its matrices, and the norm that they have."""

    like: Tensor
    view: MatrixView | None  # None for one row of all entries
    geometry: Geometry
    s: Sequence[float]

    def matrices(self, X: Tensor) -> list[Tensor]:
        """Return the matrices of a contiguous tensor; writing to them writes to it."""
        return [X.view(1, -1)] if self.view is None else self.view.matrices(X)


class NormBall:
    """The ball Σ ‖D_b‖² / s_b <= 1 of vectors `(n,)`, over the matrices b that they consist of.

    A step as long as the dual norm of the gradient goes along that D of it which has the largest
    inner product with the gradient: D_b = t_b polar(G_b), t_b proportional to s_b ‖G_b‖_*.

    >>> ball = NormBall([Part(torch.zeros(2, 2), None, Sign(), [1.0])])
    >>> D = ball.furthest(torch.tensor([3.0, 0.0, -2.0, 1.0]))
    >>> D, ball.norm(D)
    (tensor([ 1.,  0., -1.,  1.]), 1.0)
    """

    def __init__(self, parts: Sequence[Part]):
        self._parts = parts

    @classmethod
    def of_groups(cls, groups: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> NormBall:
        """Return the ball of an optimizer's groups, s the square of a scale times a share."""
        parts = []
        for group, share in zip(groups, shares, strict=True):
            geometry: Geometry = Sign() if group["geometry"] == "sign" else Spectral("svd")
            for p, view in zip(group["params"], group["views"], strict=True):
                if p.requires_grad:
                    view = None if view is None else MatrixView(*view)
                    sizes = [(1, 1)] if view is None else view.sizes()
                    s = [share * update_scale(group["scale"], *size) ** 2 for size in sizes]
                    parts.append(Part(p, view, geometry, s))
        return cls(parts)

    def norm(self, D: Tensor) -> float:
        """Return the norm of D: (Σ ‖D_b‖² / s_b)^1/2."""
        squares = (g.norm(X).item() ** 2 / s for X, g, s in self._matrices(D) if s)
        return sum(squares) ** 0.5

    def furthest(self, M: Tensor) -> Tensor:
        """Return the D of norm 1 with the largest ⟨M, D⟩; zero if M is."""
        D = M.clone()
        total = 0.0
        for X, geometry, s in self._matrices(D):
            direction = geometry.direction(X)
            dual = torch.sum(X * direction).item()
            X.copy_(s * dual * direction)
            total += s * dual**2
        return D / total**0.5 if total else D

    def _matrices(self, v: Tensor) -> Iterator[tuple[Tensor, Geometry, float]]:
        pieces = split(v, [part.like for part in self._parts])
        for part, piece in zip(self._parts, pieces, strict=True):
            for X, s in zip(part.matrices(piece), part.s, strict=True):
                yield X, part.geometry, s


def largest_curvature(
    H: Operator,
    ball: NormBall,
    starts: Sequence[Tensor],
    tolerance: float = 1e-3,
    max_products: int = 100,
) -> tuple[float, Tensor]:
    """Return a lower bound of the largest ⟨D, H D⟩ over a ball, and its D.

    Ascent by Frank and Wolfe: towards the D' of the ball with the largest ⟨H D, D'⟩, as far as it
    is best, which is all the way where the curvature along D' - D is positive. The value never
    falls, and where it ends depends on the start, hence several. It is at least 0, for D = 0.

    Args:
        H: the symmetric map of `(n,)`.
        ball: of steps.
        starts: gradients `(n,)`, from whose steps the ascents begin.
        tolerance: an ascent ends when a product raises its value by less than this, relatively.
        max_products: of each ascent.
    """
    best, where = 0.0, torch.zeros_like(starts[0])
    for start in starts:
        D = ball.furthest(start)
        HD = H(D)
        value = torch.dot(D, HD).item()
        for _ in range(max_products - 1):
            ahead = ball.furthest(HD)
            H_ahead = H(ahead)
            slope = torch.dot(ahead - D, HD).item()
            bend = torch.dot(ahead - D, H_ahead - HD).item()
            if slope <= 0:  # at the end, but for rounding
                break
            far = min(1.0, slope / -bend) if bend < 0 else 1.0
            D, HD = D + far * (ahead - D), HD + far * (H_ahead - HD)
            before, value = value, torch.dot(D, HD).item()
            if far < 1 and value > 0:  # inside the ball
                norm = ball.norm(D)
                D, HD, value = D / norm, HD / norm, value / norm**2
            if value - before <= tolerance * abs(value):
                break
        if value > best:
            best, where = value, D
    return best, where
