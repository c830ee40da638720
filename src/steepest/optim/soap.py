"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from steepest.linalg.matrix_norms import spectral_norm
from steepest.linalg.matrix_roots import eigendecomposition, follow_eigenvectors
from steepest.linalg.products import product
from steepest.optim import adamw
from steepest.optim.checks import Count, Fraction, Limit, NonNegative, Rate
from steepest.optim.kronecker import (
    NEVER,
    KroneckerDescent,
    Side,
    Sides,
    at_a_time,
    average,
    corrections,
    count_step,
    due,
    sides_of,
    stacked,
    unbiased,
)
from steepest.optim.linearization import (
    SECOND_MOMENT,
    Map,
    adam_entries,
    between,
    entrywise,
    momentum_of,
    ratio,
)
from steepest.optim.matrices import Batch, stack
from steepest.optim.momentum import MOMENTUM, Momentum, remember
from steepest.optim.precision import adam_eps, factor_dtype
from steepest.optim.record import ENTRIES, SPECTRAL, Record, Update, need
from steepest.optim.scales import Scale, update_scale
from steepest.optim.settings import Settings
from steepest.optim.steepest_descent import Parameters, SteepestDescent


def _update(settings: Mapping[str, Any], free: bool) -> Update:
    normalized = settings.get("length") == "spectral"
    need(settings, "scale", "none", "spectral" if normalized else "none", "soap", free)
    row = ENTRIES._replace(source="derived here: SOAP")
    if normalized:
        row = SPECTRAL._replace(source="QIU: spectral normalization")
    return Update("soap", row, eps="eps")


class SOAP(KroneckerDescent):
    """Adam in the basis of the eigenvectors Q_L, Q_R of Shampoo's L and R.

    G' = Q_Lᵀ G Q_R;  M' <- β M' + (1 - β) G';  V <- β₂ V + (1 - β₂) G'²;
    D = Q_L [sqrt(1 - β₂ᵗ)/(1 - βᵗ) M' / (sqrt(V) + ε)] Q_Rᵀ;  W <- (1 - lr λ) W - lr s D;
    L <- β₂ L + (1 - β₂) G Gᵀ;  R <- β₂ R + (1 - β₂) Gᵀ G.

    Vyas et al., "SOAP" (arXiv 2409.11321), algorithm 3. M' is turned with the basis. Each side
    of each matrix renews its basis every `interval` steps by one step of orthogonal iteration, at a
    step of its own. It begins with the identity, that is as Adam; the first basis is by
    eigendecomposition. V turns with the squares of the turn, where the authors' code only reorders
    it: a basis that turns far, as after a change of the gradients or in a null space, would else
    meet the V of other directions, and take steps of any size. In the null space of a low-rank
    factor a basis is arbitrary, so there rounding alone decides between runs.

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: Adam's rate, times s; with `length="spectral"`, lr s is the spectral norm.
        momentum: β, in [0, 1).
        beta2: β₂, in [0, 1).
        eps: ε of Adam; at least 1e-19 in float32, below which squares of gradients underflow.
        sides: "both" (default), or "left" or "right" to rotate one side alone.
        interval: steps between renewals of a basis.
        max_side: a side longer than this has no factor and keeps the basis of the weights; `None`
            for no limit.
        block: larger matrices are cut into equal blocks of at most this many rows and columns,
            which have bases of their own; `None` (default) to cut nothing.
        length: "spectral" to divide D by its spectral norm, so that rates transfer over widths
            with `scale="spectral"` and `max_side=None` (Qiu et al., arXiv 2512.05620); for matrices
            that are not cut. "none" (default) to take D as it is.
        scale: shape factor s, see `update_scale`; "none" by default.
        settings: what all optimizers take, see `Settings`; the rate of AdamW for all parameters
            that are no matrices is `lr` unless given, and as for Muon, 0.15 `lr`
            mostly, with `length="spectral"`.
    """

    records = (
        Record(
            name="soap",
            label="SOAP",
            geometry="spectral, adapted",
            memory="momentum and second moment",
            rates=(8e-3, 1.6e-2, 3.2e-2),
            update=_update,
        ),
    )

    geometries: ClassVar[Mapping[str, str]] = {
        **SteepestDescent.geometries, "soap": "spectral",
    }  # fmt: skip

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 3e-3,
        *,
        momentum: Fraction = 0.95,
        beta2: Fraction = 0.95,
        eps: NonNegative = 1e-8,
        sides: Sides = "both",
        interval: Count = 10,
        max_side: Limit = 1024,
        block: Limit = None,
        length: Literal["own", "spectral"] = "own",
        scale: Scale = "none",
        **settings: Unpack[Settings],
    ):
        super().__init__(
            params,
            lr,
            geometry="soap",
            memory=Momentum(momentum),
            scale=scale,
            length=length,
            options={
                "beta2": beta2,
                "eps": eps,
                "sides": sides,
                "interval": interval,
                "max_side": max_side,
                "block": block,
            },
            **settings,
        )

    def expected_rms(
        self, group: Mapping[str, Any], outputs: int, inputs: int, stack: int = 1, adam: float = 1.0
    ) -> float | None:
        """Return Adam's, as the basis changes no length; divided by a norm it is unknown."""
        if group["geometry"] != "soap":
            return super().expected_rms(group, outputs, inputs, stack)
        if group["length"] == "spectral":
            return None
        return adamw.expected_rms(group, adam) * update_scale(group["scale"], outputs, inputs)

    def matrix_root(
        self, group: Mapping[str, Any], matrix: Mapping[str, Any], factor: float
    ) -> Map:
        """Return X -> the root of factor P⁻¹ X, with Adam's P between the bases."""
        t = float(matrix["steps"])
        left, right, M = (
            matrix.get("left_root"),
            matrix.get("right_root"),
            momentum_of(group, matrix),
        )
        adam = factor / (1 - group["momentum"] ** t) * math.sqrt(1 - group["beta2"] ** t)
        entries = adam * adam_entries(matrix[SECOND_MOMENT], group["eps"])
        back, forth = (None if Q is None else Q.mT for Q in (left, right))
        if group["length"] == "spectral":  # the momentum is in the basis, which changes no norm
            M = M if group["momentum"] else between(back, M, right)
            entries = entries * ratio(factor, entries * M, 2)
        middle = entrywise(entries)
        return lambda X: between(left, middle(between(back, X, right)), forth)

    def entry_memory(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The momentum, and Adam's second moment in the rotated basis."""
        second = (SECOND_MOMENT,) if self._adapts(group) else ()
        return super().entry_memory(group) + second

    def averaged(self, group: dict[str, Any], batch: Batch) -> Tensor:
        """Return the gradients: the momentum is kept in the eigenbasis."""
        return stack(batch.G).to(factor_dtype(group, batch.W[0]))

    def adapt(self, group: dict[str, Any], batch: Batch, N: Tensor) -> Tensor:
        """Return Adam's direction in the eigenbasis, for each matrix."""
        count_step(batch)
        G, sides = N, sides_of(group, N.shape[1:])
        bases = {side: stacked(batch, f"{side}_root") for side in sides}
        rotated = _rotated(G, bases)
        M = remember(group, replace(batch, G=list(rotated.unbind(0)))).to(G.dtype)
        V = batch.memory[SECOND_MOMENT]
        squares = rotated.square().to(V[0].dtype)
        torch._foreach_lerp_(V, list(squares.unbind(0)), 1 - group["beta2"])
        root = stack(V).to(G.dtype).sqrt() + adam_eps(group["eps"], V[0].dtype)
        D = corrections(batch, group["beta2"], G).sqrt() * unbiased(group, batch, M) / root
        D = _rotated(D, {side: Q.mT for side, Q in bases.items()})
        for side in sides:
            average(group, batch, side, G)
            renew_bases(group, batch, side)
        return _of_spectral_norm_one(D) if group["length"] == "spectral" else D


def renew_bases(group: Mapping[str, Any], batch: Batch, side: Side) -> None:
    """Follow the eigenvectors of factors, and take momentum and second moment along."""
    turns = [i for i, _ in due(group, batch, side)]
    fresh = [i for i in turns if batch.states[i][f"{side}_renewed"] == NEVER]
    known = [i for i in turns if i not in fresh]
    n = batch.G[0].shape[0 if side == "left" else 1]
    for some in (*at_a_time(fresh, n), *at_a_time(known, n)):
        states = [batch.states[i] for i in some]
        factors = stack([state[side] for state in states])
        old = stack([state[f"{side}_root"] for state in states])
        if some[0] in fresh:
            Q = eigendecomposition(factors)[1].flip(-1)
        else:
            Q = follow_eigenvectors(factors, old)
        turn = old.mT @ Q
        # Entries taken as uncorrelated: variances turn with the squares.
        for key, T in ((MOMENTUM, turn), (SECOND_MOMENT, turn.square())):
            if key in batch.memory:
                kept = [batch.memory[key][i] for i in some]
                X = stack(kept)
                X = T.mT.to(X.dtype) @ X if side == "left" else X @ T.to(X.dtype)
                torch._foreach_copy_(kept, list(X.unbind(0)))
        for state, basis in zip(states, Q.unbind(0), strict=True):
            # a view would keep, and save, all of the batch
            state[f"{side}_root"] = basis.clone(memory_format=torch.contiguous_format)
            state[f"{side}_renewed"] = torch.tensor(group["step_count"])


def _of_spectral_norm_one(D: Tensor) -> Tensor:
    """Each matrix over its spectral norm, to three digits in training; zero stays zero."""
    try:
        norm = spectral_norm(D, "krylov", iterations=10)[:, None, None]
    except ValueError as error:
        raise FloatingPointError(
            "got NaN or infinite entries in the direction of SOAP, expected finite ones"
        ) from error
    return D / torch.where(norm > 0, norm, 1.0)


def _rotated(X: Tensor, bases: dict[Side, Tensor]) -> Tensor:
    """Q_Lᵀ X Q_R."""
    for side, Q in bases.items():
        X = product(Q.mT, X) if side == "left" else product(X, Q)
    return X
