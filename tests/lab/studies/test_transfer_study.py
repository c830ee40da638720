"""The command `steepest transfer`, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steepest import cli
from steepest.lab.studies.transfer_study import _option, sizes_by_axis
from steepest.transfer.coordinates import axis_of

MINE = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.input = nn.Linear(6, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 3)
    def forward(self, x):
        x = self.input(x)
        for block in self.blocks:
            x = x + block(x).tanh() / 4
        return self.head(x)
def build(width, depth=1):
    return Net(width, depth)
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


def test_a_model_by_import_path(given: list[str], tmp_path: Path, capsys: Any) -> None:
    given += ["--sizes", "width=8,depth=1", "width=16", "--lr", "0.05", "--seeds", "1"]
    given += ["--out", "here"]
    code = _run([*given, "--target", "width=64"])
    captured = capsys.readouterr()
    assert "best learning rates: mup, adam" in captured.out
    assert "coordinate check: mup, adam" in captured.out
    assert "sharpness over threshold: mup, adam" in captured.out
    assert "report: file://" in captured.out
    assert "rates over width" in captured.err  # where there is no terminal for a bar
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert code == {True: 0, False: 4, None: 3}[summary["passed"]]
    [axis] = summary["axes"]
    assert axis["name"] == "width"
    assert [each["steps"] for each in axis["rates"]["horizons"]] == [6, 12]
    page = (tmp_path / "here" / "report.html").read_text()
    assert summary["verdict"].capitalize() in page
    runs = (tmp_path / "here" / "runs.jsonl").read_text()
    assert _run([*given, "--target", "width=64", "--json"]) == code
    again = capsys.readouterr()
    assert "if your code has changed, take another --out" in again.err
    assert "if your code has changed" not in captured.err
    assert json.loads(again.out)["axes"] == summary["axes"]
    assert (tmp_path / "here" / "runs.jsonl").read_text() == runs
    assert _run(given) == 2  # another target
    assert "holds a run with other settings: target was" in capsys.readouterr().err
    assert _run(["report", "here"]) == 0


def test_over_two_sizes(given: list[str], tmp_path: Path, capsys: Any) -> None:
    given += ["--sizes", "width=8,depth=1", "width=16", "depth=2", "--seeds", "2"]
    given += ["--rule", "completep", "--branches", "blocks.*", "--optimizer", "sgd"]
    given += ["--settings", "momentum=0.5", "--lr", "0.1"]
    _run([*given, "--out", "here"])
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert [axis["name"] for axis in summary["axes"]] == ["width", "depth"]
    assert summary["advice"]["target"] == {"width": 16, "depth": 2}
    first, second = (axis["rates"]["horizons"][-1]["rows"] for axis in summary["axes"])
    assert first[0]["scores"] == second[0]["scores"]  # the base, trained once
    assert "over depth" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sizes", "width:8", "width=16"], "got the size 'width:8', expected names and whole"),
        (["--sizes", "width=8", "width=16", "--settings", "block:8"], "got the setting 'block:8'"),
        (["--sizes", "width=8", "width=16", "--settings", "blok=8"], "blok"),
        (["--sizes", "width=8"], "got 1 sizes, expected at least 2"),
        (["--sizes"], "got 0 sizes, expected at least 2"),
        (["--sizes", "width=8,width=9", "width=16"], "expected each name once"),
        (["--sizes", "width=16", "width=8"], "got width 16, 8, expected sizes that grow"),
        (
            [
                "--sizes",
                "width=8,depth=1",
                "width=16",
                "depth=2",
                "--rule",
                "completep",
                "--branches",
                "blocks.*.nothing",
            ],
            "blocks.*.nothing",
        ),
        (["--sizes", "width=8", "depth=2"], "the first of the sizes does not name"),
        (["--sizes", "depth=8", "depth=9"], "depth"),
        (["--sizes", "width=8", "width=16", "--rule", "mup", "--lr", "1e-30"], "got the same loss"),
    ],
)
def test_bad_input_is_a_sentence(
    given: list[str], arguments: list[str], sentence: str, capsys: Any
) -> None:
    assert _run([*given, *arguments, "--seeds", "1", "--out", "here"]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    only_training_tells = sentence == "got the same loss"
    assert Path("here", "runs.jsonl").exists() == only_training_tells


def test_options_are_values_of_python() -> None:
    typed = ["block=32", "nesterov=false", "eps=1e-8", "betas=(0.9,0.95)", "length=own", "scale=a"]
    assert dict(map(_option, typed)) == {
        "block": 32, "nesterov": False, "eps": 1e-8, "betas": (0.9, 0.95), "length": "own",
        "scale": "a",
    }  # fmt: skip


def test_what_grows_first_names_the_axis() -> None:
    assert sizes_by_axis(["heads=2,width=64", "width=128,heads=4"]) == [
        [{"width": 64, "heads": 2}, {"width": 128, "heads": 4}]
    ]
    assert axis_of(sizes_by_axis(["heads=2,width=64", "width=128,heads=4"])[0])[0] == "width"
