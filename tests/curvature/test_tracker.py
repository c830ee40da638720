"""The tracker: changes nothing, needs few products, goes on where it was stopped."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steepest
from steepest.curvature import SharpnessTracker, sharpness
from steepest.files import read_lines

Build = Any
OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "muon": lambda p: steepest.Muon(p, 1e-3),
    "soap": lambda p: steepest.SOAP(p, 1e-3),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4, bias=False)
    )


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 8, generator=generator), torch.arange(64) % 4


def _loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _train(
    model: nn.Module, optimizer: Any, steps: int, tracker: SharpnessTracker | None = None
) -> None:
    batch = _batch()
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model, batch).backward()
        optimizer.step()
        if tracker:
            tracker.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_bit_for_bit(name: str) -> None:
    """Also with dropout, which draws from the global generator."""
    models = _model(), _model()
    for i, model in enumerate(models):
        torch.manual_seed(7)
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        tracker = SharpnessTracker(model, _loss, _batch(), optimizer, every=2) if i else None
        _train(model, optimizer, 7, tracker)
        assert tracker is None or [r["step"] for r in tracker.records] == [2, 4, 6]
        assert all(module.training for module in model.modules())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_goes_on_measures_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = _model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    path = tmp_path / "sharpness.jsonl"
    tracker = SharpnessTracker(model, _loss, _batch(), optimizer, every=2, path=path)
    _train(model, optimizer, 5, tracker)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "tracker": tracker.state_dict(),
    }
    torch.save(state, tmp_path / "state.pt")
    _train(model, optimizer, 5, tracker)
    expected = tracker.records
    with open(path, "a") as file:
        file.write('{"step": 99, "los')  # killed while writing

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model = _model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    again = SharpnessTracker(model, _loss, _batch(), optimizer, every=2, path=path)
    again.load_state_dict(state["tracker"])
    assert [record["step"] for record in again.records] == [2, 4]
    _train(model, optimizer, 5, again)

    def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [{k: v for k, v in r.items() if k != "seconds"} for r in records]
        return json.loads(json.dumps(kept))

    assert numbers(again.records) == numbers(expected)
    rows, damaged = read_lines(path)
    assert numbers(rows) == numbers(expected)
    assert not damaged


def test_records_agree_with_what_is_measured_by_itself() -> None:
    model, batch = _model(), _batch()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    tracker = SharpnessTracker(model, _loss, batch, optimizer, every=3, tolerance=1e-4)
    _train(model, optimizer, 3, tracker)
    (record,) = tracker.records
    model.eval()
    assert record["loss"] == pytest.approx(_loss(model, batch).item(), rel=1e-5)
    found = sharpness(model, _loss, batch, tolerance=1e-5)
    assert record["sharpness"] == pytest.approx(found.value, rel=3e-4)
    (part,) = record["stability"]
    assert part["value"] == pytest.approx(found.value, rel=3e-4)
    assert part["threshold"] == pytest.approx(2 / 0.05)
    assert part["ratio"] == pytest.approx(part["value"] / part["threshold"])


def test_warm_starts_need_few_products() -> None:
    model = _model()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    tracker = SharpnessTracker(model, _loss, _batch(), every=10)
    _train(model, optimizer, 100, tracker)
    cold = [sharpness(model, _loss, _batch(), tolerance=0.01).products for _ in range(3)]
    later = [record["products"] for record in tracker.records[-3:]]
    assert max(later) <= min(cold)
    assert sum(later) < sum(cold)


def test_before_the_first_step_there_is_no_stability() -> None:
    model = _model()
    optimizer = OPTIMIZERS["adam"](list(model.parameters()))
    tracker = SharpnessTracker(model, _loss, _batch(), optimizer)
    record = tracker.measure()
    assert record["step"] == 0
    assert "stability" not in record
    _train(model, optimizer, 1, tracker)
    assert "stability" in tracker.measure()


def test_records_of_another_run_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "sharpness.jsonl"
    path.write_text('{"step": 1}\n')
    tracker = SharpnessTracker(_model(), _loss, _batch(), path=path)
    with pytest.raises(FileExistsError, match="has records already"):
        tracker.measure()
    assert path.read_text() == '{"step": 1}\n'


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="every=0"):
        SharpnessTracker(_model(), _loss, _batch(), every=0)
    model = _model()
    tracker = SharpnessTracker(model, lambda m, b: _loss(m, b) * torch.nan, _batch(), every=1)
    before = deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="got a loss of nan"):
        tracker.step()
    assert all(torch.equal(a, before[k]) for k, a in model.state_dict().items())
