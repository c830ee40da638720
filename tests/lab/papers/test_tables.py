"""The tables of the documentation are those that the stored summaries and the claims make."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from steepest.files import read_json
from steepest.lab.errors import InputError
from steepest.lab.papers import PAPERS
from steepest.lab.papers.tables import between_marks, claims_page, verdicts_page
from steepest.lab.studies.schemas import checked_summary

ROOT = Path(__file__).parents[3]
STORED = sorted((ROOT / "docs" / "reproductions").glob("*.json"))


def test_pages_are_what_the_stored_numbers_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "reproductions", raising=False)
    import reproductions

    for page, text in reproductions.pages().items():
        assert page.read_text() == text, f"run python benchmarks/reproductions.py for {page.name}"


@pytest.mark.parametrize("path", STORED, ids=[path.stem for path in STORED])
def test_stored_summaries_are_whole_and_have_todays_claims(path: Path) -> None:
    summary = checked_summary(read_json(path), path)
    claims = {claim["name"]: claim for claim in summary["claims"]}
    today = {claim.name: claim for claim in PAPERS[path.stem].claims}
    assert claims.keys() == today.keys()
    for name, claim in today.items():
        assert claims[name]["limits"] == claim.limits
        assert claims[name]["sentence"] == claim.sentence
        if claim.control:
            assert claims[name]["verdict"] == "not reproduced"


def test_a_table_counts_claims_and_leaves_controls_out() -> None:
    claim = {"control": False, "verdict": "reproduced"}
    summary = {"paper": {"name": "teon"}, "claims": [claim, claim, {**claim, "control": True}]}
    assert (
        verdicts_page([summary], "docs").splitlines()[-1] == "| [teon](docs/teon.md) | 2 |  |  |  |"
    )


def test_a_bar_in_a_text_does_not_end_a_cell() -> None:
    claim = {
        "sentence": "A | B.", "name": "a", "place": "p. 1", "source": "ours", "quantity": "q",
        "limits": "at most 1", "paper": "", "values": [0.5], "interval": None, "control": False,
        "verdict": "reproduced", "reason": "",
    }  # fmt: skip
    row = claims_page({"claims": [claim]}).splitlines()[-1]
    assert row.replace("\\|", "").count("|") == 6


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(InputError, match="without"):
        between_marks("text", "claims", "table")
