"""What theory says exactly of linear networks under the rules, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, median
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from steepest.curvature import GaussNewton, Hessian
from steepest.transfer import parametrize

BASE = {"width": 8}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]).flatten() - batch[1]).square().mean()


def _data(examples: int, inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, inputs, generator=generator)
    return x, torch.randn(examples, generator=generator) + x[:, 0]


@pytest.mark.parametrize("rule", ["mup", "ntp", "sp"])
def test_the_residual_eigenvalue_of_two_linear_layers(rule: Any) -> None:
    """f = e V x. H - G is width copies of [[0, qᵀ], [q, 0]], q = (1/P) Σ r x, so λ_max = ‖q‖.

    In the units of the rates it is sqrt(r_1 r_2) ‖q‖: of order 1 under muP, where sharpness does
    not depend on the width, and of order 1 / sqrt(width) under NTP (arXiv 2402.17457, section 4).
    """
    x, y = _data(20, 5)

    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(5, width, bias=False), nn.Linear(width, 1, bias=False))

    scaled = []
    for width in (8, 32):
        torch.manual_seed(1)
        made = parametrize(build, BASE, {"width": width}, rule=rule, optimizer="sgd")
        given = made.model, _half_square, (x, y)
        R = Hessian(*given).to_dense() - GaussNewton(*given).to_dense()
        rates = [made[name].lr for name, _ in made.model.named_parameters()]
        sizes = [p.numel() for p in made.model.parameters()]
        root = torch.cat(
            [torch.full((n,), rate**0.5) for n, rate in zip(sizes, rates, strict=True)]
        )
        values = torch.linalg.eigvalsh(root[:, None] * R * root)
        with torch.no_grad():
            residual = made.model(x).flatten() - y
        q = (residual[:, None] * x).mean(0)
        expected = math.prod(rates) ** 0.5 * q.norm()
        torch.testing.assert_close(values[-width:], expected.expand(width), rtol=1e-9, atol=0.0)
        torch.testing.assert_close(values[:width], -expected.expand(width), rtol=1e-9, atol=0.0)
        scaled.append((expected / q.norm()).item())
    power = math.log2(scaled[1] / scaled[0]) / 2
    assert power == pytest.approx({"mup": 0.0, "ntp": -0.5, "sp": 0.0}[rule], abs=1e-9)


def _first_step(width: int, seed: int, rule: Any, readout: float) -> float:
    """The best length of the first step of a deep linear network, over its limit."""
    x, y = _data(200, 1)
    layers = 3

    def build(width: int) -> nn.Module:
        frozen_in, frozen_out = nn.Linear(1, width, bias=False), nn.Linear(width, 1, bias=False)
        trained = [nn.Linear(width, width, bias=False) for _ in range(layers)]
        nn.init.normal_(frozen_in.weight)
        nn.init.normal_(frozen_out.weight, std=1.0 / width)
        for layer in trained:
            nn.init.normal_(layer.weight, std=width**-0.5)
        return nn.Sequential(frozen_in, *trained, frozen_out)

    torch.manual_seed(seed)
    made = parametrize(build, {"width": 64}, {"width": width}, rule=rule, optimizer="sgd")
    frozen = made.model[0].weight, made.model[-1].weight
    if readout:
        nn.init.normal_(frozen[1], std=readout)
    trained = [p for p in made.model.parameters() if all(p is not f for f in frozen)]
    rates = [made[f"{k}.weight"].lr for k in range(1, layers + 1)]
    gradients = torch.autograd.grad(_half_square(made.model, (x, y)), trained)
    before = [p.detach().clone() for p in trained]

    @torch.no_grad()
    def loss(rate: float) -> float:
        for p, start, gradient, factor in zip(trained, before, gradients, rates, strict=True):
            p.copy_(start - rate * factor * gradient)
        return _half_square(made.model, (x, y)).item()

    limit = len(x) / layers / x.square().sum().item()  # (m / L) yᵀK y / ‖K y‖² for K = x xᵀ
    found = minimize_scalar(loss, bounds=(0.0, 8 * limit), method="bounded")
    return float(found.x) / limit


def test_the_best_first_step_of_a_deep_linear_network_has_its_limit() -> None:
    """Hayou, arXiv 2511.01734: η → (m/L) yᵀK y / ‖K y‖² under muP, with an error as 1/sqrt(n)."""
    errors = {
        width: fmean(abs(_first_step(width, seed, "mup", 0.0) - 1) for seed in range(8))
        for width in (64, 512)
    }
    assert errors[512] <= 0.25
    assert errors[512] < errors[64] / 2


def test_with_a_readout_of_standard_size_the_best_first_step_falls_with_the_width() -> None:
    steps = [
        median(_first_step(width, seed, "sp", width**-0.5) for seed in range(5)) * width
        for width in (64, 512)
    ]
    assert 0.5 < steps[1] / steps[0] < 2  # as 1 / width
    assert steps[1] / 512 < 0.1
