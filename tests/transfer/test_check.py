"""The whole check and the advice, where the answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steepest.statistics import Interval
from steepest.transfer import Horizon, RateTransfer, SizeOptimum, advise, check_transfer


class Line(nn.Module):
    """Σ w over width entries and depth layers: the best rate of SGD is 1 / (width depth)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = sum(layer(x.expand(-1, layer.in_features)) for layer in self.layers)
        return out


def _ones(i: int) -> Tensor:
    return torch.ones(1, 1)


def _half_square(model: nn.Module, x: Tensor) -> Tensor:
    return 0.5 * (model(x) - 3.0).square().mean()


SIZES = [
    [{"width": 4}, {"width": 16}],
    [{"depth": 2}, {"depth": 8}],
]


def _check(rule: Any = "mup", **how: Any) -> Any:
    return check_transfer(
        Line, SIZES, _ones, _half_square,
        lr=1 / 16, rule=rule, optimizer="sgd", steps=12, seeds=2, **how,
    )  # fmt: skip


def test_what_transfers_over_the_width_only(tmp_path: Path) -> None:
    phases: list[str] = []
    found = _check(
        path=tmp_path / "runs.jsonl", on_run=lambda phase, said, done: phases.append(phase)
    )
    assert list(dict.fromkeys(phases)) == [
        f"{phase} over {axis}"
        for axis in ("width", "depth")
        for phase in ("rates", "coordinates", "sharpness")
    ]
    assert not found.passed
    assert found.verdict == "transfers over width only"
    width, depth = found.axes
    assert width.rates.passed
    assert [row.size for row in depth.rates.rows] == [{"depth": 2}, {"depth": 8}]
    assert depth.rates.horizons[-1].drift == pytest.approx(-2, abs=1e-3)
    assert depth.deepens
    assert not width.deepens
    assert 'the rule: "mup" says nothing of depth, "completep" does' in found.retune
    assert found.advice.target == {"width": 16, "depth": 8}
    assert found.advice.slopes["width"][0] == pytest.approx(0, abs=1e-3)
    assert found.advice.slopes["depth"][0] == pytest.approx(-1, abs=1e-3)
    assert math.log2(found.advice.lr) == pytest.approx(depth.rates.rows[-1].octaves, abs=1e-3)
    text = str(found)
    assert "transfers over width only" in text
    assert "learning rate for width 16, depth 8" in text
    assert json.loads(json.dumps(found.as_dict()))["verdict"] == found.verdict


def test_the_target_may_be_larger_than_what_was_tried() -> None:
    found = _check(target={"width": 64, "depth": 32})
    octaves = found.axes[0].rates.rows[0].octaves - 4  # four doublings of the depth
    assert math.log2(found.advice.lr) == pytest.approx(octaves, abs=0.02)


def test_a_target_of_what_does_not_grow_is_an_error() -> None:
    for target in ({"widht": 64}, {"width": 64, "heads": 8}):
        with pytest.raises(ValueError, match="none of the sizes grows"):
            _check(target=target)


def test_a_run_that_blows_up_is_said_and_ends_nothing() -> None:
    found = _check(rule="sp")
    assert found.verdict == "does not transfer"
    assert any("the learning rate at each width" in said for said in found.retune)
    assert all(axis.consistency or axis.blown for axis in found.axes)


def _rates(name: str, octaves: dict[int, tuple[float, ...]]) -> RateTransfer:
    """Best rates whose parabolas have these vertices, one for each seed."""
    rows = []
    for value, vertices in octaves.items():
        middle = round(sum(vertices) / len(vertices))
        scores = {
            2.0**k: tuple(1 + (k - vertex) ** 2 for vertex in vertices)
            for k in (middle - 1, middle, middle + 1)
        }
        rows.append(SizeOptimum({name: value}, 2.0**middle, 0.0, None, 1.0, scores))
    return RateTransfer(
        "mup", "adamw", (Horizon(10, tuple(rows), 0.0, Interval(0, 0, 0), 0.0, None),)
    )


def test_advice_is_a_line_with_its_interval() -> None:
    """Against the textbook: the slope's standard error, and the interval of a mean response."""
    from scipy import stats

    octaves = {64: (-5.2, -4.9), 128: (-5.0, -4.8), 256: (-4.9, -4.5), 512: (-4.6, -4.4)}
    found = advise([_rates("width", octaves)], {"width": 2048})
    x = np.repeat([0.0, 1.0, 2.0, 3.0], 2)
    y = np.array([value for each in octaves.values() for value in each])
    line = stats.linregress(x, y)
    assert found is not None
    assert found.points == 8
    assert found.slopes["width"] == pytest.approx((line.slope, line.stderr))
    predicted = line.intercept + 5 * line.slope
    residual = math.sqrt(np.square(y - line.intercept - line.slope * x).sum() / 6)
    spread = residual * math.sqrt(1 / 8 + (5 - x.mean()) ** 2 / np.square(x - x.mean()).sum())
    half = stats.t.ppf(0.9, 6) * spread
    assert math.log2(found.lr) == pytest.approx(predicted)
    assert math.log2(found.low) == pytest.approx(predicted - half)
    assert math.log2(found.high) == pytest.approx(predicted + half)


def test_advice_needs_points_and_a_target() -> None:
    few = [_rates("width", {64: (-5.0,), 128: (-5.0,)})]
    assert advise(few, {"width": 256}) is None
    with pytest.raises(ValueError, match="target without width"):
        advise(few, {"depth": 2})


def test_the_transfers_have_their_old_name_for_one_version() -> None:
    transfers = [_rates("width", {64: (-5.0, -5.5), 128: (-5.0, -5.0), 256: (-5.0, -6.0)})]
    advice = advise(transfers, {"width": 512})
    assert advise(transfers=transfers, target={"width": 512}) == advice is not None
    with pytest.warns(DeprecationWarning, match="transfers"):
        assert advise(found=transfers, target={"width": 512}) == advice  # type: ignore[call-arg]
