"""Super consistency: sharpness and kernel along training, against what is known in closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.transfer import parametrize, super_consistency
from steepest.transfer.consistency import _Kernel
from steepest.transfer.coordinates import BlownUp

WIDTHS = [{"width": width} for width in (32, 512)]


def _digits() -> Any:
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_digits(return_X_y=True)
    batch = torch.tensor(X[:512], dtype=torch.float32) / 8 - 1, torch.tensor(y[:512])
    return lambda i: batch


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Scaled(nn.Module):
    """64 -> N -> N -> 10 of standard normal weights, as in arXiv 2402.17457: y = c W x / sqrt(fan).

    The fans are those of the base, width 32, so the rule has all the dependence on the width.
    """

    def __init__(self, width: int, readout: float = 1.0):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(*fans, bias=False) for fans in ((64, width), (width, width), (width, 10))
        )
        for layer in self.layers:
            nn.init.normal_(layer.weight)
        self.scales = (1 / 8, (2 / 32) ** 0.5, readout / 32**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = layer(x) * scale
            x = x if layer is self.layers[-1] else x.relu()
        return x


def small_readout(width: int) -> nn.Module:
    return Scaled(width, readout=32**-0.5)


def random_features(width: int) -> nn.Module:
    model = Scaled(width, readout=32**-0.5)
    for layer in model.layers[:2]:
        layer.weight.requires_grad_(False)
    return model


def test_sharpness_is_consistent_under_mup_and_not_under_ntp() -> None:
    """Full-batch gradient descent, cross entropy: the criteria are those of the pilot."""
    settings: Any = {"optimizer": "sgd", "steps": 120, "every": 20, "seeds": 1}
    digits = _digits()
    mup = super_consistency(
        small_readout, WIDTHS, digits, _cross_entropy, lr=16.0, rule="mup", **settings
    )
    assert mup.spread <= 1.25, str(mup)
    assert mup.passed is None  # a single seed has no interval
    assert mup.verdict.startswith("cannot tell: over width 32 to 512")
    assert "take two or more" in mup.verdict
    assert all(0.8 <= row.ending[0] <= 1.1 for row in mup.rows)  # at 2 / lr
    assert all(row.ratios[0] < 0.1 for row in mup.rows)  # and far below it at the start
    assert mup.loss_spread > mup.spread
    assert mup.measure == "preconditioned Hessian"
    assert abs(mup.movement) < 0.2
    ntp = super_consistency(Scaled, WIDTHS, digits, _cross_entropy, lr=0.5, rule="ntp", **settings)
    assert ntp.spread >= 2, str(ntp)
    assert ntp.rows[-1].ratios[-1] <= ntp.rows[-1].ratios[0]  # no sharpening
    assert ntp.movement < -0.4
    assert ntp.is_lazy is None


def test_random_features_do_not_sharpen() -> None:
    found = super_consistency(
        random_features, WIDTHS, _digits(), _cross_entropy,
        lr=16.0, optimizer="sgd", steps=120, every=20, seeds=1,
    )  # fmt: skip
    for row in found.rows:
        assert row.ratios[-1] / row.ratios[0] < 1.6
        assert max(row.ratios) < 0.2


class Line(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.readout = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(x.expand(-1, self.readout.in_features))


def _half_square(model: nn.Module, x: Tensor) -> Tensor:
    return 0.5 * model(x).square().mean()


@pytest.mark.parametrize(("rule", "spread"), [("mup", 1.0), ("sp", 4.0)])
def test_a_sharpness_that_is_known(rule: Any, spread: float) -> None:
    """The Hessian of w -> ½ (Σ w)² is that of ones: λ = width, rescaled by the rate 1 / width."""
    widths = [{"width": 16}, {"width": 64}]
    found = super_consistency(
        Line, widths, lambda i: torch.ones(1, 1), _half_square,
        lr=1 / 64, rule=rule, optimizer="sgd", steps=12, seeds=2,
    )  # fmt: skip
    assert found.spread == pytest.approx(spread, rel=1e-4)
    assert found.passed == (spread == 1)
    assert ("not super consistent" in found.verdict) == (spread == 4)
    assert found.is_lazy is None
    assert found.rows[0].ratios[-1] == pytest.approx(16 / 64 / 2, rel=1e-4)
    assert [row.movement for row in found.rows] == [(0.0, 0.0)] * 2  # linear in its weights
    assert math.isnan(found.movement)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "signum", "shampoo"])
def test_other_optimizers_are_measured_in_their_own_geometry(optimizer: Any) -> None:
    found = super_consistency(
        small_readout, [{"width": 16}, {"width": 32}], _digits(), _cross_entropy,
        lr=0.01, optimizer=optimizer, steps=9, every=3, seeds=1,
    )  # fmt: skip
    measure = "one step" if optimizer in ("muon", "signum") else "preconditioned Hessian"
    assert found.measure == measure
    assert found.rows[0].steps == (3, 6, 9)
    assert all(math.isfinite(ratio) and ratio for row in found.rows for ratio in row.ratios)


def test_the_kernel_is_that_of_plain_weights_whatever_is_folded() -> None:
    """J D Jᵀ of the folded model against J Jᵀ of one whose forward has the multipliers of NTP."""

    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width, bias=False), nn.Linear(width, 2, bias=False))

    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    made = parametrize(build, {"width": 8}, {"width": 32}, rule="ntp")
    kernel = _Kernel(made, build, x, lambda model, x: model(x).sum(), {}).matrix()
    first, second = (p.detach() for p in made.model.parameters())
    grown = 4**0.5  # second = W / sqrt(4), with one rate for W and the first
    J1 = torch.einsum("oh,bi->bohi", second, x).flatten(2)
    h = x @ first.T
    J2 = torch.einsum("op,bh->boph", torch.eye(2), h).flatten(2) / grown
    J = torch.cat([J1, J2], dim=-1).flatten(0, 1)
    torch.testing.assert_close(kernel, J @ J.T, rtol=1e-4, atol=1e-5)


def test_finished_runs_are_kept_and_plain_values_come_out(tmp_path: Path) -> None:
    path, calls = tmp_path / "runs.jsonl", 0

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return _half_square(model, batch)

    def follow() -> Any:
        return super_consistency(
            Line, [{"width": 4}, {"width": 8}], lambda i: torch.ones(1, 1), loss,
            lr=0.1, optimizer="sgd", steps=6, seeds=1, path=path,
        )  # fmt: skip

    first = follow()
    ran, calls = calls, 0
    assert ran > 0
    assert str(follow()) == str(first)
    assert calls == 0
    assert json.loads(json.dumps(first.as_dict()))["rows"][0]["size"] == {"width": 4}


def test_bad_arguments() -> None:
    def follow(lr: float = 0.1, **how: Any) -> Any:
        return super_consistency(
            Line, [{"width": 4}, {"width": 8}], lambda i: torch.ones(1, 1), _half_square,
            lr=lr, optimizer="sgd", seeds=1, **how,
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"steps=4 .* every 2"):
        follow(steps=4, every=2)
    with pytest.raises(BlownUp, match="width 4 that blew up"):
        follow(lr=100.0, steps=30)
