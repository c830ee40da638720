"""Weights that a model starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from steepest.lab.data.shapes import TextShape
from steepest.lab.errors import InputError
from steepest.lab.models import build_model, load_start, to_hugging_face

TEXT = TextShape(vocabulary=23, context=12)
SMALL: dict[str, Any] = {"width": 32, "depth": 2}


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["gpt-124m", "llama"])
def test_weights_of_hugging_face_are_taken(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = build_model(name, TEXT, **SMALL)
    to_hugging_face(source).save_pretrained(tmp_path)
    model = build_model(name, TEXT, **SMALL)
    assert not _same(model, source)
    load_start(model, str(tmp_path))
    assert _same(model, source)
    deeper = build_model(name, TEXT, width=32, depth=3)
    with pytest.raises(InputError, match=r"with depth=2, for a \w+ with depth=3; choose"):
        load_start(deeper, str(tmp_path))
    bytes_only = build_model(name, TextShape(256, 12), **SMALL)
    with pytest.raises(InputError, match=r"vocabulary=23.*vocabulary=256.*the same tokenizer"):
        load_start(bytes_only, str(tmp_path))
    longer = build_model(name, TextShape(23, 20), **SMALL)
    if name == "llama":  # whose positions have no weights
        load_start(longer, str(tmp_path))
        assert _same(longer, source)
    else:
        with pytest.raises(InputError, match=r"context=12.*context=20"):
            load_start(longer, str(tmp_path))


def test_a_file_and_a_folder_of_a_model_of_the_lab(tmp_path: Path) -> None:
    source = build_model("gpt", TEXT, **SMALL)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    save_model(source, tmp_path / "model.safetensors")
    for place in (tmp_path / "weights.pt", tmp_path):
        model = build_model("gpt", TEXT, **SMALL)
        load_start(model, str(place))
        assert _same(model, source)


def test_a_place_without_weights_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file and no folder"):
        load_start(nn.Linear(2, 2), str(tmp_path))


def test_a_name_without_network_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    calls: list[bool] = []

    def asked() -> bool:
        calls.append(True)
        return False

    monkeypatch.setattr("steepest.lab.models.exchange.hub_answers", asked)
    with pytest.raises(InputError, match="has no weights"):
        load_start(build_model("gpt", TextShape(17, 8), width=8, depth=1), "nobody/nothing")
    assert calls  # before transformers, which would try for a minute
