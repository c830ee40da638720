"""SignSGD: the sign geometry without memory."""

from __future__ import annotations

from typing import Unpack

from steepest.geometry import Sign
from steepest.optim.checks import Rate
from steepest.optim.record import ENTRIES, Record, Update
from steepest.optim.settings import Settings
from steepest.optim.steepest_descent import Parameters, SteepestDescent


class SignSGD(SteepestDescent):
    """Sign descent, W <- (1 - lr λ) W - lr sign(G): steepest descent in the largest entry.

    Bernstein et al., "signSGD" (arXiv 1802.04434). Every entry of a matrix moves by exactly `lr`.

    Args:
        params: a model, a role table, parameters or groups; see `SteepestDescent`.
        lr: step of every entry of a matrix.
        settings: what all optimizers take, see `Settings`; the rate of AdamW for all parameters
            that are no matrices is `lr` unless given.

    >>> import torch
    >>> W = torch.nn.Parameter(torch.zeros(2, 2))
    >>> W.grad = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    >>> SignSGD([W], lr=0.1).step()
    >>> W.data
    tensor([[-0.1000,  0.1000],
            [-0.1000,  0.0000]])
    """

    records = (
        Record(
            name="signsgd",
            label="SignSGD",
            geometry="sign",
            memory="none",
            rates=(2.5e-4, 5e-4, 1e-3),
            update=lambda settings, free: Update("signsgd", ENTRIES),
        ),
    )

    def __init__(self, params: Parameters, lr: Rate = 1e-3, **settings: Unpack[Settings]):
        super().__init__(params, lr, geometry=Sign(), **settings)
