"""The page: what it says, that it survives any summary, and that a real browser draws it."""

from __future__ import annotations

import copy
import html
import json
import math
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from steepest.commands import COMMANDS

pytest.importorskip("plotly", reason="the extra steepest[report] is not installed")
pytest.importorskip("jinja2", reason="the extra steepest[report] is not installed")

from steepest.lab import arguments
from steepest.lab.report import page, read, render, write
from steepest.lab.report.condition_map import EVEN, condition_map, condition_share
from steepest.lab.report.figures import (
    colours,
    learning_rates,
    loss_curves,
    sharpness_picture,
    stability,
)
from steepest.lab.report.wording import headline
from steepest.lab.terminal import optimizer_table
from steepest.printing import as_text

HOSTILE = (
    "</script><script>document.documentElement.dataset.owned=1</script>{{7*7}} µ→汉 %{x} & ]]>"
)


def by_name(summary, name):
    return next(o for o in summary["optimizers"] if o["name"] == name)


def set_gap(summary, name, mean, low, high, n=3):
    by_name(summary, name)["gap_to_baseline"] = {"mean": mean, "low": low, "high": high, "n": n}


def text_of(page):
    """What a reader sees of a page, without scripts and styles."""
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def walk(value, path=()):
    """The path of every value, but of lists only the first and last entry, and no whole record."""
    if path and not (isinstance(value, dict) and isinstance(path[-1], int)):
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1} if value else ()):
            yield from walk(value[i], (*path, i))


def replaced(summary, path, value):
    changed = copy.deepcopy(summary)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


# --- there and back


@pytest.mark.parametrize(("optimizers", "matrices", "steps"), [(1, 1, 1), (4, 26, 13), (8, 0, 0)])
def test_the_summary_comes_back_out_of_the_page(summary, tmp_path, optimizers, matrices, steps):
    given = summary(optimizers, matrices, steps)
    before = copy.deepcopy(given)
    path = write(given, tmp_path / "new" / "page.html")
    assert read(path) == given == before
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_numbers_that_json_cannot_say_become_null(summary, tmp_path):
    given = summary(2)
    by_name(given, "muon")["step_seconds"] = math.nan
    by_name(given, "muon")["rates"][0]["runs"][0]["validation_loss"] = math.inf
    page = write(given, tmp_path / "page.html")
    back = by_name(read(page), "muon")
    assert back["step_seconds"] is None
    assert back["rates"][0]["runs"][0]["validation_loss"] is None
    for block in re.findall(
        r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text()
    ):
        json.loads(block, parse_constant=lambda name: pytest.fail(f"{name} in the page"))


def test_a_failed_write_leaves_the_old_page(summary, tmp_path, monkeypatch):
    path = write(summary(1), tmp_path / "page.html")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(summary(2), path)
    assert len(read(path)["optimizers"]) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("<html><p>hello</p></html>", r"page\.html.* HTML page"),
        ('<script type="application/json" id="steepest-summary">{"a": 1', "cut off or damaged"),
        ('<script type="application/json" id="steepest-summary">{a</script>', "damaged"),
        ('<script type="application/json" id="steepest-summary">[1]</script>', "not a JSON object"),
    ],
)
def test_a_page_without_a_summary_is_refused_in_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "page.html"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read(path)


# --- the foot of the page


@pytest.mark.parametrize(
    ("kind", "typed"),
    [
        ("diagnosis", "diagnose m:build --batches m:batches"),
        (
            "diagnosis",
            "diagnose m:build --batches m:batches --loss m:loss --count 6 --level quick "
            "--optimizer m:opt --clip 0.0 --monitored 'a file.jsonl' --parameters 'blocks.*' head",
        ),
        ("transfer", "transfer m:build --batches m:batches --sizes width=8,depth=2 width=16"),
        (
            "transfer",
            "transfer m:build --batches m:batches --sizes width=8 width=16 --target width=64 "
            "--rule sp --optimizer muon --settings momentum=0.9 scale=none --lr 1e-05 --steps 7 "
            "--branches 'a.*.b' --seeds 3 --grid-only",
        ),
    ],
)
def test_the_command_on_the_page_has_all_settings(kind, typed):
    def parsed(typed):
        return asdict(arguments.parsed(shlex.split(typed), COMMANDS, ""))

    given = {key: each for key, each in parsed(typed).items() if key not in ("json", "out")}
    given = json.loads(json.dumps(given, default=str))
    command = page._command({"kind": kind, "settings": given})
    assert command.startswith("steepest ")
    assert parsed(command.removeprefix("steepest ")) == parsed(typed)


def test_settings_that_were_not_given_and_parts_that_there_are_not(summary):
    given = summary(2)
    given["settings"] = {"loss": None, "parameters": [], "steps": 3}
    del given["data"]
    given["environment"]["processor"] = None
    lists = {head: dict(entries) for head, entries in page._lists(given)}
    assert lists["Settings"] == {"loss": "not given", "parameters": "not given", "steps": "3"}
    assert lists["Environment"]["processor"] == "not measured"
    assert "Data" not in lists
    assert "<h3>Data</h3>" not in render(given)


# --- accuracy and units


def with_accuracy(summary):
    given = summary(3)
    given["data"]["unit"] = "images"
    for i, optimizer in enumerate(given["optimizers"]):
        optimizer["bits_per_byte"] = None
        mean = 0.9 + i / 100
        optimizer["validation_accuracy"] = {"mean": mean, "low": mean - 0.005, "high": mean + 0.01}
        optimizer["validation_accuracy"]["n"] = 3
    return given


def test_accuracy_is_shown_where_there_is_one(summary):
    assert "Accuracy" not in text_of(render(summary(3)))
    page = text_of(render(with_accuracy(summary)))
    assert "Accuracy 95% interval" in page
    assert "91.00% 90.50 to 92.00" in page
    shown = as_text(optimizer_table(with_accuracy(summary)), 100)
    assert "91.0%±0.5%" in shown
    assert "bits/byte" not in shown
    assert "accuracy" not in as_text(optimizer_table(summary(3)), 100)


def test_the_unit_of_the_data_is_in_every_label(summary):
    given = with_accuracy(summary)
    page = text_of(render(given))
    assert "nats per image" in page
    assert "images, time" in page
    assert "Validation loss against images" in page
    assert "oken" not in page
    assert loss_curves(given, "tokens").figure.layout.xaxis.title.text == "training images"
    shown = as_text(optimizer_table(given), 100)
    assert "nats/image" in shown
    assert "images to reach" in shown
    assert "token" not in shown
    assert "nats per token" in text_of(render(summary(3)))
    assert "tokens to reach" in as_text(optimizer_table(summary(3)), 100)


# --- hostile and missing values


def hostile(summary):
    """A summary in which every text that the page shows tries to get out of its place."""
    given = summary(3, 8, 3)
    for key in ("title", "command", "created"):
        given[key] = HOSTILE
    given["plan"]["notes"] = [HOSTILE]
    given["settings"][HOSTILE] = [HOSTILE, HOSTILE]
    given["data"]["description"] = given["environment"]["device"] = HOSTILE
    for i, optimizer in enumerate(given["optimizers"]):
        for key in ("label", "geometry", "memory", "reason"):
            optimizer[key] = f"{i}{HOSTILE}"
        optimizer["rates"][0]["runs"][0]["seed"] = HOSTILE
        for row in optimizer["conditions"]:
            row["matrix"] += HOSTILE
            row["role"] = HOSTILE
    given["optimizers"][1]["name"] = HOSTILE
    return given


def test_hostile_texts_stay_texts(summary, tmp_path):
    given = hostile(summary)
    page = render(given)
    assert page.count("<script") == render(summary(3, 8, 3)).count("<script")
    assert "<script>document.documentElement" not in page
    assert HOSTILE in text_of(page)
    assert "49 µ" not in page
    for optimizer in given["optimizers"]:
        optimizer["rates"][0]["runs"][0]["seed"] = 0  # a text in its place is refused
    assert read(write(given, tmp_path / "page.html")) == given


def test_a_name_that_is_no_valid_text_is_kept(summary, tmp_path):
    given = summary(1)
    given["command"] = "steepest study caf\udce9"
    assert read(write(given, tmp_path / "page.html")) == given


def test_any_entry_may_be_null(summary, monkeypatch):
    monkeypatch.setattr("steepest.lab.report.page.get_plotlyjs", lambda: "")  # for speed
    given = summary(2, 1, 1)
    muon = {("optimizers", 1, *path): path for path in walk(given["optimizers"][1])}
    paths = [(key,) for key in given] + list(muon)
    kinds = {tuple(k for k in path if isinstance(k, str)): path for path in paths}
    assert len(kinds) > 50
    for path in kinds.values():
        try:
            page = render(replaced(given, path, None))
        except Exception as error:
            raise AssertionError(f"a null at {path} broke the page") from error
        assert "How to read this" in page


def test_a_page_of_nulls_says_not_measured(summary):
    def emptied(value):
        if isinstance(value, dict):
            return {key: emptied(item) for key, item in value.items()}
        if isinstance(value, list):
            return [emptied(item) for item in value]
        return value if isinstance(value, str) else None

    page = text_of(render(emptied(summary(4))))
    assert page.count("not measured") > 4 * 6
    assert "Not measured: no loss curves were recorded." in page
    assert "nan" not in page.lower().replace("finance", "")
    assert "None" not in page


@pytest.mark.parametrize("given", [{}, {"optimizers": []}, {"optimizers": [{}, {"name": "muon"}]}])
def test_a_nearly_empty_summary_still_gives_a_page(given):
    assert "How to read this" in text_of(render(given))


# --- what the page says


def test_a_clear_result_is_said_with_its_interval_and_seeds(summary):
    given = summary(2)
    set_gap(given, "muon", -0.0521, -0.0612, -0.043)
    assert headline(given) == (
        "Each at its own best learning rate, Muon ended 0.0521 bits per byte below AdamW "
        "(95% interval of the difference −0.0612 to −0.0430, 3 fresh seeds)."
    )


def test_an_interval_with_zero_in_it_is_no_win(summary):
    given = summary(2)
    set_gap(given, "muon", -0.02, -0.05, 0.01)
    said = headline(given)
    assert "No optimizer is distinguishable from AdamW" in said
    assert "includes zero" in said
    assert "−0.0500 to 0.0100" in said
    assert "includes zero" in text_of(render(given)).split("How to read")[0].split("Results")[1]


def test_a_loss_is_said_as_a_loss(summary):
    given = summary(2)
    set_gap(given, "muon", 0.02, 0.01, 0.03)
    assert headline(given).startswith("No optimizer ended below AdamW: the closest, Muon, ended")


def test_a_single_seed_is_no_result(summary):
    given = summary(2)
    set_gap(given, "muon", -0.02, None, None, n=1)
    assert "single observation, not a result" in headline(given)
    assert "no interval (1 fresh seed)" in text_of(render(given))


def test_an_inconclusive_optimizer_never_wins(summary):
    given = summary(3)
    set_gap(given, "signum", -0.5, -0.6, -0.4)
    set_gap(given, "muon", -0.02, -0.03, -0.01)
    said = headline(given)
    assert "Muon ended 0.0200" in said
    assert "Signum (best of 4 rates is the largest" in said
    assert said.endswith("is inconclusive, and not counted here.")
    by_name(given, "muon")["verdict"] = "inconclusive"
    assert headline(given).startswith("No other optimizer has a tuned learning rate")


def test_an_inconclusive_baseline_spoils_every_comparison(summary):
    given = summary(2)
    by_name(given, "adamw").update(verdict="inconclusive", reason="only one rate was tried")
    said = headline(given)
    assert said.startswith("The learning rate of AdamW itself is inconclusive (only one rate was")
    assert "no comparison with it stands" in said


def test_a_lower_mean_with_a_wide_interval_is_named(summary):
    given = summary(4)
    set_gap(given, "soap", -0.08, -0.2, 0.04)
    set_gap(given, "muon", -0.02, -0.03, -0.01)
    said = headline(given)
    assert "Muon ended 0.0200" in said
    assert "SOAP had a lower mean" in said


def test_without_bytes_the_unit_is_the_loss(summary):
    given = summary(2)
    for optimizer in given["optimizers"]:
        optimizer["bits_per_byte"] = None
    assert "of validation loss below AdamW" in headline(given)
    assert "Bits per" not in text_of(render(given))


def test_the_table_tells_not_reached_from_not_measured(summary):
    given = summary(3)
    assert text_of(render(given)).count("not reached") == 1  # Signum; Muon reached it
    for optimizer in given["optimizers"]:
        optimizer["curves"] = []
    assert "not reached" not in text_of(render(given))


# --- the figures, from their data


def test_curves_are_means_over_seeds_in_one_colour_everywhere(summary):
    given = summary(4)
    colour = colours(given)
    assert len(set(colour.values())) == 4
    for against in ("tokens", "seconds"):
        lines = [t for t in loss_curves(given, against).figure.data if t.fill != "toself"]
        assert {t.legendgroup: t.line.color for t in lines} == colour
        muon = next(t for t in lines if t.legendgroup == "muon")
        ends = [curve["validation_loss"][-1] for curve in by_name(given, "muon")["curves"]]
        assert muon.y[-1] == pytest.approx(sum(ends) / 3)
        assert muon.customdata[-1][:2] == pytest.approx((min(ends), max(ends)))
    assert {t.line.color for t in learning_rates(given).figure.data if t.line.color} == set(
        colour.values()
    )


def test_every_run_is_a_dot_and_the_best_rate_has_the_ring(summary):
    given = summary(2)
    line, ring, dots = learning_rates(given).figure.data[:3]  # Muon, which ranks first
    runs = [run for rate in by_name(given, "muon")["rates"] for run in rate["runs"]]
    assert len(dots.x) == len(runs) == 7
    assert list(ring.x) == [0.02]
    assert ring.y[0] == line.y[list(line.x).index(0.02)]


def test_a_diverged_run_is_a_cross_above_all_losses(summary):
    given = summary(1)
    figure = learning_rates(given).figure
    dots = figure.data[2]
    [(height, _)] = [
        (y, m) for y, m in zip(dots.y, dots.marker.symbol, strict=True) if m == "x-thin"
    ]
    assert height == max(dots.y)
    assert height < figure.layout.yaxis.range[1]


def test_a_loss_far_above_the_others_is_an_arrow_that_tells_its_value(summary):
    given = summary(2)
    by_name(given, "muon")["rates"][-1]["runs"][0]["validation_loss"] = 98.7
    figure = learning_rates(given).figure
    dots = figure.data[2]
    [i] = [i for i, mark in enumerate(dots.marker.symbol) if mark == "arrow-up"]
    assert "98.70" in dots.text[i]
    assert dots.y[i] < figure.layout.yaxis.range[1] < 3


def test_the_map_is_the_log_ratio_centred_at_one(summary):
    optimizer = summary(1)["optimizers"][0]
    optimizer["conditions"] = [
        {"step": s, "matrix": m, "role": "hidden", "nuclear_rank": n, "stable_rank": a}
        for s, m, n, a in [(1, "z", 8, 2), (1, "a", 2, 8), (9, "z", 3, 3), (9, "a", None, 2)]
    ]
    picture = condition_map(optimizer, 3)
    figure = picture.figure
    assert figure.data[0].z == ([2.0, 0.0], [-2.0, None])  # network order, not alphabetical
    assert picture.wide["yaxis.ticktext"] == ["z", "a"]
    assert picture.wide["xaxis.ticktext"] == ["1", "9"]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # first matrix on top
    axis = figure.layout.coloraxis
    assert axis.cmin == -axis.cmax
    assert axis.colorscale[1] == (0.5, EVEN)
    assert condition_share(optimizer) == (0, 1, 9)


def test_sharpness_is_shown_where_it_was_measured(summary):
    given = summary(2)
    assert sharpness_picture(given) is None
    assert "Sharpness during training" not in render(given)
    by_name(given, "muon")["sharpness"] = [
        {"step": 10, "sharpness": 5.0, "stability": [{"measure": "one step", "ratio": 0.5}]},
        {"step": 20, "sharpness": None, "stability": [{"measure": "one step", "ratio": 0.8}]},
        {"step": 30, "sharpness": 9.0, "stability": []},
    ]
    (line,) = sharpness_picture(given).figure.data
    assert (list(line.x), list(line.y)) == ([10, 30], [5.0, 9.0])
    (line,) = stability(given).figure.data
    assert (list(line.x), list(line.y)) == ([10, 20], [0.5, 0.8])
    assert stability(given).figure.layout.shapes[0].y0 == 1
    assert "Sharpness during training" in render(given)


def test_the_page_loads_nothing(summary):
    page = render(summary(3))
    own = re.sub(r"<script>/\*\*\s*\* plotly\.js.*?</script>", "", page, flags=re.DOTALL)
    assert len(own) < len(page) - 3_000_000  # plotly is inside, once
    assert own.count("plotly.js v") == 0
    assert not re.search(r"https?://|\bsrc=|\bhref=|url\(|@import|fetch\(|import\(", own)
    assert "default-src 'none'" in own


# --- a real browser


def without_data(dom):
    return re.sub(r"<script\b.*?</script>", "", dom, flags=re.DOTALL)


def test_a_browser_draws_every_figure(summary, tmp_path, dumped):
    given = summary(4, 26, 6)
    dom = without_data(dumped(write(given, tmp_path / "page.html"), tmp_path / "profile"))
    plots = dom.split('data-figure="')[1:]
    names = [plot.split('"')[0] for plot in plots]
    assert names == ["tokens", "seconds", "rates", "map-0", "map-1", "map-2", "map-3"]
    for plot in plots[:4]:
        assert 'class="main-svg"' in plot
    for plot in plots[4:]:
        assert "main-svg" not in plot  # a tab not yet opened is not drawn
    for plot in plots[:3]:
        legend = re.findall(r'class="legendtext"[^>]*>([^<]+)<', plot)
        assert sorted(legend) == ["AdamW", "Muon", "SOAP", "Signum"]
        assert plot.count('class="trace scatter') >= 4
    assert re.search(
        r'<g class="heatmaplayer.*?<image[^>]+href="data:image/png', plots[3], re.DOTALL
    )
    assert "blocks.3.mlp.down" in plots[3]
    assert "plot.ly" not in dom


def test_a_browser_runs_no_hostile_text(summary, tmp_path, dumped):
    dom = dumped(write(hostile(summary), tmp_path / "page.html"), tmp_path / "profile")
    assert "data-owned" not in dom
    assert without_data(dom).count('class="main-svg"') >= 4


PHONE = """<!DOCTYPE html>
<iframe id="phone" src="page.html" style="width:390px;height:900px;border:0"></iframe>
<pre id="measured"></pre><script>
const phone = document.getElementById("phone");
phone.onload = () => setTimeout(() => {
  const inside = phone.contentDocument;
  inside.querySelectorAll("[role=tab]")[1].click();
  setTimeout(() => {
    const root = inside.documentElement, widest = (all) => Math.max(...Array.from(
      inside.querySelectorAll(all), (part) => part.getBoundingClientRect().right));
    document.getElementById("measured").textContent = JSON.stringify({
      page: [root.scrollWidth, root.clientWidth], plots: widest(".main-svg"),
      texts: widest("p, h1, h2, h3, dd, button"),
      shown: Array.from(inside.querySelectorAll("[role=tabpanel]"), (panel) => !panel.hidden),
      maps: inside.querySelectorAll(".heatmaplayer image").length,
    });
  }, 1500);
}, 1500);
</script>"""


def test_on_a_phone_nothing_is_wider_than_the_screen_and_the_tabs_work(summary, tmp_path, dumped):
    write(summary(3, 26, 6), tmp_path / "page.html")
    wrapper = tmp_path / "phone.html"
    wrapper.write_text(PHONE, encoding="utf-8")
    dom = dumped(wrapper, tmp_path / "profile", "--allow-file-access-from-files")
    measured = json.loads(re.search(r'<pre id="measured">(.*?)</pre>', dom)[1])
    assert measured["page"] == [390, 390] or measured["page"][0] == measured["page"][1] > 360
    assert measured["plots"] <= 390
    assert measured["texts"] <= 390
    assert measured["shown"] == [False, True, False]
    assert measured["maps"] == 2


def test_the_library_never_imports_the_report():
    source = Path(__file__).parents[3] / "src" / "steepest"
    for path in source.rglob("*.py"):
        parts = path.relative_to(source).parts
        if "lab" in parts or "commands" in parts or path.name == "cli.py":
            continue
        assert not re.search(
            r"^\s*(import|from) (plotly|jinja2|steepest\.lab)", path.read_text(), re.M
        )
