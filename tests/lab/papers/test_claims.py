"""Claims of all papers: complete, well formed, and at the quick scale as they should be."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest

from steepest.lab.papers import PAPERS
from steepest.lab.papers.claim import Claim, Comparison, Experiment
from steepest.lab.papers.datasets import SETS
from steepest.lab.papers.reproduction import ReproductionPlan, reproduce, study_config

ALL = [claim for paper in PAPERS.values() for claim in paper.claims]
EXPERIMENTS = {claim.experiment.name: claim.experiment for claim in ALL}
SETTINGS = [
    pytest.param(experiment, scale, id=f"{name}-{scale}")
    for name, experiment in EXPERIMENTS.items()
    for scale in experiment.scales
]


def test_names_are_unique() -> None:
    assert len({claim.name for claim in ALL}) == len(ALL)
    assert len({id(claim.experiment) for claim in ALL}) == len(EXPERIMENTS)


@pytest.mark.parametrize("paper", PAPERS.values(), ids=list(PAPERS))
def test_every_check_is_a_claim_or_left_out_with_a_reason(paper: object) -> None:
    answered = {check for claim in paper.claims for check in claim.checks}  # type: ignore[attr-defined]
    left_out = dict(paper.left_out)  # type: ignore[attr-defined]
    assert answered | left_out.keys() == paper.checks.keys()  # type: ignore[attr-defined]
    assert not answered & left_out.keys()
    assert all(len(reason.split()) > 3 for reason in left_out.values())


@pytest.mark.parametrize("paper", PAPERS.values(), ids=list(PAPERS))
def test_every_paper_has_a_control(paper: object) -> None:
    assert any(claim.control for claim in paper.claims)  # type: ignore[attr-defined]


@pytest.mark.parametrize("claim", ALL, ids=[claim.name for claim in ALL])
def test_a_claim_has_a_limit_and_ends_its_sentence(claim: Claim) -> None:
    assert claim.low < claim.high
    assert math.isfinite(claim.low) or math.isfinite(claim.high)
    assert claim.sentence.endswith(".")
    assert len(claim.sentence.split()) <= 25
    if claim.experiment.kind in ("identity", "theory"):
        assert "quick" in claim.experiment.scales


@pytest.mark.parametrize(("experiment", "scale"), SETTINGS)
def test_every_scale_fits_what_it_measures(
    experiment: Experiment | Comparison, scale: str, tmp_path: Path
) -> None:
    setting = experiment.scales[scale]  # type: ignore[index]
    if isinstance(experiment, Comparison):
        path = tmp_path / SETS.get(str(setting.data), ("text.txt",))[0]
        path.write_text("some text " * 100)
        study_config(experiment, setting, None if setting.data is None else str(path))
        return
    sizes = dict(setting.sizes) | ({"data": ""} if setting.data else {})
    inspect.signature(experiment.measure).bind(0, **sizes)


def test_identities_and_theory_hold_and_controls_are_refused(tmp_path: Path) -> None:
    plan = ReproductionPlan(tuple(PAPERS.values()), "quick", tmp_path, None, 2, only=_theory())
    summaries = reproduce(plan, lambda *_: None, None)  # type: ignore[arg-type]
    rows = [row for summary in summaries for row in summary["claims"]]
    wrong = {
        row["name"]: (row["verdict"], row["values"], row["limits"], row["reason"])
        for row in rows
        if row["verdict"] != ("not reproduced" if row["control"] else "reproduced")
    }
    assert not wrong


def _theory() -> tuple[str, ...]:
    return tuple(c.name for c in ALL if c.experiment.kind in ("identity", "theory"))
