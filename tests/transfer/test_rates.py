"""Best learning rates over sizes: where they are known, and where they are measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.files import read_lines
from steepest.transfer import rate_transfer

WIDTHS = [{"width": width} for width in (16, 64)]


class Line(nn.Module):
    """One output; under SGD its error shrinks by |1 - lr width| in a step."""

    def __init__(self, width: int):
        super().__init__()
        self.readout = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(x.expand(-1, self.readout.in_features))


def _ones(i: int) -> Tensor:
    return torch.ones(1, 1)


def _square(model: nn.Module, batch: Tensor) -> Tensor:
    return 0.5 * model(batch).square().mean()


@pytest.mark.parametrize(("rule", "octaves"), [("sp", -2.0), ("mup", 0.0)])
def test_a_drift_that_is_known(rule: Any, octaves: float) -> None:
    """One rate for all sizes must fall as 1 / width; muP divides the readout's by it."""
    found = rate_transfer(
        Line, WIDTHS, _ones, _square, lr=1 / 16, rule=rule, optimizer="sgd", steps=12, seeds=2
    )
    assert [row.lr for row in found.rows] == [1 / 16, 2.0**octaves / 16]
    assert [each.steps for each in found.horizons] == [6, 12]
    for horizon in found.horizons:
        assert horizon.drift == pytest.approx(octaves, abs=1e-6)
        assert horizon.interval.low == pytest.approx(horizon.interval.high, abs=1e-6)
        assert ("does not transfer" in horizon.verdict) == (octaves != 0)
    assert found.passed == (octaves == 0)
    assert f"{octaves:+.2f} octaves" in str(found)
    assert found.horizons[0].advised is None  # there is no line through one point


@pytest.mark.parametrize("rule", ["sp", "mup"])
def test_a_straight_drift_is_followed_by_the_advice(rule: Any) -> None:
    """Where the best rate falls as 1 / width, smaller sizes know that of the last one."""
    sizes = [{"width": width} for width in (4, 16, 64)]

    def lifted(model: nn.Module, batch: Tensor) -> Tensor:
        return 1 + _square(model, batch)  # costs are relative, so none of a loss of zero

    found = rate_transfer(
        Line, sizes, _ones, lifted, lr=1 / 4, rule=rule, optimizer="sgd", steps=12, seeds=2
    )
    for horizon in found.horizons:
        last = horizon.rows[-1]
        assert horizon.advised == pytest.approx(2.0**last.octaves, rel=1e-6)
        assert abs(horizon.advised_penalty) < 0.01
        assert (horizon.penalty > 0.01) == (rule == "sp")
        assert f"{horizon.advised:.3g}, advised by the sizes before, costs" in horizon.verdict


def test_a_grid_grows_to_its_best_rate_and_not_without_end() -> None:
    def run(lr: float) -> Any:
        return rate_transfer(
            Line, WIDTHS, _ones, _square, lr=lr, optimizer="sgd", steps=12, seeds=1
        )

    found = run(2.0**-9)
    assert found.rows[0].lr == 2.0**-4
    assert found.horizons[0].rows[0].scores.keys() == found.rows[0].scores.keys()  # the same runs
    assert min(found.rows[0].scores) == 2.0**-10
    assert max(found.rows[0].scores) == 2.0**-3
    assert found.rows[0].interval is None
    assert "-" in str(found)
    with pytest.raises(ValueError, match=r"no best rate .*: 16\}"):
        run(2.0**-22)


def test_a_run_that_diverges_counts_twice_its_first_loss() -> None:
    found = rate_transfer(
        Line, WIDTHS, _ones, _square, lr=1 / 8, optimizer="sgd", steps=12, seeds=1
    )
    scores = found.rows[0].scores
    assert all(math.isfinite(score) for each in scores.values() for score in each)
    assert scores[1 / 4][0] > 1e3 * scores[1 / 16][0]


def test_a_grid_alone_trains_at_no_rate_between(tmp_path: Path) -> None:
    sizes, path = [{"width": width} for width in (4, 16, 48)], tmp_path / "runs.jsonl"
    how: dict[str, Any] = {"lr": 1 / 4, "rule": "sp", "optimizer": "sgd", "path": path}
    found = rate_transfer(Line, sizes, _ones, _square, grid_only=True, **how)

    def rates() -> list[float]:
        return [json.loads(row["name"])[7] for row in read_lines(path)[0]]

    alone = rates()
    assert all(math.log2(rate).is_integer() for rate in alone)
    for horizon in found.horizons:
        first, last = horizon.rows[0], horizon.rows[-1]
        own, carried = fmean(last.scores[last.lr]), fmean(last.scores[first.lr])
        assert horizon.penalty == pytest.approx(carried / own - 1)
        assert horizon.penalty > 0.01
        assert horizon.advised is not None
        assert horizon.advised_penalty is None
        assert "advised" not in horizon.verdict
    more = rate_transfer(Line, sizes, _ones, _square, **how)
    assert len(rates()) > len(alone)  # those between, and no run twice
    assert len(set(path.read_text().splitlines())) == len(rates())
    for few, all_ in zip(found.horizons, more.horizons, strict=True):
        assert few.rows == all_.rows
        assert few.drift == all_.drift


def test_a_start_where_everything_diverges_finds_its_way_down() -> None:
    found = rate_transfer(Line, WIDTHS, _ones, _square, lr=8.0, optimizer="sgd", steps=12, seeds=2)
    assert [row.lr for row in found.rows] == [1 / 16, 1 / 16]


def test_finished_runs_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"

    def sweep() -> tuple[Any, list[tuple[str, float]], int]:
        named: list[tuple[str, float]] = []
        calls = 0

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return _square(model, batch)

        found = rate_transfer(
            Line, WIDTHS, _ones, loss, lr=1 / 16, optimizer="sgd", steps=5, seeds=2,
            path=path, on_run=lambda said, done: named.append((said, done)),
        )  # fmt: skip
        return found, named, calls

    first, named, calls = sweep()
    runs = len(path.read_text().splitlines())
    assert calls == 6 * runs  # steps, and one forward pass that roles are found by
    assert sum(said.startswith("width 16, rate 0.0625: loss ") for said, _ in named) == 2
    assert all(0 < done <= 1 for _, done in named)
    assert named[-1][1] > 0.6
    again, same, none = sweep()
    assert none == 0
    assert same == named
    assert again == first
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:10])  # killed while it was writing
    third, _, few = sweep()
    assert few == 6
    assert third == first
    assert len(read_lines(path)[0]) == runs
    other = tmp_path / "mine.txt"
    other.write_text("my notes\n")
    with pytest.raises(ValueError, match="line of something else"):
        rate_transfer(Line, WIDTHS, _ones, _square, lr=0.1, path=other)
    assert other.read_text() == "my notes\n"


def test_seeds_give_an_interval_and_sizes_are_needed() -> None:
    found = rate_transfer(
        Line, WIDTHS, lambda i: torch.ones(1, 1) * (1 + i % 3), _square,
        lr=1 / 32, optimizer="adamw", steps=12, seeds=3,
    )  # fmt: skip
    for row in found.rows:
        assert row.interval is None or row.interval.low <= row.octaves <= row.interval.high
        assert row.lr / 2 <= 2.0**row.octaves <= row.lr * 2
    assert json.loads(json.dumps(found.as_dict()))["passed"] == found.passed
    with pytest.raises(ValueError, match=r"1 sizes, .* least 2"):
        rate_transfer(Line, WIDTHS[:1], _ones, _square, lr=0.1)
    with pytest.raises(ValueError, match="steps=1 and seeds=2"):
        rate_transfer(Line, WIDTHS, _ones, _square, lr=0.1, steps=1)


def test_sizes_that_do_not_grow_are_an_error() -> None:
    sizes = [{"width": width} for width in (16, 64, 32)]
    with pytest.raises(ValueError, match="width 16, 64, 32"):
        rate_transfer(Line, sizes, _ones, _square, lr=1 / 16, optimizer="sgd", steps=4, seeds=1)


def test_a_model_that_begins_with_nan_is_an_error() -> None:
    def nan(model: nn.Module, batch: Tensor) -> Tensor:
        return _square(model, batch) * math.nan

    with pytest.raises(ValueError, match="nan at width 16 before"):
        rate_transfer(Line, WIDTHS, _ones, nan, lr=0.1)


def test_one_run_tells_of_both_horizons() -> None:
    """Half of the steps say what a run of that length would, after as long a warm-up."""
    long = rate_transfer(
        Line, WIDTHS, _ones, _square, lr=1 / 64, optimizer="sgd", steps=40, seeds=1
    )
    score = long.horizons[0].rows[0].scores[1 / 64][0]
    losses = []
    torch.manual_seed(0)
    model = Line(16)
    for step in range(20):
        loss = _square(model, _ones(0))
        losses.append(loss.item())
        [gradient] = torch.autograd.grad(loss, [model.readout.weight])
        with torch.no_grad():
            model.readout.weight -= min(1.0, (step + 1) / 4) / 64 * gradient
    assert score == pytest.approx(sum(losses[10:]) / 10, rel=1e-5)


def _digits() -> Any:
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_digits(return_X_y=True)
    images = torch.tensor(X[:512], dtype=torch.float32) / 8 - 1
    classes = torch.tensor(y[:512])
    return lambda i: (images, classes)


def _mlp(width: int) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(64, width, bias=False), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, 10, bias=False),
    )  # fmt: skip
    for layer, gain in ((model[0], 1.0), (model[2], 2**0.5), (model[4], 2**0.5)):
        nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
    nn.init.normal_(model[4].weight, std=2**0.5 / width)
    return model


def test_on_digits_the_rate_stays_under_mup_and_moves_under_ntp() -> None:
    """Full-batch gradient descent on cross entropy, as in arXiv 2402.17457 at a small size."""

    def sweep(rule: Any, lr: float) -> Any:
        return rate_transfer(
            _mlp, [{"width": width} for width in (32, 256)], _digits(),
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            lr=lr, rule=rule, optimizer="sgd", steps=60, seeds=1,
        )  # fmt: skip

    assert all(abs(each.drift) <= 1 for each in sweep("mup", 0.25).horizons)
    assert all(each.drift >= 1.5 for each in sweep("ntp", 0.25).horizons)
