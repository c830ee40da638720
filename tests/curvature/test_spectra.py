"""Sharpness, spectrum, Gauss-Newton split and directional curvature against dense matrices."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.curvature import (
    GaussNewton,
    Hessian,
    directional_curvature,
    effective_rank,
    gauss_newton_split,
    sharpness,
    spectrum,
)

DOUBLE = torch.float64


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(30, 6, dtype=DOUBLE), torch.randint(4, (30,))


def _loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _dense(model: nn.Module, batch: Any, kind: Any = Hessian) -> Tensor:
    return kind(model, _loss, batch).to_dense()


def test_sharpness_is_the_largest_eigenvalue(model: nn.Module, batch: Any) -> None:
    values, vectors = torch.linalg.eigh(_dense(model, batch))
    found = sharpness(model, _loss, batch, tolerance=1e-8)
    assert float(found) == found.value == pytest.approx(values[-1].item(), rel=1e-7)
    assert abs(values[-1].item() - found.value) <= found.error <= 1e-8 * found.value
    assert abs(torch.dot(found.vector, vectors[:, -1])).item() == pytest.approx(1, abs=1e-5)
    assert found.converged
    assert found.products <= len(values)


def test_a_spectrum_from_a_single_probe(model: nn.Module, batch: Any) -> None:
    """Whose products are too few for a trace to any accuracy, and enough for one with its error."""
    H = _dense(model, batch)
    found = spectrum(model, _loss, batch, count=1, probes=1, steps=3)
    assert 2 <= found.trace.products <= 5
    assert abs(found.trace.value - H.trace().item()) <= 4 * found.trace.error


def test_sharpness_of_a_block(model: nn.Module, batch: Any) -> None:
    block = Hessian(model, _loss, batch, ["2.weight"]).to_dense()
    found = sharpness(model, _loss, batch, ["2.weight"], tolerance=1e-8)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(block)[-1].item(), rel=1e-7)


def test_sharpness_is_not_the_largest_magnitude() -> None:
    """A network that is at a saddle with the larger curvature downwards."""
    model = nn.Linear(2, 1, bias=False).double()

    def loss(model: Any, x: Tensor) -> Tensor:
        w = model.weight.view(-1)
        return x.sum() * (0.5 * w[0] ** 2 - 5 * w[1] ** 2)

    x = torch.ones(1, dtype=DOUBLE)
    assert sharpness(model, loss, x).value == pytest.approx(1)
    both = spectrum(model, loss, x, count=1).extremes.values
    torch.testing.assert_close(both, torch.tensor([1.0, -10.0], dtype=DOUBLE))


def test_a_start_saves_products_and_changes_nothing(model: nn.Module, batch: Any) -> None:
    cold = sharpness(model, _loss, batch, tolerance=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-4 * torch.randn_like(p)
    warm = sharpness(model, _loss, batch, tolerance=1e-3, start=cold)
    again = sharpness(model, _loss, batch, tolerance=1e-3, start=cold.vector)
    fresh = sharpness(model, _loss, batch, tolerance=1e-3)
    assert warm.products <= again.products + 1 < fresh.products + 1
    assert warm.value == pytest.approx(fresh.value, rel=2e-3)


def test_one_generator_is_one_result(model: nn.Module, batch: Any) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (
        sharpness(model, _loss, batch, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(one.vector, two.vector)
    assert torch.equal(before, torch.get_rng_state())


def test_a_start_of_another_model(model: nn.Module, batch: Any) -> None:
    with pytest.raises(ValueError, match=r"start .*\(3,\).*\(92,\)"):
        sharpness(model, _loss, batch, start=torch.ones(3))


def test_spectrum(model: nn.Module, batch: Any) -> None:
    values = torch.linalg.eigvalsh(_dense(model, batch))
    found = spectrum(
        model, _loss, batch, count=3, probes=40, generator=torch.Generator().manual_seed(0)
    )
    assert found.size == len(values)
    expected = torch.cat([values[-3:].flip(0), values[:3].flip(0)])
    torch.testing.assert_close(found.extremes.values, expected, rtol=2e-3, atol=1e-5)
    assert abs(found.trace.value - values.sum().item()) <= 4 * found.trace.error
    nuclear = values.abs().sum().item()
    assert abs(found.nuclear_norm.value - nuclear) <= 4 * found.nuclear_norm.error
    assert found.nuclear_norm.error < 0.2 * nuclear
    rank = nuclear / values.abs().max().item()
    assert abs(found.effective_rank.value - rank) <= 4 * found.effective_rank.error


def test_effective_rank(model: nn.Module, batch: Any) -> None:
    values = torch.linalg.eigvalsh(_dense(model, batch)).abs()
    generator = torch.Generator().manual_seed(0)
    found = effective_rank(model, _loss, batch, probes=60, generator=generator)
    true = (values.sum() / values.max()).item()
    assert abs(found.value - true) <= 4 * found.error
    assert found.error < 0.15 * true


def test_effective_rank_counts_equal_eigenvalues() -> None:
    model = nn.Linear(5, 3, bias=False)
    with pytest.raises(ValueError, match="got a Hessian of zero"):
        effective_rank(model, lambda model, x: model(x).sum(), torch.ones(2, 5))
    x = torch.eye(5)
    found = effective_rank(model, lambda model, x: model(x).square().sum(), x)
    assert found.value == pytest.approx(15, rel=1e-4)  # the Hessian is twice the identity


def test_gauss_newton_split(model: nn.Module, batch: Any) -> None:
    H, G = (_dense(model, batch, kind) for kind in (Hessian, GaussNewton))
    found = gauss_newton_split(model, _loss, batch, generator=torch.Generator().manual_seed(0))
    for part, matrix in (
        (found.hessian, H),
        (found.gauss_newton, G),
        (found.functional, H - G),
    ):
        values = torch.linalg.eigvalsh(matrix)
        scale = values.abs().max().item()
        assert part.largest == pytest.approx(values[-1].item(), rel=3e-3)
        assert part.smallest == pytest.approx(values[0].item(), rel=3e-3, abs=1e-3 * scale)
        assert abs(part.trace.value - matrix.trace().item()) <= 4 * part.trace.error + 1e-9
        assert part.converged
    assert found.functional.smallest < 0 < found.functional.largest


def test_functional_part_of_a_linear_model_is_zero(batch: Any) -> None:
    model = nn.Linear(6, 4).double()
    found = gauss_newton_split(model, _loss, batch)
    assert abs(found.functional.largest) < 1e-12
    assert abs(found.functional.trace.value) < 1e-10


def test_curvature_along_a_direction(model: nn.Module, batch: Any) -> None:
    D = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    v = torch.cat([d.reshape(-1) for d in D.values()])
    H = Hessian(model, _loss, batch)
    found = directional_curvature(model, _loss, batch, D)
    assert found.curvature == pytest.approx((v @ H.to_dense() @ v).item(), rel=1e-10)
    assert found.gain == pytest.approx((v @ H.gradient()).item(), rel=1e-10)
    assert found.norm == pytest.approx(v.norm().item())
    assert found.rayleigh == pytest.approx(found.curvature / found.norm**2)


def test_the_best_step_is_that_of_the_loss_itself_where_it_is_quadratic() -> None:
    torch.manual_seed(0)
    model, X = nn.Linear(5, 2, bias=False).double(), torch.randn(20, 5, dtype=DOUBLE)
    Y = torch.randn(20, 2, dtype=DOUBLE)

    def loss(model: Any, X: Tensor) -> Tensor:
        return 0.5 * (model(X) - Y).square().mean()

    D = torch.autograd.grad(loss(model, X), model.weight)[0]
    found = directional_curvature(model, loss, X, {"weight": D})

    def at(t: float) -> float:
        moved = deepcopy(model)
        with torch.no_grad():
            moved.weight -= t * D
        return loss(moved, X).item()

    assert at(0) - at(found.best_step) == pytest.approx(found.decrease, rel=1e-10)
    assert at(found.best_step) < min(at(0.9 * found.best_step), at(1.1 * found.best_step))


def test_without_a_minimum_the_best_step_is_infinite() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    D, x = {"weight": torch.ones(1, 2)}, torch.ones(1)
    found = directional_curvature(model, lambda m, x: -m.weight.square().sum() * x.sum(), x, D)
    assert found.curvature == pytest.approx(-4)
    assert found.gain < 0
    assert found.best_step == -math.inf
    assert found.decrease == math.inf


def test_directions_that_cannot_be(model: nn.Module, batch: Any) -> None:
    good = {"0.weight": torch.ones(8, 6)}
    for direction, sentence in (
        ({"0.weight": torch.ones(6, 8)}, r"shape \(6, 8\) for 0\."),
        ({"nothing": torch.ones(1)}, "'nothing', which no"),
        ({"*.weight": torch.ones(1)}, r"pattern .* 0\.weight"),
        ({"0.weight": torch.zeros(8, 6)}, "norm 0.0"),
        ({"0.weight": torch.full((8, 6), math.nan)}, "norm nan"),
    ):
        with pytest.raises(ValueError, match=sentence):
            directional_curvature(model, _loss, batch, direction)
    directional_curvature(model, _loss, batch, good)


def test_errors_in_float32_are_no_smaller_than_rounding() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.linspace(0.1, 1.7, 12).view(3, 4)

    def loss(model: Any, x: Tensor) -> Tensor:
        return model(x).square().mean()

    true = torch.linalg.eigvalsh(Hessian(model, loss, x, dtype=DOUBLE).to_dense())[-1].item()
    eps = torch.finfo(torch.float32).eps
    top = sharpness(model, loss, x, tolerance=1e-6)
    assert top.error >= eps * true
    assert abs(top.value - true) <= top.error
    assert (spectrum(model, loss, x).extremes.errors >= eps * true).all()
