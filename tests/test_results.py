"""A result that writes its table prints at a prompt and in a notebook, and exports."""

from __future__ import annotations

import inspect
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest import curvature, diagnosis, model, parametrize, transfer
from steepest.curvature import muon_conditions, preconditioned_sharpness
from steepest.curvature.block_diagonal import BlockwiseDiagonal, DiagonalShare
from steepest.curvature.directional import DirectionalCurvature
from steepest.curvature.muon_theory import MuonCondition
from steepest.curvature.ntk import NTKDrift, NTKSpectrum
from steepest.curvature.spectra import GaussNewtonSplit, Sharpness, Spectrum
from steepest.curvature.teon_theory import StackCondition
from steepest.diagnosis import LayerConditions, Plan
from steepest.files import read_json
from steepest.results import Column, Result, Results, ResultTable


@dataclass(frozen=True, repr=False)
class Reading(Result):
    name: str
    value: float | None
    shape: tuple[int, ...] = (2, 3)

    def table(self) -> ResultTable:
        columns = ("name", Column("value", "the value", ".2f"), "shape")
        return ResultTable.of([self], columns, "readings [x]", "a <caption>")


READING = Reading("up[0] <b>", 1.234)


def test_all_forms_follow_from_the_table(tmp_path: Path) -> None:
    text = str(READING)
    for part in ("readings [x]", "a <caption>", "the value", "up[0] <b>", "1.23", "2 x 3"):
        assert part in text
    assert repr(READING).split() == text.split()
    html = READING._repr_html_()
    assert "<td>up[0] &lt;b&gt;</td><td>1.23</td><td>2 x 3</td>" in html
    assert "<p>a &lt;caption&gt;</p>" in html
    row = {"name": "up[0] <b>", "value": 1.234, "shape": (2, 3)}
    assert READING.records == [row]
    expected = {"title": "readings [x]", "caption": "a <caption>", "rows": [row]}
    assert READING.as_dict() == expected
    READING.save(tmp_path / "reading.json")
    assert read_json(tmp_path / "reading.json") == json.loads(json.dumps(expected))


def test_a_list_of_results_is_a_list_and_one_table() -> None:
    both = Results([READING, Reading("down", None)])
    assert both == [READING, Reading("down", None)]
    assert [row["name"] for row in both.records] == ["up[0] <b>", "down"]
    assert len(repr(both).splitlines()) == len(repr(READING).splitlines()) + 1
    assert both.table().cells()[1] == ["down", "-", "2 x 3"]
    assert "no rows" in repr(Results[Reading]())


@pytest.mark.parametrize("shown", [READING, READING.table(), Results([READING])])
def test_a_data_frame_needs_pandas_and_says_so(
    shown: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pandas.*\[dataframe\]"):
        shown.to_dataframe()
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert shown.to_dataframe() == [{"name": "up[0] <b>", "value": 1.234, "shape": (2, 3)}]


def test_a_result_without_a_table_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="Result has no table"):
        str(Result())


PARTS = {  # rows and parts of results, which show in the tables of these
    "AuditRow", "AuditWarning", "Axis", "Horizon", "LayerSlope", "ParameterFactors",
    "ParameterRole", "PlanRow", "Prediction", "RaceResult", "SizeCurve", "SizeOptimum",
    "StackDiagnosis",
}  # fmt: skip
NO_RESULTS = {  # what is asked, not what is answered
    "Batches", "GaussNewton", "Hessian", "LayerConditions", "MatrixView", "NTK",
}  # fmt: skip


@pytest.mark.parametrize("room", [model, curvature, diagnosis, parametrize, transfer])
def test_every_public_result_shows_itself(room: Any) -> None:
    public = [getattr(room, name) for name in room.__all__]
    classes = [each for each in public if inspect.isclass(each)]
    silent = {c.__name__ for c in classes if not issubclass(c, Result)} - PARTS - NO_RESULTS
    assert not silent, f"these are no results: {silent}"
    for shown in (c for c in classes if issubclass(c, Result)):
        assert shown.table is not Result.table, f"{shown.__name__} writes no table"
        assert "<" not in shown.__repr__.__qualname__, f"{shown.__name__} needs repr=False"


@pytest.mark.parametrize(
    "returned",
    [
        Sharpness, Spectrum, GaussNewtonSplit, DirectionalCurvature, MuonCondition,
        StackCondition, NTKSpectrum, NTKDrift, DiagonalShare, BlockwiseDiagonal,
    ],
)  # fmt: skip
def test_what_curvature_returns_shows_itself(returned: type[Result]) -> None:
    assert issubclass(returned, Result)
    assert returned.__repr__ is Result.__repr__


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_roles_conditions_and_plans_show_at_a_prompt() -> None:
    mlp, x = _mlp(), torch.randn(32, 6)
    assert "0.weight" in repr(steepest.roles(mlp))
    assert "get a matrix update" in repr(steepest.roles(mlp))
    assert "0.15 lr" in repr(Plan.default(mlp))
    with LayerConditions(mlp) as conditions:
        _loss(mlp, x).backward()
        rows = conditions.measure()
    assert "stable rank" in repr(rows)
    assert rows.records[0]["nuclear_rank"] == rows[0].nuclear_rank
    muon = muon_conditions(mlp, _loss, x)
    assert repr(muon).count(".weight") == len(muon) == 2
    optimizer = steepest.Muon(mlp)
    optimizer.step()
    rows = preconditioned_sharpness(mlp, _loss, x, optimizer)
    assert rows.records[0]["ratio"] == rows[0].ratio
    monitor = steepest.Monitor(mlp, optimizer, every=1)
    assert "no sample yet" in repr(monitor)
    optimizer.step()
    assert "step 1" in repr(monitor)
    assert monitor.as_dict()["rows"] == monitor.records


def test_the_spectrum_of_a_hessian_of_zero_shows_itself() -> None:
    line = nn.Linear(3, 1, bias=False)
    flat = curvature.spectrum(line, lambda m, x: m(x).mean(), torch.randn(4, 3), count=1)
    assert "trace" in repr(flat)
    assert "effective rank" not in repr(flat)
    assert not any(math.isnan(row["value"]) for row in flat.records)
