"""The paper on Shampoo: its helpers against plain formulas, and the names of what it compares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import steepest
from steepest.lab.papers.claim import Comparison
from steepest.lab.papers.clarifying_shampoo import PAPER, along_a_run, bag_averages, localization
from steepest.lab.papers.clarifying_shampoo.updates import semi_orthogonality, sine, zero_weight
from steepest.lab.train.optimizers import named_optimizer

COMPARISONS = {
    c.experiment.name: c.experiment for c in PAPER.claims if isinstance(c.experiment, Comparison)
}


@pytest.mark.parametrize("comparison", COMPARISONS.values(), ids=list(COMPARISONS))
def test_what_is_compared_has_the_names_under_which_losses_are_kept(comparison: Comparison) -> None:
    specs = comparison.scales["cpu"].sizes["optimizers"]
    assert [named_optimizer(spec).name for spec in specs] == list(specs)
    losses = {spec: float(i) for i, spec in enumerate(specs)}
    for claim in PAPER.claims:
        if claim.experiment is comparison:
            assert math.isfinite(claim.value(losses))


def test_semi_orthogonality_is_zero_for_the_identity_alone() -> None:
    assert semi_orthogonality(3 * torch.eye(4), 2 * torch.eye(6)) == (0.0, 0.0)
    left, right = semi_orthogonality(torch.diag(torch.tensor([2.0, 0.0])), torch.eye(3))
    assert (left, right) == pytest.approx((1.0, 0.0))


def test_the_sine_is_that_of_the_angle() -> None:
    A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert sine(A, 3 * A) == 0.0
    assert sine(A, B) == pytest.approx(math.sqrt(0.5))


def test_factors_of_kl_shampoo_are_those_of_a_matrix_normal_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (3, 4))
    bag = A @ torch.randn(20_000, 3, 4, generator=generator, dtype=torch.float64) @ B
    fit = bag_averages.kl_factors(bag, 30)
    covariance = torch.kron(A @ A.mT, B.mT @ B)
    error = (torch.kron(fit.left, fit.right) - covariance).norm() / covariance.norm()
    assert float(error) < 0.05


def test_one_sided_averages_over_a_run_are_exact() -> None:
    W = zero_weight(4, 6)
    optimizer = steepest.Shampoo([W], sides="left", beta2=0.95, eps=0, interval=1, length="own")
    gradients = [torch.randn(4, 6, dtype=torch.float64) for _ in range(20)]
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
    assert along_a_run.distances(optimizer, W, gradients)[0] < 1e-10


def test_every_parameter_is_trained_wherever_shampoo_is() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
            self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 5)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.hidden(self.norm(self.embedding(tokens))).relu())

    for build in (localization.nowhere, localization.on_matrices, localization.on_all):
        model = Network()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = build(model, 0.1)
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(moved)
