"""`parametrize`: a model of any size whose best learning rate is that of a small one."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from inspect import signature
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from steepest.model.parameter_roles import ParameterRole, RoleTable, all_roles
from steepest.optim.family import record_of
from steepest.optim.rates import callers_level
from steepest.optim.record import ADAMW, Record
from steepest.optim.settings import modern
from steepest.optim.steepest_descent import SteepestDescent
from steepest.parametrize import initialization
from steepest.parametrize.attention import HeadSize, check_gains
from steepest.parametrize.dimensions import Build, Overrides, growth
from steepest.parametrize.folding import ScaleInput, folds, tied_heads
from steepest.parametrize.parameter_factors import ParameterFactors, factors_of_parameter
from steepest.parametrize.rules import Rule, update_of
from steepest.results import Column, Result, ResultTable

DecayOfBase = Literal["base", "coupled"]
# What groups have of their own, and would override without a word.
_OF_GROUPS = {
    "lr", "weight_decay", "decay", "graft_eps", "adamw_lr", "adamw_eps", "adamw_weight_decay",
}  # fmt: skip


class Parametrized(Result):
    """A model at its target size, with the factors of each parameter; made by `parametrize`.

    It prints as a table. The model is the user's own class with other numbers in its weights:
    saving, copying, compiling and sharding it need nothing of this object.

    Attributes:
        model: at the target size, initialized.
        rows: a `ParameterFactors` for each parameter.
        base, target: the sizes.
        rule, optimizer_name, settings: as given.
        readout: for heads tied to an embedding, the factor on their input.
    """

    width = 140

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[ParameterFactors],
        base: Mapping[str, Any],
        target: Mapping[str, Any],
        rule: Rule,
        optimizer: str | type[Optimizer],
        settings: Mapping[str, Any],
        overrides: Overrides | None,
        readout: Mapping[str, float],
        like: RoleTable | None = None,
    ):
        self.model = model
        self.rows = tuple(rows)
        self.base, self.target = dict(base), dict(target)
        self.rule, self.settings = rule, dict(settings)
        self._record = record_of(optimizer)
        self.optimizer_name = self._record.name
        self.readout = dict(readout)
        self._overrides, self._like = overrides, like

    @property
    def has_memory(self) -> bool:
        """Whether the first step of the optimizer depends on what it keeps."""
        return self._record.kind is not torch.optim.SGD

    def __iter__(self) -> Iterator[ParameterFactors]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> ParameterFactors:
        """Return the row of a parameter."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"got {name!r}, which is no parameter of this model")

    def groups(
        self,
        lr: float,
        weight_decay: float = 0.0,
        decay: DecayOfBase = "base",
        eps: float = 1e-8,
        adamw_lr: float | None = None,
        adamw_weight_decay: float = 0.0,
        settings: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Return parameter groups with the rates multiplied in, one for each set of factors.

        Args:
            lr: learning rate of the base model.
            weight_decay: λ of the base model.
            decay: "base" (default): every step shrinks a weight by lr λ, as at the base, at
                any size; "coupled": the group's own rate times λ, which vanishes with the width
                under muP.
            eps: Adam's epsilon at the base.
            adamw_lr: for matrix optimizers, the rate of parameters that are no matrices. By default
                0.15 lr for Muon, TEON and steps of Muon's length or spectral norm 1, otherwise lr.
            adamw_weight_decay: for matrix optimizers, λ of parameters that are no matrices. For SGD
                and AdamW it is λ of vectors (biases, gains). 0 by default.
            settings: of the optimizer, where they differ from those of `parametrize`: TEON's
                `stack` and, under `sp`, `scale` are in the groups. All others, such as `length`
                or `block`, go to the optimizer itself, as `optimizer` does.

        Schedulers that multiply the rate (`LambdaLR`, as in Hugging Face's Trainer) keep the
        factors; those that set it to one number for all groups (`OneCycleLR`, `CyclicLR`, a loop
        that assigns `group["lr"]`) destroy any such scheme. A group has its "lr_factor".

        Make them after the model is sharded or moved, like any groups.

        Raises:
            ValueError: for a parameter of the model that came after `parametrize`.
        """
        if str(decay) == "independent":
            decay = "base"
            warnings.warn(
                'decay="independent" is called decay="base" here now: in optimizers it means '
                "something else. The old name goes with the next version",
                DeprecationWarning,
                stacklevel=callers_level(),
            )
        if decay not in get_args(DecayOfBase):
            raise ValueError(f'got decay={decay!r}, expected "base" or "coupled"')
        every = {**self.settings, **modern(settings or {})}
        rows = {row.name: row for row in self.rows}
        table = all_roles(self.model, self._overrides, like=self._like)
        members: dict[tuple[Any, ...], list[ParameterRole]] = defaultdict(list)
        for role in table:
            if role.name not in rows:
                raise ValueError(
                    f"got {role.name}, a parameter that the model did not have when it was "
                    "parametrized; expected all layers to be made inside `build`"
                )
            row = rows[role.name]
            if role.parameter.requires_grad:
                equal = (float(f"{x:.10g}") for x in (row.lr, row.eps))  # but for rounding
                vector = role.role == "vector" and role.view is None
                apart = vector or row.update != self.optimizer_name
                shrink = adamw_weight_decay if apart else weight_decay
                members[row.update, *equal, shrink].append(role)
        kind = self._record.kind
        ours = issubclass(kind, SteepestDescent)
        marks: Mapping[str, Mapping[str, Any]] = {}
        if issubclass(kind, SteepestDescent):
            marks = kind.marks(table, every)
            if adamw_lr is None:
                adamw_lr = lr * kind.adamw_ratio({**_defaults(self._record), **every})
        update_key = update_of(kind, every, self.rule).eps
        groups = []
        for (update, factor, eps_factor, shrink), roles in members.items():
            inner = ours and update == ADAMW
            rate = adamw_lr if inner and adamw_lr is not None else lr
            group: dict[str, Any] = {
                "params": [(role.name, role.parameter) for role in roles],
                "name": f"{update}, lr x {factor:.10g}, eps x {eps_factor:.10g}, decay {shrink:g}",
                "lr_factor": factor,
                "lr": rate * factor,
                "weight_decay": shrink / factor if decay == "base" else shrink,
            }
            if inner:
                group["geometry"] = ADAMW
            elif ours:
                group["views"] = [role.view for role in roles]
                for key, values in marks.items():
                    group[key] = [values.get(role.name) for role in roles]
            if eps_key := "eps" if inner else update_key:
                group[eps_key] = eps * eps_factor
            groups.append(group)
        return groups

    def optimizer(
        self,
        lr: float,
        *,
        weight_decay: float = 0.0,
        decay: DecayOfBase = "base",
        eps: float = 1e-8,
        adamw_lr: float | None = None,
        adamw_weight_decay: float = 0.0,
        **settings: Any,
    ) -> Optimizer:
        """Return the optimizer with these groups: torch's SGD or AdamW, or one of this package.

        Args:
            lr, weight_decay, decay, eps, adamw_lr, adamw_weight_decay: as for `groups`.
            settings: all else that the optimizer takes, such as `momentum`.

        Raises:
            ValueError: for settings that change what an update is, which belong to `parametrize`.
        """
        settings = modern(settings)
        every = {**self.settings, **settings}
        kind: Any = self._record.kind
        _check_settings(self._record, every)
        if update_of(kind, every, self.rule) != update_of(kind, self.settings, self.rule):
            raise ValueError(
                f"got {settings}, which need other factors; expected them in "
                "parametrize(..., settings=...)"
            )
        groups = self.groups(lr, weight_decay, decay, eps, adamw_lr, adamw_weight_decay, every)
        return kind(groups, lr=lr, **every)

    def table(self) -> ResultTable:
        """Return the factors of every parameter; layers with the same ones are one row."""
        sizes = (f"{key} {self.base[key]} -> {self.target[key]}" for key in self.base)
        columns = (
            Column("parameter"),
            Column("kind"),
            Column("fan_in", "in"),
            Column("fan_out", "out"),
            *map(Column, ("init", "lr", "eps", "why", "source")),
        )
        alike: dict[tuple[Any, ...], set[str]] = defaultdict(set)
        for row in self.rows:
            factors = (
                float(f"{x:.4g}") for x in (row.fan_in, row.fan_out, row.init, row.lr, row.eps)
            )
            layers = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name)
            alike[layers, row.kind, *factors, row.why, row.source].add(row.name)
        rows = [
            (layers if len(names) > 1 else names.pop(), *others)
            for (layers, *others), names in alike.items()
        ]
        for name, factor in self.readout.items():
            why = f"tied to the embedding: input x {factor:.4g}"
            rows.append((name, "output", *[None] * 5, why, "TP-V Table 8"))
        return ResultTable(
            columns,
            tuple(rows),
            f"{self.rule}, {self.optimizer_name}: {', '.join(sizes)}",
            "factors relative to the base model",
        )

    @property
    def records(self) -> list[dict[str, Any]]:
        """The factors of every parameter, each a row."""
        return [asdict(row) for row in self.rows]

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the model, as plain numbers and strings."""
        return {
            "rule": self.rule,
            "optimizer": self.optimizer_name,
            "settings": self.settings,
            "base": self.base,
            "target": self.target,
            "readout": self.readout,
            "parameters": self.records,
        }


def parametrize(
    build: Build,
    base: Mapping[str, Any],
    target: Mapping[str, Any],
    *,
    rule: Rule = "mup",
    optimizer: str | type[Optimizer] = "adamw",
    settings: Mapping[str, Any] | None = None,
    roles: Overrides | None = None,
    branches: Sequence[str] | None = None,
    head_size: HeadSize | None = None,
    example: Any = None,
) -> Parametrized:
    """Build a model at `target` whose best learning rate is that of the one at `base`.

    At `target == base` the model is the user's own, bit for bit, and all factors are 1.

    Args:
        build: the user's own function from sizes to a model. It is called on the meta device, where
            nothing is allocated, then once at the base and once at the target.
        base: the sizes at which the learning rate was tuned, such as `dict(width=64, depth=2)`.
        target: the sizes to train; those left out are the base's.
        rule: "mup" (default, TP-V); "depth-mup" (branches times 1/sqrt(L)) and "completep" (1/L),
            which add depth to it; "spectral", muP with an initialization of spectral norm
            sqrt(out/in); "sp" (one rate) and "ntp", the controls.
        optimizer: which one will train it, by name or class; the factors depend on it. A class of
            your own says how its rate follows the size in its `records`.
        settings: of that optimizer. Those that change the length of an update, such as `length`
            and `scale`, change the factors.
        roles: overrides for `steepest.roles`, such as `{"*.gate.weight": "hidden"}`, and
            "transposed" for parameters used as x @ W; not views, which have one size.
        branches: for rules with depth, patterns for the last module of each residual branch; known
            for the blocks of GPT-2, LLaMA and ViT and of this package.
        head_size: from the model to the size of its attention heads, where the attention module and
            `model.config` do not say it.
        example: what the base model is called with, as for `steepest.roles`. One forward pass then
            says which layers give the output and which axis of a bare parameter is the input.

    Raises:
        ValueError: for axes that do not grow in proportion, parameters that nothing is known of,
            unknown branches or head sizes, settings without a rate. The message names them.
        TypeError: for an optimizer that is neither a name nor a class.

    The user's tensors are scaled to the RMS of the base times a factor. That RMS is measured on one
    base model, so it has a relative error of about 1/sqrt(2 n) for n random entries.

    >>> def build(width):
    ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width),
    ...                          nn.ReLU(), nn.Linear(width, 2))
    >>> big = parametrize(build, dict(width=16), dict(width=64))
    >>> [(row.kind, row.lr) for row in big.rows if row.name.endswith("weight")]
    [('input', 1.0), ('hidden', 0.25), ('output', 0.25)]
    >>> [group["lr"] for group in big.groups(lr=0.01)]
    [0.01, 0.0025, 0.0025, 0.01]
    """
    if rule not in get_args(Rule):
        raise ValueError(f"got rule={rule!r}, expected one of {', '.join(get_args(Rule))}")
    if unknown := set(target) - set(base):
        raise ValueError(
            f"got {sorted(unknown)} in target, which base has no value for; expected sizes of base"
        )
    settings = modern(settings or {})
    record = record_of(optimizer)
    optimizer = record.name
    _check_settings(record, settings)
    update = update_of(optimizer, settings, rule)
    target = {**base, **target}
    like = None
    if example is not None:
        with torch.random.fork_rng(devices=[]):
            like = all_roles(build(**base), roles, example=example)
    grown = growth(build, base, target, roles, like)
    folded = folds(grown, rule, branches, head_size)
    rows = [factors_of_parameter(rule, update, role, grown, folded) for role in grown.target.table]
    model = build(**target)
    readout = {}
    if target != dict(base):
        sizes = initialization.base_sizes(grown, base, target, rule)
        rms = initialization.reference_rms(build, sizes, grown)
        check_gains(model, folded)
        initialization.initialize(
            model, rms, {row.name: row.init for row in rows}, {r.name: r.multiplier for r in rows}
        )
        readout = tied_heads(model, rule, grown)
    for name, factor in readout.items():
        model.get_submodule(name).register_forward_pre_hook(ScaleInput(factor), with_kwargs=True)
    return Parametrized(model, rows, base, target, rule, optimizer, settings, roles, readout, like)


def _defaults(record: Record) -> dict[str, Any]:
    """Settings by which a rate for what is no matrix is chosen, as the class has them."""
    own = signature(record.kind).parameters
    defaults = {key: own[key].default for key in ("scale", "length") if key in own}
    usual = {"scale": "spectral", "length": "own"}
    return {**usual, **defaults, "geometry": record.geometry.partition(",")[0]}


def _check_settings(record: Record, settings: Mapping[str, Any]) -> None:
    eps = record.update({}, True).eps if record.update else ""
    own = (_OF_GROUPS | {eps}) & set(settings)
    if own:
        raise ValueError(
            f"got {sorted(own)} among the settings of {record.name}, which follow the size of each "
            "parameter; expected lr, weight_decay, decay, eps (Adam's, also of grafting), adamw_lr "
            "and adamw_weight_decay as arguments of `groups` or `optimizer`"
        )
