"""Settings as a TOML file, which `--config` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steepest.lab.files import write_atomically

NAME = "config.toml"


def write_settings(folder: Path, command: str, settings: Mapping[str, Any]) -> None:
    """Write all settings that have a value into `config.toml` in a folder."""
    lines = [f"# steepest {command} --config {NAME}, and what differs behind it"]
    lines += [f"{key} = {_toml(value)}" for key, value in settings.items() if value is not None]
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
