"""TEON: the spectral geometry of matrices stacked over layers, with momentum."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from steepest.geometry import Spectral, StackedSpectral
from steepest.linalg.polar_factor import PolarMethod
from steepest.model.matrix_view import matrix_label
from steepest.model.parameter_roles import RoleTable
from steepest.model.stacks import find_stacks
from steepest.optim.checks import check_setting
from steepest.optim.matrices import Batch
from steepest.optim.parameter_groups import check_stacks
from steepest.optim.scales import Scale, stacked_rank, with_adamw_lr
from steepest.optim.settings import Settings
from steepest.optim.steepest_descent import Parameters, SteepestDescent


class TEON(SteepestDescent):
    """Muon, with the queries, keys and values of K consecutive layers orthogonalized together.

    Of each kind, Z = [N₁ | ... | N_K] (mode 1, `(out, K in)`), Q = polar(Z), and
    W_k <- (1 - lr λ) W_k - lr s Q_k with s by the shape of one layer. All other matrices take
    Muon's step, also the layers that are left over at the end.

    Zhang et al., "TEON" (arXiv 2601.23261), algorithm 1, with K = 2, mode 1 and s = sqrt(out/in) as
    there. For square layers Q_k has 1/sqrt(K) of the Frobenius norm of Muon's direction, so at the
    same rate a stacked layer takes a smaller step. That is the paper's form and the default;
    `compensate=True` gives a stack the Frobenius norm it has under Muon, sqrt(K min(out, in)), for
    comparisons at equal length.

    Args:
        params: a model or a role table, in which the stacks are found; or groups with a key
            "stacks": for each parameter the number of the stack of each of its matrices, or `None`.
        lr: spectral norm of the step, times s.
        stack: K, the number of consecutive layers in a stack.
        mode: 1 to stack along the inputs, 2 along the outputs.
        compensate: whether a stack moves as far as its layers would under Muon.
        momentum, nesterov, scale, method, steps, dtype: as for `Muon`.
        settings: what all optimizers take, see `Settings`.

    Warns if nothing was stacked. `stacks` says which stacks were made.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 0.02,
        *,
        stack: int = 2,
        mode: Literal[1, 2] = 1,
        compensate: bool = False,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: Scale = "spectral",
        method: PolarMethod = "auto",
        steps: int | None = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[Settings],
    ):
        check_setting("stack", stack)
        self._stack = stack
        own = {
            "lr": lr,
            "geometry": "spectral",
            "mode": mode,
            "compensate": compensate,
            "momentum": momentum,
            "nesterov": nesterov,
            "scale": scale,
            "method": method,
            "steps": steps,
            "dtype": dtype,
        }
        super().__init__(params, own, **with_adamw_lr(settings, lr, scale))
        if stack > 1 and not self.stacks:
            warnings.warn(
                "TEON found nothing to stack, so it is Muon here: no queries, keys or values of "
                f"{stack} layers were found. Print steepest.roles(model) for what was found, or "
                'pass groups with "stacks"',
                UserWarning,
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its key "stacks" if some of its matrices are to be stacked."""
        super().add_param_group(param_group)
        if self.param_groups[-1].get("stacks") is not None:
            try:
                check_stacks(self.param_groups[-1])
            except ValueError:
                self.param_groups.pop()
                raise

    @property
    def stacks(self) -> list[tuple[str, ...]]:
        """The stacks: names of the parameters in each, with the matrix's number where several."""
        stacks: dict[tuple[int, int], list[str]] = defaultdict(list)
        for g, group in enumerate(self.param_groups):
            labels = group.get("stacks") or []
            names = group.get("param_names") or [str(i) for i in range(len(labels))]
            for name, label in zip(names, labels, strict=False):
                for i, number in enumerate(label or ()):
                    if number is not None:
                        stacks[g, number].append(matrix_label(name, i, len(label)))
        return [tuple(stack) for stack in stacks.values()]

    def groups(self, table: RoleTable, own: Any) -> list[dict[str, Any]]:
        """Return the parameter groups of a model, with the stacks found in it."""
        groups = super().groups(table, own)
        numbers = find_stacks(table, self._stack)
        for group in groups:
            if group.get("geometry") != "adamw":
                group["stacks"] = [numbers.get(name) for name, _ in group["params"]]
        return groups

    def direction(self, group: dict[str, Any], batch: Batch, N: Tensor) -> Tensor:
        """Return the slices of the polar factor of each stack."""
        if batch.stack == 1:
            return super().direction(group, batch, N)
        K, (m, n) = batch.stack, N.shape[-2:]
        polar = Spectral(group["method"], group["steps"], group["dtype"])
        D = StackedSpectral(group["mode"], polar).direction(N.unflatten(0, (-1, K))).flatten(0, 1)
        if not group["compensate"]:
            return D
        return D * math.sqrt(K * min(m, n) / stacked_rank(m, n, K, group["mode"]))
