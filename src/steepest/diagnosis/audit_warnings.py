"""What is surely wrong with a model and its optimizers: one function for each kind of mistake."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.optimizer import Optimizer

from steepest.matrix_view import MatrixView
from steepest.optim.mixed import Mixed
from steepest.optim.steepest_descent import SteepestDescent
from steepest.parameter_roles import ParameterRole, Role

AuditGeometry = Literal[
    "spectral", "stacked", "euclidean", "sign", "adaptive", "unknown", "not trained"
]
Kind = Literal[
    "not trained",
    "trained twice",
    "not in the model",
    "frozen but moved",
    "embedding",
    "head",
    "vector",
    "left out",
    "several as one",
    "zero weight",
    "zero gradient",
    "clipping",
    "decay",
    "overwritten",
    "rates apart",
    "one rate",
]
SPECTRAL = ("spectral", "stacked")
LARGEST_DECAY = 0.1
"""Of a weight, in a step."""
LARGEST_STEP = 1.0
"""In spectral norm, over that of the weight."""
LARGEST_RATIO = 100.0
"""Between updates of matrices of one role and shape."""
LARGE_ADAMW_RATE = 0.01


@dataclass(frozen=True)
class AuditRow:
    """One parameter: what it is, what it gets, and how far its first update goes.

    The numbers of the update are None where they are not known: for what is not trained, or where
    they depend on a gradient and no batch was given. Weight decay is in `decay` only.

    Attributes:
        parameter: its name.
        shape: its shape.
        role: what it is, see `steepest.roles`.
        matrices: how many matrices it is by that role's view; 0 for what is no matrix.
        geometry: of its update; "adaptive" is Adam and its kin, "unknown" a foreign optimizer,
            whose update is measured all the same.
        lr: the rate of its group.
        rms: root-mean-square entry of the update.
        spectral_norm: of the update; the largest over its matrices, None for what is no matrix. The
            power method's, a lower bound, for matrices of more than 256 rows and columns.
        weight_rms: root-mean-square entry of the weight.
        relative_rms: rms / weight_rms; None for zero weights.
        relative_spectral_norm: over that of the weight; the largest over its matrices.
        against_adamw: rms / lr. AdamW's first update has an RMS of lr, so this is how many times as
            far the entries move as in AdamW with the same rate.
        decay: part of the weight that weight decay takes off in a step.
        gradient_rms: root-mean-square entry of the gradient of the batch, 0 where there is none;
            None without a batch.
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
        kind: which, one of `Kind`.
        parameters: names of those it is about.
        message: what is wrong and what to do, in a sentence.
    """

    kind: Kind
    parameters: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class Place:
    """Where an optimizer has a parameter."""

    optimizer: Optimizer
    group: Mapping[str, Any]
    index: int

    @property
    def scale(self) -> str:
        """The convention of a spectral rate, by the names of torch; empty if not known."""
        if isinstance(self.optimizer, torch.optim.Muon):
            return str(self.group["adjust_lr_fn"] or "original")
        spectral = self.group.get("geometry") == "spectral"
        return str(self.group["scale"]).replace("-", "_") if spectral else ""


@dataclass(frozen=True)
class Part:
    """A row with what it was made of."""

    row: AuditRow
    role: ParameterRole
    places: Sequence[Place]

    @property
    def name(self) -> str:
        """Of the parameter."""
        return self.row.parameter

    @property
    def trains(self) -> bool:
        """Whether a step is to move it."""
        return self.role.parameter.requires_grad

    @property
    def spectral(self) -> bool:
        """Whether its update is a spectral one, also of stacks."""
        return self.row.geometry in SPECTRAL

    @property
    def adapter(self) -> bool:
        """Whether it is of a LoRA adapter, whose second matrix is zero on purpose."""
        return "lora_" in self.name


@dataclass(frozen=True)
class Setup:
    """All that the checks look at."""

    parts: Sequence[Part]
    strangers: Sequence[str]
    gradient_norm: float | None
    clip_norm: float | None
    spectral_length: float
    """Frobenius norm of all spectral updates together, for a rate of 1."""


Found = Iterable[tuple[Kind, Iterable[Part | str], str]]


def find_warnings(setup: Setup) -> tuple[AuditWarning, ...]:
    """Return what all checks found; in messages `{}` stands for the names."""
    found = []
    for check in _CHECKS:
        for kind, parts, message in check(setup):
            names = tuple(each if isinstance(each, str) else each.name for each in parts)
            if names:
                found.append(AuditWarning(kind, names, message.replace("{}", _listed(names))))
    return tuple(found)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _membership(setup: Setup) -> Found:
    trained = [each for each in setup.parts if each.trains]
    yield (
        "not trained",
        [each for each in trained if not each.places],
        "no optimizer has {}; put it into a group, or freeze it with requires_grad_(False)",
    )
    yield (
        "trained twice",
        [each for each in trained if len(each.places) > 1],
        "every round of steps moves {} more than once, as it is in several groups or optimizers; "
        "keep it in one",
    )
    yield (
        "not in the model",
        setup.strangers,
        "an optimizer has {}, which the model does not have; build it when the model has its final "
        "parameters, after to_empty(), tying and adapters",
    )
    yield (
        "frozen but moved",
        [p for p in setup.parts if p.places and not p.trains and p.role.parameter.grad is not None],
        "every step moves {} though it is frozen, as it still has a gradient; set its .grad to "
        "None",
    )


def _no_hidden_matrices(setup: Setup) -> Found:
    spectral = [each for each in setup.parts if each.spectral and each.trains]
    what: list[tuple[Role, str]] = [
        ("embedding", "a table, of which a batch reads rows"),
        ("head", "the output layer or a router, whose rows are classes"),
        ("vector", "a gain or bias, and no matrix"),
    ]
    for role, why in what:
        yield (
            role,  # type: ignore[misc]  # these roles are kinds
            [each for each in spectral if each.row.role == role],
            f"the spectral update is for hidden matrices, and {{}} is {why}; give it AdamW, as "
            "steepest.Muon(model) does",
        )


def _left_out(setup: Setup) -> Found:
    """Of a plan, which is an answer for each matrix, nothing is."""
    left = [
        each
        for each in setup.parts
        if each.trains and each.role.is_matrix and each.row.geometry in ("adaptive", "euclidean")
        if not any(isinstance(place.optimizer, Mixed) for place in each.places)
    ]
    others = [each for each in setup.parts if each.spectral and each.role.is_matrix]
    if not others:
        return
    for name, convolutions in (("a convolution", True), ("a hidden matrix", False)):
        yield (
            "left out",
            [each for each in left if (each.row.role == "conv") == convolutions],
            f"{{}} is {name} without a spectral update, while {len(others)} others have one; "
            "steepest.Muon(model) gives it to all, with convolutions seen as matrices",
        )


def _several_as_one(setup: Setup) -> Found:
    by_count: dict[tuple[int, int], list[Part]] = defaultdict(list)
    for each in setup.parts:
        taken = _matrices_taken(each)
        if each.spectral and each.role.is_matrix and taken and taken < each.row.matrices:
            by_count[each.row.matrices, taken].append(each)
    for (count, taken), parts in by_count.items():
        yield (
            "several as one",
            parts,
            f"{{}} is {count} matrices ({parts[0].role.reason}) and gets the update of {taken}; "
            'pass the model to steepest.Muon, or groups with "views"',
        )


def _matrices_taken(part: Part) -> int | None:
    """As how many matrices the optimizer takes a parameter; None if that is not known."""
    place = part.places[0] if part.places else None
    if place is None:
        return None
    if isinstance(place.optimizer, SteepestDescent):
        view = (place.group.get("views") or [None] * (place.index + 1))[place.index]
        return None if view is None else len(MatrixView(*view).sizes())
    return 1 if len(part.row.shape) == 2 else None


def _zeros(setup: Setup) -> Found:
    matrices = [p for p in setup.parts if p.trains and p.row.role != "vector" and not p.adapter]
    zero = [each for each in matrices if each.row.weight_rms == 0]
    yield (
        "zero weight",
        zero,
        "{} is all zero, so a relative rate means nothing, and what comes before it may get no "
        "gradient until it has moved; initialize it, unless it is to start from zero",
    )
    yield (
        "zero gradient",
        [each for each in matrices if each.row.gradient_rms == 0],
        "the gradient of {} is exactly zero on this batch, so nothing moves it"
        + (f", perhaps as {zero[0].name} is all zero" if zero else "")
        + "; check that the loss depends on it",
    )


def _clipping(setup: Setup) -> Found:
    if setup.clip_norm is None:
        return
    clip, norm = setup.clip_norm, setup.gradient_norm
    numbers = ""
    if norm is not None and norm > clip:
        numbers = f" (their norm is {norm:.3g} on this batch, so they shrink {norm / clip:.3g}x)"
    elif norm is not None:
        numbers = f" (their norm is {norm:.3g} on this batch, so they are left as they are)"
    after = ""
    if setup.spectral_length > clip:
        after = (
            "; should it clip what the spectral step makes of them, that shrinks "
            f"{setup.spectral_length / clip:.3g}x"
        )
    yield (
        "clipping",
        [each for each in setup.parts if each.row.scale_free and each.row.rms],
        f"clipping gradients to {clip:g}{numbers} does not shorten the update of {{}}, which is as "
        "long for any gradient, and only weighs batches differently in what it remembers; lower "
        f"the rate to bound it{after}",
    )


def _sizes(setup: Setup) -> Found:
    decayed = [each for each in setup.parts if (each.row.decay or 0.0) > LARGEST_DECAY]
    if decayed:
        worst = max(each.row.decay or 0.0 for each in decayed)
        yield (
            "decay",
            decayed,
            f"weight decay takes up to {worst:.0%} off {{}} in every step, as it is multiplied by "
            "the rate; lower one of them",
        )
    norms = [(each, each.row.relative_spectral_norm or 0.0) for each in setup.parts]
    if huge := [each for each, norm in norms if norm > LARGEST_STEP]:
        yield (
            "overwritten",
            huge,
            f"one step overwrites {{}}: the spectral norm of its update is up to "
            f"{max(norm for _, norm in norms):.3g} times that of the weight; lower the rate",
        )


def _rates(setup: Setup) -> Found:
    alike: dict[tuple[Role, tuple[int, int]], list[Part]] = defaultdict(list)
    for each in setup.parts:
        if each.role.view is not None and each.role.is_matrix and each.row.scale_free:
            alike[each.row.role, each.role.view.sizes()[0]] += [each] if each.row.rms else []
    for (role, (m, n)), parts in alike.items():
        ordered = sorted(parts, key=lambda each: each.row.rms or 0.0)
        if not ordered:
            continue
        least, most = ordered[0], ordered[-1]
        ratio = (most.row.rms or 0.0) / (least.row.rms or 1.0)
        if ratio > LARGEST_RATIO:
            yield (
                "rates apart",
                [least, most],
                f"the updates of {{}}, both {role} of {m} x {n}, differ {ratio:.3g} times in size; "
                "look for a forgotten scale or rate",
            )
    rates = {
        place.group["lr"]
        for each in setup.parts
        for place in each.places
        if each.spectral and place.scale not in ("", "match_rms_adamw")
    }
    large = [
        each
        for each in setup.parts
        if each.row.geometry == "adaptive" and each.trains
        if each.row.lr in {float(lr) for lr in rates} and each.row.lr >= LARGE_ADAMW_RATE
    ]
    if large:
        yield (
            "one rate",
            large,
            f"AdamW moves {{}} with the rate of the spectral updates, {large[0].row.lr:g}, which "
            'is large for it; give it about 0.15 of that, or use the scale "match-rms-adamw"',
        )


_CHECKS: tuple[Callable[[Setup], Found], ...] = (
    _membership,
    _no_hidden_matrices,
    _left_out,
    _several_as_one,
    _zeros,
    _clipping,
    _sizes,
    _rates,
)
