"""The loss and the logits of a model, for every kind of batch that the lab knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def loss_of(model: Any, batch: Any) -> Tensor:
    """Return the mean cross-entropy of a batch in nats, or the loss that the model gives itself.

    Logits of bfloat16 and float16 are taken to float32 first; float64 stays float64.

    Args:
        model: maps inputs to logits `(..., classes)`, a tensor or an object with `.logits`.
        batch: `(inputs, classes)`, where classes are whole numbers of shape `(...)`; or a mapping,
            for which the loss is `model(**batch).loss`.

    Raises:
        ValueError: for other batches and outputs.

    >>> model = torch.nn.Linear(4, 3)
    >>> loss_of(model, (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))).shape
    torch.Size([])
    """
    if isinstance(batch, Mapping):
        return own_loss(model(**batch), batch)
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"got a batch of type {type(batch).__name__}, expected a mapping or (inputs, classes); "
            "name a loss of your own"
        )
    inputs, classes = batch
    outputs = model(inputs)
    logits = entry_of(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or not isinstance(classes, Tensor) or _has_parts(classes):
        raise ValueError(
            f"got outputs of type {type(outputs).__name__} and targets of "
            f"{getattr(classes, 'dtype', type(classes).__name__)}, expected one tensor and integer "
            "classes; name a loss of your own"
        )
    return cross_entropy(logits, classes)


def own_loss(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a model gives itself, for a batch that is a mapping.

    Raises:
        ValueError: where it gives none, as a model of Hugging Face without labels.
    """
    loss = entry_of(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"got outputs of type {type(outputs).__name__} without a loss, for a batch with "
            f"{', '.join(map(str, batch)) or 'nothing'}; expected a loss in them, which models of "
            "Hugging Face give for a batch with labels; or name a loss of your own"
        )
    return loss


def entry_of(outputs: Any, name: str, default: Any) -> Any:
    """Return an entry of what a model gives, a mapping or an object, or the default.

    >>> entry_of({"logits": 3}, "logits", None), entry_of(torch.ones(1), "logits", 4)
    (3, 4)
    """
    if isinstance(outputs, Mapping):
        return outputs.get(name, default)
    return getattr(outputs, name, default)


def _has_parts(classes: Tensor) -> bool:
    return classes.is_floating_point() or classes.is_complex()


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of logits `(..., classes)` against classes `(...)`.

    >>> round(cross_entropy(torch.zeros(5, 8), torch.arange(5)).exp().item(), 4)
    8.0
    """
    logits = logits.flatten(0, -2)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(precise, classes.flatten())


def logits_of(model: Any, inputs: Any) -> Tensor:
    """Return the logits `(..., classes)` that a model gives: its output, or `.logits` of it.

    Raises:
        ValueError: for other outputs.

    >>> logits_of(torch.nn.Linear(4, 3), torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """
    outputs = model(inputs)
    logits = entry_of(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"got outputs of type {type(outputs).__name__}, expected a tensor of logits, or an "
            "object that has them as .logits"
        )
    return logits
