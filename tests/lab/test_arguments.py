"""Settings of a file behind `--config`, and how they join those that are typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steepest.commands import COMMANDS
from steepest.lab.arguments import parsed
from steepest.lab.errors import InputError


def _train(folder: Path, toml: str, *typed: str) -> Any:
    (folder / "a.toml").write_text(toml)
    return parsed(["train", "--config", str(folder / "a.toml"), *typed], COMMANDS, "")


def test_a_file_gives_settings_and_what_is_typed_goes_first(tmp_path: Path) -> None:
    toml = 'steps = 7\nlr = 0.5\ncompile = true\ndata = "-x"\nmodel-options = ["heads=2"]\n'
    command = _train(tmp_path, toml, "--steps", "9")
    assert (command.steps, command.lr, command.compile) == (9, 0.5, True)
    assert (command.data, command.model_options) == ("-x", ("heads=2",))


@pytest.mark.parametrize(
    ("toml", "typed", "expected"),
    [
        ("steps = 300\ntokens = 100", ["--steps", "5"], {"steps": 5, "tokens": None}),
        ("steps = 5", ["--tokens", "1.5k"], {"tokens": 1500}),
        ("batch_tokens = 64", ["--accumulate", "2"], {"accumulate": 2, "batch_tokens": None}),
        ('data = "stdlib"', ["--batches", "a:b"], {"batches": "a:b", "data": None}),
        ('batches = "a:b"', ["--data=stdlib"], {"data": "stdlib", "batches": None}),
    ],
)
def test_a_typed_setting_replaces_the_one_that_it_stands_for(
    toml: str, typed: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    command = _train(tmp_path, toml, *typed)
    assert {name: getattr(command, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("widht = 16", r"a\.toml has the setting 'widht'.*did you mean width"),
        ("[model]\nwidth = 16", r"a\.toml has a table \[model\]"),
        ('compile = "yes"', r"a\.toml has compile = 'yes', expected true or false"),
        ("steps = true", r"a\.toml has steps = True, expected one number or text"),
        ("steps = [1, 2]", r"a\.toml has steps = \[1, 2\], expected one number or text"),
        ('model_options = [["a=1"]]', r"a\.toml has model_options = .*expected numbers or texts"),
        ("steps =", r"a\.toml is no TOML file"),
    ],
)
def test_a_file_that_holds_something_else_is_named(
    toml: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        _train(tmp_path, toml)


def test_there_is_one_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="twice"):
        _train(tmp_path, "", "--config=b.toml")
    with pytest.raises(SystemExit):
        parsed(["train", "--config", "--steps", "3"], COMMANDS, "")
