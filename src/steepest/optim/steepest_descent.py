"""The one step that all optimizers of this package share.

gradient -> matrices -> memory -> direction -> scale -> weight decay -> parameter. The optimizers
differ in the geometry that gives the direction and in the memory before it; each is a file of its
own beside this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from steepest.linalg.polar_factor import PolarMethod
from steepest.optim.parameter_groups import Work, complete, geometry_of, groups_of
from steepest.optim.scales import Scale, update_scale
from steepest.parameter_roles import RoleTable, roles

OnNonfinite = Literal["raise", "skip"]
Parameters = nn.Module | RoleTable | ParamsT

# Matrices of equal shape are stacked up to this many entries for one batched product. On a CPU a
# large product gains nothing from a batch, so only small matrices are stacked there.
_ENTRIES_PER_BATCH = {"cpu": 2**18, "default": 2**26}


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
        NotImplementedError: from `step`, for parameters sharded by `fully_shard`, unchanged too.
    """

    def __init__(
        self,
        params: Parameters,
        *,
        lr: float | Tensor,
        geometry: Literal["sign", "spectral"],
        momentum: float | None = None,
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
            "weight_decay": weight_decay,
            "scale": scale,
            "method": method,
            "steps": steps,
            "dtype": dtype,
        }
        if momentum is not None:  # without the key, no scheduler can give a memory by mistake
            defaults |= {"momentum": momentum, "nesterov": nesterov}
        self._adamw_defaults = {
            "lr": lr * 1.0 if adamw_lr is None else adamw_lr,  # never the same tensor
            "weight_decay": adamw_weight_decay,
            "betas": adamw_betas,
            "eps": adamw_eps,
            "fused": True,
        }
        if isinstance(params, nn.Module):
            params = roles(params)
        super().__init__(groups_of(params) if isinstance(params, RoleTable) else params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; for `"geometry": "adamw"` the `adamw_*` settings are the defaults."""
        adamw = param_group.get("geometry") == "adamw"
        super().add_param_group({**(self._adamw_defaults if adamw else {}), **param_group})
        group = self.param_groups[-1]
        try:
            complete(group)
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

        Parameters without a gradient are left alone. So is a matrix, or a parameter of the AdamW
        group, whose gradient is exactly zero (an idle expert): neither weights nor memory move. The
        memory is made all the same, as a step of zero gradients is how checkpoint libraries ask
        for it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, Work(group)) for group in self.param_groups]
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

    def _descend(self, group: dict[str, Any], work: Work, active: list[bool]) -> None:
        lr, beta = float(group["lr"]), group.get("momentum", 0.0)
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
            for matrix in W:  # foreach would round the factor: in bfloat16, 0.99 to 0.9883
                matrix.mul_(1 - lr * group["weight_decay"])
        geometry = geometry_of(group)
        for batch in _batches(update):
            matrices = [update[i] for i in batch]
            stack = torch.stack(matrices) if len(matrices) > 1 else matrices[0].unsqueeze(0)
            D = geometry.direction(stack)
            outputs, inputs = D.shape[1:] if D.ndim == 3 else (1, 1)
            step = -lr * update_scale(group["scale"], outputs, inputs)
            torch._foreach_add_([W[i] for i in batch], list(D.unbind(0)), alpha=step)
        work.write_back()

    def _adamw(self, group: dict[str, Any], work: Work, active: list[bool]) -> None:
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


def _only(tensors: Iterable[Tensor], active: list[bool]) -> list[Tensor]:
    return [t for t, use in zip(tensors, active, strict=True) if use]


def _largest_entries(gradients: list[Tensor]) -> list[float]:
    """The largest absolute entry of each gradient; waits once for the device."""
    if not gradients:
        return []
    device = gradients[0].device
    double = any(G.dtype == torch.float64 for G in gradients)
    dtype = torch.float64 if double else torch.float32

    def stacked(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value.to(device, dtype) for value in values])

    if device.type == "cpu":  # where the norm takes twenty times as long
        low, high = (stacked(each) for each in zip(*map(torch.aminmax, gradients), strict=True))
        largest = torch.maximum(high, -low)
    else:
        largest = stacked(torch._foreach_norm(gradients, ord=math.inf))
    return cast(list[float], largest.tolist())


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
