"""The layerwise condition: is the nuclear rank of the gradient above the stable rank of the input?

Davis and Drusvyatskiy, "When do spectral gradient updates help in deep learning?" (arXiv
2512.04299): for a matrix W that multiplies activations A, with loss gradient G, the guaranteed
decrease of a spectral step over that of a Euclidean step is about nr(G) / st(A). The condition
compares guarantees at the step sizes of the theory, not outcomes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steepest.linalg import nuclear_rank
from steepest.linalg.solvers import eigvalsh
from steepest.model.activations import Activations, Seen, hook, owners
from steepest.model.matrix_view import MatrixView, matrix_label
from steepest.model.parameter_roles import Role, roles
from steepest.results import Result, Results, ResultTable


@dataclass(frozen=True, repr=False)
class LayerCondition(Result):
    """One matrix, measured on one batch.

    Attributes:
        matrix: parameter name; `[i]` behind it counts the matrices of a fused or batched one.
        role: what the parameter is, see `steepest.roles`.
        shape: (out, in).
        nuclear_rank: nr(G) of the loss gradient, before momentum and clipping.
        stable_rank: st(A) of what the matrix multiplies, hence behind the previous nonlinearity;
            uncentred, over all tokens.
        stable_rank_output: st(W A + b) of what the layer gives, hence before the next nonlinearity.
        tokens: number of columns of A.
    """

    matrix: str
    role: Role
    shape: tuple[int, int]
    nuclear_rank: float
    stable_rank: float
    stable_rank_output: float
    tokens: int

    @property
    def ratio(self) -> float:
        """nr(G) / st(A): above 1 the condition favours a spectral step."""
        return self.nuclear_rank / self.stable_rank if self.stable_rank else math.inf

    def table(self) -> ResultTable:
        """Return the ranks and their ratio as one row."""
        columns = ("matrix", "role", "shape", "nuclear_rank", "stable_rank", "ratio")
        more = ("stable_rank_output", "tokens")
        return ResultTable.of([self], (*columns, *more))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary."""
        return asdict(self)


class LayerConditions:
    """Measure the condition for every matrix of a model during ordinary training steps.

    Within the `with` block, every forward pass adds its activations to Gram matrices (sums over
    tokens, in float64; nothing else is kept), so a batch may come in pieces. `measure`, called
    after the backward passes and before the gradients are clipped or cleared, gives the rows.
    Training is not changed: hooks only read.

    Covered are linear layers (also fused and Hugging Face's `Conv1D`), convolutions, and
    embeddings, whose input is the token indicator, self-attention of PyTorch without its output,
    and single recurrent layers. `not_covered` names the other matrices.

    >>> model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    >>> with LayerConditions(model) as conditions:
    ...     model(torch.randn(32, 8)).square().mean().backward()
    ...     rows = conditions.measure()
    >>> [(row.matrix, row.shape, row.tokens) for row in rows]
    [('0.weight', (16, 8), 32), ('2.weight', (4, 16), 32)]
    >>> all(1 <= row.stable_rank <= 16 and 1 <= row.nuclear_rank <= 8 for row in rows)
    True
    """

    def __init__(self, model: nn.Module):
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._grams: dict[str, tuple[_Gram, _Gram]] = {}
        self._handles: list[RemovableHandle] = []
        table = [r for r in roles(self._model) if r.view is not None and not r.view.is_vector]
        self._owners = owners(table, self._model)
        covered = {row.name for row, _ in self._owners}
        self.not_covered = [row.name for row in table if row.name not in covered]

    def __enter__(self) -> LayerConditions:
        self._grams = {row.name: (_Gram(), _Gram()) for row, _ in self._owners}
        for row, module in self._owners:
            seen = self._seen(module, *self._grams[row.name])
            self._handles.append(hook(module, row.name, seen))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._grams.clear()

    def _seen(self, module: nn.Module, entering: _Gram, leaving: _Gram) -> Seen:
        def seen(activations: Activations) -> None:
            if isinstance(module, nn.Embedding):
                entering.add_indices(activations.entering, module.num_embeddings)
            else:
                entering.add(activations.entering)
            leaving.add(activations.leaving)

        return seen

    @torch.no_grad()
    def measure(self) -> Results[LayerCondition]:
        """Return a row for every matrix that was used and has a gradient; the list is a table.

        Raises:
            RuntimeError: outside the `with` block, or before any forward pass in it.
            FloatingPointError: for gradients or activations with NaN or infinite entries.
        """
        if not any(entering.tokens for entering, _ in self._grams.values()):
            raise RuntimeError(
                "got no activations, expected a forward pass within the `with` block; a compiled "
                "model that ran before does not call hooks, so run the uncompiled one"
            )
        measured = Results[LayerCondition]()
        for row, _ in self._owners:
            name = row.name
            entering, leaving = self._grams[name]
            gradient = row.parameter.grad
            if not entering.tokens or gradient is None:
                continue
            view = row.view or MatrixView.of(gradient.shape)
            matrices = view.matrices(gradient.to_dense().contiguous())
            for i, G in enumerate(matrices):
                if not bool(G.isfinite().all()):
                    raise FloatingPointError(
                        f"got NaN or infinite entries in the gradient of {name}, expected finite"
                    )
                if not bool(G.any()):
                    continue  # an idle expert, or a layer behind a zero: no direction to judge
                group = i // max(1, len(view.splits))
                measured.append(
                    LayerCondition(
                        matrix=matrix_label(name, i, len(matrices)),
                        role=row.role,
                        shape=(G.shape[0], G.shape[1]),
                        nuclear_rank=float(nuclear_rank(G)),
                        stable_rank=entering.stable_rank(group, view.batch),
                        stable_rank_output=leaving.stable_rank(),
                        tokens=entering.tokens,
                    )
                )
        return measured


class _Gram:
    """The sum of a aᵀ over all tokens a, and from it the stable rank of the matrix of tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None  # (features, features), or (features,) if diagonal

    def add(self, tokens: Tensor) -> None:
        """Add tokens of shape `(..., features)`."""
        wide = tokens.detach().to(torch.promote_types(tokens.dtype, torch.float32))
        wide = wide.reshape(-1, wide.shape[-1])
        self._accumulate((wide.mT @ wide).to(torch.float64), len(wide))

    def add_indices(self, indices: Tensor, size: int) -> None:
        """Add indicator vectors, whose Gram matrix is the diagonal of the counts."""
        counts = torch.bincount(indices.flatten(), minlength=size)
        self._accumulate(counts.to(torch.float64), indices.numel())

    def _accumulate(self, gram: Tensor, tokens: int) -> None:
        self._sum = gram if self._sum is None else self._sum.add_(gram)
        self.tokens += tokens

    def stable_rank(self, group: int = 0, groups: int = 1) -> float:
        """‖A‖_F² / ‖A‖_op² = trace / largest eigenvalue, for one of equal groups of features."""
        assert self._sum is not None
        gram = self._sum
        if not bool(gram.isfinite().all()):
            raise FloatingPointError("got NaN or infinite activations, expected finite ones")
        if gram.ndim == 1:
            return float(gram.sum() / gram.max())
        if groups > 1:
            size = len(gram) // groups
            part = slice(group * size, (group + 1) * size)
            gram = gram[part, part]
        largest = eigvalsh(gram)[-1]
        return float(gram.trace() / largest) if float(largest) > 0 else 0.0
