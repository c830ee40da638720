"""The study of where curvature settles: its verdicts, its runs, its page, going on with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.lab.errors import InputError
from steepest.lab.report import read, render, write
from steepest.lab.studies import edge_of_stability as study
from steepest.lab.studies.edge_of_stability import EdgeConfig, digits, trained, verdict

pytest.importorskip("sklearn")


def _records(ratios: list[float]) -> list[dict[str, Any]]:
    return [{"stability": [{"ratio": ratio}]} for ratio in ratios]


@pytest.mark.parametrize(
    ("ratios", "word"),
    [
        ([0.1, 0.5, 0.8, 1.2, 0.95], "at the edge"),
        ([0.1, 0.5, 0.8, 0.89, 0.89], "below"),
        ([0.1, 0.5, 0.6, 0.7, 0.8], "still rising"),
        ([0.1, 0.5, 0.8, 0.95, 1.2], "above"),
        ([0.1, 0.5, 0.8, 0.95, math.inf], "above"),
        ([0.1, 0.5, 0.8, 0.95, math.nan], "diverged"),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.6], "below"),
        ([0.5], "below"),
        ([], "diverged"),
    ],
)
def test_verdicts(ratios: list[float], word: str) -> None:
    assert verdict(_records(ratios), diverged=False)["verdict"] == word
    assert verdict(_records(ratios), diverged=True)["verdict"] == "diverged"


def test_digits_are_centred_and_scaled() -> None:
    X, Y = digits(300)
    assert X.shape == (300, 64)
    assert float(X.mean(0).abs().max()) < 1e-5
    assert X.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(Y.sum(1), torch.ones(300))
    with pytest.raises(InputError, match=r"examples=1798, .* 1797"):
        digits(1798)


def test_gradient_descent_settles_at_its_threshold() -> None:
    """The claim itself, in a small case: fewer steps at a rate that is soon too large."""
    config = EdgeConfig(steps=600, every=30, examples=200, width=32)
    found = trained(config, "gd", 0.4, seed=0)
    assert found["verdict"] == "at the edge"
    start = found["records"][0]["sharpness"]
    assert start < 0.8 * 2 / 0.4  # it had to rise
    assert found["records"][-1]["loss"] < 0.3 * found["records"][0]["loss"]


def test_a_rate_far_too_large_diverges() -> None:
    found = trained(EdgeConfig(steps=50, every=10, examples=100, width=16), "gd", 50.0, seed=0)
    assert found["diverged"]
    assert found["verdict"] == "diverged"


@pytest.fixture
def small() -> EdgeConfig:
    return EdgeConfig(
        optimizers=("gd", "muon-0", "spectral-dual", "adam"),
        seeds=1, steps=20, every=4, width=8, examples=50, workers=2,
    )  # fmt: skip


def test_runs_that_are_finished_are_not_made_again(small: EdgeConfig, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    out = tmp_path / "edge"
    summary = study.edge_of_stability(small, out, lambda *news: told.append(news))
    assert told[0] == (0, 12, "")
    assert told[-1][:2] == (12, 12)
    assert len(summary["entries"]) == 12
    measures = {entry["name"]: entry["measure"] for entry in summary["entries"]}
    assert measures == {
        "gd": "preconditioned Hessian",
        "muon-0": "one step",
        "spectral-dual": "norm ball",
        "adam": "preconditioned Hessian",
    }
    thresholds = [entry["threshold"] for entry in summary["entries"] if entry["name"] == "gd"]
    assert thresholds == pytest.approx([20, 10, 5])

    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    gone = sorted(kept)[0]
    gone.unlink()
    told.clear()
    again = study.edge_of_stability(small, out, lambda *news: told.append(news))
    assert told[0] == (11, 12, "going on")
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept if path != gone)
    for old, new in zip(summary["entries"], again["entries"], strict=True):
        for a, b in zip(old["runs"], new["runs"], strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}

    page = write(summary, tmp_path / "report.html")
    assert read(page)["entries"][0]["label"] == "GD"  # read checks every field
    with pytest.raises(InputError, match="steps"):
        study.edge_of_stability(EdgeConfig(steps=30, every=4), out)


def test_the_page_shows_every_optimizer_and_diverged_runs(monkeypatch: Any) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")
    config = EdgeConfig(optimizers=("gd", "soap"), seeds=1)
    nothing: dict[str, Any] = {**verdict([], True), "records": []}
    good = {
        "records": [
            {
                "step": step, "loss": 0.1, "sharpness": 9.0, "products": 3, "seconds": 0.1,
                "stability": [
                    {"measure": "preconditioned Hessian", "value": 9.0, "threshold": 10.0,
                     "ratio": 0.9}
                ],
            }
            for step in range(10)
        ]
    }  # fmt: skip
    good |= verdict(good["records"], diverged=False)
    found = {
        (name, rate, 0): nothing if rate == study.EDGE_METHODS[name].rates[0] else good
        for name in config.optimizers
        for rate in study.EDGE_METHODS[name].rates
    }
    html = render(study.summarize_edge(config, found))
    assert "At the threshold in every run that settled: GD; SOAP." in html
    assert "3 runs: 2 at the edge, 1 diverged" in html
    assert html.count("λ_max of the Hessian") >= 1
    with pytest.raises(InputError, match="kind 'poem'"):
        render({"kind": "poem"})


def test_impossible_settings_get_a_sentence() -> None:
    for changes, sentence in (
        ({"seeds": 0}, "seeds=0"),
        ({"steps": 20}, "steps=20 .* every 30"),
        ({"optimizers": ("gd", "gd")}, "optimizers .* once"),
    ):
        with pytest.raises(InputError, match=sentence):
            EdgeConfig(**changes)  # type: ignore[arg-type]
