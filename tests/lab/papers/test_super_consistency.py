"""The closed forms of super consistency against what autograd says in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from steepest.lab.papers.super_consistency.digits_networks import (
    digit_images,
    drawn_batches,
    normal_mlp,
    reseeded,
)
from steepest.lab.papers.super_consistency.first_step import best_first_rate, limit_rate
from steepest.lab.papers.super_consistency.two_layer_linear import TwoLayerLinear


def test_the_coupling_of_two_layers_is_an_eigenvalue_of_the_off_diagonal_blocks() -> None:
    X, y = torch.randn(7, 20, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    model = TwoLayerLinear(3, gamma=1.7)

    def weighted_outputs(V: torch.Tensor, E: torch.Tensor) -> torch.Tensor:
        residuals = (X @ model.V.T @ model.E / (1.7 * math.sqrt(3 * 20)) - y).detach()
        outputs = X @ V.T @ E / (1.7 * math.sqrt(3 * 20))
        return (residuals * outputs).mean()  # its second derivative is R

    blocks = torch.autograd.functional.hessian(weighted_outputs, (model.V.data, model.E.data))
    rows = [[b.reshape(a.numel(), -1) for b in row] for a, row in
            zip((model.V, model.E), blocks, strict=True)]  # fmt: skip
    R = torch.cat([torch.cat(row, 1) for row in rows])
    assert torch.linalg.eigvalsh(R).max().item() == pytest.approx(model.coupling((X, y)), rel=1e-9)


def test_the_best_first_rate_of_a_wide_network_is_near_its_limit() -> None:
    torch.manual_seed(0)
    X = torch.randn(50, 1, dtype=torch.float64)
    y = X[:, 0]
    rates = [best_first_rate(X, y, 400, 1.0) for _ in range(5)]
    assert sorted(rates)[2] == pytest.approx(limit_rate(X, y), rel=0.2)


def test_other_seeds_build_other_models_and_the_same_seed_the_same() -> None:
    def weight(seed: int, of_sweep: int) -> torch.Tensor:
        torch.manual_seed(of_sweep)
        model: nn.Module = reseeded(normal_mlp, seed)(8)
        return model.get_parameter("0.weight").detach()

    assert torch.equal(weight(1, 0), weight(1, 0))
    assert not torch.equal(weight(1, 0), weight(2, 0))
    assert not torch.equal(weight(1, 0), weight(1, 1))


def test_batch_0_has_all_images_and_others_so_many_of_them() -> None:
    batches = drawn_batches(digit_images(30), 4, seed=1)
    assert len(batches(0)[0]) == 30
    assert len(batches(1)[0]) == 4
    assert torch.equal(batches(1)[0], batches(1)[0])
