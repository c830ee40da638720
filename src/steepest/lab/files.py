"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from steepest.lab.errors import InputError


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one piece: a reader sees the old one or the new one."""
    write_atomically(path, json.dumps(content, indent=1).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, force it to disk, and rename it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def read_json(path: Path, remedy: str | None = None) -> dict[str, Any]:
    """Read a JSON object, or say that the file is damaged, and the remedy."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"got {content!r:.40}")
    except ValueError as error:
        remedy = remedy or f"Delete {path.parent} to start again, or choose another --out"
        raise InputError(
            f"{path} is damaged: it is not a JSON object ({error}). {remedy}"
        ) from error
    return content
