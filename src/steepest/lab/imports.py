"""What a user names on the command line: functions of their own, by import path."""

from __future__ import annotations

import importlib
import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab.errors import InputError


def imported(path: str) -> Any:
    """Return what `package.module:name` stands for; the current folder is looked into first.

    Raises:
        InputError: for a path that is none, and for what goes wrong in importing it.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise InputError(f"got {path!r}, expected an import path such as my_package.module:name")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise InputError(
            f"got {path!r}, but importing {module} failed: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            names = ", ".join(key for key in vars(found) if not key.startswith("_"))
            raise InputError(f"got {path!r}, but {module} has no {part}; it has {names}")
        found = getattr(found, part)
    return found


def with_known_generators() -> None:
    """Seed all generators, so that the same command builds the same model and batches again."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002


def imported_model(path: str) -> nn.Module:
    """Return the model at an import path, or what the function there returns.

    Raises:
        InputError: as `imported`, and for what is neither.
    """
    found = imported(path)
    found = found if isinstance(found, nn.Module) else _called(path, found, "a model")
    if not isinstance(found, nn.Module):
        raise InputError(
            f"got {path!r}, which gives a {type(found).__name__}; expected a torch.nn.Module, or a "
            "function that returns one"
        )
    return found


def imported_batches(path: str, count: int) -> list[Any]:
    """Return the first batches at an import path, or of what the function there returns.

    Raises:
        InputError: as `imported`, and for what is neither.
    """
    return list(itertools.islice(imported_stream(path), count))


def imported_stream(path: str) -> Iterator[Any]:
    """Return an iterator over the batches at an import path, or of what the function there returns.

    Raises:
        InputError: as `imported`, and for what is neither.
    """
    found = imported(path)
    found = _called(path, found, "batches") if callable(found) else found
    if not isinstance(found, Iterable):
        raise InputError(
            f"got {path!r}, which gives a {type(found).__name__}; expected an iterable of batches, "
            "or a function that returns one"
        )
    return iter(found)


def _called(path: str, function: Any, what: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise InputError(
            f"got {type(error).__name__} from {path}() ({error}); expected {what}, or a function "
            f"that takes no arguments and returns {what}"
        ) from error


def default_loss(model: Any, batch: Any) -> Tensor:
    """`model(**batch).loss` for mappings, else cross entropy of `model(inputs)` against classes.

    Raises:
        ValueError: for other batches and outputs.
    """
    if isinstance(batch, Mapping):
        return model(**batch).loss
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"got a batch of type {type(batch).__name__}, expected a mapping or (inputs, classes); "
            "name a loss of your own"
        )
    inputs, classes = batch
    outputs = model(inputs)
    if not isinstance(outputs, Tensor) or classes.is_floating_point():
        raise ValueError(
            f"got outputs of type {type(outputs).__name__} and targets of {classes.dtype}, "
            "expected one tensor and integer classes; name a loss of your own"
        )
    return F.cross_entropy(outputs.flatten(0, -2), classes.flatten())
