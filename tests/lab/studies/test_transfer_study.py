"""The command `steepest transfer`, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steepest import cli

MINE = """
import torch
from torch import nn
def build(width):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
def batches():
    torch.manual_seed(1)
    while True:
        x = torch.randn(50, 6)
        yield x, x[:, :3].argmax(1)
"""


@pytest.fixture
def given(tmp_path: Path, monkeypatch: Any) -> list[str]:
    name = f"sizes_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    return ["transfer", f"{name}:build", "--batches", f"{name}:batches", "--steps", "12"]


def _run(arguments: list[str]) -> int:
    try:
        cli.main(arguments)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_rates_and_coordinates_of_a_model_by_import_path(
    given: list[str], tmp_path: Path, capsys: Any
) -> None:
    given += ["--sizes", "width=8", "width=16", "--lr", "0.05", "--seeds", "1", "--out", "here"]
    code = _run(given)
    out = capsys.readouterr().out
    assert "best learning rates: mup, adam, 12 steps" in out
    assert "coordinate check: mup, adam" in out
    summary = json.loads((tmp_path / "here" / "transfer.json").read_text())
    assert code == (0 if summary["passed"] else 4)
    assert [row["size"] for row in summary["rates"]["rows"]] == [{"width": 8}, {"width": 16}]
    runs = (tmp_path / "here" / "runs.jsonl").read_text()
    assert _run([*given, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["rates"] == summary["rates"]
    assert (tmp_path / "here" / "runs.jsonl").read_text() == runs


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sizes", "width:8", "width=16"], "got the size 'width:8', expected names and whole"),
        (["--sizes", "width=8"], "got 1 sizes, expected at least 2"),
        (["--sizes", "depth=8", "depth=9"], "depth"),
        (["--sizes", "width=8", "width=16", "--rule", "mup", "--lr", "1e-30"], "got the same loss"),
    ],
)
def test_bad_input_is_a_sentence(
    given: list[str], arguments: list[str], sentence: str, capsys: Any
) -> None:
    assert _run([*given, *arguments, "--seeds", "1", "--out", "here"]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
