"""What Shampoo, KL-Shampoo and SOAP share: a factor for each side of a matrix, and its roots.

L is an average of products G Gᵀ, `(out, out)`, R of Gᵀ G, `(in, in)`. What is expensive, their
roots or eigenvectors, is renewed every `interval` steps; each side has a step of its own in the
interval, chosen so that all steps cost the same.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from steepest.geometry import Spectral
from steepest.linalg.matrix_norms import frobenius_norm
from steepest.linalg.matrix_roots import inverse_root
from steepest.linalg.newton_schulz import scaled
from steepest.linalg.products import fast_products, product, symmetric_product
from steepest.model.matrix_view import MatrixView
from steepest.optim import adamw
from steepest.optim.linearization import (
    SECOND_MOMENT,
    Map,
    adam_entries,
    between,
    entrywise,
    matrix_states,
    momentum_of,
    of_matrices,
    ratio,
    two_sided,
)
from steepest.optim.matrices import Batch, Matrices, MatrixState, stack
from steepest.optim.precision import adam_eps, factor_dtype
from steepest.optim.record import ENTRIES, SPECTRAL, Row, need
from steepest.optim.rounding import Assignment
from steepest.optim.scales import adamw_ratio, update_scale
from steepest.optim.steepest_descent import SteepestDescent

Side = Literal["left", "right"]
Sides = Literal["both", "left", "right"]
AdaptedLength = Literal["adam", "muon", "own"]
_Any = TypeVar("_Any")
_ENTRIES_RENEWED = 2**20  # at a time: small factors share the cost of a call, large ones need not
NEVER = -1  # the step in which a side was renewed that never was


class KroneckerDescent(SteepestDescent):
    """A step with a factor for each side of a matrix; the subclasses say what is made of them."""

    @classmethod
    def adamw_ratio(cls, defaults: Mapping[str, Any]) -> float:
        """Return Muon's where steps are as long as Muon's or of spectral norm 1, otherwise 1."""
        spectral = defaults["length"] in ("muon", "spectral")
        return adamw_ratio(defaults["scale"]) if spectral else 1.0

    def expected_rms(
        self, group: Mapping[str, Any], outputs: int, inputs: int, stack: int = 1, adam: float = 1.0
    ) -> float | None:
        """Return Adam's or Muon's where a step is as long; the own length is of the gradients."""
        if group["length"] == "muon" or not self._adapts(group):
            return super().expected_rms(group, outputs, inputs, stack)
        if group["length"] == "adam":
            return adamw.expected_rms(group, adam) * update_scale(group["scale"], outputs, inputs)
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one of another geometry is not cut into blocks unless it says so."""
        if param_group.get("geometry") in SteepestDescent.geometries:
            param_group = {"block": None, **param_group}
        super().add_param_group(param_group)

    def remember(self, group: dict[str, Any], batch: Batch) -> Tensor:
        """Return the momentum, or the gradients where `adapt` keeps the momentum itself."""
        if self._adapts(group):
            return self.averaged(group, batch)
        return super().remember(group, batch)

    def direction(self, group: dict[str, Any], batch: Batch, N: Tensor) -> Tensor:
        """Return the adapted direction, or that of another geometry if the group says so."""
        if self._adapts(group):
            return self.adapt(group, batch, N)
        return super().direction(group, batch, N)

    def averaged(self, group: dict[str, Any], batch: Batch) -> Tensor:
        """Add the gradients to the momentum; return what is adapted."""
        return super().remember(group, batch)

    @abstractmethod
    def adapt(self, group: dict[str, Any], batch: Batch, N: Tensor) -> Tensor:
        """Return the adapted direction of each matrix."""

    @staticmethod
    def _adapts(group: Mapping[str, Any]) -> bool:
        return group["geometry"] not in SteepestDescent.geometries

    def start(self, group: dict[str, Any], matrices: Matrices) -> None:
        """Make the factors of matrices: zero, with the identity for what is computed from them."""
        if not self._adapts(group):
            return
        for state, G in zip(matrices.states(self.state), matrices.gradients, strict=True):
            if "steps" in state:
                continue
            dtype = factor_dtype(group, state.parameter)
            for side in sides_of(group, G.shape):
                n = G.shape[0 if side == "left" else 1]
                state[side] = torch.zeros(n, n, dtype=dtype, device=G.device)
                state[f"{side}_root"] = torch.eye(n, dtype=dtype, device=G.device)
                state[f"{side}_renewed"] = torch.tensor(NEVER)
            state["steps"] = torch.tensor(0)

    def entry_memory(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The momentum, and the second moment where there is grafting from Adam."""
        second = (SECOND_MOMENT,) if self._adapts(group) and group["length"] == "adam" else ()
        return super().entry_memory(group) + second

    def largest_entry(self, group: dict[str, Any], dtype: torch.dtype) -> float:
        """Return the largest gradient entry whose products do not overflow."""
        return super().largest_entry(group | {"geometry": "adamw"}, dtype) / 2**10

    def is_linear(self, group: Mapping[str, Any]) -> bool:
        """Whether it is: not where a step is Muon's, as it is before the first renewal."""
        if group["geometry"] in SteepestDescent.geometries:
            return super().is_linear(group)
        return group["length"] != "muon" or not self._begins(group)

    def _begins(self, group: Mapping[str, Any]) -> bool:
        """Whether a matrix that takes steps has a side whose root was never renewed."""
        for p, view in zip(group["params"], group["views"], strict=True):
            shapes = MatrixView(*view).block_shapes(group["block"])
            states = matrix_states(self.state.get(p, {}), len(shapes))
            for shape, matrix in zip(shapes, states, strict=True):
                if matrix and matrix["steps"] > 0 and not _is_ready(matrix, group, shape):
                    return True
        return False

    def linear_root(self, group: Mapping[str, Any], i: int, G: Tensor, share: float) -> Map:
        """Return the map of a parameter, from those of its matrices."""
        if group["geometry"] in SteepestDescent.geometries:
            return super().linear_root(group, i, G, share)
        state = self.state.get(group["params"][i], {})

        def of_matrix(matrix: Mapping[str, Any]) -> Map:
            if matrix["steps"] == 0:
                return torch.zeros_like
            return self.matrix_root(
                group, matrix, share * update_scale(group["scale"], *matrix["size"])
            )

        return of_matrices(group, i, state, G, of_matrix)

    def matrix_root(
        self, group: Mapping[str, Any], matrix: Mapping[str, Any], factor: float
    ) -> Map:
        """Return X -> the root of factor a L^-p X R^-p for one matrix, as `preconditioned` has it.

        Args:
            group: of the matrix.
            matrix: what is kept for it, its momentum and second moment, and its "size".
            factor: of the map.
        """
        t = float(matrix["steps"])
        correction = 1 - group["momentum"] ** t
        left, right, M = (
            matrix.get("left_root"),
            matrix.get("right_root"),
            momentum_of(group, matrix),
        )
        if group["length"] == "own":
            return two_sided(left, right, factor / correction)
        length = factor  # of a direction of length 1, whatever that of M
        if group["length"] == "adam":
            V = matrix[SECOND_MOMENT] / (1 - group["graft_beta2"] ** t)
            adam = factor / correction * adam_entries(V, group["graft_eps"])
            if not _is_ready(matrix, group, M.shape):
                return entrywise(adam)
            length = frobenius_norm(adam * M).item()
        else:
            length *= math.sqrt(M.numel() / max(matrix["size"]))
        return two_sided(left, right, ratio(length, between(left, M, right), "fro"))

    def _take(self, group: dict[str, Any], batch: Batch, assign: Assignment) -> None:
        with fast_products():
            super()._take(group, batch, assign)


def row_of_length(settings: Mapping[str, Any], name: str, free: bool, source: str) -> Row | None:
    """Return how the rate follows the size, by what the update takes its length from.

    `None` for an update of its own length; `source` is that of Adam's length.
    """
    length = settings.get("length", "adam")
    scale = "spectral" if length == "muon" else "none"
    need(settings, "scale", "none", scale, name, free)
    need(settings, "relative_eps", True, True, name, free)
    if length == "muon":
        return SPECTRAL._replace(source="derived here: grafting")
    return ENTRIES._replace(source=source) if length == "adam" else None


def _is_ready(matrix: Mapping[str, Any], group: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether each side of a matrix of `shape` has had its root renewed."""
    return all(int(matrix[f"{side}_renewed"]) != NEVER for side in sides_of(group, shape))


def sides_of(group: Mapping[str, Any], shape: Sequence[int]) -> list[Side]:
    """Return the sides of an `(out, in)` matrix that have a factor."""
    longest = group.get("max_side") or math.inf
    wanted: tuple[Side, ...] = ("left", "right") if group["sides"] == "both" else (group["sides"],)
    return [side for side in wanted if shape[0 if side == "left" else 1] <= longest]


def count_step(batch: Batch) -> None:
    """Count a step of each matrix, by which averages are corrected for their start from zero."""
    for state in batch.states:
        state["steps"] += 1


def average(group: Mapping[str, Any], batch: Batch, side: Side, G: Tensor, by: int = 1) -> None:
    """L <- β₂ L + (1 - β₂) G Gᵀ / by, or R <- β₂ R + (1 - β₂) Gᵀ G / by."""
    X = G if side == "left" else G.mT
    products = symmetric_product(X, X.mT)
    factors = [state[side] for state in batch.states]
    torch._foreach_lerp_(factors, list(products.div_(by).unbind(0)), 1 - group["beta2"])


def due(
    group: Mapping[str, Any], batch: Batch, side: Side, at_once: bool = False
) -> Iterator[tuple[int, MatrixState]]:
    """Yield the matrices of a batch whose side is renewed in this step, with their positions.

    One that had no gradient at its turn is renewed as soon as it has one. With `at_once`, a matrix
    is renewed in every step of its first interval.
    """
    views = tuple(group["views"])
    limits = (group["sides"], group.get("max_side"))
    slots = _slots(views, group.get("block"), limits, group["interval"])
    now = group["step_count"] % group["interval"]
    for i, state in enumerate(batch.states):
        overdue = group["step_count"] - int(state[f"{side}_renewed"]) >= group["interval"]
        early = at_once and state["steps"] <= group["interval"]
        if overdue or early or now == slots[state.position, side]:
            yield i, state


@functools.lru_cache(maxsize=64)
def _slots(
    views: tuple[tuple[Any, ...], ...],
    block: int | None,
    limits: tuple[Sides, int | None],
    interval: int,
) -> dict[tuple[int, Side], int]:
    """The step in the interval for each side of each matrix: the dearest first, to the emptiest."""
    shapes = [shape for view in views for shape in MatrixView(*view).block_shapes(block)]
    group = {"sides": limits[0], "max_side": limits[1]}
    costs = [
        (shape[0 if side == "left" else 1] ** 3, i, side)
        for i, shape in enumerate(shapes)
        for side in sides_of(group, shape)
    ]
    load = [0] * min(interval, max(1, len(costs)))
    slots: dict[tuple[int, Side], int] = {}
    for cost, i, side in sorted(costs, key=lambda each: -each[0]):
        slots[i, side] = load.index(min(load))
        load[slots[i, side]] += cost
    return slots


def at_a_time(several: Sequence[_Any], n: int) -> Iterator[Sequence[_Any]]:
    """Yield as many as are renewed together, of factors of side n."""
    count = max(1, _ENTRIES_RENEWED // n**2)
    for start in range(0, len(several), count):
        yield several[start : start + count]


def renew_roots(group: Mapping[str, Any], states: Sequence[MatrixState], side: Side) -> None:
    """Root <- (factor / (1 - β₂ᵗ) + ε)^-p; nothing where a factor is too small for its type."""
    n = len(states[0][side]) if states else 1
    for some in at_a_time(states, n):
        factors = stack([state[side] for state in some])
        small = factors.diagonal(dim1=-2, dim2=-1).amax(-1) < 1e2 * torch.finfo(factors.dtype).tiny
        if group["eps"] and not group["relative_eps"]:  # then ε alone has a root
            small.zero_()
        if small.any():  # NaN is not, and an error below
            some = [state for state, no in zip(some, small.tolist(), strict=True) if not no]
            factors = factors[~small]
        if not some:
            continue
        if group["bias_correction"]:
            seen = [1 - group["beta2"] ** float(state["steps"]) for state in some]
            factors = factors / factors.new_tensor(seen)[:, None, None]
        eps = torch.full_like(factors[:, 0, 0], group["eps"])
        if group["relative_eps"]:
            eps *= factors.diagonal(dim1=-2, dim2=-1).mean(-1)
        cutoff = 0.0 if group["eps"] else None  # eps is there to keep what a cutoff would drop
        roots = inverse_root(factors, group["exponent"], eps=eps, cutoff=cutoff)
        for state, root in zip(some, roots.unbind(0), strict=True):
            state[f"{side}_root"] = root.clone()  # a view would keep, and save, all of the batch
            state[f"{side}_renewed"] = torch.tensor(group["step_count"])


def unready(group: Mapping[str, Any], batch: Batch) -> list[int]:
    """Positions of matrices with a side that has never been renewed."""
    return [
        i
        for i, state in enumerate(batch.states)
        if any(state[f"{side}_renewed"] == NEVER for side in sides_of(group, batch.G[0].shape))
    ]


def stacked(batch: Batch, key: str) -> Tensor:
    """The state `key` of each matrix, `(matrices, ...)`."""
    return stack([state[key] for state in batch.states])


def preconditioned(group: Mapping[str, Any], batch: Batch, N: Tensor, degree: int = 2) -> Tensor:
    """Root of L times N times root of R, with another length if there is grafting.

    Before its first renewal a matrix takes the direction whose length it will take. Without
    grafting it is Muon's: of gradients whose factors are too small for their type.

    Args:
        degree: the power of the gradients that the factors go with.

    Raises:
        FloatingPointError: without grafting, if that is beyond the range of its type.
    """
    roots = {side: stacked(batch, f"{side}_root") for side in sides_of(group, N.shape[1:])}
    early = unready(group, batch)
    if group["length"] == "own":
        D = rooted(roots, N)
        if early:
            power = 1 - group["exponent"] * degree * len(roots)  # of the gradients in D
            size = frobenius_norm(N[early], keepdim=True) / math.sqrt(min(N.shape[1:]))
            D[early] = Spectral("auto").direction(N[early]) * size**power
        low, high = torch.aminmax(D)
        if not bool((high - low).isfinite()):
            raise FloatingPointError(
                f'got length="own" and a direction whose entries are too large for {D.dtype}: '
                "this length grows as earlier gradients shrink. Expected finite entries; pass "
                'length="adam", or a larger eps'
            )
        return D
    if group["length"] == "adam":
        other = adam_direction(group, batch, N)
        length = frobenius_norm(other, keepdim=True)
        other = other[early] if early else other
    else:
        share = N[0].numel() / (batch.outputs * batch.inputs)  # of a block in the whole matrix
        rank = min(batch.outputs, batch.inputs)
        length = torch.full_like(N[:, :1, :1], math.sqrt(rank * share))
        other = Spectral("auto").direction(N[early]) if early else N

    def direction(D: Tensor) -> tuple[Tensor, Tensor]:
        if early:
            D[early] = other
        D = _normalized(D)  # after a jump of the gradients' scale its square could overflow
        return D, torch.linalg.matrix_norm(D, keepdim=True)

    D, norm = direction(rooted(roots, _normalized(N)))
    if not all(
        0.0 < x < math.inf for x in norm.flatten().tolist()
    ):  # beyond the range of a product
        roots = {side: scaled(root) for side, root in roots.items()}
        D, norm = direction(rooted(roots, _normalized(N), scaled))
    return D * torch.where(norm > 0, length / torch.where(norm > 0, norm, 1.0), 0.0)


def rooted(
    roots: Mapping[Side, Tensor], X: Tensor, then: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The left root times X times the right root; `then` acts on the first product."""
    for side, root in roots.items():
        X = product(root, X) if side == "left" else product(X, root)
        X = then(X) if then else X
    return X


def _normalized(X: Tensor) -> Tensor:
    """Each matrix over its largest entry; zero stays zero."""
    largest = torch.maximum(X.amax((-2, -1), keepdim=True), -X.amin((-2, -1), keepdim=True))
    return X / torch.where(largest > 0, largest, 1.0)


def adam_direction(group: Mapping[str, Any], batch: Batch, N: Tensor) -> Tensor:
    """Adam's direction, whose second moment takes in the gradients of this step."""
    V = batch.memory[SECOND_MOMENT]
    squares = [G.to(v.dtype).square() for G, v in zip(batch.G, V, strict=True)]
    torch._foreach_lerp_(V, squares, 1 - group["graft_beta2"])
    V_hat = stack(V).to(N.dtype) / corrections(batch, group["graft_beta2"], N)
    return N / (V_hat.sqrt() + adam_eps(group["graft_eps"], V[0].dtype))


def unbiased(group: Mapping[str, Any], batch: Batch, M: Tensor) -> Tensor:
    """The momentum over the sum of the weights that it gave to gradients."""
    M = M / corrections(batch, group["momentum"], M)
    return M * (1 - group["momentum"]) if group["heavy_ball"] else M


def corrections(batch: Batch, beta: float, like: Tensor) -> Tensor:
    """1 - βᵗ for each matrix, `(matrices, 1, 1)`."""
    each = [1 - beta ** float(state["steps"]) for state in batch.states]
    return torch.tensor(each, dtype=like.dtype, device=like.device)[:, None, None]
