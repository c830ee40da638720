"""Runs of every kind of model and data, with all that a run can be asked to do."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steepest.files import read_json
from steepest.lab.errors import InputError
from steepest.lab.train import TrainConfig, train
from steepest.lab.train.dry_run import dry_run
from steepest.lab.train.run_folder import read_metrics
from steepest.lab.train.setup import data_of

TEXT: dict[str, Any] = {
    "data": "text.txt", "width": 16, "depth": 2, "context": 16, "batch": 4, "device": "cpu"
}  # fmt: skip
IMAGES: dict[str, Any] = {"data": "images.npz", "width": 8, "batch": 16, "device": "cpu"}
OWN = """
import torch
from torch import nn
def build(width=16, depth=2):
    middle = [nn.Linear(width, width) for _ in range(depth)]
    return nn.Sequential(nn.Linear(6, width), nn.Dropout(0.2), *middle, nn.Linear(width, 3))
def rows(n):
    x = torch.randn(n, 6)
    return x, x[:, :3].argmax(1)
def stream():
    for _ in range(5):
        yield rows(16)
def judge():
    return [(torch.eye(6), torch.arange(6) % 3)]
def squares(model, batch):
    return (model(batch[0]) - nn.functional.one_hot(batch[1], 3)).square().mean()
"""
MANY = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
def build():
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[2].weight), nn.init.zeros_(model[2].bias)  # so it answers: class 0
    return model
def examples():
    return TensorDataset(torch.ones(40, 1), torch.arange(40) // 20 ^ 1)
"""
KINDS: dict[str, dict[str, Any]] = {
    "gpt": {"model": "gpt", **TEXT},
    "llama, accumulated": {"model": "llama", **TEXT, "batch_tokens": 128},
    "gpt, averaged": {"model": "gpt", **TEXT, "ema": 0.9},
    "gpt, tokenizer": {"model": "gpt", **TEXT, "tokenizer": "bpe:270"},
    "mlp": {"model": "mlp", **IMAGES, "depth": 3},
    "residual-convnet": {"model": "residual-convnet", **IMAGES, "recompute": True},
    "own": {
        "model": "mine:build", "batches": "mine:stream", "validation": "mine:judge", "width": 8,
    },
    "own, loss": {
        "model": "mine:build", "batches": "mine:stream", "validation": "mine:judge",
        "loss": "mine:squares",
    },
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("STEEPEST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i * i % 97}; " for i in range(3000)))
    (tmp_path / "mine.py").write_text(OWN)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    images = rng.integers(0, 90, (90, 8, 8)) + 60 * labels[:, None, None]
    np.savez(tmp_path / "images.npz", x_train=images.astype(np.uint8), y_train=labels)
    return tmp_path


def _config(kind: str, **changes: Any) -> TrainConfig:
    shared: dict[str, Any] = {
        "steps": 12, "threads": 1, "validate_every": 4, "validate_windows": 4,
        "checkpoint_every": 3, "log_every": 1, "lr": 0.02,
    }  # fmt: skip
    return TrainConfig(**{**shared, **KINDS[kind], **changes})


class Stop(Exception):
    pass


def _stop_after(step: int) -> Any:
    def on_step(done: int, values: dict[str, Any]) -> None:
        if done == step:
            raise Stop

    return on_step


def _end(out: Path) -> tuple[bytes, list[Any]]:
    last = max((out / "checkpoints").glob("step-*"))
    losses = [(r["kind"], r["step"], r["loss"]) for r in read_metrics(out) if "loss" in r]
    return (last / "model.safetensors").read_bytes(), losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_of_any_kind_ends_bit_for_bit_as_an_undisturbed_one(
    kind: str, place: Path
) -> None:
    config = _config(kind)
    whole = train(config, place / "whole")
    for step in (2, 4, 8):
        with pytest.raises(Stop):
            train(config, place / "parts", on_step=_stop_after(step))
    parts = train(config, place / "parts")
    assert parts["validation_loss"] == whole["validation_loss"]
    assert _end(place / "parts") == _end(place / "whole")


def test_classes_are_scored_by_accuracy_and_learned(place: Path) -> None:
    config = _config("mlp", steps=60, optimizer="adamw", lr=0.01, validate_every=30)
    result = train(config, place / "run")
    assert result["unit"] == "images"
    assert result["tokens"] == 60 * 16
    assert result["validation_accuracy"] == 1.0
    rows = [row for row in read_metrics(place / "run") if row["kind"] == "validation"]
    assert rows[-1]["accuracy"] == 1.0
    assert rows[0]["accuracy"] < 1


def test_batches_of_a_user_are_judged_by_as_many_batches_as_text_by_windows(place: Path) -> None:
    (place / "many.py").write_text(MANY)
    own = {"model": "many:build", "batches": "many:examples", "validation": "many:examples"}
    for windows, accuracy in ((2, 0.0), (3, 1 / 3), (9, 0.5)):
        config = _config("own", **own, width=None, steps=1, lr=0.0, adamw_lr=0.0, batch=10)
        config = replace(config, validate_windows=windows)
        result = train(config, place / f"{windows} batches")
        assert result["validation_accuracy"] == pytest.approx(accuracy)


def test_the_score_of_text_is_in_bits_per_byte_whatever_the_tokens(place: Path) -> None:
    for kind in ("gpt", "gpt, tokenizer"):
        config = _config(kind, steps=1, lr=0.0, adamw_lr=0.0)
        result = train(config, place / kind)
        data = data_of(config)
        assert data.bytes_per_token is not None
        bits = result["validation_loss"] / np.log(2) / data.bytes_per_token
        assert result["bits_per_byte"] == pytest.approx(bits)
    assert data.bytes_per_token > 1


def test_tokens_decide_steps_and_passes(place: Path) -> None:
    said: list[str] = []
    config = _config("gpt", tokens=1000, batch_tokens=128)  # 64 tokens in a forward pass
    result = train(config, place / "run", say=said.append)
    assert (result["steps"], result["tokens"]) == (8, 1024)
    assert "accumulate 2: 128 tokens an update, 64 in a forward pass" in said
    assert "steps 8: 1,000 tokens, 128 a step" in said
    with pytest.raises(InputError, match="at least the 64 tokens of one forward pass"):
        train(replace(config, batch_tokens=60), place / "other")


def test_recomputed_blocks_give_the_same_bits(place: Path) -> None:
    for recompute in (False, True):
        train(_config("gpt", recompute=recompute), place / str(recompute))
    assert _end(place / "True") == _end(place / "False")


def test_the_moving_average_is_judged(place: Path) -> None:
    train(_config("gpt"), place / "plain")
    averaged = train(_config("gpt", ema=0.9), place / "averaged")
    plain, mean = (
        [row["loss"] for row in read_metrics(place / name) if row["kind"] == "train"]
        for name in ("plain", "averaged")
    )
    assert plain == mean  # training is as it was
    state = torch.load(
        max((place / "averaged" / "checkpoints").glob("step-*")) / "state.pt", weights_only=True
    )
    assert int(state["average"]["n_averaged"]) == 12
    assert (
        averaged["validation_loss"] != read_json(place / "plain" / "result.json")["validation_loss"]
    )


def test_samples_are_written_and_change_nothing(place: Path) -> None:
    train(_config("gpt"), place / "plain")
    train(_config("gpt", samples=2), place / "samples")
    assert _end(place / "plain")[0] == _end(place / "samples")[0]
    texts = [row["text"] for row in read_metrics(place / "samples") if row["kind"] == "sample"]
    assert len(texts) == 2 * 4  # after steps 1, 4, 8 and 12
    assert all(text[0].isprintable() for text in texts)
    with pytest.raises(InputError, match="samples"):
        train(_config("mlp", samples=1), place / "images")


def test_the_file_of_settings_holds_all_of_them(place: Path) -> None:
    config = _config("gpt, averaged", track=(), clip=1.0)
    train(config, place / "run")
    stored = tomllib.loads((place / "run" / "config.toml").read_text())
    stored["model_options"] = tuple(stored["model_options"])
    stored["track"] = tuple(stored["track"])
    assert TrainConfig(**stored) == config
    assert "final_lr" not in stored  # follows from the schedule, which may change
    assert TrainConfig(**{**stored, "schedule": "galore"}).final_lr == 0.1


def test_a_trace_of_three_steps(place: Path) -> None:
    said: list[str] = []
    train(_config("gpt", profile=True), place / "run", say=said.append)
    assert (place / "run" / "profile.json").stat().st_size > 1000
    assert any("3 steps, by operation" in sentence for sentence in said)


@pytest.mark.parametrize("kind", ["gpt", "mlp", "own"])
def test_a_dry_run_counts_what_a_run_has(kind: str, place: Path) -> None:
    config = _config(kind, optimizer="muon")
    before = sorted(place.rglob("*"))
    planned = dry_run(config)
    assert [p for p in sorted(place.rglob("*")) if "cache" not in p.parts] == before
    result = train(config, place / "run")
    assert planned.parameters == result["parameters"]
    assert planned.state_bytes == result["optimizer_state_bytes"]
    assert planned.steps * planned.per_step == result["tokens"]
    assert {group.lr for group in planned.groups} == {0.02, 4e-3}
    assert f"{planned.parameters:,} parameters" in str(planned)


def test_data_and_model_have_to_fit(place: Path) -> None:
    with pytest.raises(InputError, match="images"):
        train(_config("gpt", data="images.npz"), place / "run")
    with pytest.raises(InputError, match="text"):
        train(_config("mlp", data="text.txt"), place / "run")
    with pytest.raises(InputError, match="--data and --batches"):
        _config("own", data="text.txt")


FAULTS = """
import torch
from torch import nn
from torch.nn import functional as F
x, y = torch.randn(60, 6), torch.arange(60) % 3
class Rows(torch.utils.data.Dataset):
    def __init__(self, *tensors, names=None): self.tensors, self.names = tensors, names
    def __len__(self): return len(x)
    def __getitem__(self, i):
        row = [t[i] for t in self.tensors]
        return dict(zip(self.names, row)) if self.names else tuple(row)
good, strings = Rows(x, y), Rows(x, y, names=("pixel_values", "labels"))
floats, beyond, two = Rows(x, x[:, :1]), Rows(x, y + 3), Rows(x, x, y)
broken, unlabelled = Rows(x * float("nan"), y), Rows(x, names=("pixel_values",))
wide = Rows(torch.randn(60, 7), y)
late = [(x[:4], y[:4] + 9 * (i > 1)) for i in range(40)]
def build(): return nn.Linear(6, 3)
def frozen(): return build().requires_grad_(False)
def empty(): return nn.Flatten()
class Pair(nn.Linear):
    def forward(self, x): return super().forward(x), x
def pair(): return Pair(6, 3)
class Named(nn.Linear):
    def forward(self, pixel_values, labels=None):
        logits = super().forward(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}
def named(): return Named(6, 3)
def detached(model, batch): return model(batch[0]).sum().detach()
def many(model, batch): return model(batch[0]).sum(1)
def own(model, batch): return F.cross_entropy(model(batch[0]), batch[1])
"""


def _faulty(place: Path, **changes: Any) -> TrainConfig:
    (place / "faults.py").write_text(FAULTS)
    settings = {"model": "build", "batches": "good", **changes}
    for name in ("model", "batches", "loss"):
        if name in settings:
            settings[name] = f"faults:{settings[name]}"
    return TrainConfig(**{"batch": 4, **settings}, optimizer="adamw", steps=12, device="cpu")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "pair"}, "outputs of type tuple .* loss of your own"),
        ({"model": "frozen"}, "Linear whose parameters are all frozen"),
        ({"model": "empty"}, "Flatten without parameters"),
        ({"batches": "floats"}, r"float32 \(4, 6\), float32 \(4, 1\).* loss of your own"),
        ({"batches": "beyond"}, "expected classes from 0 to one less than the outputs"),
        ({"batches": "late"}, "expected classes from 0 to one less than the outputs"),
        ({"batches": "two"}, r"mapping or \(inputs, classes\)"),
        ({"batches": "wide"}, r"float32 \(4, 7\).* shapes cannot be multiplied"),
        ({"batches": "strings"}, r"pixel_values float32 \(4, 6\).* unexpected keyword"),
        ({"batches": "unlabelled", "model": "named"}, "without a loss, .* with pixel_values"),
        ({"batches": "broken"}, "loss of nan for the first batch of faults:broken"),
        ({"loss": "detached"}, "no function of the weights"),
        ({"loss": "many"}, r"of shape \(4,\); expected a scalar"),
    ],
)
def test_what_does_not_fit_is_a_sentence_before_or_while_it_trains(
    changes: dict[str, Any], sentence: str, place: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        train(_faulty(place, **changes), place / "run")
    if changes != {"batches": "late"}:
        with pytest.raises(InputError, match=sentence):
            dry_run(_faulty(place, **changes))


@pytest.mark.filterwarnings("ignore:none of the 3 entries")
def test_losses_of_all_kinds_of_batches_are_means_over_examples(place: Path) -> None:
    pairs = train(_faulty(place, validation="faults:good", batch=7), place / "pairs")
    own = train(_faulty(place, validation="faults:good", batch=7, loss="own"), place / "own")
    dicts = train(
        _faulty(place, batches="strings", validation="faults:strings", batch=7, model="named"),
        place / "dicts",
    )
    assert own["validation_loss"] == pytest.approx(pairs["validation_loss"], rel=1e-6)
    assert dicts["validation_loss"] == pytest.approx(pairs["validation_loss"], rel=1e-6)
    assert dicts["validation_accuracy"] == pairs["validation_accuracy"]
    assert "validation_accuracy" not in own


def test_a_warm_up_ends_before_the_tokens_do(place: Path) -> None:
    config = _config("gpt", tokens=4 * 64, warmup=4)
    with pytest.raises(InputError, match="warmup=4 of 4 steps"):
        train(config, place / "run")
    assert train(replace(config, warmup=3), place / "run")["steps"] == 4


def test_the_tokens_of_an_update_are_those_it_has(place: Path) -> None:
    said: list[str] = []
    result = train(_config("gpt", batch_tokens=100, tokens=500), place / "run", say=said.append)
    assert any("accumulate 2: 128 tokens an update, the nearest to 100" in s for s in said)
    assert any("steps 4: 500 tokens, 128 a step" in s for s in said)
    assert result["tokens"] == 512


def test_what_cannot_go_together_is_refused_before_training(place: Path) -> None:
    with pytest.raises(InputError, match="recompute and sharpness_every"):
        _config("gpt", recompute=True, sharpness_every=2)
    np.arange(4000, dtype="<u2").tofile(place / "tokens.bin")
    with pytest.raises(InputError, match="without a tokenizer"):
        train(_config("gpt", data="tokens.bin", samples=1), place / "run")
    assert not (place / "run" / "metrics.jsonl").exists()
