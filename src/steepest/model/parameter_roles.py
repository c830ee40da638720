"""What each parameter of a model does, and hence which parameters a matrix norm is meant for.

Module types decide first, names second, shapes last; every choice can be overridden by a name
pattern. Each row of the table gives its reason.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args, overload

from torch import Tensor, nn

from steepest.model.dataflow import Dataflow
from steepest.model.matrix_view import MatrixView
from steepest.model.role_evidence import (
    READ,
    NotFollowed,
    chooses,
    follow,
    is_output,
    is_turned,
    judge,
    notes,
)
from steepest.model.role_guesses import (
    LAST,
    MATRIX_ROLES,
    STATED,
    Guess,
    attention_kinds,
    guess,
    guessed_heads,
    plain_name,
    routers,
)
from steepest.model.role_guesses import Role as Role
from steepest.results import Column, Result, ResultTable

Override = Role | MatrixView | Literal["transposed"]
_MAY_BE_HEADS = (*MATRIX_ROLES, "vector")


@dataclass(frozen=True)
class ParameterRole:
    """One row of the table: a parameter, its role, how it is a batch of matrices, and why."""

    name: str
    parameter: Tensor = field(repr=False)
    role: Role
    view: MatrixView | None
    reason: str
    attention: tuple[str, ...] = ()
    """What each matrix is in an attention layer: "q", "k" or "v"; empty for all else."""
    guessed: bool = False
    """Whether names, shapes or the order of layers decided, and no type or example."""
    axes_known: bool = True
    """Whether it is known which axis of a parameter of no known layer is the input."""
    by_example: bool = False
    """Whether an example showed other matrices than names and types would."""

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter is meant for an update in a matrix norm."""
        return self.role in MATRIX_ROLES


class RoleTable(Result, Sequence[ParameterRole]):
    """The roles of all parameters of a model, in its own order; tied parameters appear once.

    It is a sequence of `ParameterRole`, shows as a table, and can be given to any optimizer of
    this package in place of the model.
    """

    def __init__(self, rows: Sequence[ParameterRole]):
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, key: int | str) -> ParameterRole: ...
    @overload
    def __getitem__(self, key: slice) -> RoleTable: ...
    def __getitem__(self, key: int | str | slice) -> ParameterRole | RoleTable:
        """Return a row by position or parameter name, or a part of the table."""
        if isinstance(key, str):
            for row in self._rows:
                if row.name == key:
                    return row
            raise KeyError(f"got {key!r}, which is no parameter of this model{_similar(key, self)}")
        return RoleTable(self._rows[key]) if isinstance(key, slice) else self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[ParameterRole]:
        return iter(self._rows)

    @property
    def matrices(self) -> list[ParameterRole]:
        """The rows that get an update in a matrix norm."""
        return [row for row in self._rows if row.is_matrix]

    @property
    def others(self) -> list[ParameterRole]:
        """The rows that do not: embeddings, heads, vectors."""
        return [row for row in self._rows if not row.is_matrix]

    def table(self) -> ResultTable:
        """Return name, shape, role, matrices and reason of every parameter."""
        total = sum(row.parameter.numel() for row in self)
        matrix = sum(row.parameter.numel() for row in self.matrices)
        share = f"{matrix / total:.0%}" if total else "none"
        return ResultTable(
            tuple(
                Column(*names)
                for names in (
                    ("parameter",),
                    ("shape",),
                    ("role",),
                    ("matrices", "matrices (out, in)"),
                    ("reason",),
                )
            ),
            tuple(
                (
                    row.name,
                    tuple(row.parameter.shape),
                    row.role,
                    str(row.view) if row.is_matrix else None,
                    row.reason,
                )
                for row in self
            ),
            caption=f"{matrix:,} of {total:,} entries ({share}) get a matrix update",
            styles=tuple("" if row.is_matrix else "dim" for row in self),
        )


def roles(
    model: nn.Module, overrides: Mapping[str, Override] | None = None, *, example: Any = None
) -> RoleTable:
    """Find out what each parameter of `model` is.

    | role      | what                                                      | update |
    |-----------|-----------------------------------------------------------|--------|
    | hidden    | weight of a linear, recurrent or attention layer           | matrix |
    | conv      | convolution, seen as `(out, in * kh * kw)` for each group | matrix |
    | qkv       | fused query, key, value: three matrices                   | matrix |
    | experts   | several matrices in one parameter, as of experts          | matrix |
    | embedding | embedding table, position, class token; also if tied      | other  |
    | head      | a layer that gives an output, and routers to experts      | other  |
    | vector    | bias, norm gain, what acts entry by entry, a single row   | other  |

    With an `example`, one forward pass is followed. A layer gives an output if its result reaches
    what the model returns, or the loss, and goes into no other layer with weights; a sum of the
    results of many layers, as at the end of a transformer without a head, has none. How a bare
    parameter is multiplied says which axis is the input, and where it is several matrices. A layer
    whose result is split is as many matrices. A weight that is used in two ways, as in a tied
    autoencoder, has the view of its first use, and the reason names both. Without an example, types
    and names decide, and each reason that is a guess says so.

    Args:
        model: any module; `torch.compile`d ones too. Weights, gradients, buffers, modes and
            random generators stay as they are.
        overrides: from a name pattern (`"*.proj.weight"`, as in `fnmatch`) to a role, to
            "transposed" for a matrix stored as (in, out), or to a `MatrixView`; the first pattern
            that matches a parameter decides.
        example: what the model is called with, in the mode it is in: a tensor, a tuple of
            arguments, a dictionary of keyword arguments; or a function of the model, such as
            `lambda model: loss(model, batch)`.

    Raises:
        ValueError: for a pattern that matches no parameter, an unknown role, a view that does not
            fit, a model without parameters, an example that the model raises for.

    Warns if nothing or almost nothing (less than a tenth of what is neither embedding nor head)
    would get a matrix update.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    >>> [(row.name, row.role) for row in roles(model)][::2]
    [('0.weight', 'hidden'), ('2.weight', 'hidden'), ('3.weight', 'head')]
    >>> roles(model)["3.weight"].reason
    "Linear, the model's output, as the layer registered last, a guess"
    >>> roles(model, example=torch.randn(2, 8))["3.weight"].reason
    "Linear, the model's output"
    >>> roles(model, {"3.weight": "hidden"})["3.weight"].reason
    "override '3.weight'"
    """
    table = all_roles(model, overrides, example=example)
    _warn_if_hardly_any(table)
    return table


def all_roles(
    model: nn.Module,
    overrides: Mapping[str, Override] | None = None,
    *,
    example: Any = None,
    like: RoleTable | None = None,
) -> RoleTable:
    """Return the same without a warning: for what is no optimizer of matrices.

    `like` is such a table of the same model at another size, made with an example.
    """
    model = cast(nn.Module, getattr(model, "_orig_mod", model))
    overrides = dict(overrides or {})
    if lazy := [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]:
        raise ValueError(
            f"got {lazy[0]} without a shape, of a lazy module; expected one that was called"
        )
    flow = None if example is None else follow(model, example)
    aliases = _aliases(model)
    table = RoleTable(tuple(_rows(model, overrides, flow, aliases, like)))
    if not len(table):
        raise ValueError(f"got a {type(model).__name__} without parameters, expected some")
    _check_patterns(overrides, aliases, table)
    return table


def roles_in_loss(
    model: nn.Module, loss: Callable[[Any, Any], Any], batch: Any, **overrides: Any
) -> RoleTable:
    """Return the roles by one evaluation of `loss(model, batch)`.

    Where that cannot be followed, names and types decide, and every reason that is a guess tells
    why it was left at that.
    """
    try:
        return all_roles(model, **overrides, example=lambda called: loss(called, batch))
    except NotFollowed as error:
        cause = f" ({type(error.__cause__).__name__} in the forward pass)"
        return RoleTable(
            [
                replace(row, reason=row.reason + cause) if row.guessed else row
                for row in all_roles(model, **overrides)
            ]
        )


def _rows(
    model: nn.Module,
    overrides: Mapping[str, Override],
    flow: Dataflow | None,
    aliases: Mapping[int, list[str]],
    like: RoleTable | None,
) -> Iterator[ParameterRole]:
    heads, choosing = guessed_heads(model), routers(model)
    shown = {} if like is None else _by_name(like)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        names = aliases[id(parameter)]
        answer = first = guess(name, parameter, model)
        path = plain_name(name).rpartition(".")[0]
        owner = id(model.get_submodule(path))
        if flow is not None:
            answer = judge(number, name, parameter, answer, flow)
            # The layer registered last is no head where the same weight is the encoder too.
            named = owner in heads and not (LAST in heads[owner] and is_turned(number, flow))
            answer = _placed(number, name, path, answer, flow, model, named)
            if answer.role == "head" and number in flow.read and not answer.layer:  # tied by hand
                answer = replace(answer, role="embedding", reason=READ)
        if owner in choosing and answer.view is not None and answer.role != "embedding":
            reason = f"{_kind(answer)}, {choosing[owner]}"
            answer = replace(answer, role="head", reason=reason)
        elif owner in heads and answer.guessed and answer.role in _MAY_BE_HEADS:
            kind, stated = _kind(answer), heads[owner]
            reason = f"{kind} {stated}" if stated.startswith("named") else f"{kind}, {stated}"
            certain = stated == STATED and flow is None
            answer = replace(answer, role="head", reason=reason, guessed=not certain)
        if (other := shown.get(name) or shown.get(_family(name))) is not None:
            answer = at_size(tuple(parameter.shape), first, other)
        role, view, reason = answer.role, answer.view, answer.reason
        by_example = view != first.view and not answer.guessed
        guessed, axes_known = answer.guessed, answer.axes_known
        pattern = next((p for p in overrides if any(fnmatchcase(n, p) for n in names)), None)
        if pattern is not None:
            role, view = _overridden(name, parameter, role, view, overrides[pattern])
            reason, guessed, axes_known = f"override {pattern!r}", False, True
        else:
            reason += "" if flow is None else notes(number, answer, flow)
            if guessed:
                unused = flow is not None and number not in flow.layers
                reason += ", a guess: the example does not use it" if unused else ", a guess"
            if len(names) > 1:
                reason += f"; tied to {', '.join(names[1:])}"
                if role in ("hidden", "head"):  # the embedding came second
                    role = "embedding" if _is_embedding_too(model, names) else role
        kinds = attention_kinds(name, role, view)
        row = ParameterRole(name, parameter, role, view, reason, kinds, guessed, axes_known)
        yield replace(row, by_example=by_example and pattern is None)


def _kind(answer: Guess) -> str:
    """The reason as it begins, with the layer or how it is multiplied."""
    return (
        answer.reason if answer.reason.startswith("multiplied") else answer.reason.partition(",")[0]
    )


def _family(name: str) -> str:
    """The name without the numbers of layers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _by_name(table: RoleTable) -> dict[str, ParameterRole]:
    """The rows by name, and by name without the numbers of layers."""
    return {key: row for row in table for key in (_family(row.name), row.name)}


def at_size(shape: tuple[int, ...], guess: Guess, other: ParameterRole) -> Guess:
    """Return what an example showed of the same parameter at another size."""
    view, before = other.view, tuple(other.parameter.shape)
    reason = other.reason.partition(", a guess")[0]
    known = replace(guess, role=other.role, reason=reason, guessed=other.guessed)
    known = replace(known, axes_known=other.axes_known)
    if view is None or guess.view is None or len(shape) < 2:
        return replace(known, view=None if view is None else guess.view)
    if guess.layer:
        now = guess.view._replace(splits=())
    else:
        trailing = [math.prod(before[i:]) for i in range(1, len(before))]
        if view.columns not in trailing:
            return replace(known, view=guess.view)
        columns = math.prod(shape[1 + trailing.index(view.columns) :])
        rows = math.prod(shape) // (view.batch * columns)
        now = MatrixView(view.batch, rows, columns, view.transposed)
    if view.is_interleaved:
        return replace(known, view=now._replace(splits=view.splits))
    sizes = [size * now.outputs for size in view.splits]
    if any(size % view.outputs for size in sizes):
        return replace(known, view=now)
    return replace(known, view=now._replace(splits=tuple(s // view.outputs for s in sizes)))


def _placed(
    number: int, name: str, path: str, answer: Guess, flow: Dataflow, model: nn.Module, named: bool
) -> Guess:
    """What was seen of where the result of a layer goes."""
    if number not in flow.layers:
        return answer
    if is_output(number, name, answer, flow, named):
        return replace(answer, role="head", reason=f"{_kind(answer)}, {STATED}")
    if chooses(number, model, path, flow):
        return replace(answer, role="head", reason=f"{answer.reason}, a router")
    return answer


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, the first one first."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return aliases


def _is_embedding_too(model: nn.Module, names: list[str]) -> bool:
    owners = (model.get_submodule(name.rpartition(".")[0]) for name in names)
    return any(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in owners)


def _overridden(
    name: str, parameter: Tensor, guess: Role, view: MatrixView | None, choice: Override
) -> tuple[Role, MatrixView | None]:
    """Role and view as the user wants them; a role keeps what is known of the layout."""
    shape = tuple(parameter.shape)
    if isinstance(choice, MatrixView):
        choice.check(shape)
        return "hidden", choice
    if choice == "transposed":  # and of the same role, if that is or may be a matrix
        role: Role = guess if guess in ("experts", "head") else "hidden"
        return role, (view or MatrixView.of(shape))._replace(transposed=True, splits=())
    if choice not in get_args(Role):
        raise ValueError(
            f'got {choice!r} for {name!r}, expected a MatrixView, "transposed" or one of '
            f"{get_args(Role)}"
        )
    if choice not in MATRIX_ROLES:
        return choice, view
    if len(shape) < 2:
        raise ValueError(
            f"got role {choice!r} for {name!r} of shape {shape}, which is no matrix; "
            'expected "vector", "embedding" or "head", or a narrower pattern'
        )
    if choice == "experts":
        known = view is not None and view.batch == shape[0]
        return choice, view if known else MatrixView.of(shape, batch=shape[0])
    view = view or MatrixView.of(shape)
    if choice != "qkv":
        return choice, view._replace(splits=())
    view = view if view.splits else view._replace(splits=(view.outputs // 3,) * 3)
    view.check(shape)
    return choice, view


def _check_patterns(
    overrides: Mapping[str, object], aliases: Mapping[int, list[str]], table: RoleTable
) -> None:
    names = [name for group in aliases.values() for name in group]
    for pattern in overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = _similar(pattern, table)
            raise ValueError(f"got the override {pattern!r}, which matches no parameter{close}")


def _similar(name: str, table: RoleTable) -> str:
    close = difflib.get_close_matches(name, [row.name for row in table], n=3, cutoff=0.4)
    return f"; similar names: {', '.join(close)}" if close else ""


def _warn_if_hardly_any(table: RoleTable) -> None:
    matrix = sum(row.parameter.numel() for row in table.matrices)
    vectors = sum(row.parameter.numel() for row in table.others if row.role == "vector")
    if matrix == 0 or matrix < 0.1 * (matrix + vectors):
        amount = f"only {matrix:,}" if matrix else "none"
        warnings.warn(
            f"{amount} of the {matrix + vectors:,} entries outside embeddings and heads would get "
            "a matrix update; print steepest.roles(model) for the reasons, and override by name "
            "what was taken for something else",
            UserWarning,
            stacklevel=3,
        )
