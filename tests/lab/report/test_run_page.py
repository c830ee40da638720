"""The page of one run: every number on it is one of the run's files."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the extra steepest[report] is not installed")
pytest.importorskip("jinja2", reason="the extra steepest[report] is not installed")

from steepest.files import read_json, read_lines, write_json, write_lines
from steepest.lab.errors import Diverged, InputError
from steepest.lab.report import find, find_all, read, render, write
from steepest.lab.report.run_page import CONTROL, run_headline, run_page
from steepest.lab.report.wording import count, duration, megabytes, number, percent, rate
from steepest.lab.studies.run_summary import run_summary
from steepest.lab.studies.schemas import checked_summary

HOSTILE = "</script><script>document.documentElement.dataset.owned=1</script>{{7*7}} µ→汉 & ]]>"


@pytest.fixture(autouse=True)
def _no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")  # for speed


def text_of(page: str) -> str:
    """What a reader sees of a page."""
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_lines(folder / "metrics.jsonl")[0] if row["kind"] == kind]


@pytest.fixture
def muon(runs: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be changed."""
    return Path(shutil.copytree(runs / "muon", tmp_path / "muon"))


# --- its summary


def test_the_summary_has_the_numbers_of_the_files(runs: Path) -> None:
    folder = runs / "muon"
    summary = run_summary(folder)
    result, config = read_json(folder / "result.json"), read_json(folder / "config.json")
    assert checked_summary(summary, folder) == summary
    assert summary["metrics"] == read_lines(folder / "metrics.jsonl")[0]
    assert (summary["status"], summary["unit"]) == (result.pop("status"), result.pop("unit"))
    assert {key: summary["result"][key] for key in result} == result
    assert summary["data"] == {
        "name": config["data"], "tokenizer": "bytes", "sha256": config["data_sha256"],
    }  # fmt: skip
    assert (summary["model"], summary["label"]) == ("gpt, width 8, depth 1, heads=1", "Muon")
    assert summary["settings"]["context"] == 8
    assert summary["environment"] == read_json(folder / "environment.json")


def test_throughput_follows_from_units_and_time_where_it_is_not_written(
    muon: Path, edited: Any
) -> None:
    written = [row.get("units_per_second") for row in run_summary(muon)["metrics"]]
    edited(muon, lambda row: {k: v for k, v in row.items() if k != "units_per_second"})
    for row, speed in zip(run_summary(muon)["metrics"], written, strict=True):
        if row["kind"] == "train":
            assert row.get("units_per_second") == pytest.approx(speed)


def test_the_rate_is_the_one_of_the_run(runs: Path, muon: Path) -> None:
    assert run_summary(runs / "adamw")["lr"] == 0.01
    peak = max(row["lr"] for row in lines_of(muon, "train"))
    assert run_summary(muon)["lr"] >= peak
    config = read_json(muon / "config.json") | {"optimizer": "my_package:MyOptimizer"}
    write_json(muon / "config.json", config)  # which the report does not import
    assert run_summary(muon)["lr"] == peak
    write_json(muon / "config.json", config | {"optimizer": "teon:compensate=true"})
    assert run_summary(muon)["label"] == "TEON (compensate=true)"


def test_a_model_by_name_and_a_users_batches_are_named(muon: Path) -> None:
    config = read_json(muon / "config.json")
    config |= {"model": "gpt", "width": 64, "depth": None, "model_options": ["heads=8"]}
    config |= {"batches": "my:batches", "tokenizer": "bpe:300"}
    write_json(muon / "config.json", config)
    summary = run_summary(muon)
    assert summary["model"] == "gpt, width 64, heads=8"
    assert summary["data"]["name"] == "my:batches"
    assert summary["data"]["tokenizer"] == "bpe:300"
    result = read_json(muon / "result.json") | {"unit": "examples"}
    write_json(muon / "result.json", result)
    assert run_summary(muon)["unit"] == "examples"
    assert "tokenizer" not in run_summary(muon)["data"]


def test_data_that_were_not_named_are_those_of_the_default(runs: Path, muon: Path) -> None:
    write_json(muon / "config.json", read_json(muon / "config.json") | {"data": None})
    assert run_summary(muon)["data"]["name"] == "stdlib"
    assert run_summary(runs / "images")["data"]["name"] == "digits"


def test_a_run_of_tokens_has_the_steps_that_they_make(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "stopped", tmp_path / "stopped"))
    write_json(folder / "config.json", read_json(folder / "config.json") | {"tokens": 1610})
    assert run_summary(folder)["steps"] == math.ceil(1610 / (2 * 8)) == 101


def test_a_folder_of_the_time_when_every_model_was_a_gpt(muon: Path) -> None:
    config = read_json(muon / "config.json")
    for name in ("width", "depth", "context", "model_options", "tokenizer"):
        del config[name]
    sizes = {"width": 8, "depth": 1, "context": 8, "heads": 1}
    write_json(muon / "config.json", config | {"model": sizes})
    summary = run_summary(muon)
    assert summary["model"] == "gpt, width 8, depth 1"
    assert summary["settings"]["model heads"] == 1
    assert "model gpt" in text_of(render(summary)).lower()


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_refused(muon: Path, missing: str) -> None:
    (muon / missing).unlink()
    with pytest.raises(InputError, match=r"muon, expected the folder of `steepest train`"):
        run_summary(muon)


def test_a_folder_of_something_else_with_metrics_is_refused(muon: Path) -> None:
    write_json(muon / "config.json", {"steps": 3})
    with pytest.raises(InputError, match=r"config\.json without an optimizer"):
        find(muon)


# --- its page


def test_every_number_of_the_result_is_on_the_page(runs: Path) -> None:
    folder = runs / "muon"
    result = read_json(folder / "result.json")
    summary, place = find(folder)
    assert place == folder / "report.html"
    page = text_of(render(summary))
    for shown in (
        f"After 12 steps and {count(result['tokens'])} tokens the validation loss is "
        f"{number(result['validation_loss'], 5)} nats per token",
        f"{result['parameters']:,}",
        f"{result['tokens']:,}",
        duration(result["seconds"]),
        duration(result["wall_seconds"]),
        f"{number(1000 * result['step_seconds'])} ms",
        percent(result["optimizer_share"]),
        f"{megabytes(result['peak_memory_bytes'])} MB",
        f"{megabytes(result['optimizer_state_bytes'])} MB",
        rate(summary["lr"]),
    ):
        assert shown in page, shown
    assert "Accuracy" not in page


def test_the_curves_are_the_lines_of_the_file(runs: Path) -> None:
    folder = runs / "muon"
    _, pictures = run_page(run_summary(folder))
    training, validation = lines_of(folder, "train"), lines_of(folder, "validation")
    shown = {name: picture.figure for name, picture in pictures.items() if picture}
    batch, held_out = shown["loss"].data
    assert list(batch.y) == [row["loss"] for row in training]
    assert list(held_out.y) == [row["loss"] for row in validation]
    assert list(held_out.x) == [row["tokens"] for row in validation]
    assert list(held_out.customdata) == [row["step"] for row in validation]
    for name, key in (("rate", "lr"), ("share", "optimizer_share")):
        known = [row[key] for row in training if row[key] is not None]
        assert list(shown[name].data[0].y) == known
    [sharp] = shown["sharpness"].data
    assert list(sharp.y) == [row["sharpness"] for row in lines_of(folder, "sharpness")]
    [ratios] = shown["stability"].data
    rows = lines_of(folder, "sharpness")
    assert list(ratios.y) == [row["stability"][0]["ratio"] for row in rows]
    cells = sum(value is not None for row in shown["conditions"].data[0].z for value in row)
    ranked = [r for r in lines_of(folder, "condition") if r["nuclear_rank"] and r["stable_rank"]]
    assert cells == len(ranked) > 0
    assert "accuracy" not in shown


def test_a_run_without_measurements_of_curvature_shows_none(runs: Path) -> None:
    page = text_of(render(run_summary(runs / "adamw")))
    assert "Sharpness" not in page
    assert "Which matrices" not in page
    assert "Text samples" not in page


def test_images_are_called_images_everywhere(runs: Path) -> None:
    folder = runs / "images"
    summary, result = run_summary(folder), read_json(folder / "result.json")
    assert summary["unit"] == "images"
    page = text_of(render(summary)).split("What was run")[0]
    loss = number(result["validation_loss"], 5)
    assert (
        f"{loss} nats per image; its accuracy is {percent(result['validation_accuracy'], 4)}."
        in page
    )
    assert "oken" not in page
    assert "per byte" not in page
    _, pictures = run_page(summary)
    assert pictures["accuracy"] is not None
    measured = [row["accuracy"] for row in lines_of(folder, "validation")]
    assert list(pictures["accuracy"].figure.data[0].y) == measured
    for name in ("loss", "rate", "throughput", "share", "accuracy"):
        assert pictures[name].figure.layout.xaxis.title.text == "training images"


def test_bits_per_byte_and_use_of_the_processor_are_shown_where_they_are_known(
    runs: Path, muon: Path
) -> None:
    result = read_json(runs / "muon" / "result.json")
    text = text_of(render(run_summary(muon)))
    assert f", which is {number(result['bits_per_byte'], 5)} bits per byte." in text
    assert f"Model FLOPs utilization {percent(result['mfu'])}" in text
    for name in ("bits_per_byte", "mfu"):
        del result[name]
    write_json(muon / "result.json", result)
    lines = read_lines(muon / "metrics.jsonl")[0]
    for row in lines:
        row.pop("bits_per_byte", None)
        row.pop("mfu", None)
    write_lines(muon / "metrics.jsonl", lines)
    text = text_of(render(run_summary(muon)))
    assert "per byte" not in text
    assert "FLOPs" not in text


def test_the_samples_of_the_file_are_shown(runs: Path) -> None:
    samples = lines_of(runs / "muon", "sample")
    assert samples
    content, _ = run_page(run_summary(runs / "muon"))
    shown = [(sample["step"], sample["text"]) for sample in reversed(content["samples"])]
    assert shown == [(row["step"], row["text"].translate(CONTROL)) for row in samples]
    assert "a\0\n\tb".translate(CONTROL) == "a␀\n\tb"


def test_samples_stay_texts(muon: Path, tmp_path: Path) -> None:
    samples = [
        {"kind": "sample", "step": step, "text": f"{step}: {HOSTILE}\n  next"} for step in (3, 6, 9)
    ]
    others = [row for row in read_lines(muon / "metrics.jsonl")[0] if row["kind"] != "sample"]
    rows = sorted(others + samples, key=lambda row: row["step"])
    write_lines(muon / "metrics.jsonl", rows)
    write_json(muon / "config.json", read_json(muon / "config.json") | {"data": HOSTILE})
    summary = run_summary(muon)
    page = render(summary)
    assert "<script>document" not in page
    assert page.count("<script") == render(run_summary(muon)).count("<script") == 4
    text = text_of(page)
    assert text.index(f"9: {HOSTILE}") < text.index(f"6: {HOSTILE}") < text.index(f"3: {HOSTILE}")
    assert "49 µ" not in page
    folded = page[page.index("<details>") :]
    assert "3: " in folded
    assert "9: " not in folded[: folded.index("</details>")]
    assert read(write(summary, tmp_path / "page.html")) == summary


def test_the_page_is_rebuilt_from_itself(runs: Path, tmp_path: Path) -> None:
    summary, _ = find(runs / "muon")
    page = write(summary, tmp_path / "page.html")
    again, place = find(page)
    assert (again, place) == (summary, page)
    assert render(again).encode() == page.read_bytes()


PHONE = """<!DOCTYPE html>
<iframe id="phone" src="page.html" style="width:420px;height:900px;border:0"></iframe>
<pre id="measured"></pre><script>
const phone = document.getElementById("phone");
phone.onload = () => setTimeout(() => {
  const inside = phone.contentDocument, root = inside.documentElement;
  const widest = (all) => Math.max(...Array.from(
    inside.querySelectorAll(all), (part) => part.getBoundingClientRect().right));
  document.getElementById("measured").textContent = JSON.stringify({
    page: [root.scrollWidth, root.clientWidth],
    parts: widest(".main-svg, p, h1, h2, h3, dd, dt, pre, figcaption"),
    plots: inside.querySelectorAll(".main-svg").length, owned: root.dataset.owned || null,
  });
}, 1500);
</script>"""


@pytest.mark.parametrize("compared", [False, True])
def test_on_a_phone_nothing_is_wider_than_the_screen(
    runs: Path, muon: Path, tmp_path: Path, compared: bool, dumped: Any, monkeypatch: Any
) -> None:
    monkeypatch.undo()  # a browser needs plotly
    sample = {"kind": "sample", "step": 12, "text": HOSTILE + "a" * 200}
    write_lines(muon / "metrics.jsonl", [*read_lines(muon / "metrics.jsonl")[0], sample])
    summary, _ = find_all([muon, runs / "adamw"] if compared else [muon])
    write(summary, tmp_path / "page.html")
    (tmp_path / "phone.html").write_text(PHONE)
    flag = "--allow-file-access-from-files"
    dom = dumped(tmp_path / "phone.html", tmp_path / "profile", flag)
    block = re.search(r'<pre id="measured">(.*?)</pre>', dom)
    assert block is not None
    measured = json.loads(block[1])
    assert measured["page"][0] == measured["page"][1] > 360
    assert measured["parts"] <= 420
    assert measured["plots"] >= (2 if compared else 7)
    assert measured["owned"] is None


# --- runs that did not end as they should


def test_an_unfinished_run_says_so(runs: Path) -> None:
    summary = run_summary(runs / "stopped")
    last = lines_of(runs / "stopped", "validation")[-1]
    assert (summary["status"], summary["result"]["step"]) == ("unfinished", 6)
    assert summary["result"]["validation_loss"] == last["loss"]
    assert run_headline(summary) == (
        "This run is not finished: step 6 of 12 is the last one measured. Its last validation "
        f"loss is {number(last['loss'], 5)} nats per token, which is "
        f"{number(last['bits_per_byte'], 5)} bits per byte."
    )
    assert "This run is not finished" in text_of(render(summary))


def test_a_run_that_measured_nothing_yet_has_a_page(muon: Path) -> None:
    (muon / "result.json").unlink()
    (muon / "metrics.jsonl").write_text("")
    summary, _ = find(muon)
    assert run_headline(summary) == "This run is not finished: nothing is there."
    assert "no losses were recorded" in text_of(render(summary))


def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(
    runs: Path, tmp_path: Path, small_run: Any
) -> None:
    settings = {"optimizer": "muon", "data": str(runs / "text.txt")}
    whole = run_summary(small_run(tmp_path / "whole", **settings))
    small_run(tmp_path / "resumed", stop=7, **settings)
    resumed = run_summary(small_run(tmp_path / "resumed", **settings))
    assert resumed["status"] == "finished"

    def losses(summary: dict[str, Any]) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in summary["metrics"]]

    assert losses(resumed) == losses(whole)
    assert resumed["result"]["validation_loss"] == whole["result"]["validation_loss"]


def test_a_diverged_run_says_so_and_shows_no_result(
    runs: Path, tmp_path: Path, small_run: Any
) -> None:
    settings = {"optimizer": "adamw", "lr": 1e30, "adamw_lr": 1e30, "warmup": 0}
    with pytest.raises(Diverged) as error:
        small_run(tmp_path / "wild", data=str(runs / "text.txt"), **settings)
    write_json(
        tmp_path / "wild" / "result.json",
        {"status": "diverged", "validation_loss": None, "reason": str(error.value)},
    )
    summary, _ = find(tmp_path / "wild")
    page = text_of(render(summary))
    assert summary["result"]["validation_loss"] is None
    assert "This run diverged, so it has no result." in page
    assert "NaN or infinite" in page
    assert "the validation loss is" not in page


def test_a_run_whose_last_loss_is_not_finite_has_diverged(muon: Path, edited: Any) -> None:
    (muon / "result.json").unlink()
    edited(muon, lambda row: row | {"loss": math.nan})
    summary = run_summary(muon)
    assert summary["status"] == "diverged"
    page = render(summary)
    for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page):
        json.loads(block, parse_constant=lambda name: pytest.fail(f"{name} in the page"))


def test_any_optional_number_may_be_missing(muon: Path, edited: Any) -> None:
    """A page needs the kind and the step of each line, and the keys of the settings."""
    edited(muon, lambda row: {key: row[key] for key in ("kind", "step") if key in row})
    write_json(muon / "result.json", {"status": "finished", "validation_loss": None})
    summary, _ = find(muon)
    page = text_of(render(summary))
    assert "its validation loss was not measured" in page
    assert "nan" not in page.lower()
    assert "None" not in page
