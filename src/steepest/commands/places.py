"""Where a command writes: its folder, and the report in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from steepest.lab.errors import InputError
from steepest.lab.train.run_folder import removed


def page(report: Any, summary: dict[str, Any], out: Path) -> Path:
    """Write the report into the folder of what it is about."""
    if not out.is_dir():
        raise removed(out)
    path: Path = report.write(summary, out / "report.html")
    return path


def report_room() -> Any:
    """Return what writes reports.

    Raises:
        InputError: if a library that it needs is not installed.
    """
    try:
        import scipy  # noqa: F401

        from steepest.lab import report
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("jinja2", "plotly", "scipy"):
            raise
        raise InputError(
            f"the report needs {error.name}, which is not installed; "
            "run: pip install 'steepest[report]'"
        ) from error
    return report


def folder(name: str, settings: dict[str, Any]) -> Path:
    """Return the folder under runs/ that belongs to these settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return Path("runs") / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
