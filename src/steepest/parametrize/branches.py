"""The multipliers of residual branches, folded into the last layer of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from steepest.model.attention_sizes import OF_HEADS
from steepest.parametrize.changes import uses
from steepest.parametrize.dimensions import Growth, in_list, pattern_of
from steepest.parametrize.multipliers import Folds, add, own_parameters

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
# Those of a further branch that some of these have, and layers inside a branch.
_CROSS_ATTENTION = ("crossattention.c_proj", "crossattention.output.dense")
_INNER = ("intermediate", "linear1")


_DEPTH = re.compile(
    r"(^|_)n?(depth|layer|block|loop|iter(ation)?|repeat|recurrence)s?$", re.IGNORECASE
)


def check_depth(growth: Growth, branches: Sequence[str] | None) -> None:
    """Raise where layers become more that are no members of a list: modules used again."""
    before, now = uses(growth.base.model), uses(growth.target.model)
    for name, count in now.items():
        if count != (old := before[growth.counterparts[name][0]]):
            raise ValueError(
                f"got {name} used {old} times at the base and {count} times at the target; "
                "expected modules of its own for each layer, as no published rule for depth covers "
                "shared ones; or rule='mup', which says nothing of depth"
            )
    nothing_else = branches is not None and set(growth.numbers) == growth.changed
    for size, names in growth.numbers.items():
        deeper = nothing_else or any(_DEPTH.search(name) for name in (size, *names))
        if deeper and not any(OF_HEADS.search(name) for name in names):
            raise ValueError(
                f"got {size}, which changes {', '.join(sorted(names))} and no list of layers; "
                "expected the layers in an nn.ModuleList whose length is the depth, as no "
                "published rule for depth covers shared ones; or rule='mup', which says nothing "
                "of depth"
            )


def fold_branches(
    multipliers: Folds, growth: Growth, alpha: float, branches: Sequence[str] | None
) -> None:
    """Multiply what every branch ends with by the ratio of the numbers of blocks to -alpha."""
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
        if not (own := own_parameters(model, path)):
            raise ValueError(
                f"got {path}, a {type(model.get_submodule(path)).__name__} without parameters of "
                "its own, as the end of a branch; expected branches=[...], patterns for the last "
                "layer of every branch"
            )
        add(multipliers, own, (now / before) ** -alpha, reason)


def _known_ends(growth: Growth) -> list[str]:
    model, ends = growth.target.model, []
    for path, block in model.named_modules():
        where = in_list(path, growth.lists)
        if where is None or pattern_of(path, growth.lists) not in (f"{where}.*", "*"):
            continue
        if not _has_matrices(block):  # a list of norms beside those of layers
            continue
        names = {name for name, _ in block.named_modules()}
        known = [
            paths for paths in BRANCHES.get(type(block).__name__, ()) if names.issuperset(paths)
        ]
        if not known:
            raise ValueError(
                f"got {where} growing from {growth.lists[where][0]} to {growth.lists[where][1]} "
                f"blocks of {type(block).__name__}, whose residual branches are unknown; expected "
                "branches=[...], patterns for the last layer of every branch, such as "
                f'"{where}.*.attention.output". If a branch ends with a norm, name the norm'
            )
        block_ends = [*known[0], *(end for end in _CROSS_ATTENTION if end in names)]
        inside = {*_INNER, *(end.split(".")[0] for end in block_ends)}
        for name, child in block.named_children():
            if name not in inside and _has_matrices(child):
                raise ValueError(
                    f"got {path}.{name}, which a {type(block).__name__} is not known to have, so "
                    "that it may be a branch of its own; expected branches=[...], patterns for the "
                    "last layer of every branch"
                )
        ends += [f"{path}.{end}" for end in block_ends]
    return ends


def _has_matrices(module: nn.Module) -> bool:
    return any(p.ndim > 1 for p in module.parameters())


def _given_ends(growth: Growth, branches: Sequence[str]) -> list[str]:
    if isinstance(branches, str):
        raise ValueError(f"got branches={branches!r}, expected a list of patterns")
    model = growth.target.model
    ends: list[str] = []
    for pattern in branches:
        match = [
            n
            for n, _ in model.named_modules()
            if fnmatchcase(n, pattern) and own_parameters(model, n)
        ]
        if not match:
            raise ValueError(
                f"got the pattern {pattern!r} in branches, which matches no module with parameters "
                "of its own; expected names of modules, such as blocks.*.mlp.down"
            )
        ends += [path for path in match if path not in ends]
    matrices = [name for name, shape in growth.target.shapes.items() if len(shape) > 1]
    for where in growth.lists:  # but for lists of norms beside those of layers
        members = {in_block.split(".")[0] for in_block in _below(matrices, where)}
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
