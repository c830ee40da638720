"""Models of Hugging Face and of the user, by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steepest import Muon, roles
from steepest.lab.data.shapes import ImageShape, Shape, TextShape
from steepest.lab.errors import InputError
from steepest.lab.models import build_model, logits_of, loss_of, sizes_of, smaller
from steepest.lab.user_code import UserCodeError

TEXT, IMAGES = TextShape(vocabulary=23, context=12), ImageShape(channels=1, side=16, classes=5)
MINE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int, classes: int = 2, gain: float = 1.0, norm=False, channels=1):
        super().__init__()
        self.told = dict(width=width, classes=classes, gain=gain, norm=norm, channels=channels)
        self.layer = nn.Linear(width, classes)

class Deep(Net):
    def __init__(self, width=64, depth=4): super().__init__(width)

class Everything(Net):
    def __init__(self, **settings):
        super().__init__(4)
        self.told = settings

def broken(): raise RuntimeError("my own fault")
def number(): return 3
value = 3
made = nn.Linear(2, 2)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"models_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    return name


# ------------------------------------------------------------------------------ the user's models


def test_a_function_gets_what_its_signature_names(mine: str) -> None:
    def told(name: str, shape: Shape, **arguments: Any) -> dict[str, Any]:
        model: Any = build_model(f"{mine}:{name}", shape, **arguments)
        return model.told

    options = ["gain=2", "norm=true"]
    expected = {"width": 8, "classes": 5, "gain": 2.0, "norm": True, "channels": 1}
    assert told("Net", IMAGES, width=8, options=options) == expected
    assert told("Net", None, width=8)["classes"] == 2
    assert told("Net", IMAGES, width=8, options=["classes=7"])["classes"] == 7
    everything = told("Everything", TEXT, depth=3, options=["sizes=[1, 2]", "word=some"])
    assert everything == {"depth": 3, "sizes": [1, 2], "word": "some"}
    assert sizes_of(f"{mine}:Net", IMAGES, width=8) is None


def test_a_module_is_copied_each_time(mine: str) -> None:
    first, second = (build_model(f"{mine}:made", None) for _ in range(2))
    nn.init.zeros_(first.weight)
    assert second.weight.any()


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("Net", {}, "parameter width has no default and no value; give --width"),
        ("Net", {"width": 8, "depth": 2}, "takes no depth; it takes width, classes, gain"),
        ("Net", {"width": 8, "options": ["gian=2"]}, r"takes no gian \(did you mean gain\?\)"),
        ("Net", {"width": 8, "options": ["gain=much"]}, "'gain=much', expected a number"),
        ("Net", {"width": 8, "options": ["norm=3"]}, "expected one of true, false"),
        ("number", {}, "gives a int; expected a torch.nn.Module"),
        ("number", {"width": 3}, "takes no width; it takes no arguments"),
        ("value", {}, "is a int; expected a torch.nn.Module"),
        ("made", {"width": 3}, "a module already"),
        ("missing", {}, "has no missing"),
    ],
)
def test_what_a_function_does_not_take(
    mine: str, name: str, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        build_model(f"{mine}:{name}", IMAGES, **arguments)


def test_errors_of_the_function_are_the_users(mine: str) -> None:
    with pytest.raises(UserCodeError, match="my own fault") as caught:
        build_model(f"{mine}:broken", None)
    assert "raise RuntimeError" in caught.value.traceback


def test_smaller_models_of_the_user(mine: str) -> None:
    assert smaller(f"{mine}:Deep", None) == (32, 4)
    assert smaller(f"{mine}:Deep", None, 8, 4) == (8, 2)
    assert smaller(f"{mine}:Deep", None, 8, 1) is None
    assert smaller(f"{mine}:Net", None, 32) == (16, None)
    assert smaller(f"{mine}:Net", None) is None  # of no known width
    assert smaller(f"{mine}:number", None) is None
    assert smaller(f"{mine}:made", None) is None


# ---------------------------------------------------------------------------------- Hugging Face

SMALL: dict[str, Any] = {"width": 32, "depth": 2}
OPTIONS = {
    "hf:resnet": ["layer_type=basic", "depths=[1, 1, 1, 1]", "hidden_sizes=[16, 16, 32, 32]"],
    "hf:mixtral": ["num_local_experts=4"],
}


@pytest.mark.parametrize(
    "name", ["hf:gpt2", "hf:llama", "hf:mixtral", "hf:mamba", "hf:resnet", "hf:vit"]
)
def test_models_of_hugging_face_learn(name: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    images = name in ("hf:resnet", "hf:vit")
    shape = IMAGES if images else TEXT
    sizes = SMALL if name != "hf:resnet" else {}
    model = build_model(name, shape, **sizes, options=OPTIONS.get(name, []))
    tokens = torch.randint(23, (2, 13))
    batch = (tokens[:, :-1], tokens[:, 1:])
    if images:
        batch = (torch.randn(8, 1, 16, 16), torch.randint(5, (8,)))
    assert logits_of(model, batch[0]).shape == ((8, 5) if images else (2, 12, 23))
    optimizer, losses = Muon(model, lr=0.005, adamw_lr=0.003), []
    assert len(roles(model).matrices) > 4
    for _ in range(5):
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert sizes_of(name, shape) is None


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("gpt2", {"width": 128}, {"n_embd": 128, "n_head": 2, "vocab_size": 23, "n_positions": 12}),
        ("gpt2", {"width": 96, "options": ["n_head=4"]}, {"n_head": 4, "n_layer": 12}),
        ("gpt2", {"depth": 3, "options": ["attn_pdrop=0"]}, {"n_layer": 3, "attn_pdrop": 0}),
        ("llama", {"width": 512}, {"num_attention_heads": 4, "intermediate_size": 1376}),
        ("llama", {"width": 96}, {"num_attention_heads": 1, "head_dim": 96}),
        ("mixtral", {"width": 1024}, {"num_attention_heads": 8, "num_key_value_heads": 2}),
        ("mamba", {"width": 64}, {"intermediate_size": 128, "time_step_rank": 4}),
    ],
)
def test_text_models_are_adapted(
    name: str, arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    pytest.importorskip("transformers")
    arguments = {"depth": 1} | arguments if "n_layer" not in expected else arguments
    with torch.device("meta"):
        model: Any = build_model(f"hf:{name}", TEXT, **arguments)
    config = model.config
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.vocab_size, config.use_cache) == (23, False)


@pytest.mark.parametrize(
    ("name", "side", "arguments", "expected"),
    [
        ("vit", 32, {"width": 192}, {"num_attention_heads": 3, "intermediate_size": 768}),
        ("vit", 32, {}, {"patch_size": 4, "image_size": 32, "num_channels": 1, "num_labels": 5}),
        ("vit", 28, {}, {"patch_size": 4}),
        ("vit", 8, {}, {"patch_size": 1}),
        ("vit", 8, {"options": ["patch_size=2"]}, {"patch_size": 2}),
        ("vit", 224, {}, {"patch_size": 16}),
        ("resnet", 32, {"width": 16}, {"hidden_sizes": [64, 128, 256, 512], "embedding_size": 16}),
        ("resnet", 32, {"depth": 8}, {"depths": [2, 2, 3, 1], "embedding_size": 64}),
        ("resnet", 32, {"options": ["depths=[1,1,1,2]"]}, {"depths": [1, 1, 1, 2]}),
        ("convnext", 32, {"width": 48}, {"hidden_sizes": [48, 96, 192, 384]}),
    ],
)
def test_image_models_are_adapted(
    name: str, side: int, arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model: Any = build_model(f"hf:{name}", ImageShape(1, side, 5), **arguments)
    values = {key: getattr(model.config, key) for key in expected}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} == expected


def test_a_configuration_from_a_file_or_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=500, pad_token_id=400,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        model: Any = build_model(f"hf:{path}", TEXT)
        assert (model.config.intermediate_size, model.config.vocab_size) == (100, 23)
        wide: Any = build_model(f"hf:{path}", TEXT, width=128)
        read = wide.config
        assert (read.num_attention_heads, read.num_key_value_heads, read.head_dim) == (8, 4, 16)
        assert read.intermediate_size == 200
    whole: Any = build_model(f"hf:{tmp_path}", None)
    assert whole.config.vocab_size == 500
    assert all(p.dtype == torch.float32 for p in whole.parameters())
    assert smaller(f"hf:{tmp_path}", TEXT) == (32, 2)
    assert smaller(f"hf:{tmp_path}", TEXT, 32, 2) == (16, 2)
    assert smaller("hf:resnet", IMAGES) == (32, 16)


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "sentence"),
    [
        ("hf:resent", IMAGES, {}, r"did you mean (\w+ or )?resnet"),
        ("hf:./nowhere/config.json", TEXT, {}, "no file"),
        ("hf:resnet", TEXT, {}, "no vocabulary, for text"),
        ("hf:gpt2", IMAGES, {}, "no channels, for images"),
        ("hf:clip_vision_model", TEXT, {}, "for text|predicts the next token"),
        ("hf:gpt2", TEXT, {"options": ["n_heads=2"]}, r"no n_heads \(did you mean n_head"),
        ("hf:gpt2", TEXT, {"options": ["n_head=two"]}, "n_head.*refuses|refuses.*n_head|cannot"),
        ("hf:gpt2", TEXT, {"width": 96, "options": ["n_head=7"]}, "cannot build|refuses"),
        ("hf:resnet", IMAGES, {"depth": 3}, "4 stages; expected at least one layer for each"),
        ("hf:resnet", IMAGES, {"width": 1}, None),
    ],
)
def test_what_transformers_does_not_have_is_a_sentence(
    name: str, shape: Shape, arguments: dict[str, Any], sentence: str | None
) -> None:
    pytest.importorskip("transformers")
    if sentence is None:
        build_model(name, shape, **arguments)
        return
    with pytest.raises(InputError, match=sentence):
        build_model(name, shape, **arguments)


def test_a_broken_configuration_is_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for text in ("{", "[]", "{}", '{"model_type": "no such type"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json is no configuration"):
            build_model(f"hf:{tmp_path}", TEXT)


def test_without_the_hub_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def refuse(name: str, **options: Any) -> None:
        raise OSError("We couldn't connect.\nMore lines.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(InputError, match=r"network, or download its config\.json.*connect\.$"):
        build_model("hf:somebody/something", TEXT)


def test_without_transformers_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'steepest\[hf\]'"):
        build_model("hf:gpt2", TEXT)
