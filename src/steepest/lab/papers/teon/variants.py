"""Variants of TEON that its ablations and the control of step size need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from steepest.geometry import Spectral
from steepest.model.parameter_roles import ParameterRole, RoleTable
from steepest.model.stacks import find_stacks
from steepest.optim import TEON
from steepest.optim.matrices import Batch
from steepest.optim.record import Record

_RATES = (0.01, 0.02, 0.04)


class ShortStepMuon(TEON):
    """Muon whose queries, keys and values have its rate over sqrt(K), all else its rate.

    For square layers their steps are as long as TEON's, and nothing is orthogonalized together.
    """

    records = (
        Record(
            name="muon-short-steps",
            label="Muon, rate of q, k and v over sqrt(K)",
            geometry="spectral",
            memory="momentum",
            rates=_RATES,
        ),
    )

    def direction(self, group: dict[str, Any], batch: Batch, N: Tensor) -> Tensor:
        """Return the polar factor of each matrix `(matrices, out, in)`, over sqrt(K) in a stack."""
        separate = Spectral(group["method"], group["steps"], group["dtype"]).direction(N)
        return separate / math.sqrt(batch.stack)


class OutputStackingTEON(TEON):
    """TEON that stacks the output projections of the attention too."""

    records = (
        Record(
            name="teon-outputs",
            label="TEON, outputs stacked too",
            geometry="spectral, stacked",
            memory="momentum",
            rates=_RATES,
        ),
    )
    more: ClassVar[tuple[str, ...]] = ("output",)
    """Names of the layers that are stacked beside queries, keys and values."""

    @classmethod
    def marks(
        cls, table: RoleTable, settings: Mapping[str, Any]
    ) -> Mapping[str, Mapping[str, Any]]:
        """Return the stacks that are found in a model, by the names of their parameters."""
        rows = RoleTable([cls._marked(row) for row in table])
        return {"stacks": find_stacks(rows, settings["stack"])}

    @classmethod
    def _marked(cls, row: ParameterRole) -> ParameterRole:
        layer = row.name.split(".")[-2]
        return replace(row, attention=(layer,)) if row.is_matrix and layer in cls.more else row


class AllStackingTEON(OutputStackingTEON):
    """TEON that stacks every matrix of a block, those of the MLP too."""

    records = (
        Record(
            name="teon-all",
            label="TEON, all matrices stacked",
            geometry="spectral, stacked",
            memory="momentum",
            rates=_RATES,
        ),
    )
    more: ClassVar[tuple[str, ...]] = ("output", "up", "gate", "down")
