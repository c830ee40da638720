"""Spectral descent: the spectral geometry without memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from steepest.geometry import Sign, Spectral
from steepest.linalg.polar_factor import PolarMethod
from steepest.optim.checks import PolarSteps, Precision, Rate
from steepest.optim.matrices import Batch
from steepest.optim.record import SPECTRAL, Record, Update, need
from steepest.optim.scales import Scale, update_scale
from steepest.optim.settings import Settings
from steepest.optim.steepest_descent import Parameters, SteepestDescent

Length = Literal["own", "dual"]


def _update(settings: Mapping[str, Any], free: bool) -> Update:
    need(settings, "scale", "spectral", "spectral", "spectral-descent", free)
    need(settings, "length", "own", "own", "spectral-descent", free)
    return Update("spectral-descent", SPECTRAL)


class SpectralDescent(SteepestDescent):
    """Spectral descent, W <- (1 - lr λ) W - lr s polar(G): steepest descent in the spectral norm.

    Carlson et al., "Preconditioned spectral descent for deep learning" (NeurIPS 2015). With its
    own length it is Muon without momentum. `length="dual"` is the step of the theory: for a
    loss that is L-smooth in the norm of the geometry, W <- W - (dual norm of G / L) direction with
    `lr` = 1/L (Davis and Drusvyatskiy, arXiv 2512.04299, p. 5: W - ‖G‖_*/L polar(G), for s = 1).

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: length of the step, times s; 1/L for the step of the theory.
        length: "own" (default), constant, or "dual": times the dual norm s ⟨G, polar(G)⟩ = s ‖G‖_*.
        scale: shape factor s, see `update_scale`: "spectral" sqrt(out/in) (default), "original"
            sqrt(max(1, out/in)), "match-rms-adamw" 0.2 sqrt(max(out, in)), or "none".
        method, steps, dtype: how the polar factor is computed, see `steepest.linalg.polar`; "auto"
            by default, which chooses by shape and device.
        settings: what all optimizers take, see `Settings`; the rate of AdamW for all parameters
            that are no matrices is 0.15 lr, or lr with "match-rms-adamw".

    >>> import torch
    >>> W = torch.nn.Parameter(torch.zeros(2, 2))
    >>> W.grad = torch.diag(torch.tensor([3.0, 0.1]))
    >>> SpectralDescent([W], lr=0.1, method="svd").step()
    >>> W.data
    tensor([[-0.1000,  0.0000],
            [ 0.0000, -0.1000]])
    """

    records = (
        Record(
            name="spectral-descent",
            label="SpectralDescent",
            geometry="spectral",
            memory="none",
            rates=(0.04, 0.08, 0.16),
            update=_update,
        ),
    )

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 0.02,
        *,
        length: Length = "own",
        scale: Scale = "spectral",
        method: PolarMethod = "auto",
        steps: PolarSteps = None,
        dtype: Precision = None,
        **settings: Unpack[Settings],
    ):
        super().__init__(
            params,
            lr,
            geometry=Spectral(method, steps, dtype),
            scale=scale,
            length=length,
            **settings,
        )

    def largest_entry(self, group: dict[str, Any], dtype: torch.dtype) -> float:
        """Return the largest gradient entry whose dual norm, a sum of products, is finite."""
        dual = group["geometry"] == "spectral" and group["length"] == "dual"
        return super().largest_entry(group | {"geometry": "adamw"} if dual else group, dtype)

    def direction(self, group: dict[str, Any], batch: Batch, N: Tensor) -> Tensor:
        """Return the polar factor, times the dual norm if the length is that of the theory."""
        if group["length"] == "own":
            return super().direction(group, batch, N)
        spectral = Spectral(group["method"], group["steps"], group["dtype"])
        D = (Sign() if group["geometry"] == "sign" else spectral).direction(N)  # N is needed after
        dual_norm = (N * D).sum((-2, -1), keepdim=True)
        return D * dual_norm * update_scale(group["scale"], batch.outputs, batch.inputs)
