"""Multipliers: of residual branches, attention logits and tied heads.

The first two are folded into weights; the last is a hook.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from steepest.parametrize.attention import HeadSize, fold_attention
from steepest.parametrize.branches import check_depth, fold_branches
from steepest.parametrize.dimensions import Growth
from steepest.parametrize.multipliers import Folds
from steepest.parametrize.rules import ALPHA, Rule, readout_multiplier


def folds(
    growth: Growth, rule: Rule, branches: Sequence[str] | None, head_size: HeadSize | None
) -> Folds:
    """Return the multipliers to fold into parameters of the target.

    Raises:
        ValueError: if the depth grows under a depth rule and the last layers of the residual
            branches are unknown; if the head size is needed and unknown.
    """
    multipliers: Folds = {}
    if rule in ALPHA:
        check_depth(growth, branches)
    if rule in ALPHA and growth.lists:
        fold_branches(multipliers, growth, ALPHA[rule], branches)
    if rule not in ("sp", "ntp"):
        fold_attention(multipliers, growth, head_size)
    return multipliers


class ScaleInput:
    """Multiply the input of a module: a hook, for the head that is tied to the embedding."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs with the first one scaled, be it given by position or by name."""
        if inputs:
            return (inputs[0] * self.factor, *inputs[1:]), named
        first = next(iter(named))
        return (), {**named, first: named[first] * self.factor}


def tied_heads(model: nn.Module, rule: Rule, grown: Growth) -> dict[str, float]:
    """Return the modules that share the table of an embedding, and the factor on their input."""
    owners: dict[int, list[tuple[str, nn.Module, Tensor]]] = defaultdict(list)
    names = {id(p): name for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners[id(p)].append((path, module, p))
    factors = {}
    for key, those in owners.items():
        tables = [path for path, module, _ in those if isinstance(module, nn.Embedding)]
        for path, module, _ in those:
            if tables and not isinstance(module, nn.Embedding):
                factor = readout_multiplier(rule, grown.sizes[names[key]])
                if factor != 1:
                    factors[path] = factor
    return factors
