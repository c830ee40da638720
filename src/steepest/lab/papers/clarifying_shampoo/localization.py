"""Where Shampoo's gain comes from: matrices, vectors, or embedding and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

import steepest
from steepest import MatrixView, Shampoo
from steepest.lab.papers.claim import Claim, Comparison, Numbers
from steepest.lab.papers.clarifying_shampoo.token_efficiency import on_text
from steepest.lab.train.split_optimizer import SplitOptimizer
from steepest.model.parameter_roles import Role

_VECTORS: tuple[Role, ...] = ("vector",)
_EMBEDDINGS: tuple[Role, ...] = ("embedding", "head")
_BETAS = (0.9, 0.95)


def nowhere(model: nn.Module, lr: float) -> Optimizer:
    """AdamW for all parameters, with a rate of its own for matrices."""
    table = steepest.roles(model)
    matrices = [row.parameter for row in table.matrices]
    return SplitOptimizer([torch.optim.AdamW(matrices, lr, betas=_BETAS, weight_decay=0.0),
                           _adamw([row.parameter for row in table.others])])  # fmt: skip


def on_matrices(model: nn.Module, lr: float) -> Optimizer:
    """Shampoo 1/2 for matrices, AdamW for all else."""
    return _shampoo(model, lr)


def on_vectors_too(model: nn.Module, lr: float) -> Optimizer:
    """Shampoo 1/2 for matrices and vectors, which is full-matrix Adam for these."""
    return _shampoo(model, lr, _VECTORS)


def on_embeddings_too(model: nn.Module, lr: float) -> Optimizer:
    """Shampoo 1/2 for matrices, embedding and head."""
    return _shampoo(model, lr, _EMBEDDINGS)


def on_all(model: nn.Module, lr: float) -> Optimizer:
    """Shampoo 1/2 for all parameters."""
    return _shampoo(model, lr, _VECTORS + _EMBEDDINGS)


_REST = 4e-3  # the rate of all that is no matrix, for every optimizer of a study


def _adamw(parameters: list[Any]) -> Optimizer:
    return torch.optim.AdamW(parameters, _REST, betas=_BETAS, weight_decay=0.0)


def _shampoo(model: nn.Module, lr: float, more: tuple[Role, ...] = ()) -> Optimizer:
    """Shampoo 1/2 as long as Adam's step: so what it takes over keeps the size of its updates."""
    table = steepest.roles(model)
    joining = [row.parameter for row in table.others if row.role in more]
    rest = [row.parameter for row in table.others if row.role not in more]
    groups = [
        {"params": [row.parameter for row in table.matrices],
         "views": [row.view for row in table.matrices]},
        {"params": joining, "lr": _REST, "views": [_as_matrix(p) for p in joining]},
    ]  # fmt: skip
    shampoo = Shampoo([group for group in groups if group["params"]], lr)
    return SplitOptimizer([shampoo, _adamw(rest)] if rest else [shampoo])


def _as_matrix(parameter: torch.Tensor) -> MatrixView:
    rows = 1 if parameter.ndim == 1 else len(parameter)
    return MatrixView(1, rows, parameter.numel() // rows)


def _spec(function: Any) -> str:
    return f"{function.__module__}:{function.__name__}:lr=0.016"


_NOWHERE, _MATRICES, _VECTORS_TOO, _EMBEDDINGS_TOO, _ALL = map(
    _spec, (nowhere, on_matrices, on_vectors_too, on_embeddings_too, on_all)
)

LOCALIZATION = Comparison(
    name="localization",
    title="Shampoo 1/2 on some of the parameters, AdamW on the others",
    kind="real data",
    scales=on_text(
        (_NOWHERE, _MATRICES, _VECTORS_TOO, _EMBEDDINGS_TOO, _ALL), minutes=5, steps=200
    ),
)


def _share_beyond(spec: str) -> Any:
    """The further gain with `spec`, less a quarter of the gain from matrices alone."""

    def excess(numbers: Numbers) -> float:
        gain = numbers[_NOWHERE] - numbers[_MATRICES]
        return float(numbers[_MATRICES] - numbers[spec] - gain / 4)

    return excess


_EXCESS = "further gain less a quarter of the gain from matrices (nats per token)"

CLAIMS = (
    Claim(
        name="gain-from-matrices",
        sentence="Shampoo on the matrices, with AdamW elsewhere, is ahead of AdamW alone.",
        place="Abstract",
        source="first-hand",
        experiment=LOCALIZATION,
        quantity="loss with AdamW alone less that with Shampoo on matrices (nats per token)",
        value=lambda numbers: float(numbers[_NOWHERE] - numbers[_MATRICES]),
        low=0.0,
        checks=("D2.c",),
    ),
    Claim(
        name="no-gain-from-vectors",
        sentence="Shampoo on vectors too brings less than a quarter of that gain.",
        place="Abstract",
        source="first-hand",
        experiment=LOCALIZATION,
        quantity=_EXCESS,
        value=_share_beyond(_VECTORS_TOO),
        high=0.0,
        paper="exclusively from weight matrices",
        checks=("D2.c",),
    ),
    Claim(
        name="no-gain-from-embeddings",
        sentence="Shampoo on embedding and head too brings less than a quarter of that gain.",
        place="Abstract",
        source="first-hand",
        experiment=LOCALIZATION,
        quantity=_EXCESS,
        value=_share_beyond(_EMBEDDINGS_TOO),
        high=0.0,
        paper="exclusively from weight matrices",
        checks=("D2.c",),
    ),
    Claim(
        name="no-gain-from-all-else",
        sentence="Shampoo on all parameters brings less than a quarter of that gain.",
        place="Abstract",
        source="first-hand",
        experiment=LOCALIZATION,
        quantity=_EXCESS,
        value=_share_beyond(_ALL),
        high=0.0,
        paper="exclusively from weight matrices",
        checks=("D2.c",),
    ),
)
