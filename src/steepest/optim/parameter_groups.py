"""Parameter groups: made from roles, and checked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from steepest.geometry import Spectral
from steepest.matrix_view import MatrixView
from steepest.optim.scales import update_scale
from steepest.optim.settings import Decay, Rounding
from steepest.parameter_roles import ParameterRole, Role, RoleTable

_CHOICES: dict[str, tuple[Any, ...]] = {
    "decay": get_args(Decay),
    "rounding": get_args(Rounding),
    "length": ("constant", "dual"),
    "sides": ("both", "left", "right"),
    "graft": ("adam", "muon", "none"),
    "normalize": ("spectral", "none"),
    "mode": (1, 2),
}


def groups_of(
    table: RoleTable, settings: Mapping[Role, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """A group of matrices and an AdamW group, and one for each role with settings of its own.

    Tied parameters are in the table once.
    """
    settings = dict(settings or {})
    if unknown := set(settings) - set(get_args(Role)):
        raise ValueError(f"got settings for the roles {sorted(unknown)}, expected {get_args(Role)}")
    groups = [
        _group([row for row in table.matrices if row.role not in settings]),
        _group([row for row in table.others if row.role not in settings], geometry="adamw"),
    ]
    for role, own in settings.items():
        rows = [row for row in table if row.role == role]
        if not rows:
            raise ValueError(f"got settings for the role {role!r}, which no parameter has")
        others = {} if rows[0].is_matrix else {"geometry": "adamw"}
        groups.append(_group(rows, **{**others, **own}))
    return [group for group in groups if group["params"]]


def _group(rows: list[ParameterRole], **settings: Any) -> dict[str, Any]:
    group = {"params": [(row.name, row.parameter) for row in rows], **settings}
    return group if group.get("geometry") == "adamw" else group | {"views": [r.view for r in rows]}


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


def complete(group: dict[str, Any], geometries: tuple[str, ...]) -> None:
    """Check the settings and fill in how each parameter is a matrix."""
    _one_of(group, "geometry", geometries)
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"got a learning rate of shape {tuple(lr.shape)}, expected one number")
    for key in ("lr", "weight_decay", "eps", "graft_eps"):
        if key in group and not 0.0 <= float(group[key]) < math.inf:
            raise ValueError(f"got {key}={group[key]}, expected a finite number of at least 0")
    for key in ("momentum", "beta2", "graft_beta2"):
        if not 0.0 <= group.get(key, 0.0) < 1.0:
            raise ValueError(f"got {key}={group[key]}, expected 0 or more and less than 1")
    for key in ("interval", "block", "max_side"):
        if group.get(key) is not None and not (isinstance(group[key], int) and group[key] >= 1):
            no_limit = "" if key == "interval" else ", or None for no limit"
            raise ValueError(
                f"got {key}={group[key]!r}, expected a whole number of at least 1{no_limit}"
            )
    for key, values in _CHOICES.items():
        if key in group:
            _one_of(group, key, values)
    if not 0.0 < group.get("exponent", 1.0) < math.inf:
        raise ValueError(f"got exponent={group['exponent']}, expected a finite number above 0")
    if group["heavy_ball"] and "momentum" not in group and group["geometry"] != "adamw":
        raise ValueError("got heavy_ball=True for an optimizer without momentum, expected False")
    state_dtype = group["state_dtype"]
    if state_dtype is not None and not state_dtype.is_floating_point:
        raise ValueError(f"got state_dtype={state_dtype}, expected a real floating-point type")
    if state_dtype is not None and state_dtype.itemsize < 4:
        raise ValueError(f"got state_dtype={state_dtype}, expected torch.float32 or torch.float64")
    update_scale(group["scale"], 1, 1)
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(
                f"got a parameter of {p.dtype}, expected a real floating-point type; for complex "
                "weights optimize torch.view_as_real(parameter)"
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
    group.setdefault("base_lr", float(lr))
    group.setdefault("step_count", 0)
    if group["geometry"] == "adamw":
        if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"got betas={group['betas']}, expected both in [0, 1)")
        group.pop("views", None)  # AdamW acts on entries
        return
    if "method" in group:  # checks method, steps and dtype
        Spectral(group["method"], group["steps"], group["dtype"]).direction(torch.zeros(1, 1))
    if group["rounding"] == "stochastic" and any(p.dtype == torch.float16 for p in group["params"]):
        raise ValueError('got rounding="stochastic" for float16 parameters, expected bfloat16 ones')
    views = group.get("views") or [None] * len(group["params"])
    if len(views) != len(group["params"]):
        raise ValueError(f"got {len(views)} views for {len(group['params'])} parameters")
    group["views"] = [
        _view(p, view, group["geometry"]) for p, view in zip(group["params"], views, strict=True)
    ]
    if group.get("normalize") == "spectral":
        _check_uncut(group)


def _check_uncut(group: Mapping[str, Any]) -> None:
    """Raise if a matrix is cut: spectral norms of its blocks do not make its own."""
    for p, view in zip(group["params"], group["views"], strict=True):
        view = MatrixView(*view)
        if view.sizes(group.get("block")) != view.sizes():
            raise ValueError(
                f'got normalize="spectral" and block={group["block"]} for a parameter of shape '
                f"{tuple(p.shape)}, expected whole matrices, whose spectral norm it sets; pass "
                "block=None"
            )


def check_stacks(group: Mapping[str, Any]) -> None:
    """Raise unless "stacks" has a number or None for each matrix, and stacks are of one shape."""
    stacks = group["stacks"]
    shapes: dict[int, tuple[int, int]] = {}
    if len(stacks) != len(group["params"]):
        raise ValueError(f"got {len(stacks)} stacks for {len(group['params'])} parameters")
    for p, view, numbers in zip(group["params"], group["views"], stacks, strict=True):
        sizes = MatrixView(*view).sizes()
        if numbers is not None and (not isinstance(numbers, list) or len(numbers) != len(sizes)):
            raise ValueError(
                f"got the stacks {numbers!r} for a parameter of shape {tuple(p.shape)}, expected "
                f"None or a list with a number or None for each of its {len(sizes)} matrices"
            )
        for number, size in zip(numbers or (), sizes, strict=False):
            if number is not None and shapes.setdefault(number, size) != size:
                raise ValueError(
                    f"got {size} and {shapes[number]} in stack {number}, expected equal shapes"
                )


def _one_of(group: Mapping[str, Any], key: str, values: tuple[Any, ...]) -> None:
    if group[key] not in values:
        *most, last = (f'"{value}"' if isinstance(value, str) else str(value) for value in values)
        expected = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"got {key}={group[key]!r}, expected {expected}")


def _view(p: Tensor, view: tuple[Any, ...] | None, geometry: str) -> tuple[Any, ...] | None:
    """How `p` is a matrix, as a plain tuple, which `torch.load(weights_only=True)` accepts."""
    shape = tuple(p.shape)
    if view is not None:
        *sizes, splits = MatrixView(*view)
        MatrixView(*view).check(shape)
        return (*sizes, tuple(splits))
    if geometry == "sign":
        return None  # the sign of an entry does not depend on the matrix it is in
    if p.ndim < 2:
        raise ValueError(
            f"got a {p.ndim}-dimensional parameter of shape {shape} for a {geometry} update, "
            "expected matrices; pass the model itself so that roles are found, or put it in a "
            'group of its own with "geometry": "adamw"'
        )
    if p.ndim == 3:
        raise ValueError(
            f"got a 3-dimensional parameter of shape {shape} without a model, so it is unclear "
            "whether it is a convolution or a batch of experts; pass the model itself, or a group "
            'with "views": [MatrixView.of(shape, ...)]'
        )
    return tuple(MatrixView.of(shape))
