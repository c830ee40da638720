"""Shampoo: Muon, adapted on both sides by averages of second moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Unpack

from torch import Tensor

from steepest.linalg.solvers import svd
from steepest.model.matrix_view import MatrixView
from steepest.optim.checks import Count, Exponent, Fraction, Limit, NonNegative, Rate
from steepest.optim.kronecker import (
    AdaptedLength,
    KroneckerDescent,
    Sides,
    average,
    count_step,
    due,
    preconditioned,
    renew_roots,
    row_of_length,
    sides_of,
    unbiased,
)
from steepest.optim.matrices import Batch, stack
from steepest.optim.momentum import MOMENTUM, Momentum
from steepest.optim.precision import factor_dtype
from steepest.optim.record import Record, Update
from steepest.optim.scales import Scale
from steepest.optim.settings import Settings
from steepest.optim.steepest_descent import Parameters, SteepestDescent


def _update(settings: Mapping[str, Any], free: bool) -> Update:
    """Of Shampoo's own length there is a formula (Qiu et al., arXiv 2512.05620, Table 1)."""
    depth = {"completep": "QIU Table 1"}
    if row := row_of_length(settings, "shampoo", free, "QIU Table 2: grafting"):
        eps = "graft_eps" if settings.get("length", "adam") == "adam" else ""
        return Update("shampoo", row, eps=eps, depth=depth)
    sides = 2 if settings.get("sides", "both") == "both" else 1
    exponent, block = settings.get("exponent", 1 / 2) * sides, settings.get("block", 1024)
    return Update("shampoo", None, 1 - 2 * exponent, exponent, block, depth=depth)


class Adaptation(NamedTuple):
    """Shampoo's direction taken apart, `left @ muon @ right`."""

    left: Tensor
    muon: Tensor
    right: Tensor


class Shampoo(KroneckerDescent):
    """Descent along L^-p M R^-p, with L and R averages of G Gᵀ and Gᵀ G.

    L <- β₂ L + (1 - β₂) G Gᵀ;  R <- β₂ R + (1 - β₂) Gᵀ G;  M <- β M + (1 - β) G;
    D = (L/(1 - β₂ᵗ) + ε)^-p M/(1 - βᵗ) (R/(1 - β₂ᵗ) + ε)^-p;  W <- (1 - lr λ) W - lr s a D.

    Gupta, Koren and Singer, "Shampoo" (arXiv 1802.09568), with p = 1/4; averages and p = 1/2 as in
    Eschenhagen et al., "Clarifying Shampoo" (arXiv 2602.09314). D is Muon's direction adapted from
    both sides (`adaptation`), as Adam's is Signum's. Its length is another matter, hence the factor
    a: by grafting, D is as long as Adam's update of the same matrix, or as Muon's.

    Roots are by eigendecomposition, checked, in float32, or float64 where that fails. Each side of
    each matrix is renewed every `interval` steps. Sides have steps of their own, so that all steps
    cost about the same. Before its first renewal a matrix takes Adam's direction or Muon's, the one
    that gives it its length. With `length="own"` it is renewed in every step of its first interval.
    In float32 a factor of gradients below 1e-18 is too small to be renewed. Such a matrix takes
    that direction too, and Muon's with `length="own"`.

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: length of the step, in units of Adam's, times s; as for Muon with `length="muon"`.
        momentum: β, in [0, 1).
        beta2: β₂, in [0, 1).
        exponent: p; 1/2 (default), the better one in that paper, or 1/4, the original.
        sides: "both" (default), "left" for L alone, or "right" for R alone.
        eps: ε, added to the eigenvalues.
        relative_eps: whether ε is in units of the mean eigenvalue, tr L / out (default), so that
            the direction does not depend on the scale of the gradients.
        bias_correction: whether the averages are divided by 1 - β₂ᵗ.
        interval: steps between renewals of the roots.
        block: larger matrices are cut into equal blocks of at most this many rows and columns,
            which have factors of their own; `None` to cut nothing.
        length: of D: "adam" (default), "muon" for sqrt(min(out, in)), or its "own". That,
            and p = 1/2, it goes with the inverse of the gradient's scale.
        graft_beta2, graft_eps: β₂ and ε of that Adam. Gradients far below ε take smaller steps, as
            Adam's are; ε is at least 1e-19 in float32, where squares underflow.
        scale: shape factor s, see `update_scale`; "none" by default.
        settings: what all optimizers take, see `Settings`; the rate of AdamW for all parameters
            that are no matrices is `lr` unless given, and as for Muon, 0.15 `lr`
            mostly, with `length="muon"`.

    >>> import torch
    >>> W = torch.nn.Parameter(torch.zeros(2, 2))
    >>> W.grad = torch.diag(torch.tensor([3.0, 0.1]))
    >>> optimizer = Shampoo([W], 0.1, momentum=0, beta2=0, exponent=1 / 4, eps=0, length="own")
    >>> optimizer.step()
    >>> W.data  # without memory, the polar factor
    tensor([[-0.1000,  0.0000],
            [ 0.0000, -0.1000]])
    """

    records = (
        Record(
            name="shampoo-quarter",
            label="Shampoo, p = 1/4",
            geometry="spectral, adapted",
            memory="momentum and second moment",
            rates=(4e-3, 8e-3, 1.6e-2),
            settings={"exponent": 1 / 4},
            update=lambda settings, free: _update({"exponent": 1 / 4, **settings}, free),
        ),
        Record(
            name="shampoo",
            label="Shampoo, p = 1/2",
            geometry="spectral, adapted",
            memory="momentum and second moment",
            rates=(8e-3, 1.6e-2, 3.2e-2),
            update=_update,
        ),
    )

    geometries: ClassVar[Mapping[str, str]] = {
        **SteepestDescent.geometries, "shampoo": "spectral",
    }  # fmt: skip

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 3e-3,
        *,
        momentum: Fraction = 0.9,
        beta2: Fraction = 0.95,
        exponent: Exponent = 1 / 2,
        sides: Sides = "both",
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
            geometry="shampoo",
            memory=Momentum(momentum),
            scale=scale,
            length=length,
            options={
                "beta2": beta2,
                "exponent": exponent,
                "sides": sides,
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
        """Return a L^-p N R^-p for each matrix."""
        count_step(batch)
        N = unbiased(group, batch, N.to(factor_dtype(group, batch.W[0])))
        G = stack(batch.G).to(N.dtype)
        for side in sides_of(group, G.shape[1:]):
            average(group, batch, side, G)
            turn = [state for _, state in due(group, batch, side, group["length"] == "own")]
            renew_roots(group, turn, side)
        return preconditioned(group, batch, N)

    def adaptation(self, parameter: Tensor, matrix: int = 0) -> Adaptation:
        """Return what Shampoo adds to Muon, as it is after the last step.

        L^-p M R^-p = [L^-p (M Mᵀ)^1/4] [polar(M)] [(Mᵀ M)^1/4 R^-p], arXiv 2602.09314, section 2.

        Args:
            parameter: one that has taken a step.
            matrix: which of its matrices or blocks, in the order of its view.

        Returns:
            The factors `left` `(out, out)`, `muon` `(out, in)` and `right` `(in, in)`. M is the
            momentum, corrected for its start from zero, or the gradient where there is none.

        Raises:
            ValueError: for a parameter without that matrix or without a step.
        """
        for group in self.param_groups:
            if group["geometry"] == "adamw" or not any(p is parameter for p in group["params"]):
                continue
            kept = self.state.get(parameter, {})
            if f"steps.{matrix}" in kept:
                return self._adaptation(group, parameter, matrix)
            have = sum(key.startswith("steps.") for key in kept)
            raise ValueError(f"got matrix={matrix} of a parameter with {have} after its last step")
        raise ValueError("got a parameter that takes no Shampoo step, expected one of the matrices")

    def _adaptation(self, group: dict[str, Any], parameter: Tensor, matrix: int) -> Adaptation:
        state, beta = self.state[parameter], group["momentum"]
        where = next(i for i, p in enumerate(group["params"]) if p is parameter)
        M = state.get(MOMENTUM, parameter.grad)
        if M is None:
            raise ValueError("got a parameter without momentum or gradient, expected either")
        M = MatrixView(*group["views"][where]).matrices(M.contiguous(), group["block"])[matrix]
        M = M.to(factor_dtype(group, parameter)) / (1 - beta ** float(state[f"steps.{matrix}"]))
        M = M * (1 - beta) if group["heavy_ball"] else M
        roots = {side: state[f"{side}_root.{matrix}"] for side in sides_of(group, M.shape)}
        U, S, Vh = svd(M)
        left, right = (U * S.sqrt()) @ U.mT, (Vh.mT * S.sqrt()) @ Vh
        left = roots["left"] @ left if "left" in roots else left
        right = right @ roots["right"] if "right" in roots else right
        return Adaptation(left, U @ Vh, right)
