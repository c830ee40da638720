"""The page on the edge of stability: each optimizer's curvature against its own threshold."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from steepest.lab.report.figures import BASELINE_COLOUR, PALETTE, Picture, finish
from steepest.lab.report.wording import NOT_MEASURED, finite, number, plural, rate

MEASURES = {
    "Hessian": "λ_max of the Hessian",
    "preconditioned Hessian": "λ_max of the preconditioned Hessian",
    "norm ball": "largest curvature in the norm's unit ball (a lower bound)",
    "one step": "price of the next step over its gain",
}
TOP = 2.0  # of the axis of ratios; a double click shows what is above


def edge_page(summary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Picture | None]]:
    """Return what the template shows, and the pictures by name."""
    names = list(dict.fromkeys(entry["name"] for entry in summary["entries"]))
    parts, pictures = [], {"gd": _sharpness(summary)}
    for name in names:
        entries = [entry for entry in summary["entries"] if entry["name"] == name]
        pictures[f"ratio-{name}"] = _ratios(entries, summary["edge"])
        parts.append(
            {
                "id": f"ratio-{name}",
                "label": entries[0]["label"],
                "measure": MEASURES.get(_measure(entries[0]), NOT_MEASURED),
                "said": _said(entries),
                "rows": [_row(entry) for entry in entries],
            }
        )
    content = {
        "headline": _headline(summary),
        "parts": parts,
        "edge": [rate(value) for value in summary["edge"]],
    }
    return content, pictures


def _measure(entry: dict[str, Any]) -> str:
    return "Hessian" if entry["name"] in ("gd", "heavy-ball") else str(entry["measure"])


def _verdicts(entries: list[dict[str, Any]]) -> list[str]:
    return [str(run["verdict"]) for entry in entries for run in entry["runs"]]


def _said(entries: list[dict[str, Any]]) -> str:
    """How many runs ended where, such as "4 of 6 runs at the edge, 2 below"."""
    verdicts = _verdicts(entries)
    kinds = [
        k for k in ("at the edge", "still rising", "below", "above", "diverged") if k in verdicts
    ]
    counts = [f"{verdicts.count(kind)} {kind}" for kind in kinds]
    return f"{plural(len(verdicts), 'run')}: {', '.join(counts)}"


def _headline(summary: dict[str, Any]) -> str:
    by_label: dict[str, list[dict[str, Any]]] = {}
    for entry in summary["entries"]:
        by_label.setdefault(str(entry["label"]), []).append(entry)
    every: list[str] = []
    some: list[str] = []
    never: list[str] = []
    for label, entries in by_label.items():
        ended = [v for v in _verdicts(entries) if v not in ("diverged", "still rising")]
        share = ended.count("at the edge") / len(ended) if ended else 0
        (every if share == 1 else some if share else never).append(label)
    parts = [
        f"{which}: {'; '.join(labels)}."
        for which, labels in (
            ("At the threshold in every run that settled", every),
            ("In some", some),
            ("In none", never),
        )
        if labels
    ]
    return " ".join(parts)


def _row(entry: dict[str, Any]) -> dict[str, str]:
    runs = entry["runs"]
    known = [run for run in runs if finite(run["ratio"]) is not None]
    spans = [f"{number(run['low'], 2)} to {number(run['high'], 2)}" for run in known]
    losses = [run["loss"][-1] for run in known]
    return {
        "lr": rate(entry["lr"]),
        "threshold": number(entry["threshold"], 3),
        "ratio": ", ".join(number(run["ratio"], 3) for run in known) or NOT_MEASURED,
        "span": "; ".join(spans),
        "loss": ", ".join(number(loss, 2) for loss in losses) or NOT_MEASURED,
        "verdict": ", ".join(str(run["verdict"]) for run in runs),
    }


def _sharpness(summary: dict[str, Any]) -> Picture | None:
    """λ_max under gradient descent, with the line of 2 / lr for each rate."""
    entries = [entry for entry in summary["entries"] if entry["name"] == "gd"]
    figure = go.Figure()
    for i, entry in enumerate(entries):
        colour = PALETTE[i % len(PALETTE)]
        for j, run in enumerate(entry["runs"]):
            figure.add_scatter(
                x=run["steps"], y=run["sharpness"], mode="lines", showlegend=j == 0,
                line={"color": colour, "width": 1.5}, name=f"learning rate {rate(entry['lr'])}",
                legendgroup=str(i), hovertemplate="step %{x}: %{y:.3f}",
            )  # fmt: skip
        if entry["threshold"]:
            figure.add_hline(
                y=entry["threshold"], line={"dash": "dot", "width": 1.5, "color": colour},
                annotation={"text": f"2 / {rate(entry['lr'])}", "xanchor": "right", "x": 1},
            )  # fmt: skip
    if not figure.data:
        return None
    finish(figure, "step", "largest eigenvalue of the Hessian")
    figure.update_yaxes(rangemode="tozero")
    return Picture(figure)


def _ratios(entries: list[dict[str, Any]], edge: list[float]) -> Picture | None:
    """What is measured over its threshold: a colour for each rate, a line for each seed."""
    figure = go.Figure()
    for i, entry in enumerate(entries):
        for j, run in enumerate(entry["runs"]):
            points = [
                (x, y)
                for x, y in zip(run["steps"], run["ratios"], strict=True)
                if finite(y) is not None
            ]
            figure.add_scatter(
                x=[x for x, _ in points], y=[y for _, y in points], mode="lines",
                name=f"lr {rate(entry['lr'])}" + (", diverged" if _diverged(entry) else ""),
                legendgroup=str(i), showlegend=j == 0, hovertemplate="step %{x}: %{y:.3f}",
                line={"color": PALETTE[i % len(PALETTE)], "width": 1.5},
            )  # fmt: skip
    if not figure.data:
        return None
    finish(figure, "step", "measured / threshold")
    figure.add_hrect(*edge, fillcolor=BASELINE_COLOUR, opacity=0.15, line_width=0)
    figure.add_hline(y=1, line={"dash": "dot", "width": 1.5, "color": BASELINE_COLOUR})
    figure.update_yaxes(range=[0.0, TOP])
    figure.update_layout(
        height=300, legend={"y": -0.28, "yanchor": "top"}, margin={"t": 30, "b": 80}
    )
    return Picture(figure)


def _diverged(entry: dict[str, Any]) -> bool:
    return all(run["verdict"] == "diverged" for run in entry["runs"])
