"""Whether a model takes its first batch: one forward pass, before there is an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from steepest.lab.errors import InputError
from steepest.lab.user_code import UserCodeError, sentence_of_torch, user_code_error
from steepest.model.untouched import untouched


def check_first_pass(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Any],
    source: str,
    autocast: AbstractContextManager[Any],
) -> None:
    """Refuse a model, a batch and a loss that do not fit each other; the model stays as it is.

    Args:
        model: with its fresh weights, on the device of the batch.
        batch: the first one.
        loss: `loss(model, batch) -> scalar`.
        source: what the batch comes from, for the sentence.
        autocast: context of the forward pass.

    Raises:
        InputError: for what the forward pass raises, for a model of which nothing is trained, and
            for a loss that is no finite scalar or does not depend on the weights.
        UserCodeError: the same, where it happens in code of the user.
    """
    if not any(p.requires_grad for p in model.parameters()):
        frozen = any(True for _ in model.parameters())
        raise InputError(
            f"got a {type(model).__name__} "
            f"{'whose parameters are all frozen' if frozen else 'without parameters'}; expected "
            "some to train"
        )
    with untouched(model), torch.enable_grad(), autocast:
        try:
            value = loss(model, batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            told = f"the first batch of {source}, {described(batch)}, does not fit model and loss"
            if (theirs := user_code_error(error)) is not None:
                raise UserCodeError(f"{told}: {theirs}", theirs.traceback) from error
            kind = "" if isinstance(error, ValueError | IndexError) else f"{type(error).__name__}: "
            raise InputError(f"{told}: {kind}{sentence_of_torch(error)}") from error
    if not isinstance(value, Tensor) or value.dim() > 0 or not value.requires_grad:
        raise InputError(
            f"got a loss that is {_result(value)}; expected a scalar that depends on the weights"
        )
    if not bool(value.detach().isfinite()):
        raise InputError(
            f"got a loss of {value.item()} for the first batch of {source}, before any update; "
            f"look for NaN and infinity in the batch ({described(batch)}) and in the fresh weights"
        )


def described(batch: Any) -> str:
    """Return types and shapes of what is in a batch.

    >>> described({"x": torch.zeros(4, 2), "y": torch.tensor([1, 2])})
    'a dict of x float32 (4, 2), y int64 (2,)'
    """
    if isinstance(batch, Mapping):
        entries = [f"{key} {_entry(value)}" for key, value in batch.items()]
    elif isinstance(batch, tuple | list):
        entries = [_entry(value) for value in batch]
    else:
        return _entry(batch)
    return f"a {type(batch).__name__} of {', '.join(entries) or 'nothing'}"


def _entry(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _result(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"of shape {tuple(value.shape)}" if value.dim() else "no function of the weights"
