"""The attention scale, 1/d in place of 1/sqrt(d), folded into weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from torch import Tensor, nn

from steepest.model.attention_sizes import HEAD_SIZE, HEADS, WIDTH, first_size
from steepest.model.matrix_view import MatrixView
from steepest.parametrize.dimensions import Blueprint, Growth
from steepest.parametrize.multipliers import Folds, add, own_parameters

HeadSize = Callable[[nn.Module], int]
_FUSED = re.compile(r"(qkv|c_attn$|query_key_value$|in_proj_weight$)", re.IGNORECASE)
_QUERY_NORM = re.compile(r"^(q|query)_?(norm|layer_?norm|ln)$", re.IGNORECASE)
_IN_A_NORM = "in the gain of a norm of queries"
_OF_QUERIES, _OF_BOTH = {"q", "qk", "query"}, {"qk", "k", "key"}  # parts of the name of a norm
_OF_TORCH = (
    "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
    "in_proj_bias", "bias_k", "bias_v",
)  # fmt: skip


def fold_attention(multipliers: Folds, growth: Growth, head_size: HeadSize | None) -> None:
    """Turn 1/sqrt(d) into 1/d, relative to the base: logits times sqrt(d_base / d)."""
    model, seen = growth.target.model, set()
    for row in growth.target.table:
        path, _, last = row.name.rpartition(".")
        bare = last != "weight"  # a parameter of the attention module itself
        layer = row.name if bare else path
        attention, _, own = layer.rpartition(".")
        fused = bool(_FUSED.search(own))
        if row.parameter.ndim < 2 or not (fused or row.attention == ("q",)):
            continue
        # With a key of another size torch has three weights, and still one bias.
        fused |= isinstance(model.get_submodule(attention), nn.MultiheadAttention)
        seen.add(attention)
        before = growth.counterparts[row.name][0].removesuffix(row.name[len(attention) :])
        now, then = (
            _head_size(blueprint, where, head_size, None if fused else blueprint[name].view)
            for blueprint, where, name in (
                (growth.target, attention, row.name),
                (growth.base, before, growth.counterparts[row.name][0]),
            )
        )
        if now is None or then is None:
            if growth.sizes[row.name].fan_out == 1:
                continue
            raise ValueError(
                f"got {row.name}, which grows, and no size of its attention heads in "
                f"{attention or 'the model'} or model.config; expected head_size=, such as "
                "`lambda model: model.width // model.heads` (or `lambda model: 1` if the model "
                "scales its logits with 1/d itself)"
            )
        scale = math.sqrt(then / now)
        if scale == 1:
            continue
        reason = f"attention 1/d: logits x {scale:.4g}"
        norms = _query_norms(model.get_submodule(attention))
        if norms:  # they would undo what comes before them
            for norm in norms:
                _fold_norm(multipliers, model, _join(attention, norm), scale, reason)
        elif fused:
            _fold_fused(multipliers, model, row.name, attention, scale, reason)
        else:
            add(multipliers, [row.name] if bare else own_parameters(model, path), scale, reason)
    if head_size is None:
        _check_all_seen(growth, seen)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_all_seen(growth: Growth, seen: set[str]) -> None:
    """Raise for an attention module that grows and has no query known by its name."""
    for path, module in growth.target.model.named_modules():
        layers = [
            name
            for name, size in growth.sizes.items()
            if re.fullmatch(rf"{re.escape(path)}[.]\w+[.]weight", name) and size.kind == "hidden"
        ]
        named_so = re.search("attention|attn", type(module).__name__, re.IGNORECASE)
        if named_so and path not in seen and len(layers) > 1:
            raise ValueError(
                f"got {path}, a {type(module).__name__} in which no query is known by its name "
                f"({', '.join(layers)}), so that the attention scale cannot be found; expected a "
                'layer named "query", "q_proj", "qkv" or alike, or, if logits are scaled with 1/d '
                "already or there are none, head_size=lambda model: 1"
            )


def _fold_fused(
    multipliers: Folds, model: nn.Module, name: str, attention: str, scale: float, reason: str
) -> None:
    """Query, key and value in one parameter have one rate, so all three get sqrt(scale).

    Logits see it twice, and the output layer takes it back from the values: exact.
    """
    root = math.sqrt(scale)
    module = model.get_submodule(attention)
    own = [name, name.removesuffix("weight") + "bias"]
    if isinstance(module, nn.MultiheadAttention):  # also biases of its own as keys and values
        own = [_join(attention, n) for n in _OF_TORCH]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    outputs = [
        _join(attention, n)
        for n, child in module.named_children()
        if isinstance(getattr(child, "weight", None), Tensor)
        and child.weight.ndim == 2
        and _join(attention, f"{n}.weight") != name
    ]
    if len(outputs) != 1:
        raise ValueError(
            f"got {name}, a fused query, key and value, and {len(outputs)} other layers in "
            f"{attention}; expected one, the output layer. Scale the logits with 1/d in the model "
            "itself, and pass head_size=lambda model: 1"
        )
    _check_norms(module, attention, name, outputs[0])
    add(multipliers, [n for n in own if n in parameters], root, f"{reason}, over query and key")
    opposite = f"{reason}, taken back from the values"
    add(multipliers, [f"{outputs[0]}.weight"], 1 / root, opposite, False)


def _check_norms(attention: nn.Module, path: str, name: str, output: str) -> None:
    """Raise for a norm between values and output layer, which undoes what the values get."""
    children = [n for n, _ in attention.named_children()]
    fused, last = (layer.removesuffix(".weight").rpartition(".")[2] for layer in (name, output))
    first = children.index(fused) if fused in children else -1
    for i, (child, module) in enumerate(attention.named_children()):
        between = first < i < children.index(last) or re.search("inner|sub", child)
        if between and type(module).__name__.endswith("Norm"):
            raise ValueError(
                f"got {name}, a fused query, key and value, and the norm {_join(path, child)} "
                "after it, which undoes what is folded into it if it acts on keys or values; scale "
                "the logits with 1/d in the model itself, and pass head_size=lambda model: 1"
            )


def _query_norms(attention: nn.Module) -> list[str]:
    """Names of the norms of queries, also of those inside a norm of queries and keys."""
    norms = []
    for name, child in attention.named_children():
        if isinstance(child, nn.Identity):
            continue
        inside = [n for n, module in child.named_children() if _is_query_norm(n, module)]
        if inside and type(child).__name__.endswith("Norm"):
            norms += [f"{name}.{n}" for n in inside]
        elif _is_query_norm(name, child):
            norms.append(name)
    return norms


def _is_query_norm(name: str, module: nn.Module) -> bool:
    named = bool(_OF_QUERIES & set(name.lower().split("_")))
    return bool(_QUERY_NORM.match(name)) or (named and type(module).__name__.endswith("Norm"))


def _fold_norm(multipliers: Folds, model: nn.Module, path: str, scale: float, reason: str) -> None:
    """Fold the scale into the gain of a norm; into its root if the norm is that of keys too."""
    names = own_parameters(model, path)
    if not names:
        raise ValueError(
            f"got {path}, a norm of queries without a gain, so that the attention scale cannot be "
            "folded into weights; scale the logits with 1/d in the model itself, and pass "
            "head_size=lambda model: 1"
        )
    parts = set(path.rpartition(".")[2].lower().split("_"))
    both = bool(_OF_BOTH & parts)
    add(multipliers, names, math.sqrt(scale) if both else scale, f"{reason}, {_IN_A_NORM}")


def check_gains(model: nn.Module, multipliers: Folds) -> None:
    """Raise for a folded gain that is all zeros: its norm multiplies with 1 + gain."""
    for name, those in multipliers.items():
        of_norm = name.endswith(".weight") and any(_IN_A_NORM in fold.reason for fold in those)
        if of_norm and not model.get_parameter(name).any():
            raise ValueError(
                f"got {name}, a gain of zeros, whose norm multiplies with 1 + gain, so that the "
                "attention scale cannot be folded into it; scale the logits with 1/d in the model "
                "itself, and pass head_size=lambda model: 1"
            )


def _head_size(
    blueprint: Blueprint, attention: str, head_size: HeadSize | None, query: MatrixView | None
) -> int | None:
    """The size of a head: given, or said by the attention module, its config or the model's.

    The heads share the outputs of a query of its own, which need not be as many as the width.
    """
    model = blueprint.model
    if head_size is not None:
        return head_size(model)
    module = model.get_submodule(attention)
    sources = (module, getattr(module, "config", None), getattr(model, "config", None))
    heads = first_size(HEADS, *sources)
    if query is not None and heads is not None and query.outputs % heads == 0:
        return query.outputs // heads
    for source in sources:
        size = first_size(HEAD_SIZE, source)
        if size is not None:
            return size
        width, heads = first_size(WIDTH, source), first_size(HEADS, source)
        if width is not None and heads is not None:
            return width // heads
    return None
