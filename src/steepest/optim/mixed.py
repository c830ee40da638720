"""Several geometries in one optimizer, a group for each."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from steepest.geometry import Euclidean
from steepest.optim.matrices import Batch
from steepest.optim.teon import TEON


class Mixed(TEON):
    """Momentum in the geometry that each group says: what `Plan.optimizer` returns.

    Groups say `"geometry"`: "spectral" (Muon; TEON with "stacks"), "sign" (Signum), "adamw", or
    "euclidean": M / ‖M‖_F times sqrt(min(out, in)), as long as a spectral direction of full rank,
    so that one rate means as much in both.
    """

    geometries = ("euclidean", *TEON.geometries)

    def direction(self, group: dict[str, Any], batch: Batch, N: Tensor) -> Tensor:
        """Return the direction of the group's geometry."""
        if group["geometry"] == "euclidean":
            return Euclidean().direction(N) * math.sqrt(min(N.shape[-2:]))
        return super().direction(group, batch, N)
