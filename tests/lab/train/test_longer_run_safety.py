"""A longer run begins only when it can; memory that cannot be read again is refused at once."""

from __future__ import annotations

import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steepest.lab.data import load
from steepest.lab.errors import Diverged, InputError
from steepest.lab.train import TrainConfig, train
from steepest.lab.train.checkpoint import steps_of

SMALL = TrainConfig(model="mlp", data="digits", width=8, depth=2, batch=8, threads=1, steps=20)


def _config(**changes: Any) -> TrainConfig:
    return replace(SMALL, **changes)


def _content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_finished_run_stays_whole_where_a_longer_one_cannot_begin(tmp_path: Path) -> None:
    config, out = _config(schedule="wsd"), tmp_path / "run"
    train(config, out)
    kept, last = steps_of(out / "checkpoints")
    with open(out / "checkpoints" / f"step-{kept:08d}" / "model.safetensors", "ab") as file:
        file.write(b"x")
    before = _content(out)
    with pytest.raises(InputError, match=rf"up to step {kept} is damaged.*is as it was"):
        train(_config(schedule="wsd", steps=40, warmup=4), out)
    assert _content(out) == before
    assert (out / "result.json").exists()
    assert last == 20


def test_copies_of_checkpoints_do_not_count(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(_config(schedule="wsd"), out)
    places = out / "checkpoints"
    for name in ("step-00000020 (copy)", "step-00000012.bak"):
        shutil.copytree(places / "step-00000020", places / name)
    assert train(_config(schedule="wsd", steps=40, warmup=4), out)["steps"] == 40
    assert steps_of(places)[-1] == 40


class _Keeps(torch.optim.SGD):
    """Keeps something beside what SGD keeps."""

    kept: Any = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.keep(parameter)

    def keep(self, parameter: torch.Tensor) -> None:
        self.state[parameter]["kept"] = self.kept


class KeepsScalar(_Keeps):
    kept = np.float64(1.5)


class KeepsQueue(_Keeps):
    kept = deque((1, 2))  # noqa: RUF012


class KeepsFunction(_Keeps):
    def keep(self, parameter: torch.Tensor) -> None:
        self.state[parameter]["kept"] = lambda: None


class KeepsByStranger(_Keeps):
    def keep(self, parameter: torch.Tensor) -> None:
        self.state[torch.zeros(2)] = {"kept": 1}


class KeepsByName(_Keeps):
    def keep(self, parameter: torch.Tensor) -> None:
        self.state["count"] = self.state.get("count", 0) + 1  # type: ignore[index]


class KeepsList(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = [1, torch.ones(2)]  # type: ignore[assignment]


class KeepsNaN(_Keeps):
    def keep(self, parameter: torch.Tensor) -> None:
        self.state["total"] = torch.tensor(float("nan"))  # type: ignore[index]


def _named(kind: type) -> str:
    return f"{kind.__module__}:{kind.__name__}:lr=0.1"


@pytest.mark.parametrize("kind", [KeepsScalar, KeepsQueue, KeepsFunction, KeepsByStranger])
def test_memory_that_cannot_be_read_again_is_refused_in_the_first_step(
    tmp_path: Path, kind: type
) -> None:
    with pytest.raises(InputError, match=rf"memory of .*{kind.__name__}.* cannot be saved"):
        train(_config(optimizer=_named(kind)), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("kind", [KeepsByName, KeepsList])
def test_memory_of_other_forms_is_saved(tmp_path: Path, kind: type) -> None:
    result = train(_config(optimizer=_named(kind)), tmp_path / "run")
    assert result["status"] == "finished"


def test_memory_that_is_not_finite_is_found_in_other_forms(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"memory of the optimizer .* of total"):
        train(_config(optimizer=_named(KeepsNaN)), tmp_path / "run")


def lbfgs(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=lr)


def test_an_optimizer_of_a_function_that_needs_a_closure_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"LBFGS from .*whose step needs closure"):
        train(_config(optimizer=f"{__name__}:lbfgs:lr=1"), tmp_path / "run")


def test_divergence_in_the_first_step_speaks_of_no_checkpoints(tmp_path: Path) -> None:
    said: list[str] = []
    config = _config(lr=1e30)
    with pytest.raises(Diverged) as stopped:
        train(config, tmp_path / "run", say=said.append)
    assert "checkpoints" not in str(stopped.value)
    said.clear()
    assert train(config, tmp_path / "run", say=said.append)["status"] == "diverged"
    assert not said


def test_the_loss_that_is_shown_is_of_a_step_near(tmp_path: Path) -> None:
    shown: dict[int, float] = {}
    train(
        _config(log_every=100),
        tmp_path / "run",
        on_step=lambda step, values: shown.update({step: values["loss"]}),
    )
    assert len(set(shown.values())) >= 10


def test_a_header_of_another_version_is_refused(tmp_path: Path) -> None:
    front = np.zeros(256, dtype="<i4")
    front[:3] = 20240520, 7, 5000
    tokens = np.zeros(5000, dtype="<u2")
    (tmp_path / "a.bin").write_bytes(front.tobytes() + tokens.tobytes())
    with pytest.raises(InputError, match="version 7, expected 1"):
        load(str(tmp_path / "a.bin"), tokenizer="bytes", validation=None)
