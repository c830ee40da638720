"""The commands of the tutorial, in their order, each with fewer steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from steepest.cli import main

TUTORIAL = Path(__file__).parents[2] / "docs" / "your_own_model.md"
EXPECTED = {
    "runs/muon": {"report.html", "result.json"},
    "runs/adamw": {"report.html", "result.json"},
    "runs/own": {"report.html", "result.json"},
    "runs/study": {"report.html", "summary.json", "config.toml"},
    "runs/decay": {"report.html", "summary.json", "config.toml"},
    "runs": {"comparison.html", "comparison.csv", "study.csv"},
}


def commands() -> list[list[str]]:
    """The commands of the document: lines after `$` in blocks of a console."""
    blocks = re.findall(r"```console\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    texts = re.findall(r"^\$ (.*)$", "".join(blocks).replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(text) for text in texts]


def shorter(arguments: list[str]) -> list[str]:
    """A command with fewer steps and seeds; a study with fewer optimizers and values."""
    leaves = "muon" if arguments[0] == "study" else None
    small = [
        argument.replace("0,0.01,0.1", "0,0.1") for argument in arguments if argument != leaves
    ]
    for i, argument in enumerate(small[:-1]):
        if argument == "--steps":
            small[i + 1] = str(int(small[i + 1]) // 25)
        if argument == "--seeds":
            small[i + 1] = "1"
    return small


def test_the_commands_of_the_tutorial_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = re.search(r"```python\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "mine.py").write_text(code[1])
    for program, *arguments in commands():
        assert program == "steepest"
        main(shorter(arguments))
    said = capsys.readouterr()
    assert "going on from step" in said.err
    assert "gap to AdamW" in said.out
    for folder, files in EXPECTED.items():
        assert files <= {path.name for path in (tmp_path / folder).iterdir()}
