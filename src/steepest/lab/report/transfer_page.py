"""The page on transfer: best rates over sizes, coordinates, sharpness, and the advice."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from steepest.lab.report.figures import BASELINE_COLOUR, PALETTE, Picture, finish, log_ticks
from steepest.lab.report.wording import NOT_MEASURED, finite, fixed, number, rate, whole
from steepest.transfer.coordinates import THRESHOLD
from steepest.transfer.outcomes import span
from steepest.transfer.runs import written


def transfer_page(summary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Picture | None]]:
    """Return what the template shows, and the pictures by name."""
    pictures: dict[str, Picture | None] = {}
    axes = []
    for axis in summary["axes"]:
        name = axis["name"]
        horizons = axis["rates"]["horizons"]
        for horizon in horizons:
            pictures[f"rates-{name}-{horizon['steps']}"] = _losses(horizon)
        pictures[f"sharpness-{name}"] = _sharpness(axis["consistency"])
        axes.append(
            {
                "name": name,
                "horizons": [
                    {
                        "id": f"rates-{name}-{horizon['steps']}",
                        "steps": horizon["steps"],
                        "advised": finite(horizon.get("advised")) is not None,
                        "cut": _cut(pictures[f"rates-{name}-{horizon['steps']}"]),
                        "rows": [_optimum(row) for row in horizon["rows"]],
                    }
                    for horizon in horizons
                ],
                "sharpness": f"sharpness-{name}",
                "cut": _cut(pictures[f"sharpness-{name}"]),
                "consistency": axis["consistency"],
                "moved": _moved(axis["consistency"]),
                "coordinates": axis["coordinates"],
                "layers": _layers(axis["coordinates"]),
                "blown": axis["blown"],
            }
        )
    advice = summary["advice"]
    headline = f"{summary['verdict'].capitalize()}."
    if advice:
        headline += f" {advice['said'].capitalize()}."
    content = {
        "headline": headline,
        "axes": axes,
        "reasons": summary["reasons"],
        "retune": summary["retune"],
        "rule": axes and summary["axes"][0]["rates"]["rule"],
        "optimizer": axes and summary["axes"][0]["rates"]["optimizer"],
    }
    return content, pictures


def _optimum(row: dict[str, Any]) -> dict[str, str]:
    ends = whole(row["interval"])
    known = ends and span(2.0 ** ends["low"], 2.0 ** ends["high"], map(float, row["scores"]), rate)
    return {
        "size": written(row["size"]),
        "best": rate(row["lr"]),
        "vertex": rate(2.0 ** row["octaves"]),
        "span": known or "",
        "loss": number(row["score"], 4),
    }


def _losses(horizon: dict[str, Any]) -> Picture | None:
    """Loss against learning rate: a line for each size, its optimum with the interval as a bar."""
    figure = go.Figure()
    shown: list[float] = []  # the best rates with their neighbours
    for i, row in enumerate(horizon["rows"]):
        points = sorted(
            (float(lr), [v for v in scores if finite(v) is not None])
            for lr, scores in row["scores"].items()
        )
        points = [(lr, values) for lr, values in points if values]
        colour = PALETTE[i % len(PALETTE)]
        group = {"legendgroup": str(i), "name": written(row["size"])}
        means = [fmean(values) for _, values in points]
        figure.add_scatter(
            x=[lr for lr, _ in points], y=means, mode="lines+markers", **group,
            line={"color": colour, "width": 2}, marker={"size": 5},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1, "width": 2,
                "array": [max(v) - m for (_, v), m in zip(points, means, strict=True)],
                "arrayminus": [m - min(v) for (_, v), m in zip(points, means, strict=True)],
            },
            hovertemplate="lr %{x:.3g}: %{y:.4g}",
        )  # fmt: skip
        interval = whole(row["interval"])
        ends = interval or {"low": row["octaves"], "high": row["octaves"]}
        tried = [lr for lr, _ in points]
        vertex = 2.0 ** row["octaves"]
        low, high = max(2.0 ** ends["low"], min(tried)), min(2.0 ** ends["high"], max(tried))
        figure.add_scatter(
            x=[vertex], y=[row["score"]], mode="markers", showlegend=False, **group,
            marker={"symbol": "diamond", "size": 11, "color": colour},
            error_x={
                "type": "data", "symmetric": False, "thickness": 2,
                "array": [max(0.0, high - vertex)],
                "arrayminus": [max(0.0, vertex - low)],
            } if interval else None,
            hovertemplate="optimum %{x:.3g}",
        )  # fmt: skip
        at = means.index(min(means))
        shown += means[max(0, at - 1) : at + 2]
    if not shown:
        return None
    finish(figure, "learning rate at the base", f"loss after {horizon['steps']} steps")
    ticks = log_ticks([float(lr) for row in horizon["rows"] for lr in row["scores"]])
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[rate(t) for t in ticks])
    pad = 0.08 * (max(shown) - min(shown)) or 0.05
    bottom, top = min(shown) - pad, max(shown) + pad
    figure.update_yaxes(range=[bottom, top])
    advised = finite(horizon.get("advised"))
    if advised is not None:
        said = f"{rate(advised)}, advised by the smaller sizes"
        figure.add_scatter(
            x=[advised] * 33, y=[bottom + k / 32 * (top - bottom) for k in range(33)], mode="lines",
            line={"dash": "dot", "width": 1.5, "color": BASELINE_COLOUR}, name=said,
            hovertemplate=f"{said}: {_cost(horizon)}<extra></extra>",
        )  # fmt: skip
    return Picture(figure)


def _cost(horizon: dict[str, Any]) -> str:
    """What the advised rate costs the largest size."""
    penalty = finite(horizon.get("advised_penalty"))
    if penalty is None:
        return "not tried"
    least = "at least " if horizon.get("advised_diverged") else ""
    return f"costs the largest {least}{fixed(100 * penalty, 1)}% of its loss"


def _cut(picture: Picture | None) -> bool:
    """Whether a line goes beyond the top of its figure."""
    if picture is None:
        return False
    top = picture.figure.layout.yaxis.range[1]
    heights = [y for trace in picture.figure.data for y in trace.y if finite(y) is not None]
    return max(heights, default=top) > top


def _sharpness(consistency: dict[str, Any] | None) -> Picture | None:
    """Sharpness over its threshold along training, a line for each size."""
    if consistency is None:
        return None
    figure = go.Figure()
    for i, row in enumerate(consistency["rows"]):
        figure.add_scatter(
            x=row["steps"], y=row["ratios"], mode="lines", name=written(row["size"]),
            line={"color": PALETTE[i % len(PALETTE)], "width": 2},
            hovertemplate="step %{x}: %{y:.3f}",
        )  # fmt: skip
    finish(figure, "step", "sharpness / threshold")
    figure.add_hline(
        y=1, line={"dash": "dot", "width": 1.5, "color": BASELINE_COLOUR},
        annotation={"text": "edge of stability", "xanchor": "right", "x": 1},
    )  # fmt: skip
    late = [y for row in consistency["rows"] for y in row["ratios"][len(row["ratios"]) // 3 :]]
    top = max([1.5, *(y for y in late if finite(y) is not None)])
    figure.update_yaxes(range=[0.0, 1.1 * top])  # a double click shows the rest
    return Picture(figure)


def _moved(consistency: dict[str, Any] | None) -> list[dict[str, str]]:
    """How far the tangent kernel moved, and how sharp it ended, for each size."""
    return [
        {
            "size": written(row["size"]),
            "ending": number(fmean(row["ending"])),
            "loss": number(row["losses"][-1]),
            "movement": number(fmean(row["movement"])),
        }
        for row in (consistency["rows"] if consistency else [])
    ]


def _layers(coordinates: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A row for each layer, its slopes in the order of the steps."""
    rows: dict[str, dict[str, Any]] = {}
    for row in coordinates["rows"] if coordinates else []:
        slope, error = finite(row["slope"]), finite(row["error"])
        small = slope is None or math.fabs(slope) <= THRESHOLD
        places = 2 if small else 3  # 0.105 is not 0.10, which would pass
        text = NOT_MEASURED if slope is None else ("+" if slope > 0 else "") + fixed(slope, places)
        said = {
            "slope": text,
            "error": "" if error is None else f"± {fixed(error, 2)}",
            "passed": row.get("passed", small),  # pages of before have none
            "step": row["step"],
        }
        rows.setdefault(row["layer"], {"layer": row["layer"], "slopes": []})["slopes"].append(said)
    return list(rows.values())
