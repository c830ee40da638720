"""What each matrix multiplies, batch by batch: stable ranks of activations, captured by hooks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steepest.diagnosis.activations import Activations, Seen, hook, owners
from steepest.linalg import stable_rank
from steepest.parameter_roles import RoleTable

EXACT = 128  # features; beyond that the power method, whose stable rank is an upper bound
ITERATIONS = 10


@dataclass(frozen=True)
class InputRanks:
    """Stable ranks around one matrix on one batch.

    Attributes:
        entering: of what the matrix multiplies, hence behind the previous nonlinearity; uncentred.
        centred: the same with the mean over tokens taken off; None if only `entering` was asked.
        leaving: of what the layer gives, hence before the next nonlinearity; None likewise.
        tokens: number of columns of the activations.
    """

    entering: float
    centred: float | None
    leaving: float | None
    tokens: int


class Inputs:
    """Within the `with` block, every forward pass leaves its stable ranks in `ranks`.

    They are keyed by parameter and by group (of a grouped convolution, else 0). Only scalars are
    kept. A parameter that is used several times has the last of its uses.
    """

    def __init__(self, model: nn.Module, table: RoleTable, entering_only: bool = False):
        self._entering_only = entering_only
        self.ranks: dict[tuple[str, int], InputRanks] = {}
        self._owners = owners(table, model)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Inputs:
        for row, module in self._owners:
            assert row.view is not None
            seen = self._seen(row.name, row.view.batch, module)
            self._handles.append(hook(module, row.name, seen))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _seen(self, name: str, groups: int, module: nn.Module) -> Seen:
        def indicators(found: Activations) -> None:
            assert isinstance(module, nn.Embedding)
            counts = torch.bincount(found.entering.flatten(), minlength=module.num_embeddings)
            share = (counts.max() / counts.sum()).item()
            more: tuple[float | None, float | None] = (None, None)
            if not self._entering_only:
                more = _centred_indicator(counts), _rank(found.leaving)
            self.ranks[name, 0] = InputRanks(1 / share, *more, int(counts.sum()))

        def tokens(found: Activations) -> None:
            both = [each.reshape(-1, each.shape[-1]) for each in found]
            for group in range(groups):
                A, B = (_part(each, group, groups) for each in both)
                more: tuple[float | None, float | None] = (None, None)
                if not self._entering_only:
                    more = _rank(A.float() - A.float().mean(0)), _rank(B)
                self.ranks[name, group] = InputRanks(_rank(A), *more, len(A))

        return indicators if isinstance(module, nn.Embedding) else tokens


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
