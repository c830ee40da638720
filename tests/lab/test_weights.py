"""Weights from a file: `steepest diagnose --checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from steepest.lab.errors import InputError
from steepest.lab.weights import load_weights


class Tied(nn.Module):
    """An embedding that is the head as well, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(()))


def _model(seed: int) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def _prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    "stored",
    [
        lambda state: state,
        lambda state: {"model": state, "step": 3},
        lambda state: {"state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": _prefixed("module.", state)},
        lambda state: _prefixed("_orig_mod.", state),
        lambda state: _prefixed("module._orig_mod.", state),
        lambda state: {name.replace("inner.", "inner._orig_mod."): v for name, v in state.items()},
        lambda state: {name: v for name, v in state.items() if name != "head.weight"},
    ],
)
def test_a_state_dict_is_loaded_as_people_store_it(stored: Any, tmp_path: Path) -> None:
    theirs, ours = _model(0), _model(1)
    torch.save(stored(theirs.state_dict()), tmp_path / "weights.pt")
    load_weights(ours, tmp_path / "weights.pt")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


def test_safetensors_leave_out_what_is_tied(tmp_path: Path) -> None:
    theirs, ours = _model(0), torch.compile(_model(1))
    safetensors.torch.save_model(theirs, str(tmp_path / "model.safetensors"))
    load_weights(ours, tmp_path / "model.safetensors")
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"inner.wieght": torch.ones(4, 4)}, "wieght' .*'inner.weight'"),
        ({"inner.weight": torch.ones(4, 3)}, r"\(4, 3\) in .* \(4, 4\)"),
        ({"scale": torch.ones(())}, r"'embedding.*4 of 5"),
        ({"model": 3, "step": 4}, "dict with model, step"),
        ([1, 2], "holds a list"),
        ({}, "holds a dict;"),
        (nn.Linear(2, 2), "which holds no weights"),
    ],
)
def test_what_is_not_of_this_model_is_a_sentence(
    content: Any, sentence: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "weights.pt")
    model = _model(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=sentence):
        load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"no weights", b"PK\x03\x04 torn", b"folder"])
def test_files_that_are_none(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content == b"folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*(read|no wei)"):
        load_weights(_model(0), tmp_path / name)
