"""The page of one run: what was run, where it ended, and its curves."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from steepest.lab.report import wording
from steepest.lab.report.condition_map import colour_limit, condition_map, condition_share
from steepest.lab.report.figures import (
    BASELINE_COLOUR,
    PALETTE,
    Picture,
    finish,
    sharpness_picture,
    stability,
    window,
)
from steepest.lab.report.wording import count, finite, number, percent
from steepest.lab.studies.stored import loss_unit, unit_of

Points = tuple[list[float], list[float], list[int]]
"""Where, what, and after which step it was measured."""

SHOWN_SAMPLES = 2  # the last ones; the others are folded away


def run_page(summary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Picture | None]]:
    """Return what the template of a run shows, and the pictures by name."""
    unit, metrics = unit_of(summary), summary["metrics"]
    axis = f"training {unit}"
    optimizer = _as_optimizer(summary)
    pictures: dict[str, Picture | None] = {
        "loss": _losses(metrics, axis),
        "accuracy": _curve(metrics, "validation", "accuracy", axis, "accuracy", ".2%"),
        "rate": _curve(metrics, "train", "lr", axis, "learning rate", ".3g"),
        "throughput": _curve(metrics, "train", "units_per_second", axis, f"{unit} in a second"),
        "share": _curve(metrics, "train", "optimizer_share", axis, "share of a step", ".1%"),
        "sharpness": sharpness_picture(optimizer),
        "stability": stability(optimizer),
        "conditions": condition_map(optimizer["optimizers"][0], colour_limit(optimizer)),
    }
    share = condition_share(optimizer["optimizers"][0])
    content = {
        "headline": run_headline(summary),
        "unit": unit,
        "loss_unit": loss_unit(unit),
        "about": _about(summary),
        "results": _results(summary),
        "condition": f"Step {share[2]}, the last one measured: the ratio is above 1 for {share[0]} "
        f"of {wording.plural(share[1], 'matrix').replace('matrixs', 'matrices')}."
        if share
        else "",
        "samples": _samples(metrics),
        "shown_samples": SHOWN_SAMPLES,
    }
    return content, pictures


def run_headline(summary: dict[str, Any]) -> str:
    """The result in a sentence, or why there is none."""
    result, unit = summary["result"], unit_of(summary)
    step, steps = result["step"], summary["steps"]
    loss = finite(result.get("validation_loss"))
    named = f"{number(loss, 5)} {loss_unit(unit)}"
    if finite(result.get("bits_per_byte")) is not None:
        named += f", which is {number(result['bits_per_byte'], 5)} bits per byte"
    if finite(result.get("validation_accuracy")) is not None:
        named += f"; its accuracy is {percent(result['validation_accuracy'], 4)}"
    if summary["status"] == "diverged":
        reason = f" It ended with: {summary['reason']}" if summary.get("reason") else ""
        return (
            "This run diverged, so it has no result. The last step that was measured is "
            f"{step} of {steps}.{reason}"
        )
    if summary["status"] == "unfinished":
        begun = f"step {step} of {steps} is the last one measured" if step else "nothing is there"
        last = f" Its last validation loss is {named}." if loss is not None else ""
        return f"This run is not finished: {begun}.{last}"
    seen = f"{steps:,} steps and {count(result.get('tokens'))} {unit}"
    if loss is None:
        return f"This run is finished after {seen}; its validation loss was not measured."
    return f"After {seen} the validation loss is {named}."


def _about(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What was run, as terms and texts."""
    data, result = summary.get("data") or {}, summary["result"]
    tokenizer = f", tokenizer {data['tokenizer']}" if data.get("tokenizer") else ""
    parameters = finite(result.get("parameters"))
    return [
        ("Model", summary["model"]),
        ("Parameters", "known at the end" if parameters is None else f"{parameters:,.0f}"),
        ("Data", f"{data.get('name')}{tokenizer}"),
        ("Optimizer", summary["label"]),
        ("Learning rate", wording.rate(summary.get("lr"))),
        ("Steps", f"{summary['steps']:,}"),
    ]


def _results(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers that are known, as terms and texts."""
    result, unit = summary["result"], unit_of(summary)
    shown = {
        f"Validation loss, {loss_unit(unit)}": ("validation_loss", lambda v: number(v, 5)),
        "Bits per byte": ("bits_per_byte", lambda v: number(v, 5)),
        "Accuracy": ("validation_accuracy", lambda v: percent(v, 4)),
        unit.capitalize(): ("tokens", lambda v: f"{v:,.0f}"),
        "Time of all steps": ("seconds", wording.duration),
        "Time with measurements": ("wall_seconds", wording.duration),
        "A step": ("step_seconds", lambda v: f"{number(1000 * v)} ms"),
        "The optimizer's share of a step": ("optimizer_share", percent),
        f"{unit.capitalize()} in a second": ("units_per_second", count),
        "Model FLOPs utilization": ("mfu", percent),
        "Peak memory": ("peak_memory_bytes", lambda v: f"{wording.megabytes(v)} MB"),
        "Memory of the optimizer": (
            "optimizer_state_bytes",
            lambda v: f"{wording.megabytes(v)} MB",
        ),
    }
    known = {term: (finite(result.get(key)), text) for term, (key, text) in shown.items()}
    return [(term, text(value)) for term, (value, text) in known.items() if value is not None]


CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Pictures of control characters, which a model of bytes writes, and a browser does not show."""


def _samples(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The text samples, the last first."""
    rows = [row for row in metrics if row["kind"] == "sample" and row.get("text") is not None]
    return [{"step": row["step"], "text": row["text"].translate(CONTROL)} for row in reversed(rows)]


def _as_optimizer(summary: dict[str, Any]) -> dict[str, Any]:
    """The run as a study of one optimizer, whose pictures of curvature and conditions it shares."""
    rows = summary["metrics"]
    own = {
        "name": summary["optimizer"],
        "label": summary["label"],
        "conditions": [row for row in rows if row["kind"] == "condition"],
        "sharpness": [row for row in rows if row["kind"] == "sharpness"],
    }
    return {"optimizers": [own]}


def points(metrics: list[dict[str, Any]], kind: str, key: str, against: str = "tokens") -> Points:
    """The finite measurements of a kind: against units or seconds, or steps where those lack."""
    rows = [row for row in metrics if row["kind"] == kind and finite(row.get(key)) is not None]
    known = bool(rows) and all(finite(row.get(against)) is not None for row in rows)
    xs = [float(row[against if known else "step"]) for row in rows]
    return xs, [float(row[key]) for row in rows], [row["step"] for row in rows]


def _losses(metrics: list[dict[str, Any]], axis: str) -> Picture | None:
    """Loss of the batches and of the validation data; the steep beginning is left out."""
    train, validation = (points(metrics, kind, "loss") for kind in ("train", "validation"))
    lines = []
    for (x, y, steps), name, colour in (
        (train, "training batch", BASELINE_COLOUR),
        (validation, "validation", PALETTE[0]),
    ):
        if x:
            lines.append(_scatter(x, y, steps, name, colour, ".4f"))
    if len(lines) == 2:
        lines[0].update(mode="lines", line={"width": 1})  # it is noise around the other
    if not lines:
        return None
    figure = go.Figure(lines)
    finish(figure, axis, "loss")
    main = validation if len(validation[0]) > 1 else train
    if len(main[0]) > 1:
        top, bottom = window([main[:2]])
        bottom = min([bottom, *train[1]])
        pad = 0.08 * (top - bottom) or 0.05
        figure.update_yaxes(range=[bottom - pad, top + pad])
    figure.update_xaxes(rangemode="tozero", hoverformat=".3s")
    figure.update_layout(hovermode="closest")
    return Picture(figure)


def _curve(
    metrics: list[dict[str, Any]],
    kind: str,
    key: str,
    axis: str,
    title: str,
    form: str = ".3s",
) -> Picture | None:
    """One measured number over training."""
    x, y, steps = points(metrics, kind, key)
    if not x:
        return None
    figure = go.Figure(_scatter(x, y, steps, title, PALETTE[0], form))
    finish(figure, axis, title)
    figure.update_xaxes(rangemode="tozero", hoverformat=".3s")
    figure.update_yaxes(rangemode="tozero", tickformat=".0%" if "%" in form else None)
    figure.update_layout(height=300, showlegend=False, hovermode="closest")
    return Picture(figure)


def _scatter(
    x: list[float], y: list[float], steps: list[int], name: str, colour: str, form: str
) -> go.Scatter:
    return go.Scatter(
        x=x, y=y, customdata=steps, name=name, line={"color": colour, "width": 2},
        mode="lines+markers" if len(x) < 40 else "lines", marker={"size": 5},
        hovertemplate="step %{customdata}: %{y:" + form + "}<extra>%{fullData.name}</extra>",
    )  # fmt: skip
