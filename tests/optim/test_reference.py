"""The optimizers are the algorithms that `reference.py` spells out, in float64."""

from __future__ import annotations

import ast
import inspect
from functools import partial

import pytest
import torch
from torch import nn

from steepest import SOAP, TEON, KLShampoo, Muon, Shampoo, SignSGD, Signum, SpectralDescent
from steepest.optim import reference

SVD = {"method": "svd"}
EVERY_STEP = {"interval": 1}
OWN = {"length": "own"}
SUM = {"heavy_ball": True}  # a sum of gradients has the direction of their average

# name: the optimizer with what it alone is told, the algorithm, and the options of both
CASES = {
    "SignSGD": (partial(SignSGD), reference.sign_sgd, {}),
    "Signum": (partial(Signum), reference.signum, {}),
    "Signum, 0.5": (partial(Signum), reference.signum, {"momentum": 0.5}),
    "Signum, heavy ball": (partial(Signum, **SUM), reference.signum, {}),
    "SpectralDescent": (partial(SpectralDescent, **SVD), reference.spectral_descent, {}),
    "SpectralDescent, dual": (
        partial(SpectralDescent, **SVD),
        reference.spectral_descent,
        {"length": "dual", "scale": "original"},
    ),
    "Muon": (partial(Muon, **SVD), reference.muon, {}),
    "Muon without Nesterov": (partial(Muon, **SVD), reference.muon, {"nesterov": False}),
    "Muon, heavy ball": (partial(Muon, **SVD, **SUM), reference.muon, {}),
    "Muon, heavy ball without Nesterov": (
        partial(Muon, **SVD, **SUM),
        reference.muon,
        {"nesterov": False, "scale": "match-rms-adamw"},
    ),
    "Shampoo": (partial(Shampoo, **EVERY_STEP), reference.shampoo, {}),
    "Shampoo, 1/4": (partial(Shampoo, **EVERY_STEP), reference.shampoo, {"exponent": 1 / 4}),
    "Shampoo, heavy ball": (partial(Shampoo, **EVERY_STEP, **SUM), reference.shampoo, {}),
    "Shampoo, own length": (partial(Shampoo, **EVERY_STEP), reference.shampoo, OWN),
    "Shampoo, own length, heavy ball": (
        partial(Shampoo, **EVERY_STEP, **SUM),
        reference.shampoo,
        OWN,
    ),
    "Shampoo, Muon's length": (
        partial(Shampoo, **EVERY_STEP),
        reference.shampoo,
        {"length": "muon", "momentum": 0.5},
    ),
    "Shampoo from the left": (
        partial(Shampoo, **EVERY_STEP),
        reference.shampoo,
        {**OWN, "sides": "left", "relative_eps": False, "eps": 0.1},
    ),
    "Shampoo from the right": (
        partial(Shampoo, **EVERY_STEP),
        reference.shampoo,
        {**OWN, "sides": "right", "bias_correction": False},
    ),
    "KLShampoo": (partial(KLShampoo, **EVERY_STEP), reference.kl_shampoo, {}),
    "KLShampoo, own length": (partial(KLShampoo, **EVERY_STEP), reference.kl_shampoo, OWN),
    "KLShampoo, Muon's length": (
        partial(KLShampoo, **EVERY_STEP),
        reference.kl_shampoo,
        {"length": "muon", "sequential": True},
    ),
    "KLShampoo, heavy ball": (
        partial(KLShampoo, **EVERY_STEP, **SUM),
        reference.kl_shampoo,
        {**OWN, "relative_eps": False, "eps": 0.1},
    ),
    "SOAP": (partial(SOAP, **EVERY_STEP), reference.soap, {}),
    "SOAP, heavy ball": (partial(SOAP, **EVERY_STEP, **SUM), reference.soap, {"momentum": 0.5}),
    "SOAP of spectral norm 1": (
        partial(SOAP, **EVERY_STEP),
        reference.soap,
        {"length": "spectral", "beta2": 0.9},
    ),
    "SOAP from the left": (
        partial(SOAP, **EVERY_STEP, sides="left"),
        partial(reference.soap, slots=(0, None)),
        {},
    ),
    "SOAP from the right": (
        partial(SOAP, **EVERY_STEP, sides="right"),
        partial(reference.soap, slots=(None, 0)),
        {"eps": 0.1},
    ),
}
STEPS, RATE, DECAY = 12, 0.03, 0.2
# Sides differ by one at most: SOAP's first basis is arbitrary in a null space of more dimensions.
SHAPES = [(6, 6), (5, 6), (6, 5)]


def problem(*shape):
    """Weights, and the gradient of ‖A W B - C‖² / 2 with other A and C for each step."""
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    out, in_ = shape[-2:]
    A = randn(STEPS + 1, out, out)
    B, C = randn(in_, in_ + 3), randn(STEPS + 1, out, in_ + 3)
    return randn(*shape), lambda W, t: A[t].mT @ (A[t] @ W @ B - C[t]) @ B.mT


def run(optimizer, parameters, gradient):
    for t in range(1, STEPS + 1):
        stacked = torch.stack([p.detach() for p in parameters])
        gradients = gradient(stacked if len(parameters) > 1 else stacked[0], t)
        for p, G in zip(parameters, gradients if len(parameters) > 1 else [gradients], strict=True):
            p.grad = G.clone()
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decay", ["decoupled", "independent", "cautious"])
@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_is_the_algorithm_of_the_reference(name, decay, shape):
    make, algorithm, options = CASES[name]
    options = {**options, "weight_decay": DECAY, "decay": decay}
    start, gradient = problem(*shape)
    W = nn.Parameter(start.clone())
    run(make([W], RATE, **options), [W], gradient)
    expected = algorithm(start, gradient, STEPS, RATE, **options)
    torch.testing.assert_close(W.detach(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_adamw_group_is_the_algorithm_of_the_reference(shape):
    start, gradient = problem(*shape)
    W = nn.Parameter(start.clone())
    group = {
        "params": [W],
        "geometry": "adamw",
        "lr": RATE,
        "betas": (0.9, 0.95),
        "weight_decay": DECAY,
    }
    run(Muon([group], RATE), [W], gradient)
    expected = reference.adamw(start, gradient, STEPS, RATE, weight_decay=DECAY)
    torch.testing.assert_close(W.detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 6, 6), (3, 5, 6), (2, 6, 5)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"mode": 2}, {"length": "muon", "nesterov": False}, {"mode": 2, "scale": "original"}],
    ids=str,
)
def test_teon_is_the_algorithm_of_the_reference(shape, options):
    start, gradient = problem(*shape)
    layers = [nn.Parameter(W.clone()) for W in start]
    group = {"params": layers, "stacks": [[0]] * len(layers)}
    run(TEON([group], RATE, weight_decay=DECAY, **SVD, **options), layers, gradient)
    expected = reference.teon(start, gradient, STEPS, RATE, weight_decay=DECAY, **options)
    torch.testing.assert_close(
        torch.stack([W.detach() for W in layers]), expected, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("options", [{}, OWN, {**OWN, "sides": "left"}], ids=str)
@pytest.mark.parametrize("shape", [(6, 6), (3, 6), (6, 9)], ids=str)
def test_blocks_are_matrices_of_their_own(options, shape):
    start, gradient = problem(*shape)
    gradients = [gradient(start, t) for t in range(1, STEPS + 1)]  # the same for all blocks
    W = nn.Parameter(start.clone())
    optimizer = Shampoo([W], RATE, block=3, weight_decay=DECAY, **EVERY_STEP, **options)
    run(optimizer, [W], lambda W, t: gradients[t - 1])
    for i in range(0, shape[0], 3):
        for j in range(0, shape[1], 3):
            block = slice(i, i + 3), slice(j, j + 3)
            expected = reference.shampoo(
                start[block],
                lambda W, t, block=block: gradients[t - 1][block],
                STEPS,
                RATE,
                weight_decay=DECAY,
                **options,
            )
            torch.testing.assert_close(W.detach()[block], expected, rtol=1e-8, atol=1e-8)


def test_it_stays_a_page_that_needs_no_other():
    """Of functions of twenty lines at most, which use nothing of this package."""
    tree = ast.parse(inspect.getsource(reference))
    imported = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not [name for name in imported if name.startswith("steepest")]
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        body = function.body[1:]  # without the docstring
        assert body[-1].end_lineno - body[0].lineno < 20, function.name
