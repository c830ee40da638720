"""The page on transfer, from what `check_transfer` returns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from steepest.lab.report import render
from steepest.lab.report.transfer_page import transfer_page
from steepest.transfer import check_transfer


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def batches(i: int) -> torch.Tensor:
        return torch.randn(16, 3, generator=torch.Generator().manual_seed(i))

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (model(x) - x[:, :1]).square().mean()

    found = check_transfer(
        build, [[{"width": 4}, {"width": 8}]], batches, loss,
        lr=0.1, optimizer="sgd", steps=24, seeds=2,
    )  # fmt: skip
    return {"kind": "transfer", "title": "Does it?", **found.as_dict()}


def test_every_number_is_on_the_page(summary: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")
    content, pictures = transfer_page(summary)
    assert set(pictures) == {"rates-width-12", "rates-width-24", "sharpness-width"}
    assert content["headline"].startswith(summary["verdict"].capitalize())
    [axis] = content["axes"]
    assert [row["size"] for row in axis["horizons"][0]["rows"]] == ["width 4", "width 8"]
    layers = [row["layer"] for row in axis["layers"]]
    assert layers == ["0", "2", "output"]
    assert [len(row["slopes"]) for row in axis["layers"]] == [2, 2, 2]
    html = render(summary)
    for reason in (*summary["reasons"], *summary["retune"]):
        assert reason.replace('"', "&#34;").replace("'", "&#39;") in html
    picture = pictures["rates-width-24"]
    assert picture is not None
    lines = [trace for trace in picture.figure.data if trace.mode == "lines+markers"]
    rows = summary["axes"][0]["rates"]["horizons"][1]["rows"]
    assert [len(line.x) for line in lines] == [len(row["scores"]) for row in rows]


def test_what_blew_up_is_said(summary: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")
    changed = copy.deepcopy(summary)
    changed["axes"][0] |= {"consistency": None, "coordinates": None, "blown": ["sharpness: got"]}
    changed["advice"] = None
    changed["axes"][0]["rates"]["horizons"][0]["rows"][0]["interval"] = None
    html = render(changed)
    assert "sharpness: got" in html
    assert "A run at the best rate of the base blew up." in html
    assert "Coordinate check" not in html


def test_what_is_cut_off_is_said(summary: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")
    changed = copy.deepcopy(summary)
    sharp = "What is above the top is cut off; a double click shows it."
    losses = "Losses above the top are cut off; a double click shows them."
    for horizon in changed["axes"][0]["rates"]["horizons"]:
        for row in horizon["rows"]:  # the best with its neighbours: nothing is cut
            row["scores"] = {row["lr"]: row["scores"][row["lr"]]}
    changed["axes"][0]["consistency"]["rows"][0]["ratios"] = [0.5] * 12
    changed["axes"][0]["consistency"]["rows"][1]["ratios"] = [0.5] * 12
    html = render(changed)
    assert sharp not in html
    assert losses not in html
    changed["axes"][0]["consistency"]["rows"][0]["ratios"][0] = 532.0
    scores = changed["axes"][0]["rates"]["horizons"][0]["rows"][0]["scores"]
    best = next(iter(scores))
    scores |= {2 * best: scores[best], 4 * best: [50.0, 50.0]}
    html = render(changed)
    assert html.count(sharp) == 1
    assert html.count(losses) == 1


def test_the_advised_rate_is_a_line(summary: dict[str, Any]) -> None:
    changed = copy.deepcopy(summary)
    half, whole = changed["axes"][0]["rates"]["horizons"]
    half |= {"advised": 0.0712, "advised_penalty": 0.004}
    whole |= {"advised": None, "advised_penalty": None}
    content, pictures = transfer_page(changed)
    assert [each["advised"] for each in content["axes"][0]["horizons"]] == [True, False]
    with_it, without = pictures["rates-width-12"], pictures["rates-width-24"]
    assert with_it is not None
    assert without is not None
    line = with_it.figure.data[-1]
    assert line.name == "0.0712, advised by the smaller sizes"
    assert set(line.x) == {0.0712}
    assert "costs the largest 0.4% of its loss" in line.hovertemplate
    assert not any("advised" in (trace.name or "") for trace in without.figure.data)


def test_a_slope_that_failed_does_not_look_as_if_it_passed(
    summary: dict[str, Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")
    changed = copy.deepcopy(summary)
    first, second, *_ = changed["axes"][0]["coordinates"]["rows"]
    third = changed["axes"][0]["coordinates"]["rows"][2]
    first |= {"slope": 0.105, "passed": False}
    second |= {"slope": 0.095, "passed": True}
    third |= {"slope": 0.085, "passed": None}
    html = render(changed)
    assert "<strong>+0.105</strong>" in html
    assert "<td>+0.10<small>" in html
    assert "<td>+0.09 ?<small>" in html
    for row in (first, second, third):  # a summary of before
        del row["passed"]
    html = render(changed)
    assert "<strong>+0.105</strong>" in html
    assert "<td>+0.09<small>" in html
