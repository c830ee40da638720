"""The commands of the tutorial, in their order; its studies with fewer steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from steepest.cli import main
from steepest.commands import COMMANDS
from steepest.lab.arguments import parsed

TUTORIAL = Path(__file__).parents[2] / "docs" / "your_own_model.md"
LONG = "runs/decay"
"""The folder of a study that would take too long for a test, and is only checked."""
EXPECTED = {
    "runs/muon": {"report.html", "result.json"},
    "runs/adamw": {"report.html", "result.json"},
    "runs/own": {"report.html", "result.json"},
    "runs/study": {"report.html", "summary.json", "config.toml"},
    "runs": {"comparison.html", "comparison.csv", "study.csv"},
}


def commands() -> list[list[str]]:
    """The commands of the document: lines after `$` in blocks of a console."""
    blocks = re.findall(r"```console\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    texts = re.findall(r"^\$ (.*)$", "".join(blocks).replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(text) for text in texts]


def shorter(arguments: list[str]) -> list[str]:
    """A command; where it is a study, with fewer steps, seeds and optimizers."""
    if arguments[0] != "study":
        return arguments
    small = [argument for argument in arguments if argument != "muon"]
    for option, value in (("--steps", "4"), ("--seeds", "1")):
        if option in small:
            small[small.index(option) + 1] = value
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
        if LONG in arguments:
            parsed(arguments, COMMANDS, "")  # which checks the settings
        else:
            main(shorter(arguments))
    said = capsys.readouterr()
    assert "going on from step" in said.err
    assert "gap to AdamW" in said.out
    for folder, files in EXPECTED.items():
        assert files <= {path.name for path in (tmp_path / folder).iterdir()}
