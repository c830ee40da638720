"""The numbers of a summary as one table in a file: CSV or Parquet, through pandas."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

from steepest.lab.errors import InputError
from steepest.lab.files import write_atomically
from steepest.lab.report.comparison import members_of
from steepest.lab.studies.schemas import kind_of

TABLE_SUFFIXES = (".csv", ".parquet")
"""What the name of a file of a table ends with."""


def export(summary: dict[str, Any], path: Path) -> Path:
    """Write the table of a summary, whole or not at all, and return the path.

    Args:
        summary: of a run, a study or a comparison, see `table_rows`.
        path: ends with `.csv` or `.parquet`.

    Raises:
        InputError: for another kind of summary, and without pandas (or pyarrow, for Parquet).
    """
    rows = table_rows(summary)
    pandas = _needed("pandas")
    frame = pandas.DataFrame([{key: _plain(value) for key, value in row.items()} for row in rows])
    content = io.BytesIO()
    if path.suffix.lower() == ".parquet":
        _needed("pyarrow")
        frame.to_parquet(content, index=False, engine="pyarrow")
    else:
        frame.to_csv(content, index=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return path


def table_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of a summary.

    Of a run: a row for each measurement. Of a study: one for each run. Of a comparison: one for
    each run, or for each optimizer of each study.

    Raises:
        InputError: for a diagnosis and the other kinds, which have a table of their own.
    """
    kind = kind_of(summary)
    if kind == "run":
        rows: list[dict[str, Any]] = [dict(row) for row in summary["metrics"]]
    elif kind == "study":
        rows = _study_rows(summary)
    elif kind == "comparison" and summary["runs"]:
        rows = [_run_row(member["name"], member["summary"]) for member in members_of(summary)]
    elif kind == "comparison":
        rows = [
            {"study": member["name"], **_optimizer_row(entry)}
            for member in members_of(summary)
            for entry in member["summary"]["optimizers"]
        ]
    else:
        raise InputError(
            f"got a summary of the kind {kind!r}, expected that of a run, a study or a comparison; "
            "its numbers are in the JSON file of its folder"
        )
    if not rows:
        raise InputError("got a summary without a single measurement, so there is no table")
    return rows


def _study_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"optimizer": entry["name"], "lr": rate["lr"], **run}
        for entry in summary["optimizers"]
        for rate in entry["rates"]
        for run in rate["runs"]
    ]


def _run_row(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """Settings are called `settings.NAME`, so that no setting hides a result."""
    settings = {f"settings.{key}": value for key, value in (run.get("settings") or {}).items()}
    keys = ("status", "model", "optimizer", "lr", "unit", "steps")
    data = {"data": (run.get("data") or {}).get("name")}
    return {"run": name, **{key: run[key] for key in keys}, **data, **run["result"], **settings}


def _optimizer_row(entry: dict[str, Any]) -> dict[str, Any]:
    """The numbers of an optimizer; a mean with its interval becomes columns."""
    row: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            row |= {f"{key}.{part}": number for part, number in value.items()}
        elif not isinstance(value, list):
            row[key] = value
    return row


def _plain(value: Any) -> Any:
    """What a cell can hold: lists and objects as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"this table needs {name}, which is not installed; run: pip install "
            "'steepest[dataframe]'"
        ) from error
