"""`audit`: before training, what every parameter gets from its optimizer, and what is wrong."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from steepest.curvature.loss_function import Loss, LossFunction
from steepest.diagnosis.audit_warnings import (
    AuditedParameter,
    AuditRow,
    AuditWarning,
    Membership,
    Setup,
    find_warnings,
)
from steepest.linalg import spectral_norm
from steepest.model.matrix_view import MatrixView
from steepest.model.parameter_roles import all_roles, roles_in_loss
from steepest.model.unwrapping import unwrapped
from steepest.optim.copying import copies_of
from steepest.random_numbers import generators_kept, seeded
from steepest.results import Column, Result, ResultTable

EXACT_SIDE = 256  # rows or columns up to which spectral norms take all singular values
SAME = 0.05  # up to this difference, half the gradient gives the same update
_Tensors = dict[Tensor, Tensor]  # keyed by parameters


@dataclass(frozen=True, repr=False)
class Audit(Result):
    """What `audit` found; true if there are no warnings, and prints as a table with them.

    Attributes:
        rows: an `AuditRow` for each parameter, in the model's order.
        warnings: what is wrong, each with its `kind`, the `parameters` and a `message`.
        measured_on: "one batch", or "Gaussian gradients".
        gradient_norm: of all gradients of the batch together; None without a batch.
    """

    rows: tuple[AuditRow, ...]
    warnings: tuple[AuditWarning, ...]
    measured_on: str
    gradient_norm: float | None

    @property
    def ok(self) -> bool:
        """Whether there are no warnings."""
        return not self.warnings

    def __bool__(self) -> bool:
        return self.ok

    def __iter__(self) -> Iterator[AuditRow]:
        return iter(self.rows)

    def __getitem__(self, parameter: str) -> AuditRow:
        """Return the row of a parameter."""
        return {row.parameter: row for row in self.rows}[parameter]

    def table(self) -> ResultTable:
        """Return what the next update of every parameter is."""
        columns = (
            Column("parameter"),
            Column("role"),
            Column("geometry"),
            Column("lr", form=".2g"),
            Column("rms", "RMS", right=True),
            Column("spectral_norm", right=True),
            Column("against_adamw", "RMS / lr", ".2g"),
            Column("decay", form=".2g"),
        )
        rows = tuple(
            (
                row.parameter.removesuffix(".weight"),
                row.role,
                row.geometry,
                row.lr,
                _number(row.rms, row.relative_rms),
                _number(row.spectral_norm, row.relative_spectral_norm),
                row.against_adamw,
                row.decay,
            )
            for row in self.rows
        )
        caption = (
            "RMS entry and spectral norm of the update, in brackets over those of the weight; "
            "RMS / lr is 1 in AdamW's first update; decay is what a step takes off"
        )
        return ResultTable(columns, rows, f"the next update, of {self.measured_on}", caption)

    def shown(self) -> Sequence[RenderableType]:
        """Return the table and the warnings."""
        return (self.table(), Text(self._said()))

    def __str__(self) -> str:
        return f"{self.table()}{self._said()}\n"

    def _said(self) -> str:
        return "\n".join(map(str, self.warnings or ["no warnings"]))

    @property
    def records(self) -> list[dict[str, Any]]:
        """The fields of every row."""
        return [asdict(row) for row in self.rows]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        return {"kind": "audit", "ok": self.ok, **asdict(self)}


def audit(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    *,
    clip_norm: float | None = None,
) -> Audit:
    """Say before training how far each parameter will move, and what is surely wrong.

    Copies of the optimizers make a step, and an update is the difference of the copied weights: of
    the gradient of the first batch, or without one of Gaussian gradients (seed 0, entries of size
    1), when only updates that do not depend on the size of the gradient are reported. A step with
    half the gradient and one with weight decay tell what these two do; all other numbers are
    without weight decay. The model, its gradients, the optimizers and the random generators of
    torch stay as they are; meanwhile this takes memory for about ten times the weights.

    Args:
        model: any module, also compiled.
        optimizer: any optimizer of torch, of this package or of others, or several of them; with
            the state that they have.
        loss: `loss(model, batch) -> scalar`; called without dropout, all else in its mode.
        batches: of which the first is taken.
        clip_norm: the norm that your loop clips gradients to, if it does.

    Raises:
        ValueError: for a loss without batches or the reverse; a model without parameters, or on the
            meta device; LBFGS, whose step is many; and an optimizer that has made steps where there
            is no batch, since its memory and Gaussian gradients have nothing to do with each other.
        TypeError: for what is no optimizer.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> result = audit(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    >>> result.ok, round(result["0.weight"].rms, 6), round(result["0.weight"].against_adamw, 3)
    (True, 0.001, 1.0)
    >>> result = audit(model, torch.optim.Muon([model[0].weight, model[2].weight]))
    >>> [(warning.kind, warning.parameters) for warning in result.warnings]
    [('not trained', ('0.bias', '2.bias')), ('head', ('2.weight',))]
    """
    optimizers = _optimizers(optimizer, batches is not None)
    if (loss is None) != (batches is None):
        present, absent = ("batches", "loss") if loss is None else ("loss", "batches")
        raise ValueError(
            f"got {present} without {absent}; pass both, for the gradient of your model, or "
            "neither, for random gradients"
        )
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"got clip_norm={clip_norm}, expected a finite number above 0, or None")
    model = unwrapped(model)
    if meta := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"got {meta[0]} on the meta device, expected a model filled with weights")
    with generators_kept():
        first = None if batches is None else list(islice(batches, 1))
        if first == []:
            raise ValueError("got no batches, expected at least one; a generator can be read once")
        if loss is None or first is None:
            table = all_roles(model)
        else:
            table = roles_in_loss(model, loss, first[0])
        gradients, norm = _gradients(model, loss, first)
        updates = _updates(optimizers, gradients)
        halves = _updates(optimizers, gradients, scale=0.5)
        decayed = _updates(optimizers, gradients, decay=True)

    places: dict[Tensor, list[Membership]] = defaultdict(list)
    for member in optimizers:
        for group in member.param_groups:
            for i, p in enumerate(group["params"]):
                places[p].append(Membership(member, group, i))
    parts = []
    for role in table:
        p, memberships = role.parameter, places.pop(role.parameter, [])
        lr = memberships[0].group.get("lr") if memberships else None
        row = AuditRow(
            parameter=role.name,
            shape=tuple(p.shape),
            role=role.role,
            matrices=len(role.view.sizes()) if role.view and role.is_matrix else 0,
            geometry=memberships[0].geometry if memberships else "not trained",
            lr=None if lr is None else float(lr),
            weight_rms=_rms(p),
        )
        if norm is not None and p.requires_grad:
            row = replace(row, gradient_rms=_rms(gradients[p]) if p in gradients else 0.0)
        if memberships and p.requires_grad:
            row = _measured(row, role.view, p, updates[p], halves[p], decayed[p])
        parts.append(AuditedParameter(row, role, memberships))
    strangers = [uses[0].name for uses in places.values()]
    warnings = find_warnings(Setup(parts, strangers, norm, clip_norm))
    measured_on = "Gaussian gradients" if norm is None else "one batch"
    return Audit(tuple(part.row for part in parts), warnings, measured_on, norm)


def _optimizers(optimizers: Optimizer | Iterable[Optimizer], memory: bool) -> list[Optimizer]:
    """The optimizers as a list; `memory` is whether they may have made steps."""
    members: list[Any] = [optimizers]
    if isinstance(optimizers, Iterable) and not isinstance(optimizers, Optimizer):
        members = list(optimizers)
    # Accelerate has an optimizer around that of torch.
    members = [getattr(member, "optimizer", member) for member in members]
    for member in members:
        if not isinstance(member, Optimizer):
            raise TypeError(
                f"got an optimizer of type {type(member).__name__}, expected one of torch, or "
                "several"
            )
        if isinstance(member, torch.optim.LBFGS):
            raise ValueError(
                "got LBFGS, which evaluates the loss many times in a step; expected an optimizer "
                "whose step() takes gradients"
            )
        kept = [
            v for state in member.state.values() for v in state.values() if isinstance(v, Tensor)
        ]
        if not memory and any(v.any() for v in kept):
            raise ValueError(
                f"got a {type(member).__name__} that has made steps, and no batch; expected loss "
                "and batches, as its update depends on how the gradient compares with those before"
            )
    if not members:
        raise ValueError("got no optimizer, expected at least one")
    return members


def _gradients(
    model: nn.Module, loss: Loss | None, batches: Sequence[Any] | None
) -> tuple[_Tensors, float | None]:
    """The gradient of each trained parameter, and the norm of all where there is a batch."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if loss is None or batches is None:
        seeded = torch.Generator().manual_seed(0)
        return {p: torch.randn(p.shape, generator=seeded) for p in trained.values()}, None
    function = LossFunction(model, loss, batch_norm="batch" if model.training else "eval")
    copies = function.parameters
    tensors = torch.autograd.grad(function(batches[0]), list(copies.values()), allow_unused=True)
    pairs = zip(copies, tensors, strict=True)
    gradients: _Tensors = {trained[name]: G for name, G in pairs if G is not None}
    return gradients, math.hypot(*(float(G.norm()) for G in gradients.values()))


def _updates(
    optimizers: list[Optimizer], gradients: _Tensors, scale: float = 1.0, decay: bool = False
) -> _Tensors:
    """By how much a step of copies of the optimizers changes each parameter, in float32 or more."""
    copies = copies_of(optimizers)
    pairs: _Tensors = {}
    for optimizer, copied in zip(optimizers, copies, strict=True):
        for group, own in zip(optimizer.param_groups, copied.param_groups, strict=True):
            pairs.update(zip(group["params"], own["params"], strict=True))
            if not decay and "weight_decay" in own:
                own["weight_decay"] = 0.0
    for p, copy in pairs.items():
        copy.grad = (gradients[p] * scale).to(copy) if p in gradients else None
    for copied in copies:
        with seeded(0):  # the same random numbers in each of the steps that are compared
            copied.step()
    return {p: _wide(copy) - _wide(p) for p, copy in pairs.items()}


def _measured(
    row: AuditRow, view: MatrixView | None, W: Tensor, U: Tensor, half: Tensor, decayed: Tensor
) -> AuditRow:
    """The row with the numbers of its update: U, that of half the gradient, and with decay."""
    W = _wide(W)
    square = float(W.square().sum())
    row = replace(
        row,
        scale_free=bool((U - half).norm() <= SAME * U.norm()),
        decay=float((U - decayed).flatten() @ W.flatten()) / square if square else None,
    )
    if row.gradient_rms is None and not row.scale_free:
        return row
    rms = _rms(U)
    both = [[] if view is None else view.matrices(tensor.contiguous()) for tensor in (U, W)]
    norms = [(_norm(update), _norm(weight)) for update, weight in zip(*both, strict=True)]
    return replace(
        row,
        rms=rms,
        relative_rms=rms / row.weight_rms if row.weight_rms else None,
        against_adamw=rms / row.lr if row.lr else None,
        spectral_norm=max((update for update, _ in norms), default=None),
        relative_spectral_norm=max((u / w for u, w in norms if w), default=None),
    )


def _norm(matrix: Tensor) -> float:
    return float(spectral_norm(matrix, "exact" if min(matrix.shape) <= EXACT_SIDE else "power"))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _rms(tensor: Tensor) -> float:
    return float(_wide(tensor).norm()) / math.sqrt(max(1, tensor.numel()))


def _number(value: float | None, relative: float | None = None) -> str:
    after = "" if relative is None else f" ({relative:.2g})"
    return "-" if value is None else f"{value + 0.0:.2g}{after}"
