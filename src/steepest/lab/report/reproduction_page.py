"""The page of a paper: its claims with verdicts, and the figures of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from steepest.lab.papers.judging import VERDICTS
from steepest.lab.report.figures import PALETTE, Picture, finish, line_of, plain
from steepest.lab.report.wording import NOT_MEASURED, finite, number, plural


def reproduction_page(
    summary: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Picture | None]]:
    """Return what the template shows, and the pictures by name."""
    parts: list[dict[str, Any]] = []
    pictures: dict[str, Picture | None] = {}
    for experiment in summary["experiments"]:
        figures = _figures(experiment)
        names = {f"{experiment['name']}-{i}": name for i, name in enumerate(figures)}
        pictures |= dict(zip(names, figures.values(), strict=True))
        claims = [c for c in summary["claims"] if c["experiment"] == experiment["name"]]
        parts.append(
            {
                "id": experiment["name"],
                "title": experiment["title"],
                "about": _about(experiment),
                "claims": [claim_row(claim) for claim in claims],
                "figures": list(names.items()),
            }
        )
    content = {
        "headline": verdict_counts(summary["claims"]),
        "parts": parts,
        "paper": summary["paper"],
        "open": [
            claim_row(claim)
            for claim in summary["claims"]
            if claim["verdict"] != "reproduced" and not claim["control"]
        ],
        "left_out": list(summary["left_out"].items()),
    }
    return content, pictures


def verdict_counts(claims: Sequence[dict[str, Any]]) -> str:
    """How many claims have which verdict; controls are counted apart.

    >>> claim = {"verdict": "reproduced", "control": False}
    >>> verdict_counts([claim, claim, claim | {"verdict": "inconclusive"}])
    '3 claims: 2 reproduced, 1 inconclusive.'
    """
    verdicts = [claim["verdict"] for claim in claims if not claim["control"]]
    counts = [f"{verdicts.count(word)} {word}" for word in VERDICTS if word in verdicts]
    said = f"{plural(len(verdicts), 'claim')}: {', '.join(counts)}."
    if controls := [claim["verdict"] for claim in claims if claim["control"]]:
        refused = controls.count("not reproduced")
        said += f" Of {plural(len(controls), 'false claim')} on purpose, {refused} refused."
    return said


def claim_row(claim: dict[str, Any]) -> dict[str, Any]:
    """What a table shows of a claim, as texts."""
    values = [value for value in claim["values"] if finite(value) is not None]
    interval = claim["interval"]
    if not values:
        ours, span = NOT_MEASURED, ""
    elif interval is None:
        ours, span = number(fmean(values), 3), ""
    else:
        ours = number(interval["value"], 3)
        span = f"{number(interval['low'], 3)} to {number(interval['high'], 3)}"
    return {
        **{key: claim[key] for key in ("name", "sentence", "place", "source", "quantity")},
        **{key: claim[key] for key in ("criterion", "verdict", "reason", "limits", "control")},
        "paper": claim["paper"] or "no figure",
        "ours": ours,
        "span": span,
        "values": ", ".join(number(value, 3) for value in values),
    }


def _about(experiment: dict[str, Any]) -> str:
    sizes = ", ".join(
        f"{key.replace('_', ' ')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in experiment["sizes"].items()
    )
    parts = [plural(experiment["seeds"], "seed"), sizes, experiment["data"] or ""]
    return "; ".join(part for part in parts if part)


def _figures(experiment: dict[str, Any]) -> dict[str, Picture | None]:
    """A figure for each name: the mean over seeds as a line, the range as a band."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for numbers in experiment["numbers"]:
        for curve in numbers.get("curves") or []:
            curves.setdefault(curve["name"], []).append(curve)
    return {name: _figure(seeds) for name, seeds in curves.items()}


def _figure(seeds: list[dict[str, Any]]) -> Picture | None:
    first, figure = seeds[0], go.Figure()
    for i, name in enumerate(first["lines"]):
        lines = [curve["lines"][name] for curve in seeds if name in curve["lines"]]
        points = []
        for x, *ys in zip(first["x"], *lines, strict=False):
            known = [y for y in map(finite, ys) if y is not None]
            if known:
                points.append((x, fmean(known), min(known), max(known)))
        if not points:
            continue
        colour = PALETTE[i % len(PALETTE)]
        x = [p[0] for p in points]
        if len(seeds) > 1:
            figure.add_scatter(
                x=[*x, *reversed(x)],
                y=[p[3] for p in points] + [p[2] for p in reversed(points)],
                fill="toself", fillcolor=colour, opacity=0.15, line={"width": 0}, mode="lines",
                hoverinfo="skip", showlegend=False, legendgroup=name,
            )  # fmt: skip
        figure.add_scatter(
            x=x, y=[p[1] for p in points], line=line_of(colour), legendgroup=name,
            mode="lines+markers" if len(points) < 12 else "lines", name=plain(name),
            hovertemplate="%{y:.4g}",
        )  # fmt: skip
    if not figure.data:
        return None
    finish(figure, plain(first["across"]), plain(first["up"]))
    if first["log"]:
        figure.update_yaxes(type="log")
    if first.get("log_across"):
        figure.update_xaxes(type="log")
    figure.update_layout(
        height=360, legend={"y": -0.22, "yanchor": "top"}, margin={"t": 12, "b": 90}
    )
    return Picture(figure)
