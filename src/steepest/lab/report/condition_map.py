"""The map of the layerwise condition: which matrices would favour a spectral step, and when.

Davis and Drusvyatskiy (arXiv 2512.04299): the guaranteed decrease of a spectral step over that of
a Euclidean step is about nr(G) / st(A), nuclear rank of the gradient over stable rank of the input.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from steepest.lab.report.figures import Picture, finish, plain
from steepest.lab.report.wording import finite, number

BELOW, EVEN, ABOVE = "#B2500A", "#E9E8E4", "#0A67A3"
RANKS = ("nuclear_rank", "stable_rank", "stable_rank_output")
HOVER = (
    "%{text}<br>nuclear rank of the gradient: %{customdata[0]}"
    "<br>stable rank of the input, behind the nonlinearity: %{customdata[1]}"
    "<br>stable rank of the output, before the next one: %{customdata[2]}"
    "<br>ratio: <b>%{customdata[3]}</b><extra></extra>"
)


def colour_limit(summary: dict[str, Any]) -> int:
    """The largest |log2 ratio| the colours show, the same for all optimizers, from 1 to 6."""
    cells = [cell for o in summary.get("optimizers") or [] for cell in _cells(o)]
    largest = max((abs(math.log2(cell.ratio)) for cell in cells if cell.ratio), default=1.0)
    return min(6, max(1, math.ceil(largest)))


def condition_map(optimizer: dict[str, Any], limit: int) -> Picture | None:
    """Matrix by training step; colour = log2(nuclear rank of gradient / stable rank of input)."""
    cells = _cells(optimizer)
    if not any(cell.ratio for cell in cells):
        return None
    matrices = list(dict.fromkeys(cell.matrix for cell in cells))
    steps = sorted({cell.step for cell in cells})
    at = {(cell.matrix, cell.step): cell for cell in cells}
    rows = [[at.get((matrix, step)) for step in steps] for matrix in matrices]
    figure = go.Figure(
        go.Heatmap(
            z=[[math.log2(c.ratio) if c and c.ratio else None for c in row] for row in rows],
            text=[[c.named if c else "" for c in row] for row in rows],
            customdata=[[c.numbers if c else None for c in row] for row in rows],
            x=list(range(len(steps))), y=list(range(len(matrices))), xgap=1, ygap=1,
            coloraxis="coloraxis", hoverongaps=False, hovertemplate=HOVER,
        )
    )  # fmt: skip
    finish(figure, "training step", None)
    # plotly counts from the line of the axis here, so the labels need room too
    figure.update_xaxes(range=[-0.5, len(steps) - 0.5], title_standoff=34)
    figure.update_yaxes(
        range=[len(matrices) - 0.5, -0.5], tickvals=list(range(len(matrices))), showgrid=False,
        ticks="outside", ticklen=4, tickcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    figure.update_layout(
        height=166 + 17 * len(matrices), margin={"t": 80}, hovermode="closest",
        coloraxis={
            "cmin": -limit, "cmid": 0, "cmax": limit,
            "colorscale": [[0, BELOW], [0.5, EVEN], [1, ABOVE]],
            "colorbar": {
                "orientation": "h", "thickness": 10, "len": 1, "x": 0, "xanchor": "left", "y": 1,
                "yanchor": "bottom", "ypad": 14, "xpad": 0, "outlinewidth": 0, "tickangle": 0,
                "title": {"side": "top", "font": {"size": 12}},
            },
        },
    )  # fmt: skip
    narrow = _labels([_brief(m) for m in matrices], 10) | _some(steps, 5) | _scale(limit, 5, True)
    wide = _labels([_cut(_short(m), 40) for m in matrices], 11) | _some(steps, 16)
    wide |= _scale(limit, 13, False)
    return Picture(figure, narrow, wide)


def condition_share(optimizer: dict[str, Any]) -> tuple[int, int, int] | None:
    """At the last measured step: how many matrices have a ratio above 1, of how many; the step."""
    cells = [cell for cell in _cells(optimizer) if cell.ratio]
    if not cells:
        return None
    last = max(cell.step for cell in cells)
    ratios = [cell.ratio for cell in cells if cell.step == last and cell.ratio]
    return sum(ratio > 1 for ratio in ratios), len(ratios), last


@dataclass
class _Cell:
    """One matrix at one step; without a ratio it was not measured whole."""

    matrix: str
    step: int
    ratio: float | None
    named: str
    numbers: list[str]


def _cells(optimizer: dict[str, Any]) -> list[_Cell]:
    """The measured conditions in the order given, which is the order of the network."""
    cells = []
    for entry in optimizer.get("conditions") or []:
        matrix, step = str(entry.get("matrix")), finite(entry.get("step"))
        ranks = [finite(entry.get(key)) for key in RANKS]
        nuclear, stable = ranks[:2]
        known = nuclear is not None and stable is not None and nuclear > 0 and stable > 0
        ratio = nuclear / stable if known and nuclear and stable else None
        if step is not None:
            named = f"<b>{plain(matrix)}</b> ({plain(str(entry.get('role')))}), step {step:.0f}"
            numbers = [number(value) for value in (*ranks, ratio)]
            cells.append(_Cell(matrix, int(step), ratio, named, numbers))
    return cells


def _some(steps: list[int], most: int) -> dict[str, Any]:
    """At most so many of the steps as labels of the columns."""
    shown = range(0, len(steps), max(1, math.ceil(len(steps) / most)))
    return {
        "xaxis.tickvals": list(shown),
        "xaxis.ticktext": [str(steps[k]) for k in shown],
    }


def _scale(limit: int, most: int, brief: bool) -> dict[str, Any]:
    """Labels of the colour scale, symmetric around a ratio of 1."""
    every = math.ceil(limit / max(1, most // 2))
    ticks = sorted({sign * k for k in range(0, limit + 1, every) for sign in (-1, 1)})
    title = "nuclear ÷ stable rank" if brief else "nuclear rank of gradient ÷ stable rank of input"
    return {
        "coloraxis.colorbar.tickvals": ticks,
        "coloraxis.colorbar.ticktext": [_power(k) for k in ticks],
        "coloraxis.colorbar.title.text": title,
    }


def _labels(names: list[str], size: int) -> dict[str, Any]:
    return {"yaxis.ticktext": [plain(name) for name in names], "yaxis.tickfont.size": size}


def _power(k: int) -> str:
    """Two to the k as a reader writes it: 1/4, 1, 4; the ends say that they hold what is beyond."""
    text = str(2**k) if k >= 0 else f"1/{2**-k}"
    return {6: "≥ ", -6: "≤ "}.get(k, "") + text


def _short(matrix: str) -> str:
    """A matrix name without its `.weight`."""
    return re.sub(r"\.weight(?=$|\[)", "", matrix)


def _brief(matrix: str) -> str:
    """A matrix name for a narrow screen: `model.layers.3.mlp.up.weight` is `3.mlp.up`."""
    return _cut(re.sub(r"^([A-Za-z_]+\.)+(?=\d+\.)", "", _short(matrix)), 20)


def _cut(text: str, length: int) -> str:
    """At most so many characters, leaving out the middle."""
    return (
        text if len(text) <= length else f"{text[: length // 3]}…{text[1 - length + length // 3 :]}"
    )
