"""Muon: the spectral geometry with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from steepest.geometry import Spectral
from steepest.linalg.polar_factor import PolarMethod
from steepest.optim.checks import Fraction, PolarSteps, Precision, Rate
from steepest.optim.momentum import Momentum
from steepest.optim.record import SPECTRAL, Record, Update, need
from steepest.optim.scales import Scale
from steepest.optim.settings import Settings
from steepest.optim.steepest_descent import Parameters, SteepestDescent


def _update(settings: Mapping[str, Any], free: bool) -> Update:
    """The scale sqrt(out/in) is all that muP asks for (Qiu et al., arXiv 2512.05620, Table 1)."""
    need(settings, "scale", "spectral", "spectral", "muon", free)
    row = SPECTRAL._replace(source="QIU Table 1")
    return Update("muon", row, depth={"completep": "QIU Table 1"})


class Muon(SteepestDescent):
    """Spectral descent on an average of gradients.

    M <- β M + (1 - β) G;  N = (1 - β) G + β M with Nesterov, else M;
    W <- (1 - lr λ) W - lr s polar(N).

    K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). With
    `scale="original", method="jordan", dtype=torch.bfloat16` it is `torch.optim.Muon`, step for
    step.

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: spectral norm of the step, times s.
        momentum: β, in [0, 1).
        nesterov: whether to look ahead.
        scale: shape factor s, see `update_scale`: "spectral" sqrt(out/in) (default), "original"
            sqrt(max(1, out/in)), "match-rms-adamw" 0.2 sqrt(max(out, in)), or "none".
        method, steps, dtype: how the polar factor is computed, see `steepest.linalg.polar`; "auto"
            by default, which chooses by shape and device.
        settings: what all optimizers take, see `Settings`; the rate of AdamW for all parameters
            that are no matrices is 0.15 lr, or lr with "match-rms-adamw".

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> optimizer = Muon(model, lr=0.02)
    >>> [(g["geometry"], g["lr"], g["param_names"]) for g in optimizer.param_groups]
    [('spectral', 0.02, ['0.weight']), ('adamw', 0.003, ['0.bias', '2.weight', '2.bias'])]
    """

    records = (
        Record(
            name="muon",
            label="Muon",
            geometry="spectral",
            memory="momentum",
            rates=(0.02, 0.04, 0.08),
            update=_update,
        ),
    )

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 0.02,
        *,
        momentum: Fraction = 0.95,
        nesterov: bool = True,
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
            memory=Momentum(momentum, nesterov),
            scale=scale,
            **settings,
        )
