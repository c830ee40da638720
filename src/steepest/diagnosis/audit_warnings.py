"""What is surely wrong with a model and its optimizers: one function for each group of mistakes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.optimizer import Optimizer

from steepest.diagnosis.plan import Planned
from steepest.model.matrix_view import MatrixView
from steepest.model.parameter_roles import ParameterRole, Role
from steepest.optim.record import ADAMW
from steepest.optim.steepest_descent import SteepestDescent

AuditGeometry = Planned | Literal["unknown", "not trained"]
LARGEST_DECAY = 0.1  # of a weight, in a step
LARGEST_STEP = 1.0  # in spectral norm, over that of the weight
LARGEST_RATIO = 100.0  # between updates of matrices of one role and shape
LARGE_ADAMW_RATE = 0.01
_OURS: dict[str, AuditGeometry] = {
    ADAMW: "adamw", "sign": "sign", "euclidean": "euclidean", "spectral": "spectral",
}  # fmt: skip
_NAMES = ("Adam", "NAdam", "RAdam", "Adamax", "Adafactor", "Adagrad", "RMSprop")  # and subclasses
_ADAPTIVE = tuple(getattr(torch.optim, name) for name in _NAMES)


@dataclass(frozen=True)
class AuditRow:
    """One parameter: what it is, what it gets, and how far its next update goes.

    Numbers of the update are None for what is not trained, and where they depend on a gradient and
    no batch was given; relative ones also for zero weights. Weight decay is in `decay` only.

    Attributes:
        parameter: its name.
        shape: its shape.
        role: what it is, see `steepest.roles`.
        matrices: how many matrices it is by that role's view; 0 for what gets no matrix update.
        geometry: of its update; "adamw" for all of Adam's family; "unknown" is measured too.
        lr: the rate of its group.
        rms: root-mean-square entry of the update.
        spectral_norm: of the update, the largest over its matrices; None for what is no matrix. A
            lower bound by the power method where both sides are longer than 256.
        weight_rms: root-mean-square entry of the weight.
        relative_rms: rms / weight_rms.
        relative_spectral_norm: over that of the weight, the largest over its matrices.
        against_adamw: rms / lr. AdamW's first update has an RMS of lr, so this is how many times as
            far the entries move as in AdamW with the same rate.
        decay: part of the weight that weight decay takes off in a step.
        gradient_rms: root-mean-square entry of the gradient of the batch, 0 where the loss does not
            depend on the parameter; None without a batch.
        scale_free: whether half the gradient gives the same update, to 5%.
    """

    parameter: str
    shape: tuple[int, ...]
    role: Role
    matrices: int
    geometry: AuditGeometry
    lr: float | None = None
    rms: float | None = None
    spectral_norm: float | None = None
    weight_rms: float = 0.0
    relative_rms: float | None = None
    relative_spectral_norm: float | None = None
    against_adamw: float | None = None
    decay: float | None = None
    gradient_rms: float | None = None
    scale_free: bool | None = None


@dataclass(frozen=True)
class AuditWarning:
    """One mistake.

    Attributes:
        kind: "not trained", "trained twice", "not in the model", "frozen but moved", "embedding",
            "head", "vector" (among the spectral ones), "left out" (of them), "several as one",
            "zero weight", "zero gradient", "clipping", "decay", "overwritten", "rates apart", or
            "one rate".
        parameters: names of those it is about.
        message: what is wrong and what to do, in a sentence.
    """

    kind: str
    parameters: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class Membership:
    """Where an optimizer has a parameter."""

    optimizer: Optimizer
    group: Mapping[str, Any]
    index: int

    @property
    def name(self) -> str:
        """What the optimizer calls it."""
        if "param_names" in self.group:
            return str(self.group["param_names"][self.index])
        return f"a parameter of shape {tuple(self.group['params'][self.index].shape)}"

    @property
    def geometry(self) -> AuditGeometry:
        """That of its update."""
        optimizer, group = self.optimizer, self.group
        if isinstance(optimizer, SteepestDescent):
            labels = group.get("stacks") or [None] * len(group["params"])
            sizes = Counter(number for label in labels for number in label or ())
            own = [sizes[number] for number in labels[self.index] or () if number is not None]
            return (
                "stacked"
                if max(own, default=1) > 1
                else _OURS[optimizer.geometries[group["geometry"]]]
            )
        if isinstance(optimizer, torch.optim.Muon):
            return "spectral"
        if isinstance(group.get("use_muon"), bool):  # as in K. Jordan's groups
            return "spectral" if group["use_muon"] else "adamw"
        if isinstance(optimizer, torch.optim.SGD):
            return "euclidean"
        return "adamw" if isinstance(optimizer, _ADAPTIVE) else "unknown"


@dataclass(frozen=True)
class AuditedParameter:
    """A parameter of the model, with all that is known of it."""

    row: AuditRow
    role: ParameterRole
    memberships: Sequence[Membership]

    @property
    def trains(self) -> bool:
        """Whether steps are to move it."""
        return self.role.parameter.requires_grad

    @property
    def spectral(self) -> bool:
        """Whether it is trained by spectral updates, also of stacks."""
        return self.row.geometry in ("spectral", "stacked") and self.trains


@dataclass(frozen=True)
class Setup:
    """What the checks look at; strangers are parameters of optimizers alone."""

    parts: Sequence[AuditedParameter]
    strangers: Sequence[str]
    gradient_norm: float | None
    clip_norm: float | None


Findings = Iterable[tuple[str, Iterable[AuditedParameter | str], str]]
"""Kind, parameters, and a message in which {} stands for their names; none without parameters."""


def find_warnings(setup: Setup) -> tuple[AuditWarning, ...]:
    """Return what all checks find."""
    warnings = []
    for check in (_members, _tables, _left_out, _as_one, _zeros, _clipping, _sizes, _apart, _rate):
        for kind, parts, message in check(setup):
            names = tuple(p if isinstance(p, str) else p.row.parameter for p in parts)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            said = message.replace("{}", ", ".join(names[:3]) + more)
            warnings += [AuditWarning(kind, names, said)] if names else []
    return tuple(warnings)


def _members(setup: Setup) -> Findings:
    trained = [p for p in setup.parts if p.trains]
    text = "no optimizer has {}; put it into a group, or freeze it with requires_grad_(False)"
    yield "not trained", [p for p in trained if not p.memberships], text
    text = "several groups or optimizers have {}, and each makes a step; leave it to one"
    yield "trained twice", [p for p in trained if len(p.memberships) > 1], text
    text = "an optimizer has {}, which the model does not have; build optimizers when the model "
    text += "has its final parameters, after to_empty(), tying and adapters"
    yield "not in the model", setup.strangers, text
    frozen = [p for p in setup.parts if p.memberships and not p.trains]
    left = [p for p in frozen if p.role.parameter.grad is not None]
    text = "every step moves {} although frozen, as there is a gradient left; set .grad = None"
    yield "frozen but moved", left, text


def _tables(setup: Setup) -> Findings:
    unfit = {
        "embedding": "embedding tables, of which a batch uses rows",
        "head": "output layers or routers, with a row for each class",
        "vector": "gains or biases",
    }
    for role, why in unfit.items():
        parts = [p for p in setup.parts if p.spectral and p.row.role == role]
        text = f"spectral updates go to {why} ({{}}); leave such to AdamW, as steepest.Muon does"
        yield role, parts, text


def _left_out(setup: Setup) -> Findings:
    """Not of a plan, which has a reason for each matrix."""
    matrices = [p for p in setup.parts if p.trains and p.role.is_matrix and p.memberships]
    count = sum(p.spectral for p in matrices)
    left = [p for p in matrices if p.row.geometry in (ADAMW, "euclidean")]
    left = [p for p in left if not p.memberships[0].group.get("planned")]
    for name, conv in (("convolutions", True), ("hidden matrices", False)):
        parts = [p for p in left if (p.row.role == "conv") == conv] if count else []
        text = f"{count} matrices get spectral updates, but not the {name} {{}}; "
        yield "left out", parts, text + "steepest.Muon(model) gives them to every matrix"


def _as_one(setup: Setup) -> Findings:
    alike: dict[tuple[int, int, str], list[AuditedParameter]] = defaultdict(list)
    for p in setup.parts:
        taken = _taken(p.memberships[0]) if p.spectral and p.role.is_matrix else 0
        if 0 < taken < p.row.matrices:
            alike[p.row.matrices, taken, p.row.role].append(p)
    for (count, taken, role), parts in alike.items():
        text = f"spectral updates take {{}} ({role}) as {taken} where there are {count} matrices; "
        yield "several as one", parts, text + 'use steepest.Muon(model), or groups with "views"'


def _taken(membership: Membership) -> int:
    """As how many matrices an optimizer with spectral updates takes a parameter; 0 if unknown."""
    if isinstance(membership.optimizer, SteepestDescent):
        return len(MatrixView(*membership.group["views"][membership.index]).sizes())
    return 1 if membership.group["params"][membership.index].ndim == 2 else 0


def _zeros(setup: Setup) -> Findings:
    """Not of adapters (LoRA), which start from a zero matrix on purpose, nor of tables."""
    matrices = [p for p in setup.parts if p.trains and (p.role.is_matrix or p.row.role == "head")]
    matrices = [p for p in matrices if "lora_" not in p.row.parameter]
    zero = [p for p in matrices if p.row.weight_rms == 0]
    text = "all of {} is zero, so a relative rate is undefined, and what comes before may get no "
    text += "gradient until it has moved; initialize it, unless that is meant"
    yield "zero weight", zero, text
    cause = f", perhaps since {zero[0].row.parameter} is all zero" if zero else ""
    text = f"the gradient of {{}} is exactly zero on this batch{cause}, so only weight decay can "
    text += "move it; see whether the loss depends on it"
    yield "zero gradient", [p for p in matrices if p.row.gradient_rms == 0], text


def _clipping(setup: Setup) -> Findings:
    clip, norm = setup.clip_norm, setup.gradient_norm
    if clip is None:
        return
    numbers = "" if norm is None else f" (on this batch their norm is {norm:.3g})"
    spectral = [p.row for p in setup.parts if p.spectral]  # their length together, at a rate of 1:
    total = math.hypot(*((r.against_adamw or 0.0) * math.prod(r.shape) ** 0.5 for r in spectral))
    text = f"clipping gradients to {clip:g}{numbers} does not shorten the updates of {{}}, which "
    after = f"; clipping what the spectral step gives would shrink it {total / clip:.3g} times"
    text += "are as long for any gradient; to bound them lower the rate" + after * (total > clip)
    yield "clipping", [p for p in setup.parts if p.row.scale_free and p.row.rms], text


def _sizes(setup: Setup) -> Findings:
    decays = [(p, p.row.decay or 0.0) for p in setup.parts]
    large = [p for p, decay in decays if decay > LARGEST_DECAY]
    text = f"weight decay takes up to {max(decay for _, decay in decays):.0%} off {{}} in a step, "
    yield "decay", large, text + "the rate times the decay; lower one of them"
    norms = [(p, p.row.relative_spectral_norm or 0.0) for p in setup.parts]
    huge = [p for p, norm in norms if norm > LARGEST_STEP]
    worst = max(norm for _, norm in norms)
    text = f"one step overwrites {{}}: the update has up to {worst:.3g} times the spectral norm of "
    yield "overwritten", huge, text + "the weight; lower the rate"


def _apart(setup: Setup) -> Findings:
    alike: dict[tuple[Role, tuple[int, int]], list[AuditedParameter]] = defaultdict(list)
    for p in setup.parts:
        if p.role.is_matrix and p.role.view is not None and p.row.scale_free and p.row.rms:
            alike[p.row.role, p.role.view.sizes()[0]].append(p)
    for (role, (m, n)), parts in alike.items():
        parts.sort(key=lambda p: p.row.rms or 0.0)
        ratio = (parts[-1].row.rms or 0.0) / (parts[0].row.rms or 1.0)
        pair = [parts[0], parts[-1]] if ratio > LARGEST_RATIO else []
        text = f"the updates of {{}}, each a {m} x {n} matrix ({role}), differ {ratio:.3g} times in"
        yield "rates apart", pair, text + " size; look for a forgotten rate or scale"


def _rate(setup: Setup) -> Findings:
    """Of spectral updates whose scale is known not to be that of AdamW."""
    rates = {p.row.lr for p in setup.parts if p.spectral and _large_rates(p.memberships[0])}
    adaptive = [p for p in setup.parts if p.trains and p.row.geometry == ADAMW]
    same = [p for p in adaptive if p.row.lr in rates and (p.row.lr or 0.0) >= LARGE_ADAMW_RATE]
    text = "AdamW moves {} at the rate of the spectral updates, whose entries are far smaller; "
    yield "one rate", same, text + 'give it about 0.15 of that, or them the scale "match-rms-adamw"'


def _large_rates(membership: Membership) -> bool:
    if isinstance(membership.optimizer, torch.optim.Muon):
        return membership.group["adjust_lr_fn"] != "match_rms_adamw"
    spectral = membership.group.get("geometry") == "spectral"
    return spectral and membership.group["scale"] != "match-rms-adamw"
