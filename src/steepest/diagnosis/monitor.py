"""What a running training says about its layers, sampled every so many steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.linalg import nuclear_rank, stable_rank
from steepest.model.inputs import Inputs
from steepest.model.matrix_view import matrix_label
from steepest.model.parameter_roles import ParameterRole, all_roles
from steepest.model.unwrapping import unwrapped
from steepest.records import Records
from steepest.results import Column, Result, ResultTable

_MEMORY = ("momentum_buffer", "exp_avg")
_SHOWN = (
    "matrix",
    "role",
    "nuclear_rank",
    "stable_rank",
    "momentum_nuclear_rank",
    "weight_rms",
    "update_rms",
)


class Monitor(Result):
    """Rides along in a training loop, through hooks of the optimizer; there is nothing to call.

    Every `every` steps it measures, for each matrix that has a gradient: nuclear and stable rank of
    the gradient, nuclear rank of the momentum before the step, stable rank of what the matrix
    multiplies and of what the layer gives (of the last forward pass of the step), and the root mean
    square of weight and update. Training is not changed, bit for bit. All it keeps between steps is
    a counter; during a sampled one a copy of the matrices.

    Args:
        model: what is trained; behind `torch.compile` hooks are not called, so the activations'
            ranks are missing there. Under DDP only the first process measures.
        optimizer: that trains it.
        every: optimizer steps between two samples; the first step is one.
        path: a file that gets each record as a line of JSON with a checksum, as the lab's
            `metrics.jsonl` has it; a run that goes on drops damaged lines with a warning.

    Raises:
        ValueError: for `every` below 1, and models without matrices.
        FileExistsError: at the first record, for a `path` with records of another run.

    A record has `kind` "condition", `step`, `matrix`, `role`, `nuclear_rank`, `stable_rank`,
    `stable_rank_output`, `tokens`, `gradient_stable_rank`, `momentum_nuclear_rank`, `weight_rms`,
    `update_rms`. What was not measured is None. Ranks do not depend on the scale of gradients, so
    neither clipping nor a gradient scaler matters.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with Monitor(model, optimizer, every=2) as monitor:
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(32, 8)).square().mean().backward()
    ...         optimizer.step()
    >>> [(record["step"], record["matrix"]) for record in monitor.records]
    [(1, '0.weight'), (1, '2.weight'), (3, '0.weight'), (3, '2.weight')]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 100,
        path: str | Path | None = None,
    ):
        if every < 1:
            raise ValueError(f"got every={every}, expected at least 1")
        self._model, self._every = unwrapped(model), every
        self._records = Records(path)
        table = all_roles(self._model)
        self._rows = [r for r in table if r.view is not None and not r.view.is_vector]
        if not self._rows:
            raise ValueError(
                f"got a {type(model).__name__} without matrices, expected some to look at"
            )
        self._inputs = Inputs(self._model, table)
        self._steps = 0
        self._sampled: list[tuple[ParameterRole, int, dict[str, Any]]] = []
        self._weights: dict[str, Tensor] = {}
        self.seconds = 0.0
        """Spent in samples, without what hooks took in forward passes."""
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner  # behind a wrapper of accelerate or Lightning
        self._optimizer = optimizer
        self._handles: list[Any] = []
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return
        self._handles = [
            optimizer.register_step_pre_hook(self._on_step),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]
        self._listen()

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was measured, in the order of steps and matrices."""
        return self._records.rows

    def table(self) -> ResultTable:
        """Return the last sample; `records` has all of them."""
        last = [row for row in self.records if row["step"] == self.records[-1]["step"]]
        title = f"step {last[0]['step']}" if last else "no sample yet"
        rows = tuple(tuple(row.get(name) for name in _SHOWN) for row in last)
        return ResultTable(tuple(map(Column, _SHOWN)), rows, title)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take all hooks off; the records stay."""
        self._inputs.__exit__()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what the file has beyond that step is dropped, it will come again."""
        self._steps = int(state["steps"])
        self._records.rewind(self._steps)
        self._inputs.__exit__()
        self._listen()

    def _listen(self) -> None:
        """Hook into the forward passes of a step that is sampled."""
        self._inputs.ranks.clear()
        if self._handles and self._steps % self._every == 0:
            self._inputs.__enter__()

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Measure before the step, or after its closure, which is what computes gradients."""
        self._sampled, self._weights = [], {}
        if self._steps % self._every:
            return None
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._before()
            return None

        def measured() -> Any:
            loss = closure()
            if not self._sampled:
                self._before()
            return loss

        return args[:1], {**kwargs, "closure": measured}

    @torch.no_grad()
    def _before(self) -> None:
        began = time.perf_counter()
        self._inputs.__exit__()
        self._sampled = [
            (row, i, self._ranks(row, i, G))
            for row in self._rows
            if row.parameter.grad is not None
            for i, G in enumerate(_matrices(row, row.parameter.grad))
            if bool(G.any()) and bool(G.isfinite().all())
        ]
        self._weights = {row.name: row.parameter.detach().clone() for row, _, _ in self._sampled}
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def _after(self) -> None:
        self._steps += 1
        if (self._steps - 1) % self._every == 0:
            began = time.perf_counter()
            rows = []
            for row, i, ranks in self._sampled:
                W, before = (_matrices(row, t)[i] for t in (row.parameter, self._weights[row.name]))
                sizes = {"weight_rms": _rms(W), "update_rms": _rms(W.float() - before.float())}
                rows.append({"kind": "condition", "step": self._steps, **ranks, **sizes})
            self._sampled, self._weights = [], {}
            self._records.append(*rows)
            self.seconds += time.perf_counter() - began
        self._listen()

    def _ranks(self, row: ParameterRole, i: int, G: Tensor) -> dict[str, Any]:
        assert row.view is not None
        seen = self._inputs.ranks.get((row.name, i // max(1, len(row.view.splits))))
        state = self._optimizer.state.get(row.parameter, {})
        memory = next((state[key] for key in _MEMORY if isinstance(state.get(key), Tensor)), None)
        M = None if memory is None else _matrices(row, memory)[i]
        return {
            "matrix": matrix_label(row.name, i, len(row.view.sizes())),
            "role": row.role,
            "nuclear_rank": float(nuclear_rank(G, "polar")),
            "stable_rank": seen and seen.entering,
            "stable_rank_output": seen and seen.leaving,
            "tokens": seen.tokens if seen else 0,
            "gradient_stable_rank": float(stable_rank(G, "power", 12)),
            "momentum_nuclear_rank": None if M is None else float(nuclear_rank(M, "polar")),
        }


def _matrices(row: ParameterRole, tensor: Tensor) -> list[Tensor]:
    assert row.view is not None
    return row.view.matrices(tensor.detach().to_dense().contiguous())


def _rms(X: Tensor) -> float:
    return X.float().square().mean().sqrt().item()
