"""The page: one HTML file that opens without a network, and the summary read back out of it."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.io import to_json
from plotly.offline import get_plotlyjs

from steepest.files import read_bytes, sealed, unsealed
from steepest.lab.errors import InputError
from steepest.lab.files import read_json, write_atomically
from steepest.lab.report import wording
from steepest.lab.report.comparison import comparison
from steepest.lab.report.comparison_page import comparison_page
from steepest.lab.report.diagnosis_page import diagnosis_page
from steepest.lab.report.edge_page import edge_page
from steepest.lab.report.export import TABLE_SUFFIXES, export
from steepest.lab.report.reproduction_page import reproduction_page
from steepest.lab.report.run_page import run_page
from steepest.lab.report.study_page import study_page
from steepest.lab.report.transfer_page import transfer_page
from steepest.lab.report.wording import NOT_MEASURED, finite
from steepest.lab.studies.run_summary import run_summary
from steepest.lab.studies.schemas import checked_summary, kind_of

PAGES = {
    "study": study_page,
    "edge_of_stability": edge_page,
    "diagnosis": diagnosis_page,
    "transfer": transfer_page,
    "run": run_page,
    "comparison": comparison_page,
    "reproduction": reproduction_page,
}
"""What makes the content of a page and its pictures, for each kind of summary."""

COMMAND_OF = {"diagnosis": ("diagnose", "model"), "transfer": ("transfer", "build")}
"""Of these kinds the command, and which of the settings is its first argument."""

SUMMARIES = ("summary.json", "diagnosis.json")
"""Files that a finished folder has one of."""

_PAGE_SUFFIXES = {"", ".html", ".htm"}

_OPEN, _CLOSE = '<script type="application/json" id="steepest-summary">', "</script>"


def render(summary: dict[str, Any]) -> str:
    """Return the whole HTML page for a summary; it contains everything it shows.

    Args:
        summary: plain JSON: dictionaries with text keys, lists, texts, numbers, None. A number
            that is None, NaN or infinite counts as not measured (and is stored as null). Its
            "kind" is a key of `PAGES`, "study" if there is none.

    Raises:
        TypeError: if the summary holds something that JSON cannot.
        InputError: for another kind.
    """
    summary = _without_nan(summary)
    kind = kind_of(summary)
    content, pictures = PAGES[kind](summary)
    figures = {
        name: json.loads(to_json(picture.figure, validate=False))
        | {"narrow": picture.narrow, "wide": picture.wide}
        for name, picture in pictures.items()
        if picture
    }
    return (
        _templates()
        .get_template(f"{kind}.html.j2")
        .render(
            title=summary.get("title") or "Study",
            facts=_facts(summary),
            drawn=set(figures),
            lists=_lists(summary),
            notes=[str(note) for note in (summary.get("plan") or {}).get("notes") or []],
            command=_command(summary),
            summary_json=_script_json(sealed(summary)),
            figures_json=_script_json(figures),
            plotly_js=Markup(get_plotlyjs()),
            **content,
        )
    )


def write(summary: dict[str, Any], path: Path) -> Path:
    """Write the page for a summary to `path`, whole or not at all, and return the path."""
    # A file name that is no valid text (a lone surrogate) may be in the summary: keep it readable.
    page = render(summary).encode("utf-8", "xmlcharrefreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def write_to(summary: dict[str, Any], path: Path) -> Path:
    """Write what the name of a path asks for, and return the path: a page, or a table.

    A name that ends with `.csv` or `.parquet` gets the table, one with `.html` or without an end
    the page.

    Raises:
        InputError: for a name with another end.
    """
    if path.suffix.lower() in TABLE_SUFFIXES:
        return export(summary, path)
    if path.suffix.lower() not in _PAGE_SUFFIXES:
        raise InputError(
            f"got {path}, expected a name that ends with {' or '.join(TABLE_SUFFIXES)} for a "
            "table, or with .html for a page"
        )
    return write(summary, path)


def find_all(paths: Sequence[Path]) -> tuple[dict[str, Any], Path | None]:
    """Return the summary of one path, or of the comparison of several; and where its page belongs.

    A comparison belongs nowhere, so its place is None.

    Raises:
        InputError: as `find`; for no path, for the same one twice, and for kinds that do not mix.
    """
    if not paths:
        raise InputError("got no path; give the folder of a run or a study, or a report.html")
    if len(paths) == 1:
        return find(paths[0])
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"got {' '.join(map(str, paths))}, expected each path once")
    folders = [path if path.is_dir() or path.stem != "report" else path.parent for path in paths]
    names = [folder.resolve().name for folder in folders]
    names = [
        name if names.count(name) == 1 else str(path)
        for name, path in zip(names, paths, strict=True)
    ]
    members = [find(path)[0] for path in paths]
    return comparison(dict(zip(names, members, strict=True))), None


def find(path: Path) -> tuple[dict[str, Any], Path]:
    """Return the summary in a folder, a page or a JSON file, and where its page belongs.

    Raises:
        InputError: for a path that holds none, or one with a missing or wrong field.
    """
    if not path.exists():
        raise InputError(
            f"{path} does not exist; give the folder of a run or a study, or a report.html"
        )
    if path.is_dir():
        names = [name for name in SUMMARIES if (path / name).exists()]
        if not names and (path / "metrics.jsonl").exists():
            return checked_summary(run_summary(path), path), path / "report.html"
        if not names:
            raise InputError(
                f"{path} has no {' or '.join(SUMMARIES)}, so nothing is finished there; run once "
                "more the command that began it"
            )
        remedy = "Run once more the command that made it; no finished run is lost"
        summary = read_json(path / names[0], remedy)
        return checked_summary(summary, path / names[0]), path / "report.html"
    if path.suffix == ".json":
        return checked_summary(read_json(path, "Give another copy of it"), path), path.with_suffix(
            ".html"
        )
    try:
        return read(path), path
    except ValueError as error:
        raise InputError(str(error)) from error


def read(path: Path) -> dict[str, Any]:
    """Return the summary that a page was made from.

    Raises:
        ValueError: if the file holds no such summary, or one that is damaged.
        InputError: for a summary with a missing or wrong field.
    """
    text = read_bytes(path).decode(errors="replace")
    advice = "Give a page that `steepest report` or `steepest study` wrote."
    begin = text.find(_OPEN)
    if begin < 0:
        raise ValueError(
            f"got {path}, which holds no summary; expected an HTML page with the block "
            f"{_OPEN}. {advice}"
        )
    begin += len(_OPEN)
    try:
        summary = unsealed(json.loads(text[begin : text.index(_CLOSE, begin)]))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"got {path}, whose summary is cut off or damaged ({error}); expected JSON. {advice}"
        ) from error
    return checked_summary(summary, path)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("steepest.lab.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _without_nan(value: Any) -> Any:
    """A copy in which NaN and the infinities are None, which JSON can say."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _script_json(value: Any) -> Markup:
    """JSON that no text in it can end: without `<`, `>` and `&`, and in ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _facts(summary: dict[str, Any]) -> list[str]:
    """The line under the title: when, how much, where."""
    plan, environment = summary.get("plan") or {}, summary.get("environment") or {}
    created = re.sub(r"^(\S+)T(\d\d:\d\d).*Z$", r"\1 \2 UTC", str(summary.get("created") or ""))
    facts = [created] if created else []
    done, planned = finite(plan.get("runs_finished")), finite(plan.get("runs_planned"))
    if done is not None:
        of = f" of {planned:.0f} planned" if planned is not None and planned != done else ""
        facts.append(f"{wording.plural(int(done), 'run')}{of}")
    if finite(plan.get("spent_seconds")) is not None:
        facts.append(wording.duration(plan["spent_seconds"]))
    named = [f"{key} {environment[key]}" for key in ("steepest", "torch") if environment.get(key)]
    return facts + named + [str(environment[key]) for key in ("device",) if environment.get(key)]


def _command(summary: dict[str, Any]) -> str | None:
    """What was typed; of some kinds it is made of the settings, which are called as the options."""
    name, first = COMMAND_OF.get(str(summary.get("kind")), ("", ""))
    settings = summary.get("settings") or {}
    if first not in settings:
        return summary.get("command")
    words = ["steepest", name, str(settings[first])]
    for key, value in settings.items():
        if key == first or value is None or value is False or value == []:
            continue
        words.append("--" + str(key).replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def _lists(summary: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The definition lists at the foot, those with something in them."""
    sizes = {"train_bytes", "validation_bytes"}
    lists = []
    for heading, key in (
        ("Settings", "settings"),
        ("Data", "data"),
        ("Environment", "environment"),
        ("Plan", "plan"),
    ):
        entries = []
        for name, value in (summary.get(key) or {}).items():
            if name == "notes":
                continue
            term = str(name).replace("_", " ").replace(" bytes", "").replace(" seconds", "")
            if name in sizes:
                text = wording.count(value, "B")
            elif str(name).endswith("_seconds"):
                text = wording.duration(value)
            elif key == "settings" and (value is None or value == []):
                text = "not given"
            else:
                text = _value(value)
            entries.append((term, text))
        if entries:
            lists.append((heading, entries))
    return lists


def _value(value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value) or "none"
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return f"{value:.6g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
