"""Multipliers: of residual branches, attention logits and tied heads.

The first two are folded into weights; the last is a hook.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from steepest.transfer.dimensions import Blueprint, Growth, in_list, pattern_of
from steepest.transfer.rules import ALPHA, Rule, readout_multiplier

# The last layers of the branches of known blocks, by class.
_LLAMA = (("self_attn.o_proj", "mlp.down_proj"),)
BRANCHES: dict[str, tuple[tuple[str, ...], ...]] = {
    "Block": (
        ("attention.output", "mlp.down"),  # of this package
        ("attn.c_proj", "mlp.c_proj"),  # nanoGPT
        ("attn.proj", "mlp.fc2"),  # timm
    ),
    "GPT2Block": (("attn.c_proj", "mlp.c_proj"),),
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "GPTNeoXLayer": (("attention.dense", "mlp.dense_4h_to_h"),),
    "ViTLayer": (("attention.o_proj", "mlp.fc2"), ("attention.output.dense", "output.dense")),
    "BertLayer": (("attention.output.dense", "output.dense"),),
    "TransformerEncoderLayer": (("self_attn.out_proj", "linear2"),),
}  # fmt: skip

HeadSize = Callable[[nn.Module], int]
_FUSED = re.compile(r"(qkv|c_attn$|query_key_value$|in_proj_weight$)", re.IGNORECASE)
_QUERY_NORM = re.compile(r"^(q|query)_?(norm|layer_?norm|ln)$", re.IGNORECASE)
_HEAD_SIZE = ("head_dim", "head_size", "d_head", "d_kv")
_WIDTH = ("hidden_size", "n_embd", "embed_dim", "d_model", "width")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")


@dataclass(frozen=True)
class Fold:
    """A multiplier in front of a parameter, and what it is for.

    `of_output` says whether the output of its layer is that much smaller for it; not where it takes
    back what another one did.
    """

    multiplier: float
    reason: str
    of_output: bool = True


Folds = dict[str, list[Fold]]


def folds(
    growth: Growth, rule: Rule, branches: Sequence[str] | None, head_size: HeadSize | None
) -> Folds:
    """Return the multipliers to fold into parameters of the target.

    Raises:
        ValueError: if the depth grows under a depth rule and the last layers of the residual
            branches are unknown; if the head size is needed and unknown.
    """
    found: Folds = {}
    if rule in ALPHA and growth.lists:
        _fold_branches(found, growth, ALPHA[rule], branches)
    if rule not in ("sp", "ntp"):
        _fold_attention(found, growth, head_size)
    return found


def _add(
    found: Folds, names: Iterable[str], multiplier: float, reason: str, of_output: bool = True
) -> None:
    for name in names:
        found.setdefault(name, []).append(Fold(multiplier, reason, of_output))


def _own(model: nn.Module, path: str) -> list[str]:
    """Names of the parameters that a module has itself."""
    module = model.get_submodule(path)
    return [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]


def _fold_branches(
    found: Folds, growth: Growth, alpha: float, branches: Sequence[str] | None
) -> None:
    model = growth.target.model
    ends = _known_ends(growth) if branches is None else _given_ends(growth, branches)
    for path in ends:
        where = in_list(path, growth.lists)
        if where is None:
            raise ValueError(
                f"got branches that match {path}, which is in no list of layers that grows; "
                f"expected the last layer of every residual branch in {', '.join(growth.lists)}"
            )
        before, now = growth.lists[where]
        reason = f"residual branch x ({now}/{before})^-{alpha:g}"
        _add(found, _own(model, path), (now / before) ** -alpha, reason)


def _known_ends(growth: Growth) -> list[str]:
    model, ends = growth.target.model, []
    for path, block in model.named_modules():
        where = in_list(path, growth.lists)
        if where is None or pattern_of(path, growth.lists) not in (f"{where}.*", "*"):
            continue
        names = {name for name, _ in block.named_modules()}
        known = [each for each in BRANCHES.get(type(block).__name__, ()) if names.issuperset(each)]
        if not known:
            raise ValueError(
                f"got {where} growing from {growth.lists[where][0]} to {growth.lists[where][1]} "
                f"blocks of {type(block).__name__}, whose residual branches are unknown; expected "
                "branches=[...], patterns for the last layer of every branch, such as "
                f'"{where}.*.attention.output". If a branch ends with a norm, name the norm'
            )
        ends += [f"{path}.{end}" for end in known[0]]
    return ends


def _given_ends(growth: Growth, branches: Sequence[str]) -> list[str]:
    if isinstance(branches, str):
        raise ValueError(f"got branches={branches!r}, expected a list of patterns")
    model = growth.target.model
    ends: list[str] = []
    for pattern in branches:
        match = [n for n, _ in model.named_modules() if fnmatchcase(n, pattern) and _own(model, n)]
        if not match:
            raise ValueError(
                f"got the pattern {pattern!r} in branches, which matches no module with parameters "
                "of its own; expected names of modules, such as blocks.*.mlp.down"
            )
        ends += [path for path in match if path not in ends]
    for where in growth.lists:
        members = {in_block.split(".")[0] for in_block in _below(growth.target.shapes, where)}
        covered = {in_block.split(".")[0] for in_block in _below(ends, where)}
        if missing := sorted(members - covered):
            raise ValueError(
                f"got branches that match nothing in {where}.{missing[0]}, expected the last layer "
                "of every residual branch in every block"
            )
    return ends


def _below(names: Iterable[str], where: str) -> list[str]:
    prefix = f"{where}." if where else ""
    return [n.removeprefix(prefix) for n in names if in_list(n, {where: None})]


def _fold_attention(found: Folds, growth: Growth, head_size: HeadSize | None) -> None:
    """Turn 1/sqrt(d) into 1/d, relative to the base: logits times sqrt(d_base / d)."""
    model, seen = growth.target.model, set()
    for row in growth.target.table:
        path, _, last = row.name.rpartition(".")
        bare = last != "weight"  # a parameter of the attention module itself
        layer = row.name if bare else path
        fused = bool(_FUSED.search(layer.rpartition(".")[2]))
        if row.parameter.ndim < 2 or not (fused or row.attention == ("q",)):
            continue
        attention = layer.rpartition(".")[0]
        seen.add(attention)
        before = growth.counterparts[row.name][0].removesuffix(row.name[len(attention) :])
        now, then = (
            _head_size(each, where, head_size, None if fused or bare else layer[len(attention) :])
            for each, where in ((growth.target, attention), (growth.base, before))
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
        norm = next(
            (n for n, _ in model.get_submodule(attention).named_children() if _QUERY_NORM.match(n)),
            None,
        )
        if norm is not None:  # it would undo what comes before it
            _add(found, _norm_gain(model, f"{attention}.{norm}"), scale, reason)
        elif fused:
            _fold_fused(found, model, row.name, attention, scale, reason)
        else:
            _add(found, [row.name] if bare else _own(model, path), scale, reason)
    if head_size is None:
        _check_all_seen(growth, seen)


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
    found: Folds, model: nn.Module, name: str, attention: str, scale: float, reason: str
) -> None:
    """Query, key and value in one parameter have one rate, so all three get sqrt(scale).

    Logits see it twice, and the output layer takes it back from the values: exact.
    """
    root = math.sqrt(scale)
    own = [name, name.removesuffix("weight") + "bias"]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    outputs = [
        f"{attention}.{n}"
        for n, child in model.get_submodule(attention).named_children()
        if isinstance(getattr(child, "weight", None), Tensor)
        and child.weight.ndim == 2
        and f"{attention}.{n}.weight" != name
    ]
    if len(outputs) != 1:
        raise ValueError(
            f"got {name}, a fused query, key and value, and {len(outputs)} other layers in "
            f"{attention}; expected one, the output layer. Scale the logits with 1/d in the model "
            "itself, and pass head_size=lambda model: 1"
        )
    _add(found, [n for n in own if n in parameters], root, f"{reason}, over query and key")
    _add(found, [f"{outputs[0]}.weight"], 1 / root, f"{reason}, taken back from the values", False)


def _norm_gain(model: nn.Module, path: str) -> list[str]:
    names = _own(model, path)
    if not names:
        raise ValueError(
            f"got {path}, a norm of queries without a gain, so that the attention scale cannot be "
            "folded into weights; scale the logits with 1/d in the model itself, and pass "
            "head_size=lambda model: 1"
        )
    return names


def _head_size(
    blueprint: Blueprint, attention: str, given: HeadSize | None, query: str | None
) -> int | None:
    """The size of a head: given, or said by the attention module, its config or the model's.

    Where only the number of heads is said, they share the outputs of the query, if it is a layer.
    """
    model = blueprint.model
    if given is not None:
        return given(model)
    module = model.get_submodule(attention)
    for source in (module, getattr(module, "config", None), getattr(model, "config", None)):
        size = _number(source, _HEAD_SIZE)
        if size is not None:
            return size
        width, heads = _number(source, _WIDTH), _number(source, _HEADS)
        if width is None and heads is not None and query is not None:
            width = _number(model.get_submodule(attention + query), ("out_features",))
        if width is not None and heads is not None:
            return width // heads
    return None


def _number(source: Any, names: tuple[str, ...]) -> int | None:
    values: Mapping[str, Any] = {name: getattr(source, name, None) for name in names}
    return next((v for v in values.values() if isinstance(v, int) and v > 0), None)


class ScaleInput:
    """Multiply the input of a module: a hook, for the head that is tied to the embedding."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the inputs with the first one scaled."""
        return (inputs[0] * self.factor, *inputs[1:])


def tied_heads(model: nn.Module, rule: Rule, grown: Growth) -> dict[str, float]:
    """Return the modules that share the table of an embedding, and the factor on their input."""
    owners: dict[int, list[tuple[str, nn.Module, Tensor]]] = defaultdict(list)
    names = {id(p): name for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners[id(p)].append((path, module, p))
    found = {}
    for key, those in owners.items():
        tables = [path for path, module, _ in those if isinstance(module, nn.Embedding)]
        for path, module, _ in those:
            if tables and not isinstance(module, nn.Embedding):
                factor = readout_multiplier(rule, grown.sizes[names[key]])
                if factor != 1:
                    found[path] = factor
    return found
