"""What one parameter gets: the factors of the rule, with the multipliers folded in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from steepest.model.parameter_roles import ParameterRole
from steepest.optim.family import record_of
from steepest.optim.record import ADAMW, Update
from steepest.optim.steepest_descent import SteepestDescent
from steepest.parametrize.dimensions import Growth
from steepest.parametrize.multipliers import Folds
from steepest.parametrize.rules import Factors, Rule, factors_of, update_of


@dataclass(frozen=True)
class ParameterFactors:
    """What one parameter gets, relative to the base model.

    Attributes:
        name, shape: of the parameter.
        kind: which fans grow: "input" (out alone), "hidden" (both), "output" (in alone), "vector",
            "fixed" (none).
        update: whose update it gets; "adamw" for what is no matrix under a matrix optimizer.
        fan_in, fan_out, blocks: the ratios by which fans and the number of blocks grow.
        multiplier: what is folded into the weight; inside the other factors.
        output: what the output of its layer is multiplied with by that.
        init: factor on the standard deviation of the initialization.
        lr: factor on the learning rate.
        eps: factor on Adam's epsilon.
        weight_decay: factor that keeps learning rate times weight decay.
        source: the published table, or "derived here".
        why: what it is, and what is folded into it.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    update: str
    fan_in: float
    fan_out: float
    blocks: float
    multiplier: float
    output: float
    init: float
    lr: float
    eps: float
    weight_decay: float
    source: str
    why: str


def factors_of_parameter(
    rule: Rule, update: Update, role: ParameterRole, grown: Growth, folded: Folds
) -> ParameterFactors:
    """Return what a parameter gets under a rule, with what is folded into it."""
    if not role.is_matrix and issubclass(record_of(update.name).kind, SteepestDescent):
        update = update_of(ADAMW, {}, rule)
    size, own = grown.sizes[role.name], folded.get(role.name, [])
    multiplier = math.prod(fold.multiplier for fold in own)
    factors: Factors = factors_of(rule, update, size, role.role == "embedding")
    factors = factors.fold(multiplier, update.degree)
    depth = f", blocks x {size.blocks:.4g}" if size.blocks != 1 else ""
    why = "; ".join([role.role + depth, *(fold.reason for fold in own)])
    return ParameterFactors(
        role.name,
        tuple(role.parameter.shape),
        size.kind,
        update.name,
        size.fan_in,
        size.fan_out,
        size.blocks,
        multiplier,
        math.prod(fold.multiplier for fold in own if fold.of_output),
        factors.init,
        factors.lr,
        factors.eps if update.eps else 1.0,
        1 / factors.lr,
        factors.source,
        why,
    )
