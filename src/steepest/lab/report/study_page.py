"""The page of an optimizer study: its table, its sentences, its pictures."""

from __future__ import annotations

from statistics import median
from typing import Any

from steepest.lab.report import wording
from steepest.lab.report.condition_map import colour_limit, condition_map, condition_share
from steepest.lab.report.figures import (
    Picture,
    colours,
    learning_rates,
    loss_curves,
    ranked,
    sharpness_picture,
    stability,
)
from steepest.lab.report.wording import NOT_MEASURED, estimate, finite, is_baseline, label, number
from steepest.lab.studies.stored import loss_unit, unit_of


def study_page(summary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Picture | None]]:
    """Return what the template of the study shows, and the pictures by name."""
    pictures: dict[str, Picture | None] = {
        "tokens": loss_curves(summary, "tokens"),
        "seconds": loss_curves(summary, "seconds"),
        "rates": learning_rates(summary),
        "sharpness": sharpness_picture(summary),
        "stability": stability(summary),
    }
    limit, maps = colour_limit(summary), []
    for i, optimizer in enumerate(summary.get("optimizers") or []):
        picture = condition_map(optimizer, limit)
        if picture:
            pictures[f"map-{i}"] = picture
            maps.append({"id": f"map-{i}", "label": label(optimizer), "said": _said(optimizer)})
    content = {
        "headline": wording.headline(summary),
        "base": wording.baseline_label(summary),
        "gap_unit": wording.gap_unit(summary),
        "unit": unit_of(summary),
        "loss_unit": loss_unit(unit_of(summary)),
        "has_accuracy": any(o.get("validation_accuracy") for o in summary.get("optimizers") or []),
        "has_bytes": any(o.get("bits_per_byte") for o in summary.get("optimizers") or []),
        "rows": _rows(summary),
        "maps": maps,
        "varied": _varied(summary),
    }
    return content, pictures


def _varied(summary: dict[str, Any]) -> dict[str, Any]:
    """The second number that was tuned: a row for each optimizer, a column for each value."""
    entries = [o for o in summary.get("optimizers") or [] if o.get("varied")]
    if not entries:
        return {"rows": []}
    known = ("best_lr", "validation_loss")
    name = next(key for key in entries[0]["varied"][0] if key not in known)
    return {
        "name": name.replace("_", " "),
        "titles": [f"{row[name]:g}" for row in entries[0]["varied"]],
        "rows": [
            {
                "label": label(entry),
                "cells": [
                    (number(row["validation_loss"], 4), wording.rate(row["best_lr"]))
                    for row in entry["varied"]
                ],
            }
            for entry in entries
        ],
    }


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
                "accuracy": wording.accuracy(optimizer),
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
                    wording.megabytes(optimizer.get("peak_memory_bytes")),
                    wording.megabytes(optimizer.get("optimizer_state_bytes")),
                ),
                "verdict": str(optimizer.get("verdict") or "no verdict"),
                "reason": str(optimizer.get("reason") or ""),
            }
        )
    return rows


def _reached(optimizer: dict[str, Any], own: bool) -> tuple[str, str]:
    """Units and seconds until the baseline's final loss was reached, or why there are none."""
    tokens, seconds = (finite(optimizer.get(f"{key}_to_baseline")) for key in ("tokens", "seconds"))
    if tokens is None and seconds is None:
        if own:
            return "baseline", ""
        has_curve = any(curve.get("validation_loss") for curve in optimizer.get("curves") or [])
        return ("not reached" if has_curve else NOT_MEASURED), ""
    return wording.count(tokens), NOT_MEASURED if seconds is None else f"{number(seconds)} s"


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
