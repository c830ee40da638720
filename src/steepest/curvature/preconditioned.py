"""Sharpness in an optimizer's own units, against the value at which its steps become unstable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.curvature.forms import of_argument
from steepest.curvature.next_step import next_step
from steepest.curvature.norm_ball import NormBall, largest_curvature
from steepest.curvature.operators import Hessian
from steepest.curvature.preconditioners import (
    Group,
    Preconditioner,
    ascends,
    is_preconditioned,
    shares,
)
from steepest.linalg.krylov import eigenpairs, gaussian, start_near
from steepest.model.unwrapping import unwrapped
from steepest.results import Result, Results, ResultTable

Measure = Literal["preconditioned Hessian", "norm ball", "one step"]
Measured = tuple[float, float, float, Tensor | None]  # value, threshold, error, vector
_RANDOM_STARTS = 3  # beside one guess: 0.94 to 1 of the best of 100, on random Hessians


@dataclass(frozen=True, repr=False)
class Stability(Result):
    """How close the steps of some parameters are to instability, which is at a `ratio` of 1.

    Attributes:
        parameters: names of those that share this measure; all others are held fixed.
        measure: "preconditioned Hessian", the largest eigenvalue of P^-1/2 H P^-1/2, for steps
            lr P⁻¹ M that are linear in the gradients; "norm ball", the largest curvature ⟨D, H D⟩
            over steps of norm 1, for steps as long as the dual norm; "one step", for all others:
            the price ½ ⟨Δ, H Δ⟩ of the next step Δ over its gain -⟨G, Δ⟩.
        value: what was measured; for "norm ball" a lower bound of it; for "one step" infinite where
            there is no gain, and 0 if the step is.
        threshold: the value at which the iteration on the quadratic model becomes unstable;
            for "one step" that at which the step no longer lowers the model.
        error: how far `value` can be from an eigenvalue; 0 for "one step", NaN for a lower bound.
        products: how many products with the Hessian it took.
        vector: `(n,)`, where the next call starts from; None for "one step".
    """

    parameters: tuple[str, ...]
    measure: Measure
    value: float
    threshold: float
    error: float
    products: int
    vector: Tensor | None

    def table(self) -> ResultTable:
        """Return measure, value, threshold and ratio as one row."""
        names = ("measure", "value", "threshold", "ratio", "error", "products")
        return ResultTable.of([self], names, "stability of steps: a ratio above 1 is unstable")

    @property
    def ratio(self) -> float:
        """The value over the threshold."""
        return self.value / self.threshold


def _parameters(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    tolerance: float = 0,
    start: Sequence[Stability] = (),
    generator: torch.Generator | None = None,
) -> list[str]:
    """The parameters that the optimizer trains."""
    measures = _by_measure(model, _unwrapped(optimizer))
    return [name for groups in measures.values() for name in _names(model, groups)]


@of_argument(_parameters)
def preconditioned_sharpness(
    H: Hessian,
    optimizer: Optimizer,
    *,
    tolerance: float = 1e-3,
    start: Sequence[Stability] = (),
    generator: torch.Generator | None = None,
) -> Results[Stability]:
    """Return how close the steps of an optimizer are to instability.

    | steps                                    | measure                | threshold                |
    |------------------------------------------|------------------------|--------------------------|
    | SGD                                      | λ_max(H)               | 2 / lr                   |
    | SGD with momentum β                      | λ_max(H)               | 2 (1+β) / lr             |
    | ... and dampening δ                      | λ_max(H)               | 2 (1+β) / ((1-δ) lr)     |
    | Adam, Shampoo, KL-Shampoo, SOAP          | λ_max(P^-1/2 H P^-1/2) | 2 (1+β) / ((1-β) lr)     |
    | SpectralDescent, `length="dual"`         | max of ⟨D, H D⟩        | 2 / lr                   |
    | Muon, TEON, SignSGD, Signum, any other   | ½ ⟨Δ, H Δ⟩ / -⟨G, Δ⟩   | 1                        |

    With Nesterov's momentum thresholds are divided by 1 + 2β. Decoupled weight decay, which takes
    the share s off the weights in every step, makes the 2 a 2 - s; coupled decay is added to H;
    cautious decay, which is not linear, is left out.

    P is frozen as the last step left it, with the corrections for the start from zero, and grafting
    as the factor that it is for the present momentum. Cohen et al., "Gradient descent on neural
    networks typically occurs at the edge of stability" (arXiv 2103.00065, section 2) and "Adaptive
    gradient methods at the edge of stability" (arXiv 2207.14484, section 3). Groups that differ
    in rate, momentum or decay are one system: each counts by its rate over its threshold, and value
    and threshold are those of the group where that is largest. The ratio is exact, as eigenvalues
    of such an iteration leave the unit circle at -1, and at 1 where the curvature is negative.

    In a norm, the step along a D of norm 1 with the largest curvature multiplies the distance from
    the minimum by 1 - lr ⟨D, H D⟩; below the threshold every step lowers the quadratic model.

    For steps of fixed length no threshold on the curvature alone exists. The next step Δ is that of
    a copy of the optimizer with the gradient of this batch, without weight decay. For Muon without
    momentum the ratio is lr J / (2 ‖G‖_*), J = ⟨D, H D⟩ with D the polar factor (Shen et al., arXiv
    2505.23737, section 4); with momentum D is that of the momentum.

    Args:
        H: the Hessian of the parameters that the optimizer trains, or of more. Or in its place
            `model, loss, batch`, and settings, which make one. Nothing of model and optimizer is
            changed.
        optimizer: one of this package or of `torch.optim`, or any that steps without a closure,
            which holds the model's parameters.
        tolerance: relative error to stop at.
        start: what an earlier call returned, to need fewer products.
        generator: of the random part of the starts; by default one of its own, with seed 0.

    Returns:
        A row for each measure: one for all parameters with a preconditioned Hessian, one for those
        with a norm ball, one for those with steps of fixed length.

    Raises:
        ValueError: for an optimizer with parameters that the model does not have, or without
            trained ones; with a preconditioner, but before its first step; that maximizes with some
            groups only; or whose steps need a closure. For what `Hessian` refuses.
        FloatingPointError: for a loss or products that are not finite.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> loss = lambda model, x: 0.5 * model(x).square().sum()
    >>> [row] = preconditioned_sharpness(Hessian(model, loss, x), optimizer)
    >>> round(row.value, 3), round(row.threshold, 3), round(row.ratio, 3)
    (9.0, 19.0, 0.474)
    """
    optimizer = _unwrapped(optimizer)
    generator = generator or torch.Generator().manual_seed(0)
    earlier = {(row.measure, row.parameters): row.vector for row in start}
    rows = []
    for measure, groups in _by_measure(H.model, optimizer).items():
        names = tuple(_names(H.model, groups))
        part = H.block(names)
        before = earlier.get((measure, names))
        if measure == "preconditioned Hessian":
            measured = _eigenvalue(optimizer, groups, part, before, tolerance, generator)
        elif measure == "norm ball":
            measured = _ball(groups, part, before, tolerance, generator)
        else:
            measured = _one_step(optimizer, groups, part)
        value, threshold, error, vector = measured
        rows.append(Stability(names, measure, value, threshold, error, part.products, vector))
    return Results(rows)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer behind a wrapper of accelerate or Lightning."""
    inner = getattr(optimizer, "optimizer", None)
    return _unwrapped(inner) if isinstance(inner, Optimizer) else optimizer


def _by_measure(model: nn.Module, optimizer: Optimizer) -> dict[Measure, list[Group]]:
    """The groups with trained parameters, by how their stability is measured."""
    known = {id(p) for p in unwrapped(model).parameters()}
    measures: dict[Measure, list[Group]] = {}
    for group in optimizer.param_groups:
        trained = [p for p in group["params"] if p.requires_grad]
        if strange := [p for p in trained if id(p) not in known]:
            raise ValueError(
                f"got an optimizer with a parameter of shape {tuple(strange[0].shape)} that is "
                "none of the model's, expected the optimizer of this model; build it after "
                "whatever replaces parameters"
            )
        if trained:
            measures.setdefault(_measure(optimizer, group), []).append(group)
    if not measures:
        raise ValueError("got an optimizer without a trained parameter, expected some")
    return measures


def _measure(optimizer: Optimizer, group: Group) -> Measure:
    if is_preconditioned(optimizer, group):
        return "preconditioned Hessian"
    in_a_norm = group.get("length") == "dual" and not group.get("momentum")
    return "norm ball" if in_a_norm else "one step"


def _names(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    names = {id(p): name for name, p in unwrapped(model).named_parameters()}
    return [names[id(p)] for group in groups for p in group["params"] if p.requires_grad]


def _eigenvalue(
    optimizer: Optimizer,
    groups: Sequence[Group],
    H: Hessian,
    before: Tensor | None,
    tolerance: float,
    generator: torch.Generator,
) -> Measured:
    P = Preconditioner(optimizer, groups, H)
    guess = P.root(P.gradient) if before is None else before.to(P.gradient)
    x = start_near(guess, generator)
    top = eigenpairs(P.curvature, x, tolerance=tolerance, generator=generator)
    return top.values[0].item(), P.threshold, top.errors[0].item(), top.vectors[:, 0]


def _ball(
    groups: Sequence[Group],
    H: Hessian,
    before: Tensor | None,
    tolerance: float,
    generator: torch.Generator,
) -> Measured:
    weights, threshold = shares(groups)
    sign = -1 if ascends(groups) else 1
    guess = H.gradient() if before is None else before.to(H.vector())
    starts = [guess, *(gaussian(guess, generator) for _ in range(_RANDOM_STARTS))]
    ball = NormBall.of_groups(groups, weights)
    value, vector = largest_curvature(lambda v: sign * H(v), ball, starts, tolerance)
    return value, threshold, math.nan, vector


def _one_step(optimizer: Optimizer, groups: Sequence[Group], H: Hessian) -> Measured:
    sign = -1 if ascends(groups) else 1
    G = H.gradient()
    step = next_step(optimizer, groups, H, G)
    if not step.any():
        return 0.0, 1.0, 0.0, None
    gain = -sign * torch.dot(G, step).item()
    price = 0.5 * sign * torch.dot(step, H(step)).item()
    return price / gain if gain > 0 else math.inf, 1.0, 0.0, None
