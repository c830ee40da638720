"""The one step that all optimizers of this package share.

gradient -> matrices -> memory -> direction -> scale -> weight decay -> parameter. The optimizers
differ in the geometry that gives the direction and in the memory before it; each is a file of its
own beside this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from steepest.geometry import Geometry, Sign, Spectral
from steepest.linalg.polar_factor import PolarMethod
from steepest.matrix_view import MatrixView
from steepest.parameter_roles import RoleTable, roles

Scale = Literal["spectral", "original", "match-rms-adamw", "none"]
OnNonfinite = Literal["raise", "skip"]
Parameters = nn.Module | RoleTable | ParamsT

# Matrices of equal shape are stacked up to this many entries for one batched product. On a CPU a
# large product gains nothing from a batch, so only small matrices are stacked there.
_ENTRIES_PER_BATCH = {"cpu": 2**18, "default": 2**26}


def update_scale(scale: Scale, outputs: int, inputs: int) -> float:
    """Return the factor on the direction of an `(outputs, inputs)` matrix, for a rate of 1.

    A spectral direction of full rank has root-mean-square entry 1 / sqrt(max(outputs, inputs)) and
    spectral norm 1. With the factor, the update of a matrix with `out` outputs and `in` inputs has:

    | scale             | factor                 | spectral norm          | RMS entry         |
    |-------------------|------------------------|------------------------|-------------------|
    | "spectral"        | sqrt(out / in)         | sqrt(out / in)         | min(√in, √out)/in |
    | "original"        | sqrt(max(1, out / in)) | sqrt(max(1, out / in)) | 1/√in             |
    | "match-rms-adamw" | 0.2 sqrt(max(out, in)) | 0.2 sqrt(max(out, in)) | 0.2               |
    | "none"            | 1                      | 1                      | 1/√max(out, in)   |

    Sources: "spectral", Yang, Simon and Bernstein (arXiv 2310.17813): changes every layer's output
    by as much at any width; "original", K. Jordan's Muon; "match-rms-adamw", Moonlight (arXiv
    2502.16982): the entries move as far as AdamW's, so its learning rate can be used.

    >>> update_scale("spectral", 1024, 256), update_scale("match-rms-adamw", 100, 25)
    (2.0, 2.0)
    """
    if scale == "spectral":
        return math.sqrt(outputs / inputs)
    if scale == "original":
        return math.sqrt(max(1.0, outputs / inputs))
    if scale == "match-rms-adamw":
        return 0.2 * math.sqrt(max(outputs, inputs))
    if scale == "none":
        return 1.0
    raise ValueError(
        f'got scale={scale!r}, expected "spectral", "original", "match-rms-adamw" or "none"'
    )


class SteepestDescent(Optimizer):
    """Steepest descent on matrices, AdamW on everything else, in one object.

    The optimizers users import are subclasses that fix the geometry and the memory. `params` is

    - a model: `steepest.roles` decides which parameters get the matrix update; all others go to an
      AdamW group with the rate `adamw_lr`;
    - a table made by `steepest.roles`, to override those decisions by name;
    - parameters, named parameters or groups, as for every `torch.optim` optimizer: all of them get
      the matrix update, except groups with `"geometry": "adamw"`.

    For parameters with more than two axes that come without a model, a group can say
    `"views": [MatrixView, ...]`; by default four and more axes are seen as a convolution.

    Every group is an ordinary one: schedulers act on its `lr`, which may be a tensor.

    Raises:
        ValueError: for settings out of range, parameters that are no matrices, sparse or complex
            ones. Nothing is changed by a call that raises.
        FloatingPointError: from `step`, for a gradient with NaN or infinite entries, before any
            parameter or state is touched; with `nonfinite="skip"` that step is left out instead.
    """

    def __init__(
        self,
        params: Parameters,
        *,
        lr: float | Tensor,
        geometry: Literal["sign", "spectral"],
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        scale: Scale = "none",
        method: PolarMethod = "polar-express",
        steps: int | None = None,
        dtype: torch.dtype | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        nonfinite: OnNonfinite = "raise",
    ):
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f'got nonfinite={nonfinite!r}, expected "raise" or "skip"')
        self.nonfinite = nonfinite
        self.skipped_steps = 0
        defaults: dict[str, Any] = {
            "lr": lr,
            "geometry": geometry,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "scale": scale,
            "method": method,
            "steps": steps,
            "dtype": dtype,
        }
        self._adamw_defaults = {
            "lr": lr if adamw_lr is None else adamw_lr,
            "weight_decay": adamw_weight_decay,
            "betas": adamw_betas,
            "eps": adamw_eps,
            "fused": True,
        }
        if isinstance(params, nn.Module):
            params = roles(params)
        super().__init__(_groups(params) if isinstance(params, RoleTable) else params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; for `"geometry": "adamw"` the `adamw_*` settings are the defaults."""
        adamw = param_group.get("geometry") == "adamw"
        super().add_param_group({**(self._adamw_defaults if adamw else {}), **param_group})
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except Exception:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        own = ("nonfinite", "skipped_steps", "_adamw_defaults")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; how parameters are matrices stays as constructed.

        Raises:
            ValueError: if the groups are of other sizes or geometries; nothing is changed then.
        """
        state, groups = self.state, self.param_groups
        super().load_state_dict(state_dict)
        for i, (own, loaded) in enumerate(zip(groups, self.param_groups, strict=True)):
            if loaded.get("geometry") != own["geometry"]:
                self.state, self.param_groups = state, groups
                raise ValueError(
                    f"got a state whose group {i} has the geometry {loaded.get('geometry')!r}, "
                    f"expected {own['geometry']!r}; build the optimizer as it was when it was saved"
                )
            if "views" in own:
                loaded["views"] = own["views"]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; with a closure, evaluate it first and return its loss.

        Parameters without a gradient are left alone. So is a matrix whose gradient is exactly zero
        (an idle expert): neither its weights nor its memory move. The memory is made all the same,
        as a step of zero gradients is how checkpoint libraries ask for it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, _Work(group)) for group in self.param_groups]
        largest = _largest_entries([G for _, each in work for G in each.gradients])
        broken = [i for i, entry in enumerate(largest) if not math.isfinite(entry)]
        if broken:
            names = [name for _, each in work for name in each.names]
            if self.nonfinite == "raise":
                raise FloatingPointError(
                    f"got NaN or infinite entries in {len(broken)} of {len(largest)} gradients, "
                    f"the first in {names[broken[0]]}; nothing was updated. Look at the loss, or "
                    'pass nonfinite="skip" to leave such steps out'
                )
            self.skipped_steps += 1
            return loss
        entries = iter(largest)
        for group, each in work:
            active = [next(entries) > 0.0 for _ in each.gradients]
            if group["geometry"] == "adamw":
                self._adamw(group, each, active)
            else:
                self._descend(group, each, active)
        return loss

    def _descend(self, group: dict[str, Any], work: _Work, active: list[bool]) -> None:
        lr, beta = float(group["lr"]), group["momentum"]
        M = _only(work.buffers(self.state), active) if beta else []
        G = _only(work.gradients, active)
        if not G:
            return
        W = _only(work.matrices(), active)
        update = G
        if beta:
            torch._foreach_lerp_(M, G, 1 - beta)
            update = list(torch._foreach_lerp(G, M, beta)) if group["nesterov"] else M
        if group["weight_decay"]:
            # On a CPU, foreach rounds a plain number to the weights' precision: 0.99 to 0.9883.
            torch._foreach_mul_(
                W, torch.tensor(1 - lr * group["weight_decay"], dtype=torch.float64)
            )
        geometry = _geometry(group)
        for batch in _batches(update):
            D = geometry.direction(torch.stack([update[i] for i in batch]))
            outputs, inputs = D.shape[1:] if D.ndim == 3 else (1, 1)
            step = -lr * update_scale(group["scale"], outputs, inputs)
            torch._foreach_add_([W[i] for i in batch], list(D.unbind(0)), alpha=step)
        work.write_back()

    def _adamw(self, group: dict[str, Any], work: _Work, active: list[bool]) -> None:
        for p in work.params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        params, grads = _only(work.params, active), _only(work.gradients, active)
        state = [self.state[p] for p in params]
        in_step = all(  # the fused kernel walks through memory, whatever the strides
            p.stride() == G.stride() == s["exp_avg"].stride() == s["exp_avg_sq"].stride()
            for p, G, s in zip(params, grads, state, strict=True)
        )
        adamw(
            params,
            grads,
            [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state],
            [],
            [s["step"] for s in state],
            fused=group["fused"] and in_step,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            amsgrad=False,
            maximize=False,
        )


class _Work:
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


def _groups(table: RoleTable) -> list[dict[str, Any]]:
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


def _check_group(group: dict[str, Any]) -> None:
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
    if not 0.0 <= group["momentum"] < 1.0:
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
        _geometry(group).direction(torch.zeros(1, 1))  # checks method, steps and dtype
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


def _geometry(group: Mapping[str, Any]) -> Geometry:
    if group["geometry"] == "sign":
        return Sign()
    return Spectral(group["method"], group["steps"], group["dtype"])


def _only(tensors: Iterable[Tensor], active: list[bool]) -> list[Tensor]:
    return [t for t, use in zip(tensors, active, strict=True) if use]


def _largest_entries(gradients: list[Tensor]) -> list[float]:
    """The largest absolute entry of each gradient; waits once for the device."""
    if not gradients:
        return []
    norms = torch._foreach_norm(gradients, ord=math.inf)
    device = gradients[0].device
    double = any(G.dtype == torch.float64 for G in gradients)
    dtype = torch.float64 if double else torch.float32
    return cast(list[float], torch.stack([n.to(device, dtype) for n in norms]).tolist())


def _batches(matrices: list[Tensor]) -> Iterator[list[int]]:
    """Positions of matrices of equal shape and kind, in batches of bounded size."""
    buckets: dict[tuple[Any, ...], list[int]] = {}
    for i, M in enumerate(matrices):
        buckets.setdefault((M.shape, M.dtype, M.device), []).append(i)
    for (shape, _, device), positions in buckets.items():
        limit = _ENTRIES_PER_BATCH.get(device.type, _ENTRIES_PER_BATCH["default"])
        size = max(1, limit // max(1, shape.numel()))
        for start in range(0, len(positions), size):
            yield positions[start : start + size]
