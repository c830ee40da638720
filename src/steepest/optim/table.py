"""What `print(optimizer)` shows: what each parameter gets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.optim.optimizer import Optimizer

from steepest.matrix_view import MatrixView
from steepest.optim.scales import stacked_rank, update_scale

_ADAM_RMS = 0.2  # measured in training, see `expected_rms`


def expected_rms(
    group: Mapping[str, Any], outputs: int, inputs: int, stack: int = 1
) -> float | None:
    """Return the root-mean-square entry that an update of an `(outputs, inputs)` matrix will have.

    Exact for gradients of full rank in the sign and spectral geometries, where a stack is taken as
    a whole; 0.2 lr for AdamW and what takes its length, as Liu et al. measured in training (arXiv
    2502.16982, section 2.2); `None` where the length depends on the gradient.

    >>> group = {"geometry": "spectral", "lr": 0.02, "scale": "spectral"}
    >>> round(expected_rms(group, 1024, 256), 5)
    0.00125
    """
    lr = float(group["lr"])
    if group["geometry"] == "sign":
        return lr
    scale = update_scale(group["scale"], outputs, inputs)
    if group["geometry"] == "adamw":
        return lr * _ADAM_RMS
    if group.get("graft") == "none" or group.get("normalize") == "spectral":
        return None
    if group["geometry"] == "soap" or group.get("graft") == "adam":
        return lr * scale * _ADAM_RMS
    if group.get("length", "constant") != "constant":
        return None
    rank = float(min(outputs, inputs))
    if stack > 1 and not group["compensate"]:
        rank = stacked_rank(outputs, inputs, stack, group["mode"]) / stack
    return lr * scale * math.sqrt(rank / (outputs * inputs))


def table_of(optimizer: Optimizer) -> str:
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
            each = (expected_rms(group, *size, k) for size, k in zip(sizes, stacks, strict=True))
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
