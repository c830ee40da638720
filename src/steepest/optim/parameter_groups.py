"""Parameter groups: made from roles, checked, and seen as matrices during a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.geometry import Geometry, Sign, Spectral
from steepest.matrix_view import MatrixView
from steepest.optim.scales import update_scale
from steepest.parameter_roles import RoleTable


class Work:
    """The parameters of a group that have gradients, and those gradients as matrices."""

    def __init__(self, group: Mapping[str, Any]):
        views = group.get("views") or [None] * len(group["params"])
        names = group.get("param_names") or [f"of shape {tuple(p.shape)}" for p in group["params"]]
        self.params: list[Tensor] = []
        self.views: list[MatrixView | None] = []
        self.gradients: list[Tensor] = []
        self.names: list[str] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        for p, view, name in zip(group["params"], views, names, strict=True):
            if p.grad is None or p.numel() == 0:
                continue
            if p.grad.is_sparse:
                raise ValueError(
                    f"got a sparse gradient for the parameter {name}, expected a dense one; build "
                    "the embedding with sparse=False"
                )
            if hasattr(p.grad, "full_tensor"):  # a DTensor, whose blocks would be copies
                raise NotImplementedError(
                    f"got a gradient sharded over processes for the parameter {name}, expected the "
                    "whole one; use DistributedDataParallel instead of fully_shard"
                )
            view = None if view is None else MatrixView(*view)
            matrices = [p.grad] if view is None else view.matrices(p.grad.contiguous())
            self.params.append(p)
            self.views.append(view)
            self.gradients += matrices
            self.names += [f"parameter {name}"] * len(matrices)

    def matrices(self) -> list[Tensor]:
        """The parameters as matrices to write to; `write_back` ends the writing."""
        matrices: list[Tensor] = []
        for p, view in zip(self.params, self.views, strict=True):
            dense = p.contiguous()
            if dense is not p:  # a layout such as channels_last, which cannot be seen as a matrix
                self._copies.append((p, dense))
            matrices += _seen(view, dense)
        return matrices

    def write_back(self) -> None:
        """Copy what was written to the parameters that are no matrices in memory."""
        for p, dense in self._copies:
            p.copy_(dense)

    def buffers(self, state: dict[Tensor, Any]) -> list[Tensor]:
        """The momentum as matrices; made of zeros where there is none."""
        matrices: list[Tensor] = []
        for p, view in zip(self.params, self.views, strict=True):
            buffer = state[p].get("momentum_buffer")
            if buffer is None:
                buffer = torch.zeros_like(p, memory_format=torch.contiguous_format)
            state[p]["momentum_buffer"] = buffer.contiguous()
            matrices += _seen(view, state[p]["momentum_buffer"])
        return matrices


def _seen(view: MatrixView | None, tensor: Tensor) -> list[Tensor]:
    return [tensor] if view is None else view.matrices(tensor)


def groups_of(table: RoleTable) -> list[dict[str, Any]]:
    """A matrix group and an AdamW group; tied parameters are in the table once."""
    matrices = {
        "params": [(row.name, row.parameter) for row in table.matrices],
        "views": [row.view for row in table.matrices],
    }
    others = {
        "params": [(row.name, row.parameter) for row in table.others],
        "geometry": "adamw",
    }
    return [group for group in (matrices, others) if group["params"]]


def complete(group: dict[str, Any]) -> None:
    """Check the settings and fill in how each parameter is a matrix."""
    if group["geometry"] not in ("sign", "spectral", "adamw"):
        raise ValueError(
            f'got geometry={group["geometry"]!r}, expected "sign", "spectral" or "adamw"'
        )
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"got a learning rate of shape {tuple(lr.shape)}, expected one number")
    for key in ("lr", "weight_decay", "eps"):
        if key in group and not 0.0 <= float(group[key]) < math.inf:
            raise ValueError(f"got {key}={group[key]}, expected a finite number of at least 0")
    if not 0.0 <= group.get("momentum", 0.0) < 1.0:
        raise ValueError(f"got momentum={group['momentum']}, expected 0 or more and less than 1")
    update_scale(group["scale"], 1, 1)
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(
                f"got a parameter of {p.dtype}, expected a real floating-point type; for complex "
                "weights optimize torch.view_as_real(parameter)"
            )
    if group["geometry"] == "adamw":
        if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"got betas={group['betas']}, expected both in [0, 1)")
        group.pop("views", None)  # AdamW acts on entries
        return
    if group["geometry"] == "spectral":
        geometry_of(group).direction(torch.zeros(1, 1))  # checks method, steps and dtype
    views = group.get("views") or [None] * len(group["params"])
    if len(views) != len(group["params"]):
        raise ValueError(f"got {len(views)} views for {len(group['params'])} parameters")
    group["views"] = [
        _view(p, view, group["geometry"]) for p, view in zip(group["params"], views, strict=True)
    ]


def _view(p: Tensor, view: tuple[Any, ...] | None, geometry: str) -> tuple[Any, ...] | None:
    """How `p` is a matrix, as a plain tuple, which `torch.load(weights_only=True)` accepts."""
    shape = tuple(p.shape)
    if view is not None:
        MatrixView(*view).check(shape)
        return tuple(view)
    if geometry == "sign":
        return None  # the sign of an entry does not depend on the matrix it is in
    if p.ndim < 2:
        raise ValueError(
            f"got a {p.ndim}-dimensional parameter of shape {shape} for a spectral update, "
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


def geometry_of(group: Mapping[str, Any]) -> Geometry:
    """Return the geometry that a group names, with its settings."""
    if group["geometry"] == "sign":
        return Sign()
    return Spectral(group["method"], group["steps"], group["dtype"])
