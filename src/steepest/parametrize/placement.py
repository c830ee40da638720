"""The fans of a parameter, and by how much they grow; what cannot be placed is an error."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import nn

from steepest.model.parameter_roles import ParameterRole, RoleTable
from steepest.optim.record import Kind
from steepest.parametrize.rules import Size

# What torch.nn.utils makes of weights: norms, parametrizations, pruning.
_COMPUTED = re.compile(r"(^|[.])parametrizations[.]|(^|[.])weight_(g|v|orig)$")


def size_of(row: ParameterRole, old: ParameterRole, module: nn.Module, blocks: float) -> Size:
    """Return the fans of a parameter of the target, and by how much they grow.

    Args:
        row: of the parameter.
        old: of its counterpart at the base.
        module: that has the parameter.
        blocks: the ratio of the numbers of blocks, 1 outside of them.

    Raises:
        ValueError: for what no rule has a place for.
    """
    if old.role != row.role:
        raise ValueError(
            f"got {row.name} as {row.role} ({row.reason}) at the target and as {old.role} "
            f"({old.reason}) at the base; expected the same, or `roles=` to say what it is. Layers "
            "that are counted belong in an nn.ModuleList of their own"
        )
    _check_parts(row, old)
    _check_bare(row, old, module)
    fans, base_fans = _fans(row), _fans(old)
    fan_in, fan_out = (n / m for n, m in zip(fans, base_fans, strict=True))
    inputs, outputs = fan_in != 1, fan_out != 1
    kind: Kind = "fixed"
    if inputs or outputs:
        kind = "hidden" if inputs and outputs else "output" if inputs else "input"
        kind = "vector" if fans[0] == 1 and row.role == "vector" else kind
    if kind != "fixed" and _COMPUTED.search(row.name):
        raise ValueError(
            f"got {row.name}, part of a weight that is normalized or computed, and grows; "
            "expected plain weights, as no published rule covers these; use the layer without it"
        )
    views = None if row.view is None or old.view is None else (row.view, old.view)
    return Size(kind, fans, base_fans, fan_in, fan_out, blocks, views)


def _fans(row: ParameterRole) -> tuple[int, int]:
    """`(in, out)`; what is looked up or acts entry by entry has one input."""
    shape, view = tuple(row.parameter.shape), row.view
    if row.role == "embedding":
        return 1, shape[-1]
    if view is None:
        return 1, max(1, math.prod(shape))
    # The groups of a convolution side by side; experts are matrices of their own.
    return view.inputs, view.outputs * (1 if row.role == "experts" else view.batch)


def _check_parts(row: ParameterRole, old: ParameterRole) -> None:
    """Raise for experts that become more, and for fused matrices that grow differently."""
    new, before = row.view, old.view
    if new is None or before is None:
        return
    if row.role == "experts" and new.batch != before.batch:
        raise ValueError(
            f"got axis 0 of {row.name}, which counts its {before.batch} matrices at the base and "
            f"{new.batch} at the target; expected their number to stay, as no published rule "
            "covers more experts"
        )
    if not new.splits:
        return
    parts = [n / m for (n, _), (m, _) in zip(new.sizes(), before.sizes(), strict=True)]
    if max(parts) > 1.05 * min(parts):
        ratios = ", ".join(f"{ratio:.4g}" for ratio in parts)
        raise ValueError(
            f"got the output axis of {row.name}, whose {len(parts)} matrices grow by {ratios}; "
            "expected one ratio, since a parameter has one learning rate; let them grow alike, or "
            "keep them in parameters of their own"
        )


def _ratios(row: ParameterRole, old: ParameterRole) -> list[float]:
    return [n / m for n, m in zip(row.parameter.shape, old.parameter.shape, strict=True)]


def _is_told(row: ParameterRole) -> bool:
    return row.reason.startswith("override ")


def _check_bare(row: ParameterRole, old: ParameterRole, module: nn.Module) -> None:
    """Raise where nothing says which axis of a matrix is the input."""
    ratios, kind = _ratios(row, old), type(module).__name__
    if isinstance(module, nn.Bilinear) and row.parameter.ndim == 3 and set(ratios) != {1}:
        raise ValueError(
            f"got {row.name} of an nn.Bilinear, which grows; expected other layers, as no "
            "published rule covers products of two inputs"
        )
    shape = tuple(row.parameter.shape)
    says = (getattr(module, "out_features", None), getattr(module, "in_features", None)) == shape
    listed = isinstance(module, nn.ParameterList | nn.ParameterDict)
    of_torch = type(module).__module__.startswith("torch.nn.") and not listed
    known = kind == "Conv1D" or says or of_torch
    guessed = row.role in ("hidden", "head", "vector") and "a router" not in row.reason
    guessed = guessed and row.view is not None and row.guessed
    if len(shape) == 2 and ratios[0] != ratios[1] and guessed and not known and not _is_told(row):
        raise ValueError(
            f"got {row.name}, a parameter of {kind} that grows from {tuple(old.parameter.shape)} "
            f"to {shape}, and nothing says which axis is the input; expected roles={{{row.name!r}: "
            '"hidden"} if rows are outputs (x @ W.T, as in nn.Linear), "transposed" if columns are '
            '(x @ W), or "embedding" if rows are looked up, added or multiplied entry by entry'
        )


def check_embeddings(
    table: RoleTable, base: Mapping[str, ParameterRole], sizes: Mapping[str, Size]
) -> None:
    """Raise for bare embeddings whose width is not their last axis.

    Their other axes count positions or tokens, which may grow; but then no layer does.
    """
    for row in table:
        *others, last = _ratios(row, base[row.name]) or [1.0]
        grown = set(others) - {1}
        of_layer = row.name.endswith(".weight")
        if row.role != "embedding" or last != 1 or not grown or of_layer or _is_told(row):
            continue
        alike = [
            other.name
            for other in table
            if other.is_matrix and {sizes[other.name].fan_in, sizes[other.name].fan_out} & grown
        ]
        if alike:
            before, now = (tuple(role.parameter.shape) for role in (base[row.name], row))
            raise ValueError(
                f"got {row.name} ({row.reason}) growing from {before} to {now} as "
                f"{alike[0]} does, and not in its last axis; "
                "expected the width last, such as (1, 8, 8, width); or "
                f'roles={{{row.name!r}: "embedding"}} if its rows alone become more'
            )
