"""Gain and curvature along an update: what the quadratic model says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steepest.curvature.forms import of_argument
from steepest.curvature.jacobian import flat
from steepest.curvature.operators import Hessian
from steepest.results import Result, ResultTable


@dataclass(frozen=True, repr=False)
class DirectionalCurvature(Result):
    """What the quadratic model says of steps W - t D, as `directional_curvature` returns it.

    Attributes:
        gain: ⟨G, D⟩, what the loss falls by for a unit of t, to first order.
        curvature: ⟨D, H D⟩.
        norm: ‖D‖_F.
    """

    gain: float
    curvature: float
    norm: float

    def table(self) -> ResultTable:
        """Return gain, curvature, and what the quadratic model says of them, as one row."""
        names = ("gain", "curvature", "norm", "rayleigh", "best_step", "decrease")
        return ResultTable.of([self], names, "along a direction")

    @property
    def rayleigh(self) -> float:
        """⟨D, H D⟩ / ‖D‖², between the ends of the spectrum."""
        return self.curvature / self.norm**2

    @property
    def best_step(self) -> float:
        """The t at which the model is lowest; infinite where it has no minimum along D."""
        if self.curvature > 0:
            return self.gain / self.curvature
        return math.copysign(math.inf, self.gain) if self.gain or self.curvature else 0.0

    @property
    def decrease(self) -> float:
        """What the loss falls by at the best step, gain² / (2 curvature); infinite without one."""
        return 0.5 * self.gain * self.best_step if self.gain else abs(self.best_step)


def _names(model: nn.Module, direction: Mapping[str, Tensor]) -> list[str]:
    return list(direction)


@of_argument(_names)
def directional_curvature(H: Hessian, direction: Mapping[str, Tensor]) -> DirectionalCurvature:
    """Return gain and curvature along an update, from one Hessian-vector product.

    Args:
        H: the Hessian. Or in its place `model, loss, batch`, and settings, which make one.
        direction: the update of each parameter, by its name; all others are held fixed.

    Raises:
        ValueError: for unknown names, shapes that do not fit, a direction of zero.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> H = Hessian(model, lambda model, x: 0.5 * model(x).square().sum(), x)
    >>> directional_curvature(H, {"weight": torch.tensor([[0.0, 1.0]])}).curvature
    1.0
    """
    H = H.block(list(direction))
    for name, p in H.parameters.items():
        if name not in direction:
            raise ValueError(f"got a pattern that matches {name}, expected names of parameters")
        if direction[name].shape != p.shape:
            raise ValueError(
                f"got a direction of shape {tuple(direction[name].shape)} for {name}, expected "
                f"{tuple(p.shape)}"
            )
    D = flat([direction[name] for name in H.parameters], list(H.parameters.values())).to(H.vector())
    norm = torch.linalg.vector_norm(D, dtype=torch.float64).item()
    if not 0 < norm < math.inf:
        raise ValueError(f"got a direction of norm {norm}, expected one that is finite and not 0")
    gain, curvature = torch.dot(H.gradient(), D).item(), torch.dot(D, H(D)).item()
    return DirectionalCurvature(gain, curvature, norm)
