"""What each matrix multiplies, batch by batch: stable ranks of activations, captured by hooks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steepest.diagnosis.layer_conditions import _is_covered, _patches
from steepest.linalg import stable_rank
from steepest.parameter_roles import RoleTable, roles

EXACT = 128  # features; beyond that the power method, whose stable rank is an upper bound
ITERATIONS = 10


@dataclass(frozen=True)
class InputRanks:
    """Stable ranks around one matrix on one batch.

    Attributes:
        entering: of what the matrix multiplies, hence behind the previous nonlinearity; uncentred.
        centred: the same with the mean over tokens taken off.
        leaving: of what the layer gives, hence before the next nonlinearity.
        tokens: number of columns of the activations.
    """

    entering: float
    centred: float
    leaving: float
    tokens: int


def all_roles(model: nn.Module) -> RoleTable:
    """Return the roles, without a warning where no matrix is one for the optimizers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return roles(model)


class Inputs:
    """Within the `with` block, every forward pass leaves its stable ranks in `ranks`.

    They are keyed by parameter and by group (of a grouped convolution, else 0). Only scalars are
    kept. A parameter that is used several times has the last of its uses.
    """

    def __init__(self, model: nn.Module, table: RoleTable):
        self.ranks: dict[tuple[str, int], InputRanks] = {}
        self._owners = []
        for row in table:
            module = model.get_submodule(row.name.rpartition(".")[0])
            if row.view is not None and not row.view.is_vector and _is_covered(module):
                self._owners.append((row.name, row.view.batch, module))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Inputs:
        for name, groups, module in self._owners:
            self._handles.append(
                module.register_forward_hook(self._hook(name, groups), with_kwargs=True)
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str, groups: int) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if not torch.is_grad_enabled():
                return  # an evaluation in between
            given = args[0] if args else next(iter(kwargs.values()))
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                if isinstance(module, nn.Embedding):
                    counts = torch.bincount(given.flatten(), minlength=module.num_embeddings)
                    share = (counts.max() / counts.sum()).item()
                    ranks = InputRanks(
                        1 / share, _centred_indicator(counts), _rank(output), given.numel()
                    )
                    self.ranks[name, 0] = ranks
                    return
                if isinstance(module, nn.modules.conv._ConvNd):
                    tokens = _patches(module, given)
                    output = output.movedim(-1 - len(module.kernel_size), -1)
                else:
                    tokens = given.reshape(-1, given.shape[-1])
                outputs = output.reshape(-1, output.shape[-1])
                for group in range(groups):
                    A, B = (_part(each, group, groups) for each in (tokens, outputs))
                    self.ranks[name, group] = InputRanks(
                        _rank(A), _rank(A.float() - A.float().mean(0)), _rank(B), len(A)
                    )

        return hook


def _part(tokens: Tensor, group: int, groups: int) -> Tensor:
    return tokens if groups == 1 else tokens.chunk(groups, dim=-1)[group]


def _rank(tokens: Tensor) -> float:
    A = tokens.reshape(-1, tokens.shape[-1]).float()
    if A.shape[1] > EXACT:
        return float(stable_rank(A, "power", ITERATIONS))
    A = A / A.abs().amax().clamp(min=torch.finfo(A.dtype).tiny)
    gram = (A.mT @ A).double()
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    return float(gram.trace()) / largest if largest > 0 else 0.0


def _centred_indicator(counts: Tensor) -> float:
    """Of the indicators of tokens minus their frequencies p: covariance diag(p) - p pᵀ."""
    p = counts[counts > 0].double() / counts.sum()
    variance = float(1 - p.square().sum())
    if variance <= 0:
        return 0.0
    v = torch.where(p == p.max(), 1.0, 0.01).double()
    for _ in range(50):
        v = v / v.norm()
        w = p * v - p * (p @ v)
        v = w
    return variance / float(w.norm())
