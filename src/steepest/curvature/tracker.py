"""Sharpness along a training run, a few Hessian-vector products at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.curvature.evaluation import BatchNorm
from steepest.curvature.loss_function import Loss
from steepest.curvature.operators import Hessian
from steepest.curvature.preconditioned import Stability, preconditioned_sharpness
from steepest.curvature.spectra import sharpness
from steepest.records import Records
from steepest.results import Column, Result, ResultTable


class SharpnessTracker(Result):
    """Measures every few steps how sharp the loss is, and how near the optimizer is to instability.

    Each measurement starts from the eigenvectors of the last one, so that it takes a few products.
    Model, optimizer, gradients and the global random generator stay as they are, bit for bit.

    Args:
        model, loss, batch, parameters, batch_norm, dtype, keep_graphs: as for `Hessian`; the same
            batch every time, so keep it small.
        optimizer: of the model; with it `preconditioned_sharpness` is measured too.
        every: steps between two measurements.
        tolerance: relative error of eigenvalues.
        path: a file that gets each record as a line of JSON with a checksum.

    Raises:
        ValueError: for `every` below 1.
        FileExistsError: at the first record, for a `path` with the records of another run.
        FloatingPointError: from `step` or `measure`, for a loss that is not finite.

    Each record has `step`, `loss`, `sharpness`, its `error`, and `products` and `seconds` that it
    took; `stability` has for each part of the optimizer `measure`, `value`, `threshold`, `ratio`.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> loss = lambda model, x: 0.5 * model(x).square().sum()
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(1.0)
    >>> tracker = SharpnessTracker(model, loss, x, optimizer, every=2)
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     loss(model, x).backward()
    ...     optimizer.step()
    ...     _ = tracker.step()
    >>> [(record["step"], round(record["sharpness"], 2)) for record in tracker.records]
    [(2, 9.0), (4, 9.0)]
    >>> round(tracker.records[0]["stability"][0]["threshold"], 2)
    20.0
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Any,
        optimizer: Optimizer | None = None,
        *,
        every: int = 10,
        tolerance: float = 0.01,
        path: str | Path | None = None,
        parameters: Sequence[str] | str | None = None,
        batch_norm: BatchNorm = "eval",
        dtype: torch.dtype | None = None,
        keep_graphs: bool | None = None,
    ):
        if every < 1:
            raise ValueError(f"got every={every}, expected at least 1")
        self._records = Records(path)
        self._hessian = partial(
            Hessian,
            model,
            loss,
            batch,
            parameters,
            batch_norm=batch_norm,
            dtype=dtype,
            keep_graphs=keep_graphs,
        )
        self._optimizer = optimizer
        self._every, self._tolerance = every, tolerance
        self._steps = 0
        self._top: Tensor | None = None
        self._rows: list[Stability] = []

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was measured, in the order of steps."""
        return self._records.rows

    def table(self) -> ResultTable:
        """Return all measurements; the ratio is the largest of the parts of the optimizer."""
        names = ("step", "loss", "sharpness", "error", "ratio", "products")
        rows = []
        for record in self.records:
            ratios = [part["ratio"] for part in record.get("stability", ())]
            record = {**record, "ratio": max(ratios, default=None)}
            rows.append(tuple(record[name] for name in names))
        return ResultTable(tuple(map(Column, names)), tuple(rows), "sharpness along the run")

    def step(self) -> dict[str, Any] | None:
        """Call after each step of the optimizer; return the record if it was time to measure."""
        self._steps += 1
        return self.measure() if self._steps % self._every == 0 else None

    def measure(self) -> dict[str, Any]:
        """Measure now, and return the record; before the first step without `stability`."""
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(self._steps)
        H = self._hessian()
        top = sharpness(H, start=self._top, tolerance=self._tolerance, generator=generator)
        self._top, products = top.vector, top.products
        record: dict[str, Any] = {
            "kind": "sharpness",
            "step": self._steps,
            "loss": H.loss(),
            "sharpness": top.value,
            "error": top.error,
        }
        if self._optimizer is not None and self._steps:
            self._rows = preconditioned_sharpness(
                H,
                self._optimizer,
                start=self._rows,
                tolerance=self._tolerance,
                generator=generator,
            )
            products += sum(row.products for row in self._rows)
            shown = ("parameters", "measure", "value", "threshold", "ratio")
            record["stability"] = [{k: getattr(row, k) for k in shown} for row in self._rows]
        record |= {"products": products, "seconds": time.perf_counter() - began}
        self._records.append(record)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on: the step, and where the next measurement starts."""
        return {
            "steps": self._steps,
            "top": self._top,
            "rows": [asdict(row) for row in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what `path` has beyond that step is dropped, as it will come again."""
        self._steps, self._top = state["steps"], state["top"]
        self._rows = [Stability(**row) for row in state["rows"]]
        self._records.rewind(self._steps)
