"""What `print(optimizer)` shows: what each parameter gets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from steepest.model.matrix_view import MatrixView
from steepest.optim import adamw
from steepest.optim.precision import adam_eps
from steepest.optim.record import acts_on_entries

if TYPE_CHECKING:
    from steepest.optim.steepest_descent import SteepestDescent


def adam_share(group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """Return v / (v + ε) for the root mean square v of a parameter's gradients, by their memory.

    It is 1 before the first step. Gradients of 1e-10 and the usual ε of 1e-8 leave 0.01.
    """
    steps = float(state.get("step", state.get("steps.0", 0)))
    if not steps or "exp_avg_sq" not in state:
        return 1.0
    beta = group["betas"][1] if "betas" in group else group.get("graft_beta2", group.get("beta2"))
    square = float(state["exp_avg_sq"].mean(dtype=torch.float64)) / (1 - beta**steps)
    eps = group["graft_eps"] if "graft_eps" in group else group["eps"]
    return math.sqrt(square) / (math.sqrt(square) + adam_eps(eps, state["exp_avg_sq"].dtype))


def table_of(optimizer: SteepestDescent) -> str:
    """Return the table as text, a row for each parameter."""
    table = Table(title=type(optimizer).__name__, title_justify="left")
    for title in ("parameter", "matrices (out, in)", "update", "lr", "decay", "RMS of update"):
        table.add_column(title, overflow="fold")
    for group in optimizer.param_groups:
        count = len(group["params"])
        views = group.get("views") or [None] * count
        labels = group.get("stacks") or [None] * count
        names = group.get("param_names") or [""] * count
        in_stack = Counter(number for label in labels for number in label or ())
        for name, p, view, label in zip(names, group["params"], views, labels, strict=True):
            view = None if view is None else MatrixView(*view)
            sizes = view.sizes() if view else [(1, 1)]
            stacks = [1 if i is None else in_stack[i] for i in label or [None] * len(sizes)]
            adam = adam_share(group, optimizer.state.get(p, {}))
            each = (
                adamw.expected_rms(group, adam)
                if view is None and acts_on_entries(group)
                else optimizer.expected_rms(group, *size, k, adam)
                for size, k in zip(sizes, stacks, strict=True)
            )
            rms = sorted({"?" if value is None else f"{value:.2g}" for value in each})
            stacked = f", stacks of {max(stacks)}" if max(stacks) > 1 else ""
            table.add_row(
                name,
                str(view) if view else " x ".join(map(str, p.shape)) or "scalar",
                group["geometry"] + stacked,
                f"{float(group['lr']):.3g}",
                f"{group['weight_decay']:g}",
                ", ".join(rms),
            )
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
