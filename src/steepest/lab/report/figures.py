"""The figures of the page, as plotly figures made from the summary alone.

Colours of text, grid and axes are left to the page, which follows the reader's light or dark
setting. What belongs to an optimizer has one colour and one kind of line everywhere. A point that
was not measured is left out; a figure without any point is None.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import plotly.graph_objects as go

from steepest.lab.report.wording import (
    baseline_label,
    finite,
    is_baseline,
    label,
    number,
    rate,
)
from steepest.lab.studies.stored import unit_of

# Okabe and Ito's palette, which stays distinct under the common colour vision deficiencies, without
# its black and yellow (unreadable on one of the two backgrounds); then five colours as far from
# these, from each other and from grey as could be found, by OKLab distance with and without a
# deficiency, at a contrast of 2.6 or more with both backgrounds. The baseline is grey.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#3333FF", "#CC00AA", "#336633", "#8877FF", "#884477",
)  # fmt: skip
SOLID = PALETTE[:6]  # the others are dashed
BASELINE_COLOUR = "#808080"
SYMBOLS = (
    "circle", "square", "diamond", "triangle-up", "pentagon", "hexagon", "star", "triangle-down",
    "cross", "triangle-left", "bowtie",
)  # fmt: skip
CURVE_HOVER = "%{y:.4f} (%{customdata[0]:.4f} to %{customdata[1]:.4f}, n = %{customdata[2]})"
HOVER_OF_CURVES = "<br>%{fullData.name}, %{x:.1f} s<extra></extra>"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass
class Picture:
    """A figure, and what changes in its layout on a narrow screen (plotly's dotted names)."""

    figure: go.Figure
    narrow: dict[str, Any] = field(default_factory=dict)
    wide: dict[str, Any] = field(default_factory=dict)


def colours(summary: dict[str, Any]) -> dict[str, str]:
    """One colour for each optimizer name, in the order of the summary; the baseline is grey."""
    others = [o.get("name") for o in summary.get("optimizers") or [] if not is_baseline(summary, o)]
    chosen = {str(name): PALETTE[i % len(PALETTE)] for i, name in enumerate(others)}
    return {str(summary.get("baseline")): BASELINE_COLOUR} | chosen


def loss_curves(summary: dict[str, Any], against: str) -> Picture | None:
    """Validation loss against "tokens" or "seconds": mean over seeds, band from min to max.

    The vertical axis leaves out the steep beginning; a double click on the figure shows it.
    """
    colour = colours(summary)
    means: list[tuple[list[float], list[float]]] = []
    bands: list[go.Scatter] = []
    lines: list[go.Scatter] = []
    for optimizer in ranked(summary):
        points = _over_seeds(optimizer.get("curves") or [], against)
        if not points:
            continue
        line = colour[str(optimizer.get("name"))]
        group = {"name": plain(label(optimizer)), "legendgroup": str(optimizer.get("name"))}
        x, mean = [p[0] for p in points], [p[1] for p in points]
        low, high, n = [p[2] for p in points], [p[3] for p in points], [p[4] for p in points]
        means.append((x, mean))
        if max(n) > 1:
            bands.append(
                go.Scatter(
                    x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", mode="lines",
                    fillcolor=_transparent(line), line={"width": 0}, hoverinfo="skip",
                    showlegend=False, **group,
                )
            )  # fmt: skip
        lines.append(
            go.Scatter(
                x=x, y=mean, mode="lines" if len(x) > 1 else "markers", **group,
                line=line_of(line),
                customdata=list(zip(low, high, n, strict=True)),
                hovertemplate=CURVE_HOVER + ("" if against == "tokens" else HOVER_OF_CURVES),
            )
        )  # fmt: skip
    if not means:
        return None
    figure = go.Figure(bands + lines)
    top, bottom = window(means)
    target = baseline_loss(summary)
    if target is not None:
        bottom = min(bottom, target)
        text = f"{plain(baseline_label(summary))} at its best rate: {number(target, 4)}"
        figure.add_hline(y=target, line={"dash": "dot", "width": 1.5, "color": BASELINE_COLOUR})
        figure.add_annotation(
            x=0, xref="paper", y=target, text=text, showarrow=False, xanchor="left",
            yanchor="top", font={"size": 11}, xshift=4,
        )  # fmt: skip
    pad = 0.08 * (top - bottom) or 0.05
    axes = {"tokens": f"training {unit_of(summary)}", "seconds": "seconds of training"}
    finish(figure, axes[against], "validation loss")
    figure.update_xaxes(
        rangemode="tozero", spikethickness=1, hoverformat=".3s" if against == "tokens" else ".1f"
    )
    figure.update_yaxes(range=[bottom - pad, top + pad / 2])
    figure.update_layout(hovermode="x unified" if against == "tokens" else "closest")
    return Picture(figure)


def learning_rates(summary: dict[str, Any]) -> Picture | None:
    """Final validation loss against learning rate: the tuning runs as lines, every run as a dot."""
    colour = colours(summary)
    optimizers = ranked(summary)
    every = [run for optimizer in optimizers for run in _runs(optimizer)]
    if not every:
        return None
    losses = sorted(run.loss for run in every if run.loss is not None) or [0.0, 1.0]
    usual = median([r.loss for r in every if r.loss is not None and r.tuning] or losses)
    bottom, top = losses[0], min(losses[-1], losses[0] + 6 * (usual - losses[0]))
    pad = 0.08 * (top - bottom) or 0.05
    ceiling = top + 1.5 * pad
    figure = go.Figure()
    for i, optimizer in enumerate(optimizers):
        _sensitivity(figure, optimizer, colour[str(optimizer.get("name"))], i, ceiling)
    finish(figure, "learning rate (logarithmic)", "final validation loss")
    ticks = log_ticks([run.lr for run in every])
    exponents = [math.log10(run.lr) for run in every]
    figure.update_xaxes(
        type="log", range=[min(exponents) - 0.15, max(exponents) + 0.15]
    )  # fmt: skip
    figure.update_yaxes(range=[bottom - pad, ceiling + pad])
    figure.update_layout(hovermode="closest")
    few = [t for t in ticks if math.log10(t).is_integer()] if len(ticks) > 5 else ticks
    narrow = {"xaxis.tickvals": few, "xaxis.ticktext": [rate(t) for t in few]}
    wide = {"xaxis.tickvals": ticks, "xaxis.ticktext": [rate(t) for t in ticks]}
    return Picture(figure, narrow, wide)


def _sensitivity(
    figure: go.Figure, optimizer: dict[str, Any], colour: str, i: int, ceiling: float
) -> None:
    """Add one optimizer to the learning-rate figure: line, ring at the best rate, runs.

    The line joins the means of the tuning runs; a rate that has only fresh seeds joins with those.
    """
    symbol, runs = SYMBOLS[i % len(SYMBOLS)], _runs(optimizer)
    group = {"name": plain(label(optimizer)), "legendgroup": str(optimizer.get("name"))}
    line: list[tuple[float, float]] = []
    for lr in sorted({run.lr for run in runs}):
        tuning = [r.loss for r in runs if r.lr == lr and r.loss is not None and r.tuning]
        fresh = [r.loss for r in runs if r.lr == lr and r.loss is not None and not r.tuning]
        if tuning or fresh:
            line.append((lr, fmean(tuning or fresh)))
    figure.add_scatter(
        x=[p[0] for p in line], y=[p[1] for p in line], mode="lines", hoverinfo="skip",
        line=line_of(colour), **group,
    )  # fmt: skip
    best = finite(optimizer.get("best_lr"))
    ring = [p for p in line if best is not None and math.isclose(p[0], best, rel_tol=1e-6)]
    figure.add_scatter(
        x=[p[0] for p in ring], y=[p[1] for p in ring], mode="markers", hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 18, "color": colour, "line": {"width": 2}},
        showlegend=False, **group,
    )  # fmt: skip
    marks = [r.mark(symbol, ceiling) for r in runs]
    figure.add_scatter(
        x=[r.lr for r in runs], mode="markers",
        y=[ceiling if r.loss is None else min(r.loss, ceiling) for r in runs],
        text=[r.about for r in runs], customdata=[rate(r.lr) for r in runs],
        hovertemplate="%{fullData.name}, learning rate %{customdata}<br>%{text}<extra></extra>",
        marker={"symbol": marks, "size": [7 if m.startswith(symbol) else 9 for m in marks],
                "color": colour, "opacity": 1, "line": {"width": 1.5, "color": colour}},
        showlegend=False, **group,
    )  # fmt: skip


def sharpness_picture(summary: dict[str, Any]) -> Picture | None:
    """The largest eigenvalue of the Hessian by step, one run for each optimizer."""
    return _by_step(
        summary,
        "largest eigenvalue of the Hessian",
        lambda row: finite(row.get("sharpness")),
        "log",
    )


def stability(summary: dict[str, Any]) -> Picture | None:
    """What limits the matrices' steps, over the value at which they become unstable, by step."""
    picture = _by_step(summary, "measured / threshold", _ratio, "linear")
    if picture:
        line = {"dash": "dot", "width": 1.5, "color": BASELINE_COLOUR}
        picture.figure.add_hline(y=1, line=line)
    return picture


def _ratio(row: dict[str, Any]) -> float | None:
    """Of the matrices, whose group is the first."""
    parts = row.get("stability") or [{}]
    return finite(parts[0].get("ratio"))


def _by_step(
    summary: dict[str, Any],
    title: str,
    value: Callable[[dict[str, Any]], float | None],
    scale: str,
) -> Picture | None:
    colour, figure = colours(summary), go.Figure()
    for optimizer in ranked(summary):
        rows = [(row["step"], value(row)) for row in optimizer.get("sharpness") or []]
        points = [(x, y) for x, y in rows if y is not None]
        if points:
            figure.add_scatter(
                x=[x for x, _ in points], y=[y for _, y in points], mode="lines+markers",
                name=plain(label(optimizer)), hovertemplate="step %{x}: %{y:.3g}",
                line=line_of(colour[str(optimizer.get("name"))]),
            )  # fmt: skip
    if not figure.data:
        return None
    finish(figure, "step", title)
    figure.update_yaxes(type=scale)
    return Picture(figure)


@dataclass
class _Run:
    """One run of the learning-rate figure; without a loss it diverged."""

    lr: float
    loss: float | None
    tuning: bool
    about: str

    def mark(self, symbol: str, ceiling: float) -> str:
        """Plotly's name for its mark: filled for tuning, open for a fresh seed, x for diverged."""
        if self.loss is None:
            return "x-thin"
        if self.loss > ceiling:
            return "arrow-up"
        return symbol if self.tuning else f"{symbol}-open"


def _runs(optimizer: dict[str, Any]) -> list[_Run]:
    """The runs that have a learning rate and either a loss or the news that they diverged."""
    runs = []
    for entry in optimizer.get("rates") or []:
        lr = finite(entry.get("lr"))
        for run in entry.get("runs") or []:
            loss, purpose = finite(run.get("validation_loss")), str(run.get("purpose"))
            diverged = run.get("status") == "diverged"
            if lr is None or lr <= 0 or (loss is None and not diverged):
                continue
            result = "diverged" if diverged else f"validation loss {number(loss, 4)}"
            kind = "tuning run" if purpose == "tuning" else "fresh seed"
            about = f"{result}; {kind}, seed {run.get('seed')}"
            runs.append(_Run(lr, None if diverged else loss, purpose == "tuning", plain(about)))
    return runs


def baseline_loss(summary: dict[str, Any]) -> float | None:
    """The baseline's mean validation loss over fresh seeds at its best rate."""
    for optimizer in summary.get("optimizers") or []:
        if is_baseline(summary, optimizer):
            return finite((optimizer.get("validation_loss") or {}).get("mean"))
    return None


def ranked(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The optimizers by mean validation loss, lowest first; those without one last."""

    def key(optimizer: dict[str, Any]) -> float:
        mean = finite((optimizer.get("validation_loss") or {}).get("mean"))
        return math.inf if mean is None else mean

    return sorted(summary.get("optimizers") or [], key=key)


def _over_seeds(
    curves: Sequence[dict[str, Any]], against: str
) -> list[tuple[float, float, float, float, int]]:
    """(x, mean, min, max, number of seeds), for each evaluation that some seed has.

    Evaluations are matched by their tokens, or by their position where tokens were not recorded.
    """
    groups: dict[float, list[tuple[float, float]]] = {}
    for curve in curves:
        losses = curve.get("validation_loss") or []
        tokens, xs = curve.get("tokens") or [], curve.get(against) or []
        for i, (x, loss) in enumerate(zip(xs, losses, strict=False)):
            at, value = finite(x), finite(loss)
            if at is not None and value is not None:
                place = finite(tokens[i]) if i < len(tokens) else None
                groups.setdefault(i if place is None else place, []).append((at, value))
    points = []
    for pairs in groups.values():
        ys = [y for _, y in pairs]
        points.append((fmean(x for x, _ in pairs), fmean(ys), min(ys), max(ys), len(ys)))
    return sorted(points)


def window(means: Sequence[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """Top and bottom of the vertical axis: the curves behind the first quarter."""
    tops, ends = [], []
    for x, y in means:
        late = [v for at, v in zip(x, y, strict=True) if at >= 0.25 * x[-1]]
        tops.append(late[0])
        ends.append(y[-1])
    return max(median(tops), max(ends)), min(min(y) for _, y in means)


def finish(figure: go.Figure, x: str, y: str | None) -> None:
    """What all figures share: fonts, transparent paper, quiet axes, the legend on top."""
    figure.update_layout(
        template="none", autosize=True, height=420, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", font={"family": FONT, "size": 12, "color": "#707070"},
        margin={"l": 56, "r": 12, "t": 12, "b": 52},
        hoverlabel={"align": "left", "font": {"family": FONT}},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        showlegend=True, dragmode="zoom",
    )  # fmt: skip
    figure.update_xaxes(
        title={"text": x, "standoff": 10}, automargin=True, showgrid=False, zeroline=False,
        ticks="outside", ticklen=4, showline=True, linecolor="#808080", tickangle=0,
    )  # fmt: skip
    figure.update_yaxes(
        title={"text": y, "standoff": 8} if y else None, automargin=True, zeroline=False,
        gridcolor="rgba(128,128,128,0.25)",
    )  # fmt: skip


def log_ticks(rates: list[float]) -> list[float]:
    """1, 2, 5 steps over less than two decades, 1, 3 over up to four, else powers of ten."""
    low, high = math.log10(min(rates)), math.log10(max(rates))
    digits = (1, 2, 5) if high - low < 2 else (1, 3) if high - low < 4 else (1,)
    span = range(math.floor(low) - 1, math.ceil(high) + 1)
    ticks = [float(f"{digit}e{k}") for k in span for digit in digits]
    return [t for t in ticks if low - 0.15 <= math.log10(t) <= high + 0.15] or [min(rates)]


def plain(text: str) -> str:
    """`text` for plotly, which would read tags in it."""
    return html.escape(text, quote=False)


def line_of(colour: str) -> dict[str, Any]:
    """How the line of an optimizer is drawn, everywhere alike."""
    solid = colour == BASELINE_COLOUR or colour in SOLID
    return {"color": colour, "width": 2, "dash": "solid" if solid else "6px,2px"}


def _transparent(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
