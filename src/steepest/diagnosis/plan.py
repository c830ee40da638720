"""A plan: which geometry each parameter descends in, as a file that a person can edit."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from steepest.files import write_atomically
from steepest.geometry import Spectral
from steepest.linalg.polar_factor import PolarMethod
from steepest.model.matrix_view import MatrixView
from steepest.model.parameter_roles import RoleTable, roles
from steepest.model.stacks import find_stacks
from steepest.model.unwrapping import unwrapped
from steepest.optim.momentum import Momentum
from steepest.optim.record import ADAMW
from steepest.optim.scales import Scale
from steepest.optim.steepest_descent import SteepestDescent
from steepest.printing import sentence
from steepest.results import Column, Result, ResultTable

Planned = Literal["spectral", "stacked", "euclidean", "sign", "adamw"]
RATES: dict[str, float] = {
    "spectral": 1.0,
    "stacked": 1.0,
    "euclidean": 1.0,
    "sign": 0.05,
    ADAMW: 0.15,
}
"""Of the learning rate, for each geometry; see docs/learning_rates.md."""
_GROUPS: dict[str, dict[str, Any]] = {
    "spectral": {"geometry": "spectral"},
    "stacked": {"geometry": "spectral"},
    "euclidean": {"geometry": "euclidean"},
    "sign": {"geometry": "sign", "momentum": 0.9, "nesterov": False, "scale": "none"},
    ADAMW: {"geometry": ADAMW},
}


@dataclass(frozen=True)
class PlanRow:
    """One parameter of a plan.

    Attributes:
        parameter: its name.
        shape: its shape.
        geometry: "spectral" (Muon), "stacked" (TEON), "euclidean", "sign" (Signum) or "adamw"
            (AdamW).
        lr_scale: times the rate of its geometry.
        reason: why, for the reader.
        view: how it is seen as matrices, where a batch showed other ones than names and types.
    """

    parameter: str
    shape: tuple[int, ...]
    geometry: Planned
    lr_scale: float = 1.0
    reason: str = ""
    view: MatrixView | None = None

    def __post_init__(self) -> None:
        if self.view is None:
            return
        view: Any = self.view  # of JSON a list, of TOML a table
        try:
            view = MatrixView(**view) if isinstance(view, dict) else MatrixView(*view)
            view = view._replace(splits=tuple(view.splits))
            view.check((view.batch * view.rows * view.columns,))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"got view={self.view!r} for {self.parameter}, expected batch, rows, columns, "
                "transposed and splits, as a MatrixView has them"
            ) from error
        object.__setattr__(self, "view", view)


class Plan(Result, Sequence[PlanRow]):
    """Geometry, learning rate scale and reason for every parameter; prints as a table.

    Raises:
        ValueError: for a parameter twice, geometries that are none, and scales below zero.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> plan = Plan.default(model)
    >>> [(row.parameter, row.geometry) for row in plan if row.geometry == "spectral"]
    [('0.weight', 'spectral'), ('2.weight', 'spectral')]
    >>> [group["lr"] for group in plan.optimizer(model, lr=0.02).param_groups]
    [0.02, 0.003]
    """

    def __init__(
        self,
        rows: Iterable[PlanRow],
        rates: Mapping[str, float] | None = None,
        notes: Iterable[str] = (),
    ):
        self._rows = tuple(_modern(row) for row in rows)
        rates = {modern_geometry(name): rate for name, rate in (rates or {}).items()}
        self.notes = tuple(notes)
        """What to know of how it came about, in sentences."""
        self.rates = {**RATES, **rates}
        """Of the learning rate, for each geometry."""
        _known(self.rates, RATES, "geometry", "[rates]")
        seen = set()
        for row in self._rows:
            if row.parameter in seen:
                raise ValueError(f"got {row.parameter} twice, expected each parameter once")
            seen.add(row.parameter)
            _known([row.geometry], get_args(Planned), "geometry", row.parameter)
            _positive(row.lr_scale, f"lr_scale of {row.parameter}")
        for name, rate in self.rates.items():
            _positive(rate, f"rate of {name}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Any) -> Any:
        return self._rows[key]

    def table(self) -> ResultTable:
        """Return name, shape, geometry, rate over that of the optimizer, and reason of each row."""
        columns = ("parameter", "shape", "geometry", "rate", "reason")
        rows = tuple(
            (row.parameter, row.shape, row.geometry, f"{self._rate(row):.3g} lr", row.reason)
            for row in self._rows
        )
        caption = "\n".join(map(sentence, self.notes))
        return ResultTable(tuple(map(Column, columns)), rows, caption=caption)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries; `rate` is over the rate of the optimizer."""
        return [{**asdict(row), "rate": self._rate(row)} for row in self._rows]

    def as_dict(self) -> dict[str, Any]:
        """Return rows, rates and notes as plain values."""
        return {"rows": self.records, "rates": self.rates, "notes": list(self.notes)}

    def _rate(self, row: PlanRow) -> float:
        return self.rates[row.geometry] * row.lr_scale

    @classmethod
    def default(cls, model: nn.Module | RoleTable) -> Plan:
        """Return what `Muon(model)` does: spectral for hidden matrices, AdamW for all else."""
        table = model if isinstance(model, RoleTable) else roles(unwrapped(model))
        return cls(
            PlanRow(
                row.name,
                tuple(row.parameter.shape),
                "spectral" if row.is_matrix else ADAMW,
                reason=f"{row.role}: {row.reason}",
                view=row.view if row.by_example else None,
            )
            for row in table
        )

    def save(self, path: str | Path) -> None:
        """Write TOML, whole or not at all."""
        notes = [f"  {_text(note)}," for note in self.notes]
        lines = ["notes = [", *notes, "]", ""] if notes else []
        lines += ["# Which geometry each parameter descends in. geometry is one of:"]
        lines += [f"#   {', '.join(get_args(Planned))}", ""]
        lines += [
            "# Learning rate of each geometry, as a part of the given one.",
            "[rates]",
        ]
        lines += [f"{name} = {rate!r}" for name, rate in self.rates.items()]
        for row in self._rows:
            lines += ["", f"[parameters.{_text(row.parameter)}]"]
            lines += [f"# {' x '.join(map(str, row.shape)) or 'a number'}"]
            lines += [f"geometry = {_text(row.geometry)}"]
            lines += [f"lr_scale = {row.lr_scale!r}"] if row.lr_scale != 1 else []
            lines += [] if row.view is None else [f"view = {_view(row.view)}"]
            lines += [f"shape = {list(row.shape)}", f"reason = {_text(row.reason)}"]
        write_atomically(path, ("\n".join(lines) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote and perhaps somebody edited.

        Raises:
            ValueError: for what is no plan, with the place and what was expected.
        """
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"got {path}, which is no TOML: {error}") from error
        _known(content, ("notes", "rates", "parameters"), "section", str(path))
        notes = content.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError(f"got notes = {notes!r} in {path}, expected a list of sentences")
        entries = content.get("parameters", {})
        rows = []
        for name, entry in entries.items():
            if not isinstance(entry, dict) or "geometry" not in entry:
                raise ValueError(
                    f'got {name} in {path} without a geometry, expected geometry = "spectral", or '
                    "another one; put names with dots into quotes"
                )
            _known(entry, ("geometry", "lr_scale", "shape", "reason", "view"), "key", name)
            rows.append(
                PlanRow(
                    name,
                    tuple(entry.get("shape", ())),
                    entry["geometry"],
                    entry.get("lr_scale", 1.0),
                    str(entry.get("reason", "")),
                    entry.get("view"),
                )
            )
        return cls(rows, content.get("rates"), notes)

    def optimizer(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: Scale = "spectral",
        method: PolarMethod = "auto",
        **settings: Any,
    ) -> SteepestDescent:
        """Return one optimizer in which every parameter gets its geometry.

        Args:
            model: whose parameters the plan is about; each must be in it.
            lr: of spectral steps; the other geometries follow by their rates.
            momentum, nesterov, scale, method: as for `Muon`.
            settings: what all optimizers take, such as `weight_decay`, and `length` of `TEON`.

        Raises:
            ValueError: for a parameter that the model does not have, has in another shape, or has
                beside the plan; for matrix geometries of what is no matrix.
        """
        views = {row.parameter: row.view for row in self._rows if row.view is not None}
        names = [name for name, _ in unwrapped(model).named_parameters()]
        table = roles(unwrapped(model), {n: v for n, v in views.items() if n in names})
        planned = {row.parameter: row for row in self._rows}
        _known(planned, names, "parameter", "the plan")
        if missing := [name for name in names if name not in planned]:
            raise ValueError(
                f"got a plan without {missing[0]} ({len(missing)} of {len(names)} are missing), "
                "expected every parameter of the model; freezing is said by requires_grad"
            )
        groups: dict[tuple[str, float], list[Any]] = defaultdict(list)
        for row in table:
            plan_row = planned[row.name]
            shape = tuple(row.parameter.shape)
            if plan_row.shape and plan_row.shape != shape:
                raise ValueError(
                    f"got {row.name} as {plan_row.shape} in the plan and {shape} in the model, "
                    "expected the model that the plan was made for"
                )
            if row.view is None and plan_row.geometry not in (ADAMW, "sign"):
                raise ValueError(
                    f'got geometry="{plan_row.geometry}" for {row.name}, which is no matrix '
                    f'({row.reason}); expected "adamw" or "sign"'
                )
            groups[plan_row.geometry, plan_row.lr_scale].append(row)
        stacks = find_stacks(table, 2)
        return SteepestDescent(
            [
                self._group(geometry, lr_scale, rows, lr, stacks)
                for (geometry, lr_scale), rows in sorted(groups.items(), key=_order)
            ],
            lr,
            geometry=Spectral(method),
            memory=Momentum(momentum, nesterov),
            scale=scale,
            **settings,
        )

    def _group(
        self, geometry: str, scale: float, rows: list[Any], lr: float, stacks: dict[str, Any]
    ) -> dict[str, Any]:
        group = {
            "params": [(row.name, row.parameter) for row in rows],
            "lr": lr * self.rates[geometry] * scale,
            "planned": True,
            **_GROUPS[geometry],
        }
        if geometry in ("spectral", "stacked", "euclidean"):
            group["views"] = [row.view for row in rows]
        if geometry == "stacked":
            group["stacks"] = [stacks.get(row.name) for row in rows]
        return group


def _order(item: tuple[tuple[str, float], Any]) -> tuple[int, float]:
    (geometry, scale), _ = item
    return list(RATES).index(geometry), scale


def _view(view: MatrixView) -> str:
    """A TOML table of one line."""
    entries = (f"{name} = {json.dumps(value)}" for name, value in view._asdict().items())
    return f"{{ {', '.join(entries)} }}"


def _text(value: str) -> str:
    """A TOML string."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _known(names: Iterable[str], known: Iterable[str], kind: str, where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"expected {', '.join(known[:8])}"
            raise ValueError(f"unknown {kind} {name!r} in {where}; {hint}")


def _positive(value: Any, name: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"got {name} = {value!r}, expected a finite number of at least 0")


_OLD: dict[str, Planned] = {"adaptive": ADAMW}
"""Geometries as version 0.1 called them."""


def modern_geometry(name: str) -> str:
    """Return the name that a geometry of version 0.1 has now."""
    return _OLD.get(name, name)


def _modern(row: PlanRow) -> PlanRow:
    if row.geometry not in _OLD:
        return row
    return replace(row, geometry=_OLD[row.geometry])
