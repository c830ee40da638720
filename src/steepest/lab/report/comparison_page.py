"""The page of a comparison: one table, the warnings, and the loss curves on one plot."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from steepest.lab.report import wording
from steepest.lab.report.comparison import (
    MAIN,
    differing,
    machines_differ,
    main_settings,
    members_of,
    warnings_of,
)
from steepest.lab.report.figures import PALETTE, Picture, finish, line_of, plain, window
from steepest.lab.report.run_page import points
from steepest.lab.report.wording import (
    accuracy,
    baseline_label,
    count,
    estimate,
    finite,
    is_baseline,
    label,
    number,
    percent,
)
from steepest.lab.studies.stored import loss_unit, unit_of


def comparison_page(summary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Picture | None]]:
    """Return what the template of a comparison shows, and the pictures by name."""
    members = members_of(summary)
    columns = differing(members)
    units = list(dict.fromkeys(unit_of(member["summary"]) for member in members))
    content: dict[str, Any] = {
        "warnings": warnings_of(members),
        "machines": machines_differ(members),
        "unit": units[0] if len(units) == 1 else "units",
        "loss_unit": loss_unit(units[0]) if len(units) == 1 else "nats per unit",
        "columns": [name for name, _ in columns],
        "equal": [],
        "runs": [],
        "studies": [],
    }
    pictures: dict[str, Picture | None] = {}
    values = [[_setting(name, column[i]) for name, column in columns] for i in range(len(members))]
    if summary["runs"]:
        runs = [member["summary"] for member in members]
        known = {name for name, _ in columns}
        content |= {
            "headline": _headline(members),
            "runs": [
                _run_row(member, PALETTE[i % len(PALETTE)], values[i])
                for i, member in enumerate(members)
            ],
            "equal": [
                (name, _setting(name, value))
                for name, value in main_settings(runs[0]).items()
                if name not in known
            ],
            "has": {key for key in _OPTIONAL if any(finite(r["result"].get(key)) for r in runs)},
        }
        axes = {"tokens": f"training {content['unit']}", "seconds": "seconds of training"}
        pictures = {key: _curves(members, key, axis) for key, axis in axes.items()}
    else:
        content |= {
            "headline": f"The optimizers of {len(members)} studies beside each other.",
            "studies": [
                {
                    "name": member["name"],
                    "base": baseline_label(member["summary"]),
                    "unit": wording.gap_unit(member["summary"]),
                    "values": values[i],
                }
                for i, member in enumerate(members)
            ],
            "optimizers": _optimizer_rows(members),
        }
    return content, pictures


_OPTIONAL = ("bits_per_byte", "validation_accuracy")


def _headline(members: list[dict[str, Any]]) -> str:
    """Which run ended lowest, where losses can be compared, otherwise that they cannot."""
    runs = [member["summary"] for member in members]
    count_of_runs = wording.plural(len(runs), "run")
    if any("comparable" in sentence for sentence in warnings_of(members)):
        return f"{count_of_runs}, whose losses are not comparable as they stand."
    ended = [
        (loss, member["name"])
        for member, run in zip(members, runs, strict=True)
        if run["status"] == "finished"
        and (loss := finite(run["result"].get("validation_loss"))) is not None
    ]
    if len(ended) < 2:
        return f"{count_of_runs}, of which {len(ended)} ended with a validation loss."
    loss, name = min(ended)
    return (
        f"Of {count_of_runs}, {name} ended lowest, at a validation loss of {number(loss, 5)} "
        f"{loss_unit(unit_of(runs[0]))}. One run each: a difference may be chance, which "
        "a study with fresh seeds would show."
    )


def _run_row(member: dict[str, Any], colour: str, values: list[str]) -> dict[str, Any]:
    """A run as texts of a table."""
    run = member["summary"]
    result = run["result"]
    step = finite(result.get("step_seconds"))
    return {
        "name": member["name"],
        "colour": colour,
        "status": "" if run["status"] == "finished" else _status(run),
        "values": values,
        "loss": number(result.get("validation_loss"), 5),
        "bits_per_byte": number(result.get("bits_per_byte"), 5),
        "validation_accuracy": percent(result.get("validation_accuracy"), 4),
        "tokens": count(result.get("tokens")),
        "step": number(None if step is None else 1000 * step),
        "share": percent(result.get("optimizer_share")),
        "memory": wording.megabytes(result.get("peak_memory_bytes")),
        "state": wording.megabytes(result.get("optimizer_state_bytes")),
    }


def _status(run: dict[str, Any]) -> str:
    steps = f"step {run['result']['step']} of {run['steps']}"
    return f"diverged, {steps}" if run["status"] == "diverged" else f"not finished, {steps}"


def _setting(name: str, value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) or (name == "rate" and finite(value) is not None):
        return wording.rate(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and name in MAIN else str(value)


def _optimizer_rows(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each optimizer that any study has, with a cell for each study."""
    names = {
        str(entry["name"]): label(entry)
        for member in members
        for entry in member["summary"]["optimizers"]
    }
    return [
        {"label": shown, "cells": [_cell(member["summary"], name) for member in members]}
        for name, shown in names.items()
    ]


def _cell(study: dict[str, Any], name: str) -> dict[str, Any] | None:
    """What a study says of an optimizer, or None where it has not run it."""
    entry = next((entry for entry in study["optimizers"] if entry["name"] == name), None)
    if entry is None:
        return None
    verdict = str(entry.get("verdict") or "no verdict")
    own = is_baseline(study, entry)
    gap = entry.get("gap_to_baseline")
    return {
        "loss": estimate(entry.get("validation_loss"), 4),
        "bits": estimate(entry.get("bits_per_byte"), 4) if entry.get("bits_per_byte") else None,
        "accuracy": accuracy(entry)[0] if entry.get("validation_accuracy") else "",
        "gap": ("baseline", "") if own else estimate(gap, 3, signed=True),
        "straddles": not own and wording.sign_of_gap(entry) == 0,
        "lr": wording.rate(entry.get("best_lr")),
        "open": "" if verdict == "tuned" else verdict,
    }


def _curves(members: list[dict[str, Any]], against: str, axis: str) -> Picture | None:
    """The validation loss of all runs; the steep beginning is left out."""
    figure, shown = go.Figure(), []
    for i, member in enumerate(members):
        rows = [row for row in member["summary"]["metrics"] if finite(row.get(against)) is not None]
        x, y, steps = points(rows, "validation", "loss", against)
        if x:
            shown.append((x, y))
            figure.add_scatter(
                x=x, y=y, customdata=steps, name=plain(member["name"]),
                mode="lines+markers" if len(x) < 40 else "lines", marker={"size": 5},
                line=line_of(PALETTE[i % len(PALETTE)]),
                hovertemplate="step %{customdata}: %{y:.4f}<extra>%{fullData.name}</extra>",
            )  # fmt: skip
    if not shown:
        return None
    finish(figure, axis, "validation loss")
    top, bottom = window(shown)
    pad = 0.08 * (top - bottom) or 0.05
    figure.update_xaxes(rangemode="tozero", hoverformat=".3s")
    figure.update_yaxes(range=[bottom - pad, top + pad])
    figure.update_layout(hovermode="closest")
    return Picture(figure)
