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
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args, overload

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from steepest.matrix_view import MatrixView

Role = Literal["hidden", "conv", "qkv", "experts", "embedding", "head", "vector"]
Override = Role | MatrixView | Literal["transposed"]
_Found = tuple[Role, MatrixView | None, str]  # and the reason
MATRIX_ROLES: tuple[Role, ...] = ("hidden", "conv", "qkv", "experts")

_HEAD = re.compile(
    r"(?<!pre_)(?<![qkv]_)(?<![^\W_])(lm_?head|head|classifier|embed_out|unembed\w*|score|output_layer)$"
)
_EMBEDDING = re.compile(
    r"(^|[._])(\w*emb(ed\w*|edding\w*)?s?|wte|wpe|pos|rel_pos_[hw]|positions?(_enc\w*)?"
    r"|\w*_tokens?|latents?(_\w+)?)$"
)
_QKV = re.compile(r"(^|_)(\w*qkv(_?(proj|lin\w*|layer))?|c_attn|query_key_value)$", re.IGNORECASE)
# Known to have the rows of query, key and value by heads or, in CodeGen, by quarters of the heads.
_MIXED = re.compile(r"query_key_value|MiniMaxLightningAttention|CodeGenAttention")
_QUERY_KEY_VALUE = re.compile(
    r"(^|[.])(w|to_)?_?(?P<kind>q|k|v|query|queries|keys?|values?)(_proj|_lin|_layer|_head|_weight)?$",
    re.IGNORECASE,
)
_FEED_FORWARD = re.compile(r"(^|[.])(ffn?|mlp|feed_?forward)[.]")
_GATE_AND_UP = re.compile(r"(^|[._])(gate_?up|w_?i$|w12$|weights_in$|input_linear$)", re.IGNORECASE)
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_PARAMETRIZED = re.compile(r"(^|[.])parametrizations[.](\w+)[.]original\d*$")
_ADAPTER = re.compile(r"(^|[._])lora_(embedding_)?[AB]\b")
_BIAS = re.compile(r"(^|_)(bias(es|_table|_u|_v)?|rpb|shift_table)$")
_ENTRYWISE = re.compile(r"^(A_logs?|(\w+_)?scale)$")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
_HEAD_SIZE = ("head_dim", "head_size", "d_head")


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


def roles(model: nn.Module, overrides: Mapping[str, Override] | None = None) -> RoleTable:
    """Find out what each parameter of `model` is.

    | role      | what                                                      | update |
    |-----------|-----------------------------------------------------------|--------|
    | hidden    | weight of a linear, recurrent or attention layer           | matrix |
    | conv      | convolution, seen as `(out, in * kh * kw)` for each group | matrix |
    | qkv       | fused query, key, value: three matrices                   | matrix |
    | experts   | three-dimensional: one or two matrices for each expert    | matrix |
    | embedding | embedding table, position, class token; also if tied      | other  |
    | head      | the layer that gives the output, and routers to experts   | other  |
    | vector    | bias, norm gain, what acts entry by entry, a single row   | other  |

    Args:
        model: any module; `torch.compile`d ones too. Nothing is changed or run.
        overrides: from a name pattern (`"*.proj.weight"`, as in `fnmatch`) to a role, to
            "transposed" for a matrix stored as (in, out), or to a `MatrixView`; the first pattern
            that matches a parameter decides.

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
    table = all_roles(model, overrides)
    _warn_if_hardly_any(table)
    return table


def all_roles(model: nn.Module, overrides: Mapping[str, Override] | None = None) -> RoleTable:
    """Return the same without a warning: for what is no optimizer of matrices."""
    model = cast(nn.Module, getattr(model, "_orig_mod", model))
    overrides = dict(overrides or {})
    rows: list[ParameterRole] = []
    aliases = _aliases(model)
    heads = _heads(model)
    for name, parameter in model.named_parameters():
        names = aliases[id(parameter)]
        role, view, reason = _classify(name, parameter, model, heads)
        pattern = next((p for p in overrides if any(fnmatchcase(n, p) for n in names)), None)
        if pattern is not None:
            role, view = _overridden(name, parameter, role, view, overrides[pattern])
            reason = f"override {pattern!r}"
        elif len(names) > 1:
            reason += f"; tied to {', '.join(names[1:])}"
            if role in ("hidden", "head"):  # the embedding came second
                role = "embedding" if _is_embedding_too(model, names) else role
        rows += [ParameterRole(name, parameter, role, view, reason, _attention(name, role, view))]
    if not rows:
        raise ValueError(f"got a {type(model).__name__} without parameters, expected some")
    table = RoleTable(rows)
    _check_patterns(overrides, aliases, table)
    return table


def _classify(name: str, parameter: Tensor, model: nn.Module, heads: dict[int, str]) -> _Found:
    """Role, view and reason: by module type, then by name, then by shape."""
    name = _PARAMETRIZED.sub(r"\1\2", name)  # what it was called before, for instance, weight norm
    path, _, last = name.rpartition(".")
    module, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    kind = type(module).__name__
    shape = tuple(parameter.shape)
    if parameter.ndim < 2 or parameter.numel() == 0:
        return "vector", None, f"{parameter.ndim}-dimensional"
    if isinstance(module, nn.LayerNorm) or kind.endswith("Norm") or _BIAS.search(last):
        return "vector", None, f"{kind} {'bias' if _BIAS.search(last) else 'gain'}"

    view: MatrixView | None
    role: Role
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding", MatrixView.of(shape), kind
    if isinstance(module, nn.modules.conv._ConvNd):
        role, reason = "conv", kind if module.groups == 1 else f"{kind}, {module.groups} groups"
        flat = (shape[0], math.prod(shape[1:]))  # a three-dimensional shape would mean experts
        groups = math.gcd(module.groups, shape[0])  # 1 for the gains of a weight norm
        view = MatrixView.of(flat, batch=groups, transposed=module.transposed)
    elif isinstance(module, nn.MultiheadAttention) and last == "in_proj_weight":
        role, reason = "qkv", kind
        view = MatrixView.of(shape, splits=(shape[0] // 3,) * 3)
    elif isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1) if "weight_hr" not in last else 1
        role, reason = "hidden", f"{kind}, {gates} gate{'s' * (gates > 1)}"
        view = MatrixView.of(shape, splits=(shape[0] // gates,) * gates if gates > 1 else ())
    elif isinstance(module, nn.Linear) or (kind == "Conv1D" and hasattr(module, "nf")):
        role, view, reason = _linear(path, shape, module, parent)
    else:
        role, view, reason = _bare(name, shape, module)
    if id(module) in heads:
        return "head", view, f"{kind}, {heads[id(module)]}"
    if view is not None and view.is_vector and role in MATRIX_ROLES:
        return "vector", view, f"{reason}: a single row or column"
    return role, view, reason


def _linear(layer: str, shape: tuple[int, ...], module: nn.Module, parent: nn.Module) -> _Found:
    kind = type(module).__name__
    last = layer.rpartition(".")[2]
    view = MatrixView.of(shape, transposed=not isinstance(module, nn.Linear))
    if _HEAD.search(last):
        return "head", view, f"{kind} named {layer!r}"
    if _QKV.search(last):
        splits = _qkv_splits(last, view, parent)
        if splits:
            return "qkv", view._replace(splits=splits), f"{kind} named {layer!r}"
        reason = f"{kind}; rows of query, key, value mixed or unknown: one matrix"
        return "hidden", view, f"{reason}, override with a view"
    linear = [m for m in parent.children() if isinstance(m, nn.Linear)]
    gated = any((m.out_features, 2 * m.in_features) == (view.inputs, view.outputs) for m in linear)
    if gated and _GATE_AND_UP.search(last):  # one half of its outputs multiplies the other
        return "hidden", view._replace(splits=(view.outputs // 2,) * 2), f"{kind}, gate and up"
    return "hidden", view, kind


def _number(names: tuple[str, ...], module: nn.Module) -> int | None:
    """The first of these that is an integer of the module or, failing that, of its config."""
    found = (getattr(s, n, None) for s in (module, getattr(module, "config", None)) for n in names)
    with suppress(Exception):  # some configs refuse to say what differs between their layers
        return next((n for n in found if isinstance(n, int)), None)
    return None


def _qkv_splits(name: str, view: MatrixView, attention: nn.Module) -> tuple[int, ...]:
    """Sizes of query, key and value from the attention module or its config, or a third each."""
    mixed = _MIXED.search(f"{name} {type(attention).__name__}")
    if mixed or getattr(attention, "multi_query", None) is False:  # the latter in GPTBigCode
        return ()
    key, value = (getattr(attention, each, 0) for each in ("key_dim", "value_dim"))
    if key and 2 * key + value == view.outputs:  # linear attention
        return (key, key, value)
    heads, kv_heads = _number(_HEADS, attention), _number(_KV_HEADS, attention)
    if heads and kv_heads:
        size = _number(_HEAD_SIZE, attention) or view.inputs // heads
        splits = (heads * size, kv_heads * size, kv_heads * size)
        return splits if sum(splits) == view.outputs else ()
    return (view.outputs // 3,) * 3 if view.outputs == 3 * view.inputs else ()


def _attention(name: str, role: Role, view: MatrixView | None) -> tuple[str, ...]:
    """Which of query, key and value the matrices are, if any."""
    if view is None or view.batch != 1 or _FEED_FORWARD.search(name):
        return ()
    if role == "qkv" and len(view.splits) == 3:
        return ("q", "k", "v")
    match = _QUERY_KEY_VALUE.search(name.removesuffix("weight").rstrip("._"))
    return (match["kind"][0].lower(),) if match and role == "hidden" and not view.splits else ()


def _bare(name: str, shape: tuple[int, ...], module: nn.Module) -> _Found:
    """Judge a parameter of an unknown module by its name and shape."""
    kind = type(module).__name__
    last = name.removesuffix(".weight").rpartition(".")[2]
    if _EMBEDDING.search(last) or "lora_embedding" in name:
        return "embedding", MatrixView.of(shape), f"named {last!r}"
    if _HEAD.search(last):
        return "head", MatrixView.of(shape), f"named {last!r}"
    if _ENTRYWISE.match(last) or (last == "D" and hasattr(module, "A_log")):
        return "vector", None, f"{kind}, which acts entry by entry"
    if len(shape) == 2:
        return "hidden", MatrixView.of(shape), f"matrix of {kind}"
    if len(shape) != 3 or max(shape) == math.prod(shape):
        return "vector", None, f"{len(shape)}-dimensional parameter of {kind}: not matrices"
    named = _EXPERTS.search(f"{name} {kind}")
    if shape[0] == 1 and not named:
        return "embedding", MatrixView.of(shape), f"{kind}, one for the whole batch"
    if not named and shape[1:] == (_number(_HEADS, module), _number(_HEAD_SIZE, module)):
        view = MatrixView.of((shape[0], math.prod(shape[1:])), transposed=last != "o")
        return "hidden", view, f"matrix of {kind}, with an axis for the heads"
    view, order = _experts(last, shape, module)
    why = "named as" if named else "3-dimensional, taken for"
    return "experts", view, f"{why} experts of {kind}{order}"


def _experts(last: str, shape: tuple[int, ...], module: nn.Module) -> tuple[MatrixView, str]:
    """View a batch of experts; gate and up are two matrices where their order is known."""
    up, down = (getattr(module, each, None) for each in ("gate_up_proj", "down_proj"))
    transposed = False
    if isinstance(up, Tensor) and isinstance(down, Tensor):
        transposed = up.shape[1:] == (down.shape[2], 2 * down.shape[1])  # (in, 2 x inter)
    view = MatrixView.of(shape, batch=shape[0], transposed=transposed)
    if last != "gate_up_proj":
        return view, ""
    concatenated = getattr(module, "is_concatenated", None)  # stated by transformers
    if concatenated is None:
        return view, "; order of gate and up unknown: one matrix, override with a view"
    return view._replace(splits=(view.outputs // 2 if concatenated else 1,) * 2), ""


def _heads(model: nn.Module) -> dict[int, str]:
    """Why a module is a head, by its identity: the output layer, and routers to experts."""
    found = {id(_head_module(model)): "the model's output"}
    for module in model.modules():
        for name, child in module.named_children():
            if name == "router" or (name in ("gate", "gating") and hasattr(module, "experts")):
                found |= {id(part): "a router" for part in child.modules()}
    return found


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
    name: str, parameter: Tensor, found: Role, view: MatrixView | None, choice: Override
) -> tuple[Role, MatrixView | None]:
    """Role and view as the user wants them; a role keeps what is known of the layout."""
    shape = tuple(parameter.shape)
    if isinstance(choice, MatrixView):
        choice.check(shape)
        return "hidden", choice
    if choice == "transposed":  # and of the same role, if that is or may be a matrix
        role: Role = found if found in ("experts", "head") else "hidden"
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
