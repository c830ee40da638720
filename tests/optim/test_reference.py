"""The optimizers are the algorithms that `reference.py` spells out, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steepest import SOAP, TEON, KLShampoo, Muon, Shampoo, SignSGD, Signum, SpectralDescent
from steepest.optim import reference

SVD = {"method": "svd"}
EVERY_STEP = {"interval": 1}
CASES = {
    "SignSGD": (SignSGD, {}, reference.sign_sgd, {}),
    "Signum": (Signum, {}, reference.signum, {}),
    "SpectralDescent": (SpectralDescent, SVD, reference.spectral_descent, {}),
    "Muon": (Muon, SVD, reference.muon, {}),
    "Muon without Nesterov": (
        Muon,
        {**SVD, "nesterov": False},
        reference.muon,
        {"nesterov": False},
    ),
    "Shampoo": (Shampoo, EVERY_STEP, reference.shampoo, {}),
    "Shampoo, 1/4": (
        Shampoo,
        {**EVERY_STEP, "exponent": 1 / 4},
        reference.shampoo,
        {"exponent": 1 / 4},
    ),
    "KLShampoo": (KLShampoo, {**EVERY_STEP, "length": "own"}, reference.kl_shampoo, {}),
    "SOAP": (SOAP, EVERY_STEP, reference.soap, {}),
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
@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_is_the_algorithm_of_the_reference(name, shape):
    make, settings, algorithm, same = CASES[name]
    start, gradient = problem(*shape)
    W = nn.Parameter(start.clone())
    run(make([W], RATE, weight_decay=DECAY, **settings), [W], gradient)
    expected = algorithm(start, gradient, STEPS, RATE, weight_decay=DECAY, **same)
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
def test_teon_is_the_algorithm_of_the_reference(shape):
    start, gradient = problem(*shape)
    layers = [nn.Parameter(W.clone()) for W in start]
    group = {"params": layers, "stacks": [[0]] * len(layers)}
    run(TEON([group], RATE, weight_decay=DECAY, **SVD), layers, gradient)
    expected = reference.teon(start, gradient, STEPS, RATE, weight_decay=DECAY)
    torch.testing.assert_close(
        torch.stack([W.detach() for W in layers]), expected, rtol=1e-8, atol=1e-8
    )
