"""Measuring: what is there is kept, what is missing is made, and what cannot be is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from steepest.cli import main
from steepest.files import read_json
from steepest.lab.errors import InputError
from steepest.lab.papers import PAPERS, claim_of
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Paper, Setting
from steepest.lab.papers.judging import judge_claim
from steepest.lab.papers.reproduction import ReproductionPlan, reproduce
from steepest.lab.report import render
from steepest.lab.studies.schemas import checked_summary


def drawn(seed: int, mean: float) -> Numbers:
    """A measurement for these tests."""
    return {"drawn": mean + 0.01 * seed, "nothing": math.nan}


def failing(seed: int) -> Numbers:
    """A measurement that cannot be made."""
    raise InputError("got no number")


def _claim(experiment: Experiment, **changes: Any) -> Claim:
    settings: dict[str, Any] = {
        "name": "small", "sentence": "It is small.", "place": "p. 1", "source": "ours",
        "experiment": experiment, "quantity": "the number", "high": 1.0,
        "value": lambda numbers: numbers["drawn"],
    } | changes  # fmt: skip
    return Claim(**settings)


def _plan(out: Path, *claims: Claim, only: tuple[str, ...] = ()) -> ReproductionPlan:
    paper = Paper(name="paper", title="A paper", authors="N. N.", arxiv="0", claims=claims)
    return ReproductionPlan((paper,), "quick", out, None, 1, only)


def _experiment(seeds: int = 3, **changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "name": "drawing", "title": "Drawing", "kind": "theory", "measure": drawn,
        "scales": {"quick": Setting(sizes={"mean": 0.5}, seeds=seeds)},
    } | changes  # fmt: skip
    return Experiment(**settings)


def _reproduced(plan: ReproductionPlan) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    (summary,) = reproduce(plan, lambda done, of, name: said.append(name), None)  # type: ignore[arg-type]
    return summary, said


def test_only_what_is_missing_is_measured(tmp_path: Path) -> None:
    claim = _claim(_experiment())
    first, _ = _reproduced(_plan(tmp_path, claim))
    (place,) = tmp_path.glob("drawing-*")
    before = {file: file.read_bytes() for file in place.iterdir()}
    (place / "seed-1.json").unlink()
    second, said = _reproduced(_plan(tmp_path, claim))
    assert said == ["going on", "drawing, seed 1"]
    assert second["claims"] == first["claims"]
    for seed in (0, 2):
        file = place / f"seed-{seed}.json"
        assert file.read_bytes() == before[file]


def test_more_seeds_go_on_with_those_that_are_there(tmp_path: Path) -> None:
    _reproduced(_plan(tmp_path, _claim(_experiment(2))))
    summary, said = _reproduced(_plan(tmp_path, _claim(_experiment(4))))
    assert len(said) == 3
    assert summary["claims"][0]["values"] == [0.5, 0.51, 0.52, 0.53]


def test_other_sizes_are_measured_anew(tmp_path: Path) -> None:
    _reproduced(_plan(tmp_path, _claim(_experiment())))
    changed = _experiment(scales={"quick": Setting(sizes={"mean": 2.0}, seeds=3)})
    summary, said = _reproduced(_plan(tmp_path, _claim(changed)))
    assert len(said) == 4
    assert summary["claims"][0]["verdict"] == "not reproduced"


def test_a_damaged_measurement_is_named(tmp_path: Path) -> None:
    claim = _claim(_experiment())
    _reproduced(_plan(tmp_path, claim))
    (file,) = tmp_path.glob("drawing-*/seed-1.json")
    file.write_text(file.read_text().replace("0.51", "0.61"))
    with pytest.raises(InputError, match="damaged"):
        _reproduced(_plan(tmp_path, claim))


def test_a_failure_keeps_what_was_measured(tmp_path: Path) -> None:
    bad = _experiment(name="failing", measure=failing, scales={"quick": Setting(minutes=0)})
    with pytest.raises(InputError, match="got no number"):
        _reproduced(_plan(tmp_path, _claim(_experiment()), _claim(bad, name="bad")))
    _, said = _reproduced(_plan(tmp_path, _claim(_experiment())))
    assert said == ["going on"]


def test_what_cannot_be_measured_here_has_a_reason(tmp_path: Path) -> None:
    away = _experiment(name="away", scales={"gpu": Setting(sizes={"mean": 1.0})})
    text = _experiment(name="text", scales={"quick": Setting(data="wikitext2")})
    summary, _ = _reproduced(
        _plan(tmp_path, _claim(away), _claim(text, name="text"), _claim(_experiment(), name="c"))
    )
    rows = summary["claims"]
    assert [row["verdict"] for row in rows[:2]] == ["not testable here"] * 2
    assert "gpu" in rows[0]["reason"]
    assert "wikitext2/valid.txt" in rows[1]["reason"]


def test_a_report_of_one_claim_is_another_one(tmp_path: Path) -> None:
    claims = _claim(_experiment()), _claim(_experiment(), name="second", high=0.1)
    experiment = claims[0].experiment
    claims = claims[0], _claim(experiment, name="second", high=0.1)  # type: ignore[arg-type]
    _reproduced(_plan(tmp_path, *claims))
    one, _ = _reproduced(_plan(tmp_path, *claims, only=("second",)))
    assert [row["name"] for row in one["claims"]] == ["second"]
    assert len(read_json(tmp_path / "reports" / "paper" / "summary.json")["claims"]) == 2


def test_a_summary_is_plain_json_and_has_a_page(tmp_path: Path) -> None:
    nothing = _claim(_experiment(), name="nothing", value=lambda numbers: numbers["nothing"])
    summary, _ = _reproduced(_plan(tmp_path, nothing))
    json.dumps(summary, allow_nan=False)
    assert summary["claims"][0]["verdict"] == "inconclusive"
    assert "It is small." in render(checked_summary(summary, tmp_path))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([3.0, 3.01, 3.02], "reproduced"),
        ([4.0, 4.1, 4.2], "not reproduced"),
        ([3.0, 3.3, 3.9], "inconclusive"),
        ([3.0], "inconclusive"),
        ([], "inconclusive"),
        ([3.0, math.nan], "inconclusive"),
        ([math.inf, math.inf], "not reproduced"),
    ],
)
def test_verdicts_of_means(values: list[float], verdict: str) -> None:
    assert judge_claim(claim_of("relu-features"), values).verdict == verdict


def test_an_undecided_claim_says_how_many_seeds_would_decide() -> None:
    judgement = judge_claim(claim_of("relu-features"), [3.0, 3.25, 3.4])
    assert "seeds would decide" in judgement.reason
    seeds = int(judgement.reason.split("about ")[1].split()[0])
    more = [3.0, 3.25, 3.4] * math.ceil(seeds / 3)  # the same mean, and about the same spread
    assert judge_claim(claim_of("relu-features"), more).verdict == "reproduced"


def test_a_theorem_holds_with_every_seed_or_not_at_all() -> None:
    claim = claim_of("spectral-guarantee")
    assert judge_claim(claim, [1.0, 1.2]).verdict == "reproduced"
    assert judge_claim(claim, [1.0, 0.9, 5.0]).verdict == "not reproduced"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["teom"], "teom"),
        (["--claim", "relu-featres"], "did you mean relu-features"),
        (["--workers", "0"], "at least 1"),
        (["--data", "nowhere"], "no folder"),
    ],
)
def test_wrong_arguments_are_sentences(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", *arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_list_and_a_dry_run_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["reproduce", "--list"])
    for scale in ("quick", "cpu", "gpu", "paper"):
        main(["reproduce", "--dry-run", "--scale", scale])
    shown = capsys.readouterr().out
    for paper in PAPERS.values():
        assert paper.arxiv in shown
    assert "GPU" in " ".join(shown.split())
    assert not list(tmp_path.iterdir())


def test_one_claim_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "reproduce",
            "--claim",
            "condition-is-sufficient",
            "--out",
            str(tmp_path),
            "--workers",
            "1",
        ]
    )
    shown = capsys.readouterr().out
    assert "condition-is-sufficient" in shown
    assert "reproduced" in shown
    assert list(tmp_path.glob("reports/spectral-condition+condition-is-sufficient/report.html"))
