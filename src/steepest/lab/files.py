"""Files of the lab: those of `steepest.files`, with a remedy where one is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steepest import files
from steepest.files import DamagedFile, write_atomically, write_json
from steepest.lab.errors import InputError

__all__ = ["read_json", "write_atomically", "write_json"]


def read_json(path: Path, remedy: str | None = None) -> dict[str, Any]:
    """Read a JSON object, or say that the file is damaged, and the remedy."""
    try:
        return files.read_json(path)
    except DamagedFile as error:
        remedy = remedy or f"Delete {path.parent} to start again, or choose another --out"
        raise InputError(f"{error}. {remedy}") from error
