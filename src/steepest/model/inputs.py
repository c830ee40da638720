"""What each matrix multiplies, batch by batch: stable ranks of activations, captured by hooks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steepest.linalg import stable_rank
from steepest.linalg.solvers import eigvalsh
from steepest.model.activations import Activations, Seen, hook, owners
from steepest.model.parameter_roles import RoleTable

EXACT = 128  # features; beyond that an estimate, which is an upper bound
ITERATIONS = 6  # on activations of a GPT of width 384: too large by 0.6% on average, 10% at most


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


_Entering = tuple[float, float | None]


class Inputs:
    """Within the `with` block, every forward pass leaves its stable ranks in `ranks`.

    They are keyed by parameter and by group (of a grouped convolution, else 0). Only scalars are
    kept. A parameter that is used several times has the last of its uses.
    """

    def __init__(self, model: nn.Module, table: RoleTable, entering_only: bool = False):
        self._entering_only = entering_only
        self.ranks: dict[tuple[str, int], InputRanks] = {}
        self._last: tuple[Tensor, int, list[_Entering]] | None = None
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
        self._last = None

    def _entering(self, tensor: Tensor, groups: int) -> list[_Entering]:
        """Of each group, uncentred and centred; once for layers in a row that share an input.

        So do queries, keys and values. A tensor that was written to since is another one.
        """
        if self._last is not None:
            last, version, known = self._last
            if last is tensor and version == tensor._version and len(known) == groups:
                return known
        ranks = []
        for A in _parts(tensor, groups):
            centred = None if self._entering_only else _rank(A.float() - A.float().mean(0))
            ranks.append((_rank(A), centred))
        self._last = tensor, tensor._version, ranks
        return ranks

    def _seen(self, name: str, groups: int, module: nn.Module) -> Seen:
        def indicators(activations: Activations) -> None:
            assert isinstance(module, nn.Embedding)
            counts = torch.bincount(activations.entering.flatten(), minlength=module.num_embeddings)
            share = (counts.max() / counts.sum()).item()
            more: tuple[float | None, float | None] = (None, None)
            if not self._entering_only:
                more = _centred_indicator(counts), _rank(activations.leaving)
            self.ranks[name, 0] = InputRanks(1 / share, *more, int(counts.sum()))

        def tokens(activations: Activations) -> None:
            tokens = activations.entering.shape[:-1].numel()
            entering = self._entering(activations.entering, groups)
            for group, B in enumerate(_parts(activations.leaving, groups)):
                leaving = None if self._entering_only else _rank(B)
                self.ranks[name, group] = InputRanks(*entering[group], leaving, tokens)

        return indicators if isinstance(module, nn.Embedding) else tokens


def _parts(activations: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Tokens by features, for each group."""
    return activations.reshape(-1, activations.shape[-1]).chunk(groups, dim=-1)


def _rank(tokens: Tensor) -> float:
    A = tokens.flatten(0, -2).float()
    if A.shape[1] > EXACT:
        return float(stable_rank(A, "krylov", ITERATIONS))
    A = A / A.abs().amax().clamp(min=torch.finfo(A.dtype).tiny)
    gram = (A.mT @ A).double()
    largest = float(eigvalsh(gram)[-1])
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
