"""The optimizers a run can name, all over the same split of the model's parameters.

A name is one of the family (`muon`), or an import path: of a subclass of `SteepestDescent`, of any
other optimizer class, or of a function `build(model, lr)`. Options follow a colon:
`teon:length=muon,stack=4`, `my_package:MyOptimizer:beta=0.9`.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from steepest.lab.arguments import did_you_mean
from steepest.lab.errors import InputError
from steepest.lab.imports import imported
from steepest.lab.train.optimizer_builders import (
    Builder,
    adamw_for_all,
    beside_adamw,
    by_function,
    needed_by_step,
    of_family,
)
from steepest.lab.train.optimizer_options import (
    LR,
    arguments_of,
    parsed_options,
    text_of,
    without_options,
)
from steepest.lab.user_code import UserCodeError
from steepest.optim import SteepestDescent
from steepest.optim.family import FAMILY, record_of, study_names
from steepest.optim.record import Record

GRID = (1 / 2, 1, 2)
"""Rates of a study around a single one, as factors."""

_UNKNOWN = "its own"


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer as a run or a study names it.

    Attributes:
        name: what was asked for, the same text for equal options.
        label: in text and tables; it shows the options.
        geometry, memory: its place in the table of norms; "its own" where nothing says.
        rates: learning rates that a study starts from, ascending; none where nothing says.
        kind: the class, or the function that builds it.
        settings: the options, without the learning rate.
    """

    name: str
    label: str
    geometry: str
    memory: str
    rates: tuple[float, ...]
    kind: Any
    settings: Mapping[str, Any]
    _builder: Builder = field(repr=False, compare=False)

    def takes(self, setting: str) -> bool:
        """Whether a setting that runs share changes it: momentum, weight_decay or adamw_lr.

        >>> [named_optimizer(name).takes("momentum") for name in ("muon", "signsgd")]
        [True, False]
        """
        if setting in self.settings or self._builder is by_function:
            return False
        if setting == "adamw_lr":
            return True
        if self._builder is beside_adamw:
            return setting in arguments_of(self.kind)
        return setting != "momentum" or self.memory != "none"

    def build(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float,
        weight_decay: float,
        adamw_lr: float,
        example: Any = None,
    ) -> Optimizer:
        """Return the optimizer of a model, as `build` does."""
        shared = {"momentum": momentum, "weight_decay": weight_decay, "adamw_lr": adamw_lr}
        if self.memory == "none":
            del shared["momentum"]
        return self._builder(self.kind, model, lr, dict(self.settings), shared, example)


def named_optimizer(name: str) -> NamedOptimizer:
    """Return what a name stands for.

    | name                                  | what is built                                       |
    |---------------------------------------|-----------------------------------------------------|
    | `muon`, `teon:length=muon,stack=4`    | one of the family, with options of its class        |
    | `my_package:MyOptimizer:beta=0.9`     | a subclass of `SteepestDescent` with a record       |
    |                                       | any other class of optimizers, for the matrices     |
    | `my_package:build:lr=0.01`            | what the function `build(model, lr)` returns        |

    The option `lr` is the middle of the grid of a study, between its half and its double. Without
    it the rates are those of the record, or are around the default in the signature.

    Raises:
        InputError: for an unknown name or option, for a value that an option cannot have, and for
            what is no optimizer.

    >>> named_optimizer("teon:stack=4,length=muon").label
    'TEON, length muon, stack 4'
    >>> named_optimizer("muon:lr=0.1").rates
    (0.05, 0.1, 0.2)
    """
    head, text = without_options(name)
    if ":" not in head:
        if head not in study_names():
            raise InputError(
                f"got {head!r}{did_you_mean(head, study_names())}, expected one of "
                f"{', '.join(study_names())}, or an import path such as my_package:MyOptimizer"
            )
        record = FAMILY[head]
        known = issubclass(record.kind, SteepestDescent)
        return _described(head, text, record.kind, record, of_family if known else adamw_for_all)
    try:
        value = imported(head)
    except UserCodeError as error:
        if head.partition(":")[0] in study_names():
            raise InputError(
                f"got {name!r}, expected options as name=value, such as muon:momentum=0.95"
            ) from error
        raise
    kind = inspect.unwrap(value) if callable(value) else value
    if not isinstance(kind, type):
        _check_function(head, kind)
        return _described(head, text, kind, None, by_function)
    if not issubclass(kind, Optimizer):
        raise InputError(
            f"got {head!r}, expected a subclass of steepest.optim.SteepestDescent or of "
            "torch.optim.Optimizer, or a function build(model, lr) that returns an optimizer"
        )
    if issubclass(kind, SteepestDescent):
        try:
            return _described(head, text, kind, record_of(kind), of_family)
        except ValueError as error:
            raise InputError(f"got {head!r}: {error}") from error
    _check_class(head, kind)
    return _described(head, text, kind, None, beside_adamw)


def build(
    name: str,
    model: nn.Module,
    lr: float,
    *,
    momentum: float,
    weight_decay: float,
    adamw_lr: float,
    example: Any = None,
) -> Optimizer:
    """Return the optimizer: `lr` for the matrices, AdamW at `adamw_lr` for all else.

    The second group is the same for every name, so that runs differ in the matrices alone. Only a
    function of the user's decides about all parameters itself. Options in the name go before the
    arguments here.

    Args:
        name: as for `named_optimizer`.
        model: its parameters are what is trained.
        lr: learning rate of the matrices.
        momentum: of the matrices, also the first beta of AdamW on them. Optimizers without memory
            ignore it, and so do classes of the user's whose signature does not have it.
        weight_decay: of the matrices; it is treated as `momentum` is.
        adamw_lr: learning rate of all other parameters.
        example: one for `steepest.roles`, which makes the split.

    Raises:
        InputError: as `named_optimizer`, and for settings that do not go together.
    """
    return named_optimizer(name).build(
        model,
        lr,
        momentum=momentum,
        weight_decay=weight_decay,
        adamw_lr=adamw_lr,
        example=example,
    )


def spec_slug(name: str) -> str:
    """Return a name that a file can have, the same for equal options, and different for others.

    >>> spec_slug("muon"), spec_slug("teon:length=muon,stack=4")
    ('muon', 'teon-length-muon-stack-4-27079817')
    >>> spec_slug("teon:stack=4,length=muon") == spec_slug("teon:length=muon,stack=4")
    True
    """
    name = named_optimizer(name).name
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    if safe == name:
        return name
    return f"{safe[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def starting_rates(name: str) -> tuple[float, ...]:
    """Return the learning rates that a study starts from.

    Raises:
        InputError: for an optimizer that has none.
    """
    if rates := named_optimizer(name).rates:
        return rates
    raise InputError(
        f"got {name!r}, which has no rates for a study to start from; expected the middle of its "
        f"grid, such as {without_options(name)[0]}:lr=0.01, or a default of lr in its signature, "
        "or rates=(0.01, 0.02, 0.04) in its Record"
    )


def _described(
    head: str, text: str, kind: Any, record: Record | None, builder: Builder
) -> NamedOptimizer:
    """What the house knows of an optimizer, and what the options add."""
    settings = parsed_options(text, kind, head)
    shown = ",".join(f"{key}={text_of(value)}" for key, value in settings.items())
    lr = settings.pop(LR, None)
    if lr is not None and not _is_rate(lr):
        raise InputError(f"got lr={lr!r} for {head}, expected a finite number above 0")
    if lr is None and record is None:
        default = inspect.signature(kind).parameters[LR].default
        lr = default if _is_rate(default) else None
    usual = kind.__name__ if isinstance(kind, type) else head
    usual_rates = record.rates if record else ()
    parts = [
        f"{key.replace('_', ' ')} {text_of(value).replace(',', ' and ')}"
        for key, value in settings.items()
    ]
    return NamedOptimizer(
        name=f"{head}:{shown}" if shown else head,
        label=", ".join([record.label if record else usual, *parts]),
        geometry=record.geometry if record else _UNKNOWN,
        memory=record.memory if record else _UNKNOWN,
        rates=tuple(float(lr * scale) for scale in GRID) if lr else usual_rates,
        kind=kind,
        settings={**(record.settings if record else {}), **settings},
        _builder=builder,
    )


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _check_function(path: str, function: Any) -> None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # no function, or none that says what it takes
        names = []
    if LR not in names[1:]:
        raise InputError(
            f"got {path!r}, expected a function build(model, lr) that returns an optimizer, or a "
            "class of optimizers"
        )


def _check_class(path: str, kind: type[Optimizer]) -> None:
    if LR not in arguments_of(kind):
        raise InputError(
            f"got {path!r}, which takes no lr; expected a class that is made with parameters and lr"
        )
    if needed := needed_by_step(kind):
        raise InputError(
            f"got {path!r}, whose step needs {', '.join(needed)}; expected one that is called as "
            "step()"
        )
