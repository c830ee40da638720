"""Settings as a TOML file, which `--config` takes."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from steepest.lab.files import write_atomically

NAME = "config.toml"


def write_settings(folder: Path, command: str, config: Any) -> None:
    """Write all settings into `config.toml` in a folder.

    What follows from other settings is a comment, so that it follows anew where these change.

    Args:
        folder: of the run or the study.
        command: the one that takes the file.
        config: a frozen dataclass, which sets what is None where it follows from the others.
    """
    lines = [f"# steepest {command} --config {NAME}, and what differs behind it"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        follows = field.default is None and replace(config, **{field.name: None}) == config
        line = f"{field.name} = {_toml(value)}"
        lines.append(f"# {line}  # follows from the others" if follows else line)
    write_atomically(folder / NAME, ("\n".join(lines) + "\n").encode(errors="replace"))


def _toml(value: Any) -> str:
    """A value as TOML has it, which for these is nearly what JSON has.

    >>> _toml(("a", 'b"')), _toml(True), _toml(4e-05)
    ('["a", "b\\\\""]', 'true', '4e-05')
    """
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
