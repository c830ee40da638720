"""What each parameter of a model does, and hence which parameters a matrix norm is meant for.

Module types decide first, names second, shapes last; every choice can be overridden by a name
pattern. Each row of the table gives its reason.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args, overload

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from steepest.matrix_view import MatrixView

Role = Literal["hidden", "conv", "qkv", "experts", "embedding", "head", "vector"]
MATRIX_ROLES: tuple[Role, ...] = ("hidden", "conv", "qkv", "experts")

_HEAD = re.compile(
    r"(?<!pre_)(?<![^\W_])(lm_?head|head|classifier|embed_out|unembed\w*|score|output_layer)$"
)
_EMBEDDING = re.compile(r"(^|[._])(\w*emb(ed\w*|edding\w*)?s?|wte|wpe|pos|\w*_token|query_tokens)$")
_QKV = re.compile(r"(^|[._])(\w*qkv\w*|c_attn)$", re.IGNORECASE)
_QUERY_KEY_VALUE = re.compile(
    r"(^|[.])(w|to_)?_?(?P<kind>q|k|v|query|queries|keys?|values?)(_proj|_lin|_layer|_weight)?$",
    re.IGNORECASE,
)
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_ADAPTER = re.compile(r"(^|[._])lora_(embedding_)?[AB]\b")
_BIAS = re.compile(r"(^|_)bias(es|_table)?$")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")


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

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter is meant for an update in a matrix norm."""
        return self.role in MATRIX_ROLES


class RoleTable(Sequence[ParameterRole]):
    """The roles of all parameters of a model, in its own order; tied parameters appear once.

    It is a sequence of `ParameterRole`, prints as a table, and can be given to any optimizer of
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

    def __rich__(self) -> Table:
        """Return the table for `rich`."""
        total = sum(row.parameter.numel() for row in self)
        matrix = sum(row.parameter.numel() for row in self.matrices)
        share = f"{matrix / total:.0%}" if total else "none"
        table = Table(
            caption=f"{matrix:,} of {total:,} entries ({share}) get a matrix update",
            caption_justify="left",
        )
        for title in ("parameter", "shape", "role", "matrices (out, in)", "reason"):
            table.add_column(title, overflow="fold")
        for row in self:
            shape = " x ".join(map(str, row.parameter.shape)) or "scalar"
            style = None if row.is_matrix else "dim"
            view = str(row.view) if row.is_matrix else "-"
            table.add_row(row.name, shape, row.role, view, row.reason, style=style)
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def roles(model: nn.Module, overrides: Mapping[str, Role | MatrixView] | None = None) -> RoleTable:
    """Find out what each parameter of `model` is.

    | role      | what                                                      | update |
    |-----------|-----------------------------------------------------------|--------|
    | hidden    | weight of a linear, recurrent or attention layer           | matrix |
    | conv      | convolution, seen as `(out, in * kh * kw)` for each group | matrix |
    | qkv       | fused query, key, value: three matrices                   | matrix |
    | experts   | `(experts, out, in)`: one matrix for each expert          | matrix |
    | embedding | embedding table, position, class token; also if tied      | other  |
    | head      | the layer that gives the output                           | other  |
    | vector    | bias, norm gain, anything with a single row or column     | other  |

    Args:
        model: any module; `torch.compile`d ones too. Nothing is changed or run.
        overrides: from a name pattern (`"*.proj.weight"`, as in `fnmatch`) to a role or to a
            `MatrixView`; the first pattern that matches a parameter decides.

    Raises:
        ValueError: for a pattern that matches no parameter, an unknown role, a view that does not
            fit, a model without parameters.

    Warns if nothing or almost nothing (less than a tenth of what is neither embedding nor head)
    would get a matrix update.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    >>> [(row.name, row.role) for row in roles(model)][::2]
    [('0.weight', 'hidden'), ('2.weight', 'hidden'), ('3.weight', 'head')]
    >>> roles(model, {"3.weight": "hidden"})["3.weight"].reason
    "override '3.weight'"
    """
    model = cast(nn.Module, getattr(model, "_orig_mod", model))
    overrides = dict(overrides or {})
    rows: list[ParameterRole] = []
    aliases = _aliases(model)
    head = _head_module(model)
    for module_name, module in model.named_modules():
        parent = model.get_submodule(module_name.rpartition(".")[0])
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}".lstrip(".")
            names = aliases[id(parameter)]
            if name != names[0]:
                continue
            role, view, reason = _classify(name, parameter, module, parent, module is head)
            pattern = next((p for p in overrides if any(fnmatchcase(n, p) for n in names)), None)
            if pattern is not None:
                shape = tuple(parameter.shape)
                role, view = _overridden(name, shape, view, overrides[pattern])
                reason = f"override {pattern!r}"
            elif len(names) > 1:
                reason += f"; tied to {', '.join(names[1:])}"
                if role in ("hidden", "head"):  # the embedding came second
                    role = "embedding" if _is_embedding_too(model, names) else role
            attention = _attention(name, role, view)
            rows.append(ParameterRole(name, parameter, role, view, reason, attention))
    if not rows:
        raise ValueError(f"got a {type(model).__name__} without parameters, expected some")
    table = RoleTable(rows)
    _check_patterns(overrides, aliases, table)
    _warn_if_hardly_any(table)
    return table


def _classify(
    name: str, parameter: Tensor, module: nn.Module, parent: nn.Module, is_head: bool
) -> tuple[Role, MatrixView | None, str]:
    """Role, view and reason: by module type, then by name, then by shape."""
    kind = type(module).__name__
    last = name.rpartition(".")[2]
    shape = tuple(parameter.shape)
    if parameter.ndim < 2 or parameter.numel() == 0:
        return "vector", None, f"{parameter.ndim}-dimensional"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) or _BIAS.search(last):
        return "vector", None, f"{kind} {'bias' if _BIAS.search(last) else 'gain'}"

    view: MatrixView | None
    role: Role
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding", MatrixView.of(shape), kind
    if isinstance(module, nn.modules.conv._ConvNd):
        role, reason = "conv", kind if module.groups == 1 else f"{kind}, {module.groups} groups"
        flat = (shape[0], math.prod(shape[1:]))  # a three-dimensional shape would mean experts
        view = MatrixView.of(flat, batch=module.groups, transposed=module.transposed)
    elif isinstance(module, nn.MultiheadAttention) and last == "in_proj_weight":
        role, reason = "qkv", kind
        view = MatrixView.of(shape, splits=(shape[0] // 3,) * 3)
    elif isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1) if "weight_hr" not in last else 1
        role, reason = "hidden", f"{kind}, {gates} gate{'s' * (gates > 1)}"
        view = MatrixView.of(shape, splits=(shape[0] // gates,) * gates if gates > 1 else ())
    elif isinstance(module, nn.Linear) or (kind == "Conv1D" and hasattr(module, "nf")):
        transposed = not isinstance(module, nn.Linear)
        role, view, reason = _linear(name, shape, transposed, parent, is_head, kind)
    else:
        role, view, reason = _bare(name, shape, kind)
    if view is not None and view.is_vector and role in MATRIX_ROLES:
        return "vector", view, f"{reason}: a single row or column"
    return role, view, reason


def _linear(
    name: str, shape: tuple[int, ...], transposed: bool, parent: nn.Module, is_head: bool, kind: str
) -> tuple[Role, MatrixView, str]:
    layer = name.rpartition(".")[0]
    view = MatrixView.of(shape, transposed=transposed)
    if is_head:
        return "head", view, f"{kind}, the model's output"
    if _HEAD.search(layer.rpartition(".")[2]):
        return "head", view, f"{kind} named {layer!r}"
    if _QKV.search(layer) or "query_key_value" in layer:  # the latter interleaves heads
        splits = () if "query_key_value" in layer else _qkv_splits(view, parent)
        if splits:
            return "qkv", view._replace(splits=splits), f"{kind} named {layer!r}"
        reason = f"{kind}; rows of query, key, value unknown: one matrix, override with a view"
        return "hidden", view, reason
    return "hidden", view, kind


def _qkv_splits(view: MatrixView, attention: nn.Module) -> tuple[int, ...]:
    """Sizes of query, key and value from the attention module or its config, or a third each."""
    sources = (attention, getattr(attention, "config", None))

    def look_up(names: tuple[str, ...]) -> int | None:
        found = [getattr(s, n, None) for s in sources for n in names]
        return next((n for n in found if isinstance(n, int)), None)

    heads, kv_heads, size = look_up(_HEADS), look_up(_KV_HEADS), look_up(("head_dim", "head_size"))
    if heads and kv_heads:
        size = size or view.inputs // heads
        splits = (heads * size, kv_heads * size, kv_heads * size)
        return splits if sum(splits) == view.outputs else ()
    return (view.outputs // 3,) * 3 if view.outputs == 3 * view.inputs else ()


def _attention(name: str, role: Role, view: MatrixView | None) -> tuple[str, ...]:
    """Which of query, key and value the matrices are, if any."""
    if view is None or view.batch != 1:
        return ()
    if role == "qkv" and len(view.splits) == 3:
        return ("q", "k", "v")
    match = _QUERY_KEY_VALUE.search(name.removesuffix("weight").rstrip("._"))
    return (match["kind"][0].lower(),) if match and role == "hidden" and not view.splits else ()


def _bare(name: str, shape: tuple[int, ...], kind: str) -> tuple[Role, MatrixView | None, str]:
    """Judge a parameter of an unknown module by its name and shape."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    if _EMBEDDING.search(last) or "lora_embedding" in name:
        return "embedding", MatrixView.of(shape), f"named {last!r}"
    if _HEAD.search(last):
        return "head", MatrixView.of(shape), f"named {last!r}"
    if len(shape) == 2:
        return "hidden", MatrixView.of(shape), f"matrix of {kind}"
    if len(shape) == 3:
        why = "named as" if _EXPERTS.search(f"{name} {kind}") else "3-dimensional, taken for"
        return "experts", MatrixView.of(shape, batch=shape[0]), f"{why} experts of {kind}"
    return "vector", None, f"{len(shape)}-dimensional parameter of {kind}: no view known"


def _head_module(model: nn.Module) -> nn.Module | None:
    """The output layer: what the model says, what is named so, or its last linear layer."""
    try:  # Hugging Face's models know
        stated = cast(Any, model).get_output_embeddings()
    except (NotImplementedError, AttributeError):
        stated = None
    if isinstance(stated, nn.Module):
        return stated
    linear = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not _ADAPTER.search(n)
    ]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if any(id(m.weight) in tables or (n and _HEAD.search(n.rpartition(".")[2])) for n, m in linear):
        return None  # found by its name, or as tied to an embedding
    if not linear:
        return None
    name, last = linear[-1]
    parts = name.split(".")
    ancestors = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    inside = (nn.ModuleList, nn.MultiheadAttention, nn.TransformerEncoderLayer)
    alone = isinstance(model, nn.Linear)
    return None if alone or any(isinstance(a, inside) for a in ancestors) else last


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
    name: str, shape: tuple[int, ...], view: MatrixView | None, choice: Role | MatrixView
) -> tuple[Role, MatrixView | None]:
    """Role and view as the user wants them; a role keeps what is known of the layout."""
    if isinstance(choice, MatrixView):
        choice.check(shape)
        return "hidden", choice
    if choice not in get_args(Role):
        raise ValueError(
            f"got {choice!r} for {name!r}, expected a MatrixView or one of {get_args(Role)}"
        )
    if choice not in MATRIX_ROLES:
        return choice, view
    if len(shape) < 2:
        raise ValueError(
            f"got role {choice!r} for {name!r} of shape {shape}, which is no matrix; "
            'expected "vector", "embedding" or "head", or a narrower pattern'
        )
    if choice == "experts":
        return choice, MatrixView.of(shape, batch=shape[0])
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
