"""Comparisons of runs and of studies: what is equal, what differs, what does not compare."""

from __future__ import annotations

import copy
import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the extra steepest[report] is not installed")
pytest.importorskip("jinja2", reason="the extra steepest[report] is not installed")

from steepest import cli
from steepest.lab.errors import InputError
from steepest.lab.report import find, find_all, read, render, write
from steepest.lab.report.comparison import comparison, differing, members_of, warnings_of
from steepest.lab.report.comparison_page import comparison_page
from steepest.lab.report.wording import number
from steepest.lab.studies.run_summary import run_summary
from steepest.lab.studies.schemas import checked_summary


@pytest.fixture(autouse=True)
def _no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")  # for speed


def text_of(page: str) -> str:
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def table_of(page: str) -> list[list[str]]:
    """The texts of the first table, row by row."""
    table = page[page.index("<table") : page.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [
        [text_of(cell).strip() for cell in re.findall(r"<t[hd]\b.*?</t[hd]>", row, re.DOTALL)]
        for row in rows
    ]


def altered(run: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run with other fields; dictionaries among them are merged."""
    changed = copy.deepcopy(run)
    for key, value in changes.items():
        changed[key] = changed[key] | value if isinstance(value, dict) else value
    return changed


@pytest.fixture
def muon(runs: Path) -> dict[str, Any]:
    return run_summary(runs / "muon")


# --- runs


def test_the_table_has_what_differs_and_the_results(runs: Path) -> None:
    summary, place = find_all([runs / "muon", runs / "adamw"])
    assert place is None
    assert checked_summary(summary, runs) == summary
    assert summary["title"] == "2 runs compared"
    page = render(summary)
    head, *rows = table_of(page)
    assert [name.split(" ")[0] for name in head] == [
        "Run", "Validation", "Bits", "Optimizer", "Rate", "Tokens", "Step", "Memory",
    ]  # fmt: skip
    column = {name: i for i, name in enumerate(head)}
    assert [row[0] for row in rows] == ["muon", "adamw"]
    assert [row[column["Optimizer"]] for row in rows] == ["Muon", "AdamW"]
    assert rows[1][column["Rate"]] == "0.01"
    for row, name in zip(rows, ("muon", "adamw"), strict=True):
        result = run_summary(runs / name)["result"]
        assert row[1] == number(result["validation_loss"], 5)
        assert row[column["Tokens"]] == str(result["tokens"])
    text = text_of(page)
    assert "The same for all: model gpt, width 8, depth 1, heads=1; data " in text
    assert "steps 12" in text
    assert "not comparable" not in text
    assert "Conditions every" not in head  # how often something is measured changes no result
    lowest = min(
        ("muon", "adamw"), key=lambda n: run_summary(runs / n)["result"]["validation_loss"]
    )
    assert f"Of 2 runs, {lowest} ended lowest" in text


def test_equal_settings_are_shown_once(runs: Path) -> None:
    summary, _ = find_all([runs / "muon", runs / "adamw"])
    assert summary["settings"]["batch"] == 2
    assert "optimizer" not in summary["settings"]
    assert "sharpness every" not in summary["settings"]
    assert {name for name, _ in differing(members_of(summary))} == {"optimizer", "rate"}


def test_both_plots_have_all_runs(runs: Path) -> None:
    summary, _ = find_all([runs / "muon", runs / "adamw", runs / "stopped"])
    _, pictures = comparison_page(summary)
    for against, picture in pictures.items():
        assert picture is not None
        assert [line.name for line in picture.figure.data] == ["muon", "adamw", "stopped"]
        rows = [
            row for row in run_summary(runs / "adamw")["metrics"] if row["kind"] == "validation"
        ]
        assert list(picture.figure.data[1].x) == [row[against] for row in rows]
        assert list(picture.figure.data[1].y) == [row["loss"] for row in rows]


def test_other_data_are_a_warning_and_nobody_wins(runs: Path) -> None:
    summary, _ = find_all([runs / "muon", runs / "other"])
    page = text_of(render(summary))
    assert "Losses are not comparable: the data differ (" in page
    assert "other.txt" in page
    assert "ended lowest" not in page


def test_equal_names_of_other_data_are_a_warning(muon: dict[str, Any]) -> None:
    other = altered(muon, data={"sha256": "0" * 64})
    [sentence] = warnings_of([{"name": "a", "summary": muon}, {"name": "b", "summary": other}])
    assert sentence.endswith("text.txt, with other contents).")


def test_other_tokenizers_leave_bits_per_byte(muon: dict[str, Any]) -> None:
    first = altered(muon, result={"bits_per_byte": 2.12345})
    other = altered(
        muon, data={"sha256": "0" * 64, "tokenizer": "bpe"}, result={"bits_per_byte": 1.98765}
    )
    summary = comparison({"a": first, "b": other})
    [sentence] = warnings_of(members_of(summary))
    assert sentence == (
        "Losses are not comparable: the tokenizers differ (bytes and bpe), so a token is not the "
        "same piece of text. Bits per byte stay comparable."
    )
    _, *rows = table_of(render(summary))
    assert [row[2] for row in rows] == [number(2.12345, 5), number(1.98765, 5)]


def test_other_units_and_other_windows_are_warnings(muon: dict[str, Any]) -> None:
    images = altered(muon, unit="images", result={"validation_accuracy": 0.5})
    [sentence] = warnings_of([{"name": "a", "summary": muon}, {"name": "b", "summary": images}])
    assert (
        sentence
        == "Not comparable: these losses have other units, nats per token and nats per image."
    )
    page = text_of(render(comparison({"a": muon, "b": images})))
    assert "Validation loss against units" in page
    assert "50.00%" in page
    wider = altered(muon, settings={"model context": 16})
    [sentence] = warnings_of([{"name": "a", "summary": muon}, {"name": "b", "summary": wider}])
    assert "validated on other windows" in sentence


def test_runs_without_a_result_are_said(runs: Path, muon: dict[str, Any]) -> None:
    wild = altered(muon, status="diverged", result={"validation_loss": None})
    summary = comparison({"a": muon, "wild": wild, "cut": run_summary(runs / "stopped")})
    page = text_of(render(summary))
    assert "wild (diverged) and cut (unfinished) have no final result." in page
    assert "3 runs, of which 1 ended with a validation loss." in page
    assert "not finished, step 6 of 12" in page


def test_times_of_other_machines_are_said(muon: dict[str, Any]) -> None:
    same = text_of(render(comparison({"a": muon, "b": muon})))
    other = altered(muon, environment={"processor": "another"})
    page = text_of(render(comparison({"a": muon, "b": other})))
    assert "machines that are not the same" in page
    assert "machines that are not the same" not in same


def test_a_comparison_is_rebuilt_from_its_page(runs: Path, tmp_path: Path) -> None:
    summary, _ = find_all([runs / "muon", runs / "adamw"])
    page = write(summary, tmp_path / "page.html")
    assert read(page) == summary
    assert find(page) == (summary, page)
    assert render(read(page)).encode() == page.read_bytes()


def test_names_are_those_of_folders_or_paths_where_these_are_equal(
    runs: Path, tmp_path: Path, muon: dict[str, Any]
) -> None:
    first = write(muon, tmp_path / "a" / "report.html")
    second = write(muon, tmp_path / "b" / "muon" / "report.html")
    names = [m["name"] for m in members_of(find_all([first, second])[0])]
    assert names == ["a", "muon"]
    names = [m["name"] for m in members_of(find_all([runs / "muon", second])[0])]
    assert names == [str(runs / "muon"), str(second)]


def test_hostile_names_stay_texts(muon: dict[str, Any]) -> None:
    hostile = "</script><script>alert(1)</script>{{7*7}} µ→汉"
    page = render(comparison({hostile: altered(muon, label=hostile), "b": muon}))
    assert page.count("<script") == 4
    assert hostile in text_of(page)
    assert "49 µ" not in page


# --- studies


def test_studies_stand_beside_each_other(summary: Callable[..., dict[str, Any]]) -> None:
    first, second = summary(3, 2, 2), summary(2, 2, 2, seed=1)
    second["settings"]["width"] = 256
    compared = comparison({"small": first, "large": second})
    assert checked_summary(compared, Path("a")) == compared
    page = render(compared)
    head, *rows = table_of(page)
    assert [cell.split(" ")[0] for cell in head] == ["Optimizer", "small", "large"]
    by_label = {row[0]: row[1:] for row in rows}
    assert list(by_label) == ["AdamW", "Muon", "Signum"]
    muon = first["optimizers"][1]
    assert by_label["Muon"][0].startswith(number(muon["validation_loss"]["mean"], 4))
    assert by_label["Muon"][1].startswith("−0.02")
    assert by_label["Signum"][-1] == "not in this study"
    assert "baseline" in by_label["AdamW"][1]
    assert "Width" in page
    assert "256" in page
    assert "conditions" not in compared["studies"][0]["summary"]["optimizers"][0]
    assert first["optimizers"][0]["conditions"]  # the original is left as it was


def test_studies_of_other_data_or_baselines_are_warned_of(
    summary: Callable[..., dict[str, Any]],
) -> None:
    first, second = summary(2, 1, 1), summary(2, 1, 1)
    second["baseline"] = "muon"
    second["data"] |= {"name": "mine", "sha256": "0" * 64}
    page = text_of(render(comparison({"a": first, "b": second})))
    assert "the data differ (stdlib and mine)" in page
    assert "Gaps are to other baselines: adamw and muon." in page


# --- what does not mix


def test_kinds_that_do_not_mix_are_refused(
    muon: dict[str, Any], summary: Callable[..., dict[str, Any]], runs: Path, tmp_path: Path
) -> None:
    sentence = r"a \(run\), b \(study\), expected several runs or several studies"
    with pytest.raises(InputError, match=sentence):
        comparison({"a": muon, "b": summary(1, 1, 1)})
    page = write(comparison({"a": muon, "b": muon}), tmp_path / "page.html")
    with pytest.raises(InputError, match="comparison"):
        find_all([page, runs / "muon"])
    with pytest.raises(InputError, match="each path once"):
        find_all([runs / "muon", runs / "muon"])
    with pytest.raises(InputError, match="got no path"):
        find_all([])


def test_the_command_compares(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["report", str(runs / "muon"), str(runs / "adamw")]
    for out in ([], ["--out", "mine.html"], ["--out", "mine.csv"]):
        cli.main(arguments + out)
    assert "report: file://" in capsys.readouterr().out
    [page] = tmp_path.glob("runs/comparison-*.html")
    assert [m["name"] for m in members_of(read(page))] == ["muon", "adamw"]
    assert (tmp_path / "mine.csv").read_text().startswith("run,")
    cli.main(["report", "mine.html", "--out", "again.html"])
    assert (tmp_path / "again.html").read_text() == (tmp_path / "mine.html").read_text()
