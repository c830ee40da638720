"""What batches say of each matrix: gains between batches, curvature along directions, soft ranks.

A direction comes from one batch and its gain from another: the noise of a gradient raises its
nuclear rank, which on its own batch looks like an advantage of spectral steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from steepest.curvature.loss_function import LossFunction, chosen_parameters
from steepest.curvature.operators import Hessian
from steepest.geometry import Euclidean, Sign
from steepest.linalg import gram_singular_values, leading_singular_values, polar
from steepest.model.inputs import InputRanks, Inputs
from steepest.model.matrix_view import matrix_label
from steepest.model.parameter_roles import ParameterRole, roles_in_loss
from steepest.optim.record import ADAMW

GeometryName = Literal["euclidean", "sign", "spectral", "adamw"]
EXACT = 128
"""Rows or columns up to which polar factors are exact to 1%; beyond, steps take those of Muon."""
SKETCH = 8
"""Singular values that are kept of a matrix."""
GEOMETRIES: tuple[GeometryName, ...] = get_args(GeometryName)
PARTS = {"q": "query", "k": "key", "v": "value"}
BOUNDED: tuple[GeometryName, ...] = ("euclidean", "spectral")
"""Those that the bounds of the theory speak of."""


@dataclass(frozen=True)
class SingularSpectrum:
    """Of one matrix: soft ranks, and its largest singular values over its Frobenius norm."""

    nuclear_rank: float
    stable_rank: float
    leading: tuple[float, ...]


@dataclass
class Evidence:
    """Of one matrix, from B batches.

    Attributes:
        row: the parameter.
        index: which of its matrices.
        gradients: G_i, `(B, m, n)`.
        gains: for each geometry `(B, B)`, ⟨G_j, D(G_i)⟩ at [i, j].
        curvatures: for each geometry `(B,)`, ⟨D, H D⟩ with the direction of batch i and the Hessian
            of batch i + 1; empty where it was not measured.
        nuclear_ranks: of G_i, `(B,)`.
        gradient, momentum: of the first G, and of the mean of all.
        inputs: of each batch, where the layer could be looked into.
    """

    row: ParameterRole
    index: int
    gradients: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    gains: dict[GeometryName, Tensor] = field(default_factory=dict)
    curvatures: dict[GeometryName, Tensor] = field(default_factory=dict)
    nuclear_ranks: Tensor = field(default_factory=lambda: torch.empty(0))
    gradient: SingularSpectrum = field(default_factory=lambda: SingularSpectrum(0.0, 0.0, ()))
    momentum: SingularSpectrum = field(default_factory=lambda: SingularSpectrum(0.0, 0.0, ()))
    inputs: list[InputRanks] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The parameter, with the name or number of the matrix where there are several."""
        assert self.row.view is not None
        count, kinds = len(self.row.view.sizes()), self.row.attention
        which = PARTS[kinds[self.index]] if len(kinds) == count else self.index
        return matrix_label(self.row.name, which, count)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        assert self.row.view is not None
        return self.row.view.sizes()[self.index]

    def gain(self, geometry: GeometryName, kept: Sequence[int]) -> float:
        """The mean gain over pairs of different batches, out of those that are kept."""
        gains = self.gains[geometry]
        return fmean(gains[i, j].item() for i in kept for j in kept if i != j)

    def best_step(self, geometry: GeometryName) -> float:
        """The best single step of the quadratic model; where there is none, one that is small."""
        gain = self.gain(geometry, range(len(self.gradients)))
        curvature = abs(float(self.curvatures[geometry].mean())) if self.curvatures else 0.0
        if gain > 0 and curvature > 0:
            return gain / curvature
        m, n = self.shape
        lengths = {"euclidean": 1.0, "spectral": math.sqrt(min(m, n))}
        norm = float(matrices_of(self.row, self.row.parameter.detach())[self.index].norm())
        return 0.01 * (norm or 1.0) / lengths.get(geometry, math.sqrt(m * n))


def gather(
    function: LossFunction,
    batches: Sequence[Any],
    parameters: Sequence[str] | None,
    curvature: bool,
    tick: Callable[[], None] = lambda: None,
) -> list[Evidence]:
    """Return the evidence for each matrix that every batch has a gradient for.

    `tick` is called after each gradient, and after each Hessian-vector product.
    """
    model = function.model
    table = roles_in_loss(model, function.loss, batches[0])
    function = function.of(chosen_parameters(model, parameters))
    rows = [
        row
        for row in table
        if row.name in function.parameters and row.view is not None and not row.view.is_vector
    ]
    if not rows:
        raise ValueError(
            f"got a {type(model).__name__} without matrices that are trained, expected some"
        )
    names = [row.name for row in rows]
    places = [Evidence(row, i) for row in rows for i in range(len(_sizes(row)))]
    gradients: list[list[Tensor]] = [[] for _ in places]
    inputs: list[dict[tuple[str, int], InputRanks]] = []
    for batch in batches:
        with Inputs(model, table, entering_only=bool(inputs)) as seen:
            value = function(batch)
        weights = [function.parameters[name] for name in names]
        derivatives = torch.autograd.grad(value, weights, materialize_grads=True)
        inputs.append(seen.ranks)
        matrices = [
            G for row, g in zip(rows, derivatives, strict=True) for G in matrices_of(row, g)
        ]
        for collected, G in zip(gradients, matrices, strict=True):
            collected.append(G)
        tick()
    kept = []
    for place, collected in zip(places, gradients, strict=True):
        place.gradients = torch.stack(collected)
        collected.clear()
        if _measure(place, inputs, GEOMETRIES if curvature else BOUNDED):
            kept.append(place)
    if curvature and kept:
        _curvatures(function, batches, kept, tick)
    return kept


def direction(geometry: GeometryName, G: Tensor, V: Tensor) -> Tensor:
    """Return the direction of a geometry for gradients `(..., m, n)`.

    `V` is a mean of squared gradients, what Adam's second moment would be; what has none stays.
    """
    if geometry == ADAMW:
        root = V.sqrt()
        known = root > 1e-6 * root.amax((-2, -1), keepdim=True)
        return torch.where(known, G / root, 0.0)
    if geometry == "spectral":
        exact = min(G.shape[-2:]) <= EXACT
        return polar(G, "auto", tolerance=0.01 if exact else None, nonfinite="nan")
    return (Sign() if geometry == "sign" else Euclidean()).direction(G)


def _measure(
    place: Evidence,
    inputs: list[dict[tuple[str, int], InputRanks]],
    geometries: Sequence[GeometryName],
) -> bool:
    """Fill in what needs gradients only; not if one is zero: an idle expert, or behind a zero."""
    G = place.gradients
    flat = G.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)
    if not bool(largest.all()):
        return False
    scaled, scales = flat / largest, largest.double().cpu()  # whose squares stay in range
    inner = (scaled @ scaled.mT).double().cpu() * (scales @ scales.mT)
    norms = inner.diag().sqrt()
    mean = G.mean(0)
    for name in geometries:
        if name == "euclidean":
            gains = inner / norms[:, None]
        elif name == "spectral":
            gains = _polar_factors(G).flatten(1) @ flat.mT
        elif name == ADAMW:  # its second moment leaves out what judges
            columns = [
                unit(name, G, second_moment(G, j)).flatten(1) @ flat[j] for j in range(len(G))
            ]
            gains = torch.stack(columns, dim=1)
        else:
            gains = direction(name, G, G).flatten(1) @ flat.mT
        place.gains[name] = gains.double().cpu()
    place.nuclear_ranks = (place.gains["spectral"].diag() / norms).square()
    place.gradient = _spectrum(G[0], float(place.nuclear_ranks[0]))
    place.momentum = _spectrum(mean)
    view = place.row.view
    assert view is not None
    group = place.index // max(1, len(view.splits))
    ranks = [batch.get((place.row.name, group)) for batch in inputs]
    place.inputs = [rank for rank in ranks if rank is not None]
    return True


def _polar_factors(G: Tensor) -> Tensor:
    """Those whose inner products with gradients are the gains.

    Beyond `EXACT` a singular value of x times the Schatten-4 norm counts with an error of up to
    0.035 / √x, so that large ones, which gains are made of, are right. On gradients of a GPT of
    10.8 million parameters, untrained and trained, a gain across batches is off by 1.5% (root mean
    square), at most 3.4%; a nuclear rank by twice that, on its own batch by up to 15%, as the
    smallest singular values are damped. Muon's own polynomials would not do: they take up to 25%
    off the largest singular value, on which all may depend.
    """
    if min(G.shape[-2:]) <= EXACT:
        return direction("spectral", G, G)
    if G.is_cpu:
        return polar(G, "zolotarev", 2, nonfinite="nan")
    return polar(G, "you", dtype=torch.bfloat16, nonfinite="nan")


def _spectrum(G: Tensor, nuclear_rank: float | None = None) -> SingularSpectrum:
    """With all singular values where the nuclear rank is not known; polar factors cost as much."""
    norm = float(torch.linalg.matrix_norm(G)) or 1.0
    if nuclear_rank is None:
        values = gram_singular_values(G) / norm
        nuclear_rank = float(values.sum()) ** 2
    else:
        values = leading_singular_values(G, SKETCH) / norm
    leading = values[:SKETCH].tolist()
    stable = leading[0] ** -2 if leading[0] else 0.0
    return SingularSpectrum(nuclear_rank, stable, tuple(leading))


def second_moment(G: Tensor, without: int) -> Tensor:
    """The mean of squares over all batches but one: what judges has no part in a direction."""
    others = [i for i in range(len(G)) if i != without]
    return G[others].square().mean(0)


def _curvatures(
    function: LossFunction,
    batches: Sequence[Any],
    kept: list[Evidence],
    tick: Callable[[], None],
) -> None:
    """Fill in the curvature of batch i + 1 along the directions of batch i."""
    function = function.of(list(dict.fromkeys(place.row.name for place in kept)))
    for place in kept:
        empty = torch.full((len(batches),), math.nan, dtype=torch.float64)
        place.curvatures = {name: empty.clone() for name in GEOMETRIES}
    for i in range(len(batches)):
        j = (i + 1) % len(batches)
        H = Hessian.of(function, batches[j])
        for place in kept:
            block = H.block([place.row.name])
            V = second_moment(place.gradients, j)
            for name in GEOMETRIES:
                D = unit(name, place.gradients[i], V)
                whole = torch.zeros_like(H.parameters[place.row.name])
                matrices_of(place.row, whole)[place.index].copy_(D)
                HD = block(whole.flatten()).view(whole.shape)
                place.curvatures[name][i] = torch.sum(HD * whole).double()
                tick()


def unit(geometry: GeometryName, G: Tensor, V: Tensor) -> Tensor:
    """Return the direction of length 1: in the norm that sums √V D² for "adamw"."""
    D = direction(geometry, G, V)
    if geometry != ADAMW:
        return D
    square = torch.sum(G * D, (-2, -1), keepdim=True)
    return D / square.clamp(min=torch.finfo(D.dtype).tiny).sqrt()


def matrices_of(row: ParameterRole, tensor: Tensor) -> list[Tensor]:
    """Return the matrices of a parameter; writing to them writes to a contiguous tensor."""
    assert row.view is not None
    return row.view.matrices(tensor.contiguous())


def _sizes(row: ParameterRole) -> list[tuple[int, int]]:
    assert row.view is not None
    return row.view.sizes()
