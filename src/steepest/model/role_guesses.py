"""What module types, names and shapes say of a parameter, without running the model.

Types decide where they can. All else is a guess, and the reason says so: above all whether a layer
gives the output, and which axis of a bare parameter is the input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, cast

from torch import Tensor, nn

from steepest.model.attention_sizes import HEAD_SIZE, HEADS, KV_HEADS, first_size
from steepest.model.matrix_view import MatrixView

Role = Literal["hidden", "conv", "qkv", "experts", "embedding", "head", "vector"]
STATED = "the model's output"
LAST = "as the layer registered last"
NAMED = "named as experts"
MATRIX_ROLES: tuple[Role, ...] = ("hidden", "conv", "qkv", "experts")

_HEAD = re.compile(
    r"(?<!pre_)(?<![qkv]_)(?<![^\W_])(lm_?head|head|classifier|embed_out|unembed\w*|score|output_layer"
    r"|logits|cls_score|bbox_pred|seq_relationship|qa_outputs|to_?rgb)$",
    re.IGNORECASE,
)
_HEAD_MODULE = re.compile(
    r"^(policy|value|pi|(actor|critic)(_\w+)?|(class|bbox)_embed|\w*heads|outc)$", re.IGNORECASE
)
_OUTPUT = re.compile(
    r"^(out|output|proj_out|final|(final|last)_\w+|(conv|linear|fc|layer)_(out|last))$"
)
_AUXILIARY = re.compile(r"^aux\w*$")
_EMBEDDING = re.compile(
    r"(^|[._])(\w*emb(ed\w*|edding\w*)?s?|wte|wpe|pos|rel_pos_[hw]|positions?(_enc\w*)?"
    r"|rel\w*_(table|pos\w*)|\w*_tokens?|latents?(_\w+)?|codebook|prototypes?)$"
)
_QKV = re.compile(r"(^|_)(\w*qkv(_?(proj|lin\w*|layer))?|c_attn|query_key_value)$", re.IGNORECASE)
_KV = re.compile(r"(^|_)(kv(_?(proj|lin\w*|layer))?|c_attn|(?<!query_)key_value)$", re.IGNORECASE)
# Known to have the rows of query, key and value by heads or, in CodeGen, by quarters of the heads.
_MIXED = re.compile(r"query_key_value|MiniMaxLightningAttention|CodeGenAttention")
_QUERY_KEY_VALUE = re.compile(
    r"(^|[.])(w|to_)?_?(?P<kind>q|k|v|query|queries|keys?|values?)(_proj|_lin|_layer|_head|_weight)?$",
    re.IGNORECASE,
)
_LEAVING = re.compile(r"^(w_?)?o(ut)?(_proj)?$", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"(^|[.])(ffn?|mlp|feed_?forward)[.]")
_GATE_AND_UP = re.compile(
    r"(^|[._])(gate_?up|w_?i$|w12$|w1_w3$|weights_in$|input_linear$|(in|fc1|up|proj)_?(glu|gated)"
    r"|(swi|ge|re)?glu_proj$)",
    re.IGNORECASE,
)
_ROUTER = re.compile(r"^(\w*router|gates?|gating|switch|w_?g(ate)?|w_?noise)$")
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_SECOND = re.compile(r"(^|_)(w2|down\w*|out\w*|fc2|wo)$")
_PARAMETRIZED = re.compile(r"(^|[.])parametrizations[.](\w+)[.]original\d*$")
_ADAPTER = re.compile(r"(^|[._])lora_(embedding_)?[AB]\b")
_ROTATION = re.compile(r"(^|[._])(oft|boft|hra|road|vera|ia3|ln_tuning)_\w+")
_BIAS = re.compile(r"(^|_)(bias(es|_table|_u|_v)?|rpb|shift_table)$")
_ENTRYWISE = re.compile(r"^(A_logs?|(\w+_)?scale)$")
_EXPERT_COUNT = (
    "moe_num_experts", "num_experts", "n_experts", "num_local_experts", "n_routed_experts", "E",
)  # fmt: skip
_SIZES = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("in_dim", "out_dim"),
    ("in_size", "out_size"),
    ("input_dim", "output_dim"),
    ("input_size", "output_size"),
    ("d_in", "d_out"),
    ("nf_in", "nf_out"),
)


@dataclass(frozen=True)
class Guess:
    """What is said of a parameter without running the model.

    Attributes:
        role: without regard to whether its layer gives the output.
        view: how it is a batch of matrices.
        reason: for both.
        guessed: whether names, shapes or order decided any of it.
        layer: whether the type of its module says how it is multiplied.
        axes_known: whether it is known which axis is the input.
    """

    role: Role
    view: MatrixView | None
    reason: str
    guessed: bool = True
    layer: bool = False
    axes_known: bool = True


def guess(name: str, parameter: Tensor, model: nn.Module) -> Guess:
    """Return role, view and reason: by module type, then by name, then by shape."""
    name = plain_name(name)
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    path = path.removesuffix(".base_layer")  # what an adapter is around
    parent = model.get_submodule(path.rpartition(".")[0])
    kind = type(module).__name__
    shape = tuple(parameter.shape)
    if parameter.ndim < 2 or parameter.numel() == 0:
        return Guess("vector", None, f"{parameter.ndim}-dimensional", guessed=False)
    if isinstance(module, nn.LayerNorm) or kind.endswith("Norm"):
        return Guess("vector", None, f"{kind} gain", guessed=False)
    if _BIAS.search(last):
        return Guess("vector", None, f"{kind} bias")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Guess("embedding", MatrixView.of(shape), kind, guessed=False)
    if _ROTATION.search(name):
        return Guess(
            "vector", None, f"{kind}, numbers of an adapter that no input is multiplied by"
        )
    answer = _layer(path, last, shape, module, parent) or _bare(name, shape, module)
    view = answer.view
    if view is not None and view.is_vector and answer.role in MATRIX_ROLES:
        return replace(answer, role="vector", reason=f"{answer.reason}: a single row or column")
    return answer


def plain_name(name: str) -> str:
    """Return what a parameter was called before it was parametrized, as by weight norm."""
    return _PARAMETRIZED.sub(r"\1\2", name)


def is_qkv(name: str) -> bool:
    """Whether a weight is named as a fused query, key and value."""
    layer = plain_name(name).rpartition(".")[0].removesuffix(".base_layer")
    return _QKV.search(layer.rpartition(".")[2]) is not None


def is_layer(module: nn.Module) -> bool:
    """Whether the type of a module says how its weights are multiplied."""
    types = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    return isinstance(module, (*types, nn.RNNBase, nn.RNNCellBase)) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _layer(
    path: str, last: str, shape: tuple[int, ...], module: nn.Module, parent: nn.Module
) -> Guess | None:
    """Judge a weight of a module whose type says how it is multiplied."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvNd):
        reason = kind if module.groups == 1 else f"{kind}, {module.groups} groups"
        flat = (shape[0], math.prod(shape[1:]))  # a three-dimensional shape would mean experts
        groups = math.gcd(module.groups, shape[0])  # 1 for the gains of a weight norm
        view = MatrixView.of(flat, batch=groups, transposed=module.transposed)
        return Guess("conv", view, reason, layer=True)
    if isinstance(module, nn.MultiheadAttention) and last == "in_proj_weight":
        view = MatrixView.of(shape, splits=(shape[0] // 3,) * 3)
        return Guess("qkv", view, kind, guessed=False, layer=True)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        mode = module.mode if isinstance(module, nn.RNNBase) else kind.removesuffix("Cell")
        gates = {"LSTM": 4, "GRU": 3}.get(str(mode), 1) if "weight_hr" not in last else 1
        view = MatrixView.of(shape, splits=(shape[0] // gates,) * gates if gates > 1 else ())
        reason = f"{kind}, {gates} gate{'s' * (gates > 1)}"
        return Guess("hidden", view, reason, guessed=False, layer=True)
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        return _linear(path, shape, module, parent)
    return None


def _linear(path: str, shape: tuple[int, ...], module: nn.Module, parent: nn.Module) -> Guess:
    kind = type(module).__name__
    last = path.rpartition(".")[2]
    view = MatrixView.of(shape, transposed=not isinstance(module, nn.Linear))
    hidden = Guess("hidden", view, kind, layer=True)
    splits = _qkv_splits(last, view, parent) if _QKV.search(last) else ()
    if splits:
        split = view._replace(splits=splits)
        return replace(hidden, role="qkv", view=split, reason=f"{kind} named {path!r}")
    if _KV.search(last) and view.outputs == 2 * view.inputs:
        halves = view._replace(splits=(view.outputs // 2,) * 2)
        return replace(hidden, view=halves, reason=f"{kind} named {path!r}, key and value")
    if _QKV.search(last):
        reason = f"{kind}; rows of query, key, value mixed or unknown: one matrix"
        return replace(hidden, reason=f"{reason}, override with a view")
    linear = [m for m in parent.children() if isinstance(m, nn.Linear)]
    gated = any((m.out_features, 2 * m.in_features) == (view.inputs, view.outputs) for m in linear)
    if gated and _GATE_AND_UP.search(last):  # one half of its outputs multiplies the other
        halves = view._replace(splits=(view.outputs // 2,) * 2)
        return replace(hidden, view=halves, reason=f"{kind}, gate and up")
    if hasattr(parent, "A_log") and last in ("in_proj", "x_proj", "in_proj_qkvz", "in_proj_ba"):
        return replace(hidden, reason=f"{kind}, several projections of a state space as one matrix")
    return hidden


def _number(names: tuple[str, ...], module: nn.Module) -> int | None:
    """The first of these that is an integer of the module or, failing that, of its config."""
    return first_size(names, module, getattr(module, "config", None), getattr(module, "cfg", None))


def _qkv_splits(name: str, view: MatrixView, attention: nn.Module) -> tuple[int, ...]:
    """Sizes of query, key and value from the attention module or its config, or a third each."""
    mixed = _MIXED.search(f"{name} {type(attention).__name__}")
    if mixed or getattr(attention, "multi_query", None) is False:  # the latter in GPTBigCode
        return ()
    key, value = (getattr(attention, size, 0) for size in ("key_dim", "value_dim"))
    if key and 2 * key + value == view.outputs:  # linear attention
        return (key, key, value)
    heads, kv_heads = _number(HEADS, attention), _number(KV_HEADS, attention)
    if heads and kv_heads:
        size = _number(HEAD_SIZE, attention) or view.inputs // heads
        splits = (heads * size, kv_heads * size, kv_heads * size)
        return splits if sum(splits) == view.outputs else ()
    return (view.outputs // 3,) * 3 if view.outputs == 3 * view.inputs else ()


def attention_kinds(name: str, role: Role, view: MatrixView | None) -> tuple[str, ...]:
    """Return which of query, key and value the matrices are, if any."""
    if view is None or view.batch != 1 or _FEED_FORWARD.search(name):
        return ()
    if len(view.splits) == 3 and (role == "qkv" or (role == "hidden" and is_qkv(name))):
        return ("q", "k", "v")
    layer = name.removesuffix("weight").rstrip("._")
    if role == "hidden" and len(view.splits) == 2 and _KV.search(layer.rpartition(".")[2]):
        return ("k", "v")
    match = _QUERY_KEY_VALUE.search(layer)
    return (match["kind"][0].lower(),) if match and role == "hidden" and not view.splits else ()


def _bare(name: str, shape: tuple[int, ...], module: nn.Module) -> Guess:
    """Judge a parameter of an unknown module by its name and shape."""
    kind = type(module).__name__
    last = name.removesuffix(".weight").rpartition(".")[2]
    if _EMBEDDING.search(last) or "lora_embedding" in name:
        return Guess("embedding", MatrixView.of(shape), f"named {last!r}")
    if _HEAD.search(last):
        return Guess("head", MatrixView.of(shape), f"named {last!r}")
    if _ENTRYWISE.match(last) or (last == "D" and hasattr(module, "A_log")):
        return Guess("vector", None, f"{kind}, which acts entry by entry")
    if len(shape) == 2:
        return _bare_matrix(name, shape, module)
    if len(shape) != 3 or max(shape) == math.prod(shape):
        return Guess("vector", None, f"{len(shape)}-dimensional parameter of {kind}: not matrices")
    named = _EXPERTS.search(f"{name} {kind}")
    if shape[0] == 1 and not named:
        return Guess("embedding", MatrixView.of(shape), f"{kind}, one for the whole batch")
    if not named and shape[1:] == (_number(HEADS, module), _number(HEAD_SIZE, module)):
        view = MatrixView.of((shape[0], math.prod(shape[1:])), transposed=last != "o")
        return Guess("hidden", view, f"matrix of {kind}, with an axis for the heads")
    if not named and (heads := _heads(last, shape, module)) is not None:
        return heads
    view, order = _experts(last, shape, module)
    why = NAMED if named else "3-dimensional, taken for experts or heads"
    return Guess("experts", view, f"{why} of {kind}{order}")


def _heads(last: str, shape: tuple[int, ...], module: nn.Module) -> Guess | None:
    """Judge (heads, in, head size), or the two turned, by its name; the size is the smaller side.

    Results of heads lie side by side, and all of them go into the projection that follows.
    """
    kind, leaving = type(module).__name__, _LEAVING.match(last) is not None
    if not (leaving or _QUERY_KEY_VALUE.search(last)):
        return None
    if (_number(HEADS, module) or shape[0]) != shape[0]:
        return None
    size = _number(HEAD_SIZE, module) or min(shape[1:])
    reason = f"matrix of {kind}, with an axis for the heads"
    if leaving and shape[1] == size:
        return Guess("hidden", MatrixView.of((shape[0] * size, shape[2]), transposed=True), reason)
    transposed = (shape[2] == size) != leaving
    view = MatrixView.of(shape, batch=shape[0], transposed=transposed)
    reason = f"{shape[0]} matrices of {kind}, one for each head"
    return Guess("hidden", view, reason, axes_known=shape[1] != shape[2])


def _bare_matrix(name: str, shape: tuple[int, ...], module: nn.Module) -> Guess:
    """Judge a parameter of two axes: of several experts, and which axis is the input."""
    kind = type(module).__name__
    last = name.rpartition(".")[2]
    router = _ROUTER.match(last) and _expert_count(module) in shape
    if router:
        return Guess("head", MatrixView.of(shape), f"{kind}, a router")
    count = _number(_EXPERT_COUNT, module)
    if count and count > 1 and shape[0] % count == 0 and _EXPERTS.search(f"{name} {kind}"):
        transposed = _SECOND.search(last) is not None
        view = MatrixView(count, shape[0] // count, shape[1], transposed)
        return Guess("experts", view, f"matrix of {kind}, taken for {count} experts in its rows")
    view = MatrixView.of(shape)
    if shape[0] == shape[1]:
        return Guess("hidden", view, f"matrix of {kind}, read as (out, in)", axes_known=False)
    for entering, leaving in _SIZES:
        sizes = getattr(module, entering, None), getattr(module, leaving, None)
        if shape in (sizes, sizes[::-1]):
            stored = f"({entering}, {leaving})" if shape == sizes else f"({leaving}, {entering})"
            view = view._replace(transposed=shape == sizes)
            return Guess("hidden", view, f"matrix of {kind}, {stored}")
    biases = {
        p.numel() for n, p in module.named_parameters(recurse=False) if p.ndim == 1 and "bias" in n
    }
    if len(biases & set(shape)) == 1:  # it is added to the outputs
        transposed = shape[1] in biases
        stored = "(in, out)" if transposed else "(out, in)"
        view = view._replace(transposed=transposed)
        return Guess("hidden", view, f"matrix of {kind}, {stored} by its bias")
    known = _ADAPTER.search(name) is not None
    return Guess("hidden", view, f"matrix of {kind}, read as (out, in)", axes_known=known)


def _experts(last: str, shape: tuple[int, ...], module: nn.Module) -> tuple[MatrixView, str]:
    """View a batch of experts; gate and up are two matrices where their order is known."""
    up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
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


def _expert_count(module: nn.Module) -> int | None:
    """The number of experts beside a router: of a list of them, or as its module says."""
    for name, child in module.named_children():
        if _EXPERTS.search(name):
            return len(child) if isinstance(child, nn.ModuleList) else _number(_EXPERT_COUNT, child)
    return _number(_EXPERT_COUNT, module)


# --------------------------------------------------------------------------------- output layers


def routers(model: nn.Module) -> dict[int, str]:
    """Return the modules that choose between experts, by identity, with a reason."""
    names: dict[int, str] = {}
    for module in model.modules():
        count = _expert_count(module)
        experts = any(_EXPERTS.search(name) for name, _ in module.named_children())
        for name, child in module.named_children():
            sizes = {p.shape[0] for p in child.parameters() if p.ndim > 1}
            scores = count in sizes or isinstance(child, nn.ModuleList | nn.Sequential)
            named = _ROUTER.match(name) and (experts or scores) and count is not None
            if name == "router" or named or (name in ("gate", "gating") and experts):
                names |= {id(part): "a router" for part in child.modules()}
    return names


def guessed_heads(model: nn.Module) -> dict[int, str]:
    """Return the modules that seem to give an output, by identity, with a reason."""
    try:  # Hugging Face's models know
        stated = cast(Any, model).get_output_embeddings()
    except (NotImplementedError, AttributeError):
        stated = None
    heads: dict[int, str] = {}
    auxiliary: dict[int, str] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if not name or _ADAPTER.search(name):
            continue
        at_top = "." not in name and _OUTPUT.match(last)
        if _HEAD.search(last) or _HEAD_MODULE.match(last) or at_top:
            heads |= _named(name, module, model)
        elif _AUXILIARY.match(last):
            auxiliary |= _named(name, module, model)
    if isinstance(stated, nn.Module):
        return {**heads, **auxiliary, id(stated): STATED}
    layers = [(n, m) for n, m in model.named_modules() if _gives(m) and not _ADAPTER.search(n)]
    # Reading `m.weight` of a parametrization would compute it, and may change buffers.
    tables = {
        id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, nn.Embedding)
    }
    tables.discard(id(None))
    tied = any(id(m._parameters.get("weight")) in tables for _, m in layers)
    if not heads and not tied and layers:
        name, last_layer = layers[-1]
        alone = len(layers) == 1 and not isinstance(last_layer, nn.Linear)
        if name and not alone and not _in_blocks(name, model):
            heads[id(last_layer)] = f"{STATED}, {LAST}"
    return {**heads, **auxiliary}


def _gives(module: nn.Module) -> bool:
    """Whether it is a layer whose result may be an output."""
    attention = nn.modules.linear.NonDynamicallyQuantizableLinear
    types = (nn.Linear, nn.modules.conv._ConvNd)
    return isinstance(module, types) and not isinstance(module, attention)


def _named(name: str, module: nn.Module, model: nn.Module) -> dict[int, str]:
    """The layers that give the result of a module named as a head."""
    parent = model.get_submodule(name.rpartition(".")[0])
    beside = {n for n, _ in parent.named_children()}
    if beside & {"key", "query", "keys", "queries"}:  # the value of attention
        return {}
    if _gives(module) or _is_conv1d(module):
        return {id(module): f"named {name!r}"}
    if _in_blocks(name, model):
        return {}
    return {id(layer): f"the last in {name!r}" for layer in _last_layers(module)}


def _last_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers in a module that give its result: the last, or all of a list side by side."""
    if _gives(module):
        yield module
        return
    if isinstance(base := getattr(module, "base_layer", None), nn.Module):
        yield from _last_layers(base)
        return
    children = [child for child in module.children() if any(map(_gives, child.modules()))]
    side_by_side = isinstance(module, nn.ModuleList | nn.ModuleDict) and not _is_chain(children)
    for child in children if side_by_side else children[-1:]:
        yield from _last_layers(child)


def _is_chain(layers: list[nn.Module]) -> bool:
    """Whether each layer takes as many inputs as the one before it gives."""
    sizes = [(m.in_features, m.out_features) for m in layers if isinstance(m, nn.Linear)]
    same = len(sizes) == len(layers) > 1
    return same and all(a[1] == b[0] for a, b in pairwise(sizes))


def _in_blocks(name: str, model: nn.Module) -> bool:
    """Whether a layer is inside a list of layers or blocks, or a part of attention."""
    parts = name.split(".")
    inside = (nn.ModuleList, nn.MultiheadAttention, nn.TransformerEncoderLayer)
    for i in range(len(parts)):
        ancestor = model.get_submodule(".".join(parts[:i]))
        if isinstance(ancestor, inside):
            return True
        if isinstance(ancestor, nn.Sequential):
            kinds = [type(child) for child in ancestor if any(child.children())]
            kind = type(ancestor.get_submodule(parts[i]))
            if kind is not nn.Sequential and kinds.count(kind) > 1:
                return True
    return False
