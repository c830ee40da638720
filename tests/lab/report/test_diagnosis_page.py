"""The page of a diagnosis, from what `diagnose` returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steepest.diagnosis import diagnose
from steepest.lab.report import render
from steepest.lab.report.diagnosis_page import _place, diagnosis_page


@pytest.fixture
def summary() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), "head": nn.Linear(6, 4)}
    )

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in model["layers"]:
                x = layer(x).relu()
            return model["head"](x)

    batches = [(torch.randn(50, 6), torch.randint(4, (50,))) for _ in range(8)]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return diagnose(Whole(), loss, batches, level="thorough").as_dict()


def test_every_matrix_has_a_row_and_a_cell(summary: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")
    content, pictures = diagnosis_page(summary)
    assert [row["matrix"] for row in content["rows"]] == [row["matrix"] for row in summary["rows"]]
    known = [
        row
        for row in summary["rows"]
        if next(p for p in row["predictions"] if p["geometry"] == "spectral")["log_ratio"]
    ]
    picture = pictures["map-spectral"]
    assert picture is not None
    cells = [z for line in picture.figure.data[0].z for z in line if z is not None]
    assert len(cells) == len(known)
    html = render(summary)
    assert "Where it disagrees, believe the race." in html
    assert "inner.layers.0.weight" in html


def test_the_plan_and_the_warm_up_are_told_first(summary: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")
    content, _ = diagnosis_page(summary)
    assert content["planned"] == []
    assert "The weights look fresh and were not warmed up: got 8 batches" in content["advised"][0]
    html = render(summary)
    assert "The plan is Muon: spectral steps for hidden matrices" in html
    assert html.index("were not warmed up") < html.index("Over the layers")
    row = summary["advice"]["rows"][0]
    row["geometry"], row["reason"] = "sign", "sign steps are predicted to decrease the loss"
    html = render(summary)
    assert "The plan is Muon, but for these parameters." in html
    assert row["reason"] in html
    del summary["advice"]  # of an earlier version
    assert "The plan is Muon" not in render(summary)


def test_a_matrix_without_numbers_is_listed(summary: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")
    row = summary["rows"][0]
    names = ("stable_rank", "stable_rank_centred", "nuclear_rank", "nuclear_rank_across")
    row |= dict.fromkeys((*names, "stable_rank_output", "gradient", "momentum"))
    row |= {
        "predictions": [],
        "race": [],
        "verdict": "cannot tell",
        "reason": "its gradient is zero",
    }
    html = render(summary)
    assert "inner.layers.0.weight" in html
    assert "its gradient is zero" in html


def test_a_diagnosis_that_cannot_tell_anything_says_so(
    summary: dict[str, Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")
    for row in summary["rows"]:
        row["race"], row["verdict"] = [], "cannot tell"
        for each in row["predictions"]:
            each["log_ratio"] = None
    html = render(summary)
    assert "the batches have no common direction" in html
    assert "3 matrices, from 8 batches: 3 cannot tell." in html


@pytest.mark.parametrize(
    ("matrix", "place"),
    [
        ("model.layers.3.mlp.up.weight", ("3", "mlp.up")),
        ("blocks.0.attention.qkv.weight[2]", ("0", "attention.qkv[2]")),
        ("head.weight", ("-", "head")),
        ("4.weight", ("-", "4")),
    ],
)
def test_layer_and_kind(matrix: str, place: tuple[str, str]) -> None:
    assert _place(matrix) == place


def test_the_race_against_condition_and_prediction(summary: dict[str, Any]) -> None:
    row = summary["rows"][0]
    row.update(nuclear_rank_across=2.0, stable_rank=4.0)
    ratios = {"spectral": {"value": 0.5, "low": 0.1, "high": 0.9}}
    for each in (*row["predictions"], *row["race"]):
        each["log_ratio"] = ratios.get(each["geometry"], each["log_ratio"])
    for other in summary["rows"][1:]:
        other["race"] = []
    content, _ = diagnosis_page(summary)
    [text] = content["disagreements"]
    assert "spectral steps won the race, against the condition (nuclear rank 2" in text
    assert "the prediction" not in text
    row["nuclear_rank_across"] = 8.0
    assert diagnosis_page(summary)[0]["disagreements"] == []


def test_stacks_have_a_table(summary: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")
    assert "Stacks of neighbouring layers" not in render(summary)
    ratio = {"value": 0.0, "low": -0.1, "high": 0.1}
    summary["stacks"] = [{"matrices": ["a.0", "a.1"], "log_ratio": ratio, "verdict": "stacked"}]
    html = render(summary)
    assert "Stacks of neighbouring layers" in html
    assert "a.0, a.1" in html
