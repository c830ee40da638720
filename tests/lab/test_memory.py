"""What no memory can hold is refused with a sentence, and before any of it is allocated."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import cli
from steepest.lab import memory
from steepest.lab.data.shapes import TextShape
from steepest.lab.errors import InputError
from steepest.lab.imports import that_fit
from steepest.lab.memory import bytes_of
from steepest.lab.models import GPT, GPTConfig
from steepest.lab.studies.edge_of_stability import network
from steepest.lab.studies.transfer_study import _check_memory
from steepest.lab.train import TrainConfig
from steepest.lab.train.setup import _check_fits

MODELS = [
    GPTConfig(width=16, depth=3, heads=2, context=20),
    GPTConfig(width=24, depth=1, heads=4, context=8, mlp="swiglu", bias=True),
    GPTConfig(width=20, depth=2, heads=5, context=30, positions="learned", mlp="gelu"),
    GPTConfig(width=16, depth=2, heads=2, context=12, tied=True, bias=True),
]
MINE = """
import torch
from torch import nn
def build(width=8, depth=2):
    layers = [nn.Linear(width, width) for _ in range(depth)]
    return nn.Sequential(nn.Linear(6, width), *layers, nn.Linear(width, 3))
def batches():
    while True:
        x = torch.randn(20, 6)
        yield x, x[:, :3].argmax(1)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sizes.py").write_text(MINE)
    (tmp_path / "text.txt").write_text("how vexingly quick daft zebras jump. " * 300)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def _model(config: GPTConfig, vocabulary: int) -> GPT:
    return GPT(config, vocabulary)


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("vocabulary", [11, 300])
def test_sizes_by_formula_are_those_of_the_model(config: GPTConfig, vocabulary: int) -> None:
    model = _model(config, vocabulary)
    counted = [sum(t.numel() for t in tensors) for tensors in (model.parameters(), model.buffers())]
    assert config.count(TextShape(vocabulary, config.context)) == tuple(counted)


def test_the_bytes_of_a_run_are_a_bound_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss keeps for its gradient is more than what is counted, and not many times more."""
    for config in MODELS:
        model, batch, vocabulary = _model(config, 50), 4, 50
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, own: set[int] = own, kept: dict[int, Tensor] = kept) -> Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in own:
                kept[place] = tensor
            return tensor

        tokens = torch.zeros(batch, config.context, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(tokens, tokens)
        weights = 2 * bytes_of(list(model.parameters())) + bytes_of(list(model.buffers()))
        inside = sum(t.untyped_storage().nbytes() for t in kept.values())
        taken = weights + 2 * bytes_of(tokens) + inside
        assert loss.requires_grad
        bounds = []
        monkeypatch.setattr(
            "steepest.lab.train.cost.check_fits",
            lambda what, needed, remedy, device, bounds=bounds: bounds.append(needed),
        )
        _check_fits(
            TrainConfig(context=config.context, batch=batch),
            config,
            TextShape(vocabulary, config.context),
            torch.device("cpu"),
        )
        assert bounds[0] == weights
        assert taken / 4 < bounds[1] < taken


@pytest.mark.parametrize(
    "arguments",
    [
        "train --width 1000000",
        "train --depth 10000000000",
        "train --batch 1000000000",
        "train --width 8192 --model-options positions=learned mlp=swiglu --depth 999",
        "study --width 1000000",
        "study --batch 1000000000",
        "reproduce edge-of-stability --width 1000000",
        "diagnose sizes:build --batches sizes:batches --count 1000000000000",
        "diagnose sizes:build --batches sizes:batches --level quick --warmup-steps 1000000000000",
        "transfer sizes:build --batches sizes:batches --steps 999999999999 --sizes width=8 width=9",
        "transfer sizes:build --batches sizes:batches --steps 4 --sizes width=8 width=1000000",
        "transfer sizes:build --batches sizes:batches --steps 4 --sizes depth=2 depth=2000000000",
    ],
)
def test_what_does_not_fit_is_a_sentence(
    arguments: str, place: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "text.txt"] if arguments.split()[0] in ("train", "study") else []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments.split(), *data])
    said = " ".join(capsys.readouterr().err.split())
    assert "of memory, and this machine has" in said
    assert any(f" {unit} of memory" in said for unit in ("TB", "GB"))
    scale = 1 if sys.platform == "darwin" else 1024
    grown = scale * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 500e6  # imports, and little more


@pytest.mark.parametrize("sizes", ["--context 100000000", "--context 300"])
def test_a_context_beyond_the_data_is_said_before_the_model_is_made(
    sizes: str, place: None, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def made(*_: Any) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr("steepest.lab.train.setup.build_model", made)
    Path("text.txt").write_text("short " * 50)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--data", "text.txt", *sizes.split()])
    assert "give more text or a smaller context" in " ".join(capsys.readouterr().err.split())


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory.device_memory()
    (tmp_path / "v2").write_text("max\n")
    (tmp_path / "v1").write_text("1000000\n")
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "v2", tmp_path / "none"))
    assert memory.device_memory() == machine
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "v2", tmp_path / "v1"))
    assert memory.device_memory() == 1_000_000
    config, sizes, shape = TrainConfig(), GPTConfig(width=128), TextShape(256, 128)
    with pytest.raises(InputError, match=r"853,120 .* 6\.89 MB"):
        _check_fits(config, sizes, shape, torch.device("cpu"))
    monkeypatch.setattr(memory, "device_memory", lambda device: None)  # nobody says
    _check_fits(config, sizes, shape, torch.device("cpu"))


def test_batches_that_fit_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: 1000)
    batch = torch.zeros(100)
    assert len(list(that_fit("m:batches", iter([batch] * 2), 2))) == 2
    assert len(list(that_fit("m:batches", iter([batch] * 2), 10**9))) == 2  # there are no more
    assert len(list(that_fit("m:batches", iter(["text"]), 10**9))) == 1
    with pytest.raises(InputError, match="3 batches of m:batches"):
        list(that_fit("m:batches", iter([batch] * 9), 3))


def test_sizes_that_cannot_be_built_small_are_still_counted() -> None:
    """Two heads do not divide the widths that a bound would try; the size itself counts."""

    def build(width: int, heads: int) -> nn.Module:
        if width // heads != 5:
            raise ValueError("heads of 5")
        return nn.Linear(width, width)

    base = {"width": 5, "heads": 1}
    _check_memory(build, {"width": 10, "heads": 2}, base)
    with pytest.raises(InputError, match="width=5000000,heads="):
        _check_memory(build, {"width": 5_000_000, "heads": 1_000_000}, base)
    state = torch.get_rng_state()
    _check_memory(lambda width: nn.Linear(width, int(torch.randn(()))), {"width": 9}, {"width": 3})
    assert torch.equal(torch.get_rng_state(), state)


def test_the_network_of_the_edge_is_counted_right() -> None:
    assert sum(p.numel() for p in network(24).parameters()) == 24 * (64 + 24 + 10)


def test_so_many_seeds_that_a_list_of_runs_would_fill_memory(
    place: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["study"], ["reproduce", "edge-of-stability"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*command, "--seeds", "1000000000000"])
        assert "expected at most 10000" in " ".join(capsys.readouterr().err.split())


def test_tokens_of_32_bits_make_a_large_table() -> None:
    with pytest.raises(InputError, match=r"4000000400 .* 8\.19 TB"):
        _check_fits(TrainConfig(), GPTConfig(), TextShape(4_000_000_400, 128), torch.device("cpu"))
