"""Tables as CSV and Parquet hold the numbers of the summaries, to the last bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the extra steepest[report] is not installed")
pytest.importorskip("pandas", reason="the extra steepest[dataframe] is not installed")
pytest.importorskip("pyarrow", reason="the extra steepest[dataframe] is not installed")

import pandas

from steepest.files import read_lines
from steepest.lab.errors import InputError
from steepest.lab.report import find_all, write_to
from steepest.lab.report.comparison import comparison
from steepest.lab.report.export import table_rows
from steepest.lab.studies.run_summary import run_summary

READERS = {
    ".csv": lambda path: pandas.read_csv(path, engine="python"),
    ".parquet": pandas.read_parquet,
}


def known(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if pandas.notna(value)}


@pytest.mark.parametrize("suffix", READERS)
def test_a_run_gives_a_line_for_each_measurement(runs: Path, tmp_path: Path, suffix: str) -> None:
    path = write_to(run_summary(runs / "adamw"), tmp_path / "new" / f"table{suffix}")
    frame = READERS[suffix](path)
    stored = read_lines(runs / "adamw" / "metrics.jsonl")[0]
    assert len(frame) == len(stored)
    for row, line in zip(frame.to_dict("records"), stored, strict=True):
        assert known(row) == known(line)


@pytest.mark.parametrize("suffix", READERS)
def test_lists_are_json(runs: Path, tmp_path: Path, suffix: str) -> None:
    path = write_to(run_summary(runs / "muon"), tmp_path / f"table{suffix}")
    frame = READERS[suffix](path)
    rows = frame[frame.kind == "sharpness"]
    stored = [r for r in read_lines(runs / "muon" / "metrics.jsonl")[0] if r["kind"] == "sharpness"]
    assert [json.loads(text) for text in rows.stability] == [row["stability"] for row in stored]


@pytest.mark.parametrize("suffix", READERS)
def test_a_study_gives_a_line_for_each_run(
    summary: Callable[..., dict[str, Any]], tmp_path: Path, suffix: str
) -> None:
    study = summary(3, 1, 1)
    study["optimizers"][1]["rates"][0]["runs"][0]["validation_accuracy"] = 0.75
    frame = READERS[suffix](write_to(study, tmp_path / f"table{suffix}"))
    expected = [
        (o["name"], rate["lr"], run["seed"], run["purpose"], run["status"])
        for o in study["optimizers"]
        for rate in o["rates"]
        for run in rate["runs"]
    ]
    columns = ["optimizer", "lr", "seed", "purpose", "status"]
    assert list(frame[columns].itertuples(index=False, name=None)) == expected
    losses = [row.get("validation_loss") for row in table_rows(study)]
    assert [known({"x": x}).get("x") for x in frame.validation_loss] == losses
    assert frame.validation_accuracy.notna().sum() == 1


def test_a_comparison_gives_a_line_for_each_member(
    runs: Path, summary: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    compared, _ = find_all([runs / "muon", runs / "adamw"])
    frame = READERS[".csv"](write_to(compared, tmp_path / "runs.csv"))
    assert list(frame.run) == ["muon", "adamw"]
    results = [run_summary(runs / name)["result"] for name in frame.run]
    assert list(frame.validation_loss) == [result["validation_loss"] for result in results]
    assert list(frame["settings.batch"]) == [2, 2]
    studies = comparison({"a": summary(2, 1, 1), "b": summary(3, 1, 1)})
    frame = READERS[".csv"](write_to(studies, tmp_path / "studies.csv"))
    assert list(frame.study) == ["a"] * 2 + ["b"] * 3
    first = studies["studies"][0]["summary"]["optimizers"][1]
    assert frame["validation_loss.mean"][1] == first["validation_loss"]["mean"]
    assert frame["gap_to_baseline.low"][1] == first["gap_to_baseline"]["low"]


@pytest.mark.parametrize(("suffix", "library"), [(".csv", "pandas"), (".parquet", "pyarrow")])
def test_a_missing_library_is_named_with_its_command(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    sentence = rf"needs {library}, which is not installed; run: pip install 'steepest\[dataframe\]'"
    with pytest.raises(InputError, match=sentence):
        write_to(run_summary(runs / "adamw"), tmp_path / f"table{suffix}")
    assert not list(tmp_path.iterdir())


def test_what_has_no_table_is_refused(
    runs: Path, tmp_path: Path, summary: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(InputError, match=r"table\.xlsx, expected a name that ends with \.csv"):
        write_to(summary(1, 1, 1), tmp_path / "table.xlsx")
    edge = {"kind": "edge_of_stability", "edge": [0.9, 1.1], "entries": []}
    with pytest.raises(InputError, match="'edge_of_stability', expected that of a run"):
        write_to(edge, tmp_path / "table.csv")
    with pytest.raises(InputError, match="without a single measurement"):
        write_to(run_summary(runs / "adamw") | {"metrics": []}, tmp_path / "table.csv")
