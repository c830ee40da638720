from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import Optimizer

import steepest
from steepest.files import read_json, write_json
from steepest.lab.errors import InputError
from steepest.lab.train import checkpoint
from steepest.lab.train.run_folder import sentences_for_os_errors


class _Function:
    """Batches that are a function of seed and step."""

    def batch(self, step: int, part: int = 0) -> Any:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


def _state(model: nn.Module, optimizer: Optimizer) -> checkpoint.RunState:
    return checkpoint.RunState(model, optimizer, _Function())


def _trained(steps: int) -> tuple[nn.Module, steepest.Muon]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = steepest.Muon(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_a_checkpoint_gives_back_everything(tmp_path: Path) -> None:
    model, optimizer = _trained(3)
    checkpoint.save(tmp_path, 3, _state(model, optimizer), {"seconds": 1.5})
    expected = torch.randn(5)
    fresh, fresh_optimizer = _trained(0)
    step, progress, damaged = checkpoint.load_latest(tmp_path, _state(fresh, fresh_optimizer))
    assert (step, progress, damaged) == (3, {"seconds": 1.5}, [])
    assert torch.equal(torch.randn(5), expected)  # the random generator too
    for (name, a), b in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, fresh_optimizer.state_dict()["state"][key][name])


def test_tied_weights_survive(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Linear(4, 5, bias=False)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checkpoint.save(tmp_path, 1, _state(model, optimizer), {})
    before = model["a"].weight.detach().clone()
    model["a"].weight.data.zero_()
    checkpoint.load_latest(tmp_path, _state(model, optimizer))
    assert torch.equal(model["b"].weight, before)
    assert model["b"].weight is model["a"].weight


def test_the_newest_two_are_kept_and_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    for leftover in (".steepest-0123456789abcdef", ".step-00000009.123"):  # now, and before
        (tmp_path / leftover).mkdir(parents=True)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, _state(model, optimizer), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.pt", "progress.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["torn", "missing", "changed"])
def test_a_damaged_file_is_detected_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    model, optimizer = _trained(1)
    checkpoint.save(tmp_path, 1, _state(model, optimizer), {"at": 1})
    checkpoint.save(tmp_path, 2, _state(model, optimizer), {"at": 2})
    victim = tmp_path / "step-00000002" / name
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    elif damage == "torn":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    step, progress, damaged = checkpoint.load_latest(tmp_path, _state(model, optimizer))
    assert (step, progress) == (1, {"at": 1})
    assert len(damaged) == 1
    assert "step-00000002 is damaged" in damaged[0]
    checkpoint.save(tmp_path, 2, _state(model, optimizer), {"at": 2})  # over the damaged one
    assert checkpoint.load_latest(tmp_path, _state(model, optimizer))[0] == 2


def test_only_damaged_checkpoints_are_an_error_and_nothing_is_half_read(tmp_path: Path) -> None:
    model, optimizer = _trained(1)
    checkpoint.save(tmp_path, 1, _state(model, optimizer), {})
    (tmp_path / "step-00000001" / "state.pt").write_bytes(b"")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError, match=r"checkpoint .* damaged"):
        checkpoint.load_latest(tmp_path, _state(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("largest", [300, 1500])  # bytes; model.safetensors has 900, state.pt more
def test_a_disk_that_fills_up_gets_a_sentence_and_leaves_nothing(
    tmp_path: Path, largest: int
) -> None:
    resource = pytest.importorskip("resource")
    model, optimizer = _trained(1)
    checkpoint.save(tmp_path, 1, _state(model, optimizer), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        with pytest.raises(InputError, match="no space left"), sentences_for_os_errors(tmp_path):
            checkpoint.save(tmp_path, 2, _state(model, optimizer), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
