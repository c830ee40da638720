"""Parameter groups: made from roles, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set
from typing import Any, get_args

import torch
from torch import Tensor

from steepest.model.matrix_view import MatrixView
from steepest.model.parameter_roles import ParameterRole, Role, RoleTable
from steepest.optim.checks import Checks, check_settings, choice
from steepest.optim.precision import TRAINABLE, is_frozen_base
from steepest.optim.record import ADAMW, acts_on_entries
from steepest.optim.scales import update_scale


def check_role_settings(settings: Any, known: Set[str]) -> None:
    """Raise a `ValueError` unless `settings` has some of the `known` settings for each role."""
    if not isinstance(settings, Mapping) or not all(
        isinstance(own, Mapping) for own in settings.values()
    ):
        raise ValueError(
            f"got roles={settings!r}, expected a dictionary of settings for each role, such as "
            '{"conv": {"lr": 0.01}}'
        )
    if unknown := settings.keys() - set(get_args(Role)):
        raise ValueError(
            f"got settings for the roles {sorted(map(str, unknown))}, expected {get_args(Role)}"
        )
    for role, own in settings.items():
        if unknown := own.keys() - known:
            raise ValueError(
                f"got roles={{{role!r}: ...}} with the unknown settings "
                f"{sorted(map(str, unknown))}, expected some of {sorted(known)}"
            )


def groups_of(
    table: RoleTable, settings: Mapping[Role, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """A group of matrices and an AdamW group, and one for each role with settings of its own.

    Tied parameters are in the table once. Frozen ones that cannot be trained are left out.
    """
    table = RoleTable([row for row in table if not is_frozen_base(row.parameter)])
    settings = settings or {}
    groups = [
        _group([row for row in table.matrices if row.role not in settings]),
        _group([row for row in table.others if row.role not in settings], geometry=ADAMW),
    ]
    for role, own in settings.items():
        rows = [row for row in table if row.role == role]
        if not rows:
            present = ", ".join(dict.fromkeys(row.role for row in table))
            raise ValueError(
                f"got roles={{{role!r}: ...}}, a role that no parameter of this model has; "
                f"expected some of {present}. print(steepest.roles(model)) shows who has which"
            )
        others = {} if rows[0].is_matrix else {"geometry": ADAMW}
        groups.append(_group(rows, **{**others, **own}))
    return [group for group in groups if group["params"]]


def _group(rows: list[ParameterRole], **settings: Any) -> dict[str, Any]:
    group = {"params": [(row.name, row.parameter) for row in rows], **settings}
    return group if acts_on_entries(group) else group | {"views": [r.view for r in rows]}


def warn_of_guessed_axes(table: RoleTable, scale: Any) -> None:
    """Warn of parameters whose step would be far too long or short if read the wrong way around.

    Args:
        table: the roles of a model.
        scale: by which the length of a step follows from outputs and inputs.
    """
    wrong = []
    for row in table.matrices:
        if row.view is None or row.axes_known:
            continue
        sizes = row.view.outputs, row.view.inputs
        factor = update_scale(scale, *sizes) / update_scale(scale, *sizes[::-1])
        if not 1 / 3 <= factor <= 3:
            wrong.append((max(factor, 1 / factor), row.name, row.view))
    if wrong:
        factor, name, view = max(wrong)
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        warnings.warn(
            f"got {name}{more}, a parameter of no known layer, whose axes are read as (out, in) = "
            f"({view.outputs}, {view.inputs}) by a guess. If it is multiplied the other way "
            f"around, its steps are {factor:.3g} times too long or too short. Pass "
            "steepest.roles(model, example=batch) in place of the model to find out, or "
            f'steepest.roles(model, {{"{name}": "transposed"}})',
            UserWarning,
            stacklevel=4,
        )


def complete(group: dict[str, Any], geometries: Mapping[str, str], checks: Checks) -> None:
    """Check the settings and fill in how each parameter is a matrix."""
    is_right, expected = choice(*geometries)
    if not is_right(group["geometry"]):
        raise ValueError(f"got geometry={group['geometry']!r}, expected {expected}")
    check_settings(group, checks)
    for k, p in enumerate(group["params"]):
        if p.dtype not in TRAINABLE:
            raise ValueError(
                f"got the {name_of(group, k)} of {p.dtype}, expected torch.float16, bfloat16, "
                f"float32 or float64; {_remedy(p)}"
            )
        if getattr(p, "_fsdp_flattened", False):
            raise NotImplementedError(
                "got a parameter of FullyShardedDataParallel, which is a piece of a long vector, "
                "expected matrices; use DistributedDataParallel"
            )
    if any(p.is_meta for p in group["params"]):
        warnings.warn(
            "got parameters on the meta device: if the model gets new ones when it is filled, as "
            "with to_empty(), this optimizer will train nothing; build it after filling the model",
            UserWarning,
            stacklevel=4,
        )
    if "betas" in group:
        group["betas"] = tuple(group["betas"])  # which cannot change without being set
    group.setdefault("base_lr", float(group["lr"]))
    group.setdefault("step_count", 0)
    if group["rounding"] == "stochastic" and any(p.dtype == torch.float16 for p in group["params"]):
        raise ValueError('got rounding="stochastic" for float16 parameters, expected bfloat16 ones')
    if acts_on_entries(group):
        group.pop("views", None)  # AdamW acts on entries
        group.pop("stacks", None)
        return
    views = group.get("views") or [None] * len(group["params"])
    if not isinstance(views, (list, tuple)) or isinstance(views, MatrixView):
        raise ValueError(f"got views={views!r}, expected a list with a MatrixView or None for each")
    if len(views) != len(group["params"]):
        raise ValueError(f"got {len(views)} views for {len(group['params'])} parameters")
    group["views"] = [
        _view(p, view, group["geometry"]) for p, view in zip(group["params"], views, strict=True)
    ]
    if group["length"] == "spectral" and geometries[group["geometry"]] != group["geometry"]:
        _check_uncut(group)
    if group.get("stacks") is not None:
        check_stacks(group)


def _remedy(p: Tensor) -> str:
    """What to do with a parameter of a type that cannot be trained."""
    if p.is_complex():
        return "for complex weights optimize torch.view_as_real(parameter)"
    return "train it in bfloat16 and let the products of the model be of that type, or freeze it"


def _check_uncut(group: Mapping[str, Any]) -> None:
    """Raise if a matrix is cut: spectral norms of its blocks do not make its own."""
    for p, view in zip(group["params"], group["views"], strict=True):
        view = MatrixView(*view)
        if view.sizes(group.get("block")) != view.sizes():
            raise ValueError(
                f'got length="spectral" and block={group["block"]} for a parameter of shape '
                f"{tuple(p.shape)}, expected whole matrices, whose spectral norm it sets; pass "
                "block=None"
            )


def name_of(group: Mapping[str, Any], k: int) -> str:
    """Return what to call parameter `k` of a group in an error."""
    names = group.get("param_names", ())
    if k < len(names):
        return f"parameter {names[k]}"
    return f"parameter of shape {tuple(group['params'][k].shape)}"


def check_stacks(group: Mapping[str, Any]) -> None:
    """Raise unless "stacks" has a number or None for each matrix, and stacks are of one shape."""
    stacks = group["stacks"]
    shapes: dict[int, tuple[Any, ...]] = {}
    if not isinstance(stacks, (list, tuple)):
        raise ValueError(f"got stacks={stacks!r}, expected a list with an entry for each parameter")
    if len(stacks) != len(group["params"]):
        raise ValueError(f"got {len(stacks)} stacks for {len(group['params'])} parameters")
    for p, view, numbers in zip(group["params"], group["views"], stacks, strict=True):
        if view is None and numbers is not None:
            raise ValueError(
                f"got stacks for the geometry {group['geometry']!r}, whose parameters are seen "
                "entry by entry, expected None for each"
            )
        if view is None:
            continue
        sizes = MatrixView(*view).sizes()
        if numbers is not None and (not isinstance(numbers, list) or len(numbers) != len(sizes)):
            raise ValueError(
                f"got the stacks {numbers!r} for a parameter of shape {tuple(p.shape)}, expected "
                f"None or a list with a number or None for each of its {len(sizes)} matrices"
            )
        for number, size in zip(numbers or (), sizes, strict=False):
            if number is not None and type(number) is not int:
                raise ValueError(f"got {number!r} in stacks, expected whole numbers or None")
            if number is not None and shapes.setdefault(number, (size, p.dtype)) != (size, p.dtype):
                (other, dtype), own = shapes[number], p.dtype
                raise ValueError(
                    f"got {size} of {own} and {other} of {dtype} in stack {number}, expected equal "
                    "shapes and types"
                )


def _view(p: Tensor, view: tuple[Any, ...] | None, geometry: str) -> tuple[Any, ...] | None:
    """How `p` is a matrix, as a plain tuple, which `torch.load(weights_only=True)` accepts."""
    shape = tuple(p.shape)
    if view is not None:
        if not isinstance(view, tuple) or not 3 <= len(view) <= 5:
            raise ValueError(f"got the view {view!r}, expected a MatrixView or None")
        MatrixView(*view).check(shape)
        return tuple(MatrixView(*view))
    if geometry == "sign":
        return None  # the sign of an entry does not depend on the matrix it is in
    if p.ndim < 2:
        raise ValueError(
            f"got a {p.ndim}-dimensional parameter of shape {shape} for a {geometry} update, "
            "expected matrices; pass the model itself so that roles are found (Hugging Face's "
            'Trainer does so with optimizer_cls_and_kwargs=(lambda: steepest.Muon, {"lr": 0.02})), '
            'or put it in a group of its own with "geometry": "adamw"'
        )
    if p.ndim == 3:
        raise ValueError(
            f"got a 3-dimensional parameter of shape {shape} without a model, so it is unclear "
            "whether it is a convolution or a batch of experts; pass the model itself, or a group "
            'with "views": [MatrixView.of(shape, ...)]'
        )
    return tuple(MatrixView.of(shape))
