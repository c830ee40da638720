"""The page of a diagnosis: a map over layers for each geometry, and a row for each matrix."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import plotly.graph_objects as go

from steepest.lab.report.condition_map import (
    ABOVE,
    BELOW,
    EVEN,
    colour_limit,
    condition_map,
)
from steepest.lab.report.figures import Picture, finish, plain
from steepest.lab.report.wording import NOT_MEASURED, finite, number, plural, whole
from steepest.optim.record import ADAMW
from steepest.printing import sentence

SHOWN = ("spectral", "sign", ADAMW)
LIMIT = 3  # of the colours, in octaves


def diagnosis_page(summary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Picture | None]]:
    """Return what the template shows, and the pictures by name."""
    rows = summary["rows"]
    pictures = {f"map-{name}": _map(rows, name) for name in SHOWN}
    training = {"conditions": summary.get("monitored") or []}
    pictures["training"] = condition_map(training, colour_limit({"optimizers": [training]}))
    content = {
        "trained": pictures["training"] is not None,
        "stacks": [_stack(stack) for stack in summary.get("stacks") or []],
        "audit": _audit(summary.get("audit")),
        "disagreements": [text for row in rows if (text := _disagreement(row))],
        "headline": _headline(summary),
        "advised": [sentence(note) for note in (summary.get("advice") or {}).get("notes") or ()],
        "planned": _planned(summary) if summary.get("advice") else None,
        "level": summary["level"],
        "maps": [
            {"id": f"map-{name}", "label": name}
            for name in SHOWN
            if pictures[f"map-{name}"] is not None
        ],
        "rows": [_row(row) for row in rows],
        "raced": any(row["race"] for row in rows),
    }
    return content, pictures


def _headline(summary: dict[str, Any]) -> str:
    counts = Counter(row["verdict"] for row in summary["rows"])
    named = [f"{count} {verdict}" for verdict, count in counts.most_common()]
    total = plural(len(summary["rows"]), "matrix").replace("matrixs", "matrices")
    return f"{total}, from {summary['batches']} batches: {', '.join(named)}."


def _planned(summary: dict[str, Any]) -> list[dict[str, str]]:
    """The parameters whose geometry is not that of Muon, the default."""
    default = {row["parameter"]: row["geometry"] for row in summary.get("default") or ()}
    rows = summary["advice"]["rows"]
    return [row for row in rows if row["geometry"] != default[row["parameter"]]]


def _ratio(row: dict[str, Any], geometry: str) -> dict[str, Any] | None:
    predictions = [
        prediction for prediction in row["predictions"] if prediction["geometry"] == geometry
    ]
    return predictions[0]["log_ratio"] if predictions else None


def _map(rows: list[dict[str, Any]], geometry: str) -> Picture | None:
    """Kind of matrix by layer; colour = log2 of the predicted decrease over the Euclidean one."""
    cells: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        ratio = _ratio(row, geometry)
        if ratio is None or finite(ratio["value"]) is None:
            continue
        layer, kind = _place(row["matrix"])
        said = f"<b>{plain(row['matrix'])}</b><br>{_times(ratio)}<br>verdict: {row['verdict']}"
        cells[kind, layer] = ratio["value"] / math.log(2), said
    if not cells:
        return None
    kinds = list(dict.fromkeys(_place(row["matrix"])[1] for row in rows))
    layers = list(dict.fromkeys(_place(row["matrix"])[0] for row in rows))
    layers.sort(key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0))
    figure = go.Figure(
        go.Heatmap(
            z=[[cells.get((k, layer), (None,))[0] for layer in layers] for k in kinds],
            text=[[cells.get((k, layer), (0, ""))[1] for layer in layers] for k in kinds],
            x=[plain(layer) for layer in layers], y=[plain(kind) for kind in kinds],
            xgap=1, ygap=1, zmin=-LIMIT, zmax=LIMIT, hoverongaps=False,
            hovertemplate="%{text}<extra></extra>",
            colorscale=[[0, BELOW], [0.5, EVEN], [1, ABOVE]],
            colorbar={
                "tickvals": list(range(-LIMIT, LIMIT + 1)), "thickness": 10, "outlinewidth": 0,
                "ticktext": [f"{2.0**k:g}" for k in range(-LIMIT, LIMIT + 1)],
            },
        )
    )  # fmt: skip
    finish(figure, "layer", None)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    figure.update_layout(height=150 + 24 * len(kinds), margin={"t": 40})
    return Picture(figure)


def _place(matrix: str) -> tuple[str, str]:
    """Layer and kind: `model.layers.3.mlp.up.weight` is layer 3, kind `mlp.up`."""
    name = re.sub(r"\.weight(?=$|\[)", "", matrix)
    match = re.match(r"^(?:[A-Za-z_]\w*\.)*?(\d+)\.(.+)$", name)
    return (match[1], match[2]) if match else ("-", name)


def _times(ratio: dict[str, Any] | None) -> str:
    if ratio is None or finite(ratio["value"]) is None:
        return NOT_MEASURED
    if whole(ratio) is None:
        return number(math.exp(ratio["value"]), 2)
    value, low, high = (math.exp(ratio[key]) for key in ("value", "low", "high"))
    return f"{number(value, 2)} ({number(low, 2)} to {number(high, 2)})"


def _row(row: dict[str, Any]) -> dict[str, Any]:
    raced = [
        f"{result['geometry']} {_times(result['log_ratio'])}"
        for result in row["race"]
        if result["geometry"] != "euclidean"
    ]
    return {
        "matrix": row["matrix"],
        "about": f"{row['role']}, {row['shape'][0]} x {row['shape'][1]}, {row['tokens']} tokens",
        "stable": number(row["stable_rank"]),
        "around": [
            f"centred {number(row['stable_rank_centred'])}",
            f"output {number(row['stable_rank_output'])}",
        ],
        "nuclear": number(row["nuclear_rank"]),
        "across": number(row["nuclear_rank_across"]),
        "sketches": [
            {
                "of": name,
                "bars": _bars(row[name]["leading"]),
                "rank": number(row[name]["nuclear_rank"]),
            }
            for name in ("gradient", "momentum")
            if row.get(name)
        ],
        "ratios": [_times(_ratio(row, geometry)) for geometry in SHOWN],
        "verdict": row["verdict"],
        "reason": row["reason"] if row["verdict"] == "cannot tell" else "",
        "raced": "; ".join(raced),
    }


def _bars(leading: list[float]) -> str:
    """The largest singular values as bars, the first one full."""
    blocks = "▁▂▃▄▅▆▇█"
    top = leading[0] if leading and leading[0] else 1.0
    return "".join(blocks[min(7, int(8 * value / top))] for value in leading)


def _stack(stack: dict[str, Any]) -> dict[str, Any]:
    return {
        "matrices": stack["matrices"],
        "ratio": _times(stack["log_ratio"]),
        "verdict": stack["verdict"],
    }


def _audit(audit: dict[str, Any] | None) -> dict[str, Any] | None:
    """The warnings, and for each parameter what the first step does to it."""
    if audit is None:
        return None
    rows = [
        {
            "parameter": row["parameter"],
            "geometry": row["geometry"],
            "rate": number(row["lr"]),
            "rms": number(row["rms"]),
            "spectral_norm": number(row["spectral_norm"]),
            "relative": number(row["relative_spectral_norm"]),
            "against_adamw": number(row["against_adamw"]),
        }
        for row in audit["rows"]
    ]
    return {"warnings": audit["warnings"], "rows": rows, "measured_on": audit["measured_on"]}


def _disagreement(row: dict[str, Any]) -> str | None:
    """Where the race says the opposite of what the theory's condition or the prediction say."""
    raced = next((whole(r["log_ratio"]) for r in row["race"] if r["geometry"] == "spectral"), None)
    if raced is None or raced["low"] <= 0 <= raced["high"]:
        return None
    won = raced["value"] > 0
    claims = []
    across, stable = finite(row["nuclear_rank_across"]), finite(row["stable_rank"])
    if across and stable and (across > stable) != won:
        claims.append(
            f"the condition (nuclear rank {number(across)}, stable rank {number(stable)})"
        )
    ratio = _ratio(row, "spectral")
    if ratio and finite(ratio["value"]) is not None and (ratio["value"] > 0) != won:
        claims.append(f"the prediction ({_times(ratio)})")
    if not claims:
        return None
    winner = "spectral" if won else "Euclidean"
    return f"{row['matrix']}: {winner} steps won the race, against {' and '.join(claims)}."
