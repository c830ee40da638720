"""KL-Shampoo: Shampoo whose factors whiten each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from steepest.linalg.newton_schulz import power_of_two
from steepest.linalg.products import product
from steepest.optim.checks import Checks, Count, Fraction, Limit, NonNegative, Rate, choice
from steepest.optim.kronecker import (
    NEVER,
    AdaptedLength,
    KroneckerDescent,
    Side,
    average,
    count_step,
    due,
    preconditioned,
    renew_roots,
    row_of_length,
    stacked,
    unbiased,
)
from steepest.optim.matrices import Batch, MatrixState, stack
from steepest.optim.momentum import Momentum
from steepest.optim.precision import factor_dtype
from steepest.optim.record import Record, Update
from steepest.optim.scales import Scale
from steepest.optim.settings import Settings
from steepest.optim.steepest_descent import Parameters, SteepestDescent


def _update(settings: Mapping[str, Any], free: bool) -> Update:
    """Its own length is another one at the start than later, so no table can have it."""
    row = row_of_length(settings, "kl-shampoo", free, "derived here: KL-Shampoo")
    if row is None and not free:
        raise ValueError(
            'got length="own" for kl-shampoo, for which no rule gives the rate of a larger model; '
            'expected length="adam", or length="muon" with scale="spectral". Pass '
            'settings={"length": "adam"}'
        )
    is_adam = settings.get("length", "adam") == "adam"
    return Update("kl-shampoo", row, eps="graft_eps" if is_adam else "")


class KLShampoo(KroneckerDescent):
    """Descent along L^-1/2 M R^-1/2, with L and R fitted in the Kullback-Leibler divergence.

    L <- β₂ L + (1 - β₂) G R⁻¹ Gᵀ / in;  R <- β₂ R + (1 - β₂) Gᵀ L⁻¹ G / out;
    D = L^-1/2 M R^-1/2;  W <- (1 - lr λ) W - lr s a D.

    Lin et al., "Understanding and improving Shampoo and SOAP via Kullback-Leibler minimization"
    (arXiv 2509.03378). For one gradient repeated, D becomes its polar factor times a constant; for
    a set of gradients, L^-1/2 G R^-1/2 is semi-orthogonal on average over the set, from both sides.
    (With the exponent 1/4 inside the updates neither would hold.)

    Both updates take the opposite factor of the step before, as in the paper; with
    `sequential=True` R goes first and L takes the new R. Before its first renewal an opposite
    factor counts as the identity times the RMS entry of G, so that both have the units of G.

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: as for `Shampoo`.
        momentum: β, in [0, 1).
        beta2: β₂, in [0, 1).
        sequential: whether L takes the new R.
        eps, relative_eps, bias_correction, interval, block: as for `Shampoo`.
        length: of D: "adam" (default), "muon" for sqrt(min(out, in)), or "none", where
            the entries of D are about as large as those of Adam's update.
        graft_beta2, graft_eps, scale: as for `Shampoo`.
        settings: as for `Shampoo`.

    >>> import torch
    >>> W = torch.nn.Parameter(torch.zeros(2, 2))
    >>> W.grad = torch.diag(torch.tensor([3.0, 0.1]))
    >>> optimizer = KLShampoo([W], 0.1, momentum=0, beta2=0, eps=0, sequential=True, length="own")
    >>> optimizer.step()
    >>> W.data  # sqrt(2) times the polar factor
    tensor([[-0.1414,  0.0000],
            [ 0.0000, -0.1414]])
    """

    records = (
        Record(
            name="kl-shampoo",
            label="KL-Shampoo",
            geometry="spectral, adapted",
            memory="momentum and second moment",
            rates=(8e-3, 1.6e-2, 3.2e-2),
            update=_update,
        ),
    )

    fixed: ClassVar[Checks] = {
        "sides": choice("both"),
    }

    geometries: ClassVar[Mapping[str, str]] = {
        **SteepestDescent.geometries, "kl-shampoo": "spectral",
    }  # fmt: skip

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 3e-3,
        *,
        momentum: Fraction = 0.9,
        beta2: Fraction = 0.95,
        sequential: bool = False,
        eps: NonNegative = 1e-4,
        relative_eps: bool = True,
        bias_correction: bool = True,
        interval: Count = 10,
        block: Limit = 1024,
        length: AdaptedLength = "adam",
        graft_beta2: Fraction = 0.95,
        graft_eps: NonNegative = 1e-8,
        scale: Scale = "none",
        **settings: Unpack[Settings],
    ):
        super().__init__(
            params,
            lr,
            geometry="kl-shampoo",
            memory=Momentum(momentum),
            scale=scale,
            length=length,
            options={
                "beta2": beta2,
                "exponent": 1 / 2,
                "sides": "both",
                "sequential": sequential,
                "eps": eps,
                "relative_eps": relative_eps,
                "bias_correction": bias_correction,
                "interval": interval,
                "block": block,
                "graft_beta2": graft_beta2,
                "graft_eps": graft_eps,
            },
            **settings,
        )

    def adapt(self, group: dict[str, Any], batch: Batch, N: Tensor) -> Tensor:
        """Return a L^-1/2 N R^-1/2 for each matrix."""
        count_step(batch)
        N = unbiased(group, batch, N.to(factor_dtype(group, batch.W[0])))
        G = stack(batch.G).to(N.dtype)
        if group["sequential"]:
            renewed = self._take_in(group, batch, "right", whitened(batch, G, "left"))
            renewed += self._take_in(group, batch, "left", whitened(batch, G, "right"))
        else:
            left, right = whitened(batch, G, "left"), whitened(batch, G, "right")
            renewed = self._take_in(group, batch, "right", left)
            renewed += self._take_in(group, batch, "left", right)
        for state in renewed:
            balance(state)
        return preconditioned(group, batch, N, degree=1)

    def _take_in(
        self, group: dict[str, Any], batch: Batch, side: Side, G: Tensor
    ) -> list[MatrixState]:
        """Average the products of gradients that were whitened from the other side."""
        average(group, batch, side, G, by=G.shape[-1 if side == "left" else -2])
        turn = [state for _, state in due(group, batch, side, group["length"] == "own")]
        renew_roots(group, turn, side)
        return turn


def balance(state: MatrixState) -> None:
    """Where the factors have drifted apart, scale L by c and R by 1/c, c a power of two.

    That changes no bit of a direction. Without it, of gradients with a null space that stays, such
    as inputs that are always zero, one factor vanishes and the other grows without bound.
    """
    apart = state["right"].diagonal().mean() / state["left"].diagonal().mean()
    if not 2.0**-16 < apart < 2.0**16 and apart.isfinite() and apart > 0:
        half = round(math.log2(apart) / 4)
        for side, power in (("left", half), ("right", -half)):
            state[side] = torch.ldexp(state[side], torch.tensor(2 * power))
            state[f"{side}_root"] = torch.ldexp(state[f"{side}_root"], torch.tensor(-power))


def whitened(batch: Batch, G: Tensor, side: Side) -> Tensor:
    """L^-1/2 G or G R^-1/2, with the identity times the RMS entry of G before the first renewal."""
    largest = G.abs().amax((-2, -1), keepdim=True)  # without it small squares would vanish
    rms = largest * (G / largest).square().mean((-2, -1), keepdim=True).sqrt()
    rms = rms.clamp(min=torch.finfo(G.dtype).tiny)
    new = [bool(state[f"{side}_renewed"] == NEVER) for state in batch.states]
    is_new = torch.tensor(new, device=G.device)[:, None, None]
    root = stacked(batch, f"{side}_root")

    def times_root(G: Tensor) -> Tensor:
        G = torch.where(is_new, G / rms.sqrt(), G)
        return product(root, G) if side == "left" else product(G, root)

    limit = 1e16  # of what can be squared and summed, however far the scale has jumped
    X = times_root(G).clamp_(-limit, limit)
    if not math.isfinite(X.sum()):  # a product with a large root has overflowed, or G is zero
        unit, rms = power_of_two(largest), torch.where(largest > 0, rms, 1.0)
        X = times_root(G / unit).mul_(unit).clamp_(-limit, limit)
    return X
