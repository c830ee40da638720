"""The initialization of the target: the user's own, at the size that the rule asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steepest.parametrize.dimensions import Build, Growth, blueprint, counterparts_of, growing_lists
from steepest.parametrize.rules import ALPHA, Rule


def base_sizes(
    growth: Growth, base: Mapping[str, Any], target: Mapping[str, Any], rule: Rule
) -> dict[str, Any]:
    """Return the sizes of the model whose initialization is the reference.

    They are those of the base; for a rule that says nothing of depth, with the depth of the
    target, so that what the user's own initialization does with depth stays.
    """
    kept = () if rule in ALPHA else growth.deepening
    return {key: target[key] if key in kept else value for key, value in base.items()}


def reference_rms(build: Build, sizes: Mapping[str, Any], growth: Growth) -> dict[str, float]:
    """Return the RMS of each parameter that the target is to have before the factors of a rule.

    The reference model is built once, on the CPU, with seed 0 and without moving the generator of
    the caller. Where it has fewer or more layers, the mean square over its layers counts.

    Parameters that are constant there, such as ones and zeros, are left out.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        model = build(**sizes)
    parameters = {n: p for n, p in model.named_parameters() if not is_constant(p)}
    reference = blueprint(build, sizes, None)
    lists = growing_lists(reference.shapes, growth.target.shapes)
    rms = {}
    for name in growth.target.shapes:
        like = [name] if not lists else counterparts_of(name, reference, lists)
        squares = [mean_square(parameters[key]) for key in like if key in parameters]
        if squares:
            rms[name] = (sum(squares) / len(squares)) ** 0.5
    return rms


@torch.no_grad()
def initialize(
    model: nn.Module,
    rms: Mapping[str, float],
    factors: Mapping[str, float],
    multipliers: Mapping[str, float],
) -> None:
    """Scale the parameters of the target in place.

    Args:
        model: the target, as the user's own code initialized it.
        rms: of the base, see `reference_rms`.
        factors: on it, with the multipliers inside.
        multipliers: what is folded into each parameter, all that constants and frozen parameters
            get: they keep the user's own initialization, and the function is that of the table.

    Buffers stay as they are.
    """
    for name, p in model.named_parameters():
        if p.requires_grad and name in rms and not is_constant(p):
            p.mul_(rms[name] * factors[name] / mean_square(p) ** 0.5)
        elif multipliers[name] != 1:
            p.mul_(multipliers[name])


def is_constant(p: Tensor) -> bool:
    """Whether all entries are the same, which is no random initialization."""
    return p.numel() == 0 or bool((p == p.flatten()[0]).all())


def mean_square(p: Tensor) -> float:
    """Return the mean of the squares, in float64."""
    return float(p.detach().double().square().mean())
