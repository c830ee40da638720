"""Signum: the sign geometry with momentum."""

from __future__ import annotations

from typing import Unpack

from steepest.geometry import Sign
from steepest.optim.checks import Fraction, Rate
from steepest.optim.momentum import Momentum
from steepest.optim.record import ENTRIES, Record, Update
from steepest.optim.settings import Settings
from steepest.optim.steepest_descent import Parameters, SteepestDescent


class Signum(SteepestDescent):
    """Sign descent on an average of gradients.

    M <- β M + (1 - β) G;  W <- (1 - lr λ) W - lr sign(M).

    Bernstein et al., "signSGD" (arXiv 1802.04434), algorithm 2. Adam is an adapted Signum, as
    Shampoo is an adapted Muon.

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: step of every entry of a matrix; about a third of a good rate for AdamW.
        momentum: β, in [0, 1).
        settings: what all optimizers take, see `Settings`; the rate of AdamW for all parameters
            that are no matrices is `lr` unless given.

    >>> import torch
    >>> W = torch.nn.Parameter(torch.zeros(1, 2))
    >>> optimizer = Signum([W], lr=0.1)
    >>> for gradient in ([[1.0, -1.0]], [[-0.5, -1.0]]):
    ...     W.grad = torch.tensor(gradient)
    ...     optimizer.step()
    >>> W.data  # the first entry still follows the first gradient
    tensor([[-0.2000,  0.2000]])
    """

    records = (
        Record(
            name="signum",
            label="Signum",
            geometry="sign",
            memory="momentum",
            rates=(5e-4, 1e-3, 2e-3),
            update=lambda settings, free: Update(
                "signum", ENTRIES._replace(source="derived here: Signum")
            ),
        ),
    )

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 1e-3,
        *,
        momentum: Fraction = 0.9,
        **settings: Unpack[Settings],
    ):
        super().__init__(params, lr, geometry=Sign(), memory=Momentum(momentum), **settings)
