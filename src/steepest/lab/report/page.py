"""The page: one HTML file that opens without a network, and the summary read back out of it."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.io import to_json
from plotly.offline import get_plotlyjs

from steepest.lab.files import write_atomically
from steepest.lab.report import wording
from steepest.lab.report.condition_map import colour_limit, condition_map, condition_share
from steepest.lab.report.figures import Picture, colours, learning_rates, loss_curves, ranked
from steepest.lab.report.wording import NOT_MEASURED, estimate, finite, is_baseline, label, number

_OPEN, _CLOSE = '<script type="application/json" id="steepest-summary">', "</script>"


def render(summary: dict[str, Any]) -> str:
    """Return the whole HTML page for a summary; it contains everything it shows.

    Args:
        summary: plain JSON: dictionaries with text keys, lists, texts, numbers, None. A number
            that is None, NaN or infinite counts as not measured (and is stored as null).

    Raises:
        TypeError: if the summary holds something that JSON cannot.
    """
    summary = _without_nan(summary)
    pictures: dict[str, Picture | None] = {
        "tokens": loss_curves(summary, "tokens"),
        "seconds": loss_curves(summary, "seconds"),
        "rates": learning_rates(summary),
    }
    limit, maps = colour_limit(summary), []
    for i, optimizer in enumerate(summary.get("optimizers") or []):
        picture = condition_map(optimizer, limit)
        if picture:
            pictures[f"map-{i}"] = picture
            maps.append({"id": f"map-{i}", "label": label(optimizer), "said": _said(optimizer)})
    figures = {
        name: json.loads(to_json(picture.figure, validate=False))
        | {"narrow": picture.narrow, "wide": picture.wide}
        for name, picture in pictures.items()
        if picture
    }
    return _template().render(
        title=summary.get("title") or "Study",
        headline=wording.headline(summary),
        facts=_facts(summary),
        base=wording.baseline_label(summary),
        gap_unit=wording.gap_unit(summary),
        has_bytes=any(o.get("bits_per_byte") for o in summary.get("optimizers") or []),
        rows=_rows(summary),
        maps=maps,
        drawn=set(figures),
        lists=_lists(summary),
        notes=[str(note) for note in (summary.get("plan") or {}).get("notes") or []],
        command=summary.get("command"),
        summary_json=_script_json(summary),
        figures_json=_script_json(figures),
        plotly_js=Markup(get_plotlyjs()),
    )


def write(summary: dict[str, Any], path: Path) -> Path:
    """Write the page for a summary to `path`, whole or not at all, and return the path."""
    # A file name that is no valid text (a lone surrogate) may be in the summary: keep it readable.
    page = render(summary).encode("utf-8", "xmlcharrefreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def read(path: Path) -> dict[str, Any]:
    """Return the summary that a page was made from.

    Raises:
        ValueError: if the file holds no such summary.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    advice = "Give a page that `steepest report` or `steepest study` wrote."
    begin = text.find(_OPEN)
    if begin < 0:
        raise ValueError(
            f"got {path}, which holds no summary; expected an HTML page with the block "
            f"{_OPEN}. {advice}"
        )
    begin += len(_OPEN)
    try:
        summary = json.loads(text[begin : text.index(_CLOSE, begin)])
    except ValueError as error:
        raise ValueError(
            f"got {path}, whose summary is cut off or damaged ({error}); expected JSON. {advice}"
        ) from error
    if not isinstance(summary, dict):
        raise ValueError(
            f"got {path}, whose summary is a {type(summary).__name__}; expected an object. {advice}"
        )
    return summary


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("steepest.lab.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.j2")


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


def _rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result table, as texts."""
    colour = colours(summary)
    extent = median([max(map(abs, gap)) for gap in _gaps(summary)] or [0.0])
    span, places = _span(summary, extent), wording.decimals([extent], 3)
    rows = []
    for optimizer in ranked(summary):
        own = is_baseline(summary, optimizer)
        gap = optimizer.get("gap_to_baseline")
        share = finite(optimizer.get("optimizer_share"))
        step = finite(optimizer.get("step_seconds"))
        rows.append(
            {
                "label": label(optimizer),
                "kind": " · ".join(
                    str(optimizer[key]) for key in ("geometry", "memory") if optimizer.get(key)
                ),
                "colour": colour[str(optimizer.get("name"))],
                "baseline": own,
                "loss": estimate(optimizer.get("validation_loss"), 4),
                "bits": estimate(optimizer.get("bits_per_byte"), 4),
                "gap": ("baseline", "") if own else estimate(gap, 3, signed=True, places=places),
                "straddles": not own and wording.sign_of_gap(optimizer) == 0,
                "forest": None if own else _forest(gap, span),
                "lr": wording.rate(optimizer.get("best_lr")),
                "reached": _reached(optimizer, own),
                "step": (
                    number(None if step is None else 1000 * step),
                    "share not measured" if share is None else f"{number(100 * share, 2)}%",
                ),
                "memory": (
                    _megabytes(optimizer.get("peak_memory_bytes")),
                    _megabytes(optimizer.get("optimizer_state_bytes")),
                ),
                "verdict": str(optimizer.get("verdict") or "no verdict"),
                "reason": str(optimizer.get("reason") or ""),
            }
        )
    return rows


def _reached(optimizer: dict[str, Any], own: bool) -> tuple[str, str]:
    """Tokens and seconds until the baseline's final loss was reached, or why there are none."""
    tokens, seconds = (finite(optimizer.get(f"{key}_to_baseline")) for key in ("tokens", "seconds"))
    if tokens is None and seconds is None:
        if own:
            return "baseline", ""
        has_curve = any(curve.get("validation_loss") for curve in optimizer.get("curves") or [])
        return ("not reached" if has_curve else NOT_MEASURED), ""
    return wording.count(tokens), NOT_MEASURED if seconds is None else f"{number(seconds)} s"


def _megabytes(value: Any) -> str:
    known = finite(value)
    return NOT_MEASURED if known is None else number(known / 1e6)


def _gaps(summary: dict[str, Any]) -> list[list[float]]:
    """The known numbers of every gap: mean and ends of its interval."""
    gaps = [o.get("gap_to_baseline") or {} for o in summary.get("optimizers") or []]
    known = [[finite(gap.get(key)) for key in ("low", "mean", "high")] for gap in gaps]
    return [
        [v for v in values if v is not None]
        for values in known
        if any(v is not None for v in values)
    ]


def _span(summary: dict[str, Any], extent: float) -> tuple[float, float]:
    """The range of gaps that the small intervals in the table show; zero is always inside.

    A single far-off optimizer would flatten all others, so the range ends at twice the median
    extent; what lies beyond is drawn as an arrow.
    """
    known = [0.0, *(value for values in _gaps(summary) for value in values)]
    low, high = max(min(known), -2 * extent), min(max(known), 2 * extent)
    return (low, high) if high > low else (-1.0, 1.0)


def _forest(gap: dict[str, Any] | None, span: tuple[float, float]) -> dict[str, Any] | None:
    """Where an interval lies on a scale from 6 to 94; an end beyond the scale becomes an arrow."""
    gap = gap or {}
    mean = finite(gap.get("mean"))
    if mean is None:
        return None

    def place(value: float) -> float:
        return round(6 + 88 * (value - span[0]) / (span[1] - span[0]), 1)

    low, high = (mean if (v := finite(gap.get(k))) is None else v for k in ("low", "high"))
    return {
        "zero": place(0.0),
        "low": min(max(place(low), 3.0), 97.0),
        "high": min(max(place(high), 3.0), 97.0),
        "mean": place(mean) if 3 <= place(mean) <= 97 else None,
        "left": place(low) < 3,
        "right": place(high) > 97,
    }


def _said(optimizer: dict[str, Any]) -> str:
    """One sentence on the last column of an optimizer's map."""
    share = condition_share(optimizer)
    if share is None:
        return ""
    above, of, step = share
    return (
        f"{label(optimizer)}, step {step}, the last one measured: the ratio is above 1 for {above} "
        f"of {wording.plural(of, 'matrix').replace('matrixs', 'matrices')}."
    )


def _lists(summary: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The definition lists at the foot: settings, data, environment, plan."""
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
            else:
                text = _value(value)
            entries.append((term, text))
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
    return f"{value:.6g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
