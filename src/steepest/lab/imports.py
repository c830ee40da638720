"""What a user names on the command line: functions of their own, by import path."""

from __future__ import annotations

import importlib
import itertools
import operator
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from steepest.lab.arguments import did_you_mean
from steepest.lab.errors import InputError
from steepest.lab.losses import loss_of
from steepest.lab.memory import bytes_of, check_fits
from steepest.lab.user_code import UserCodeError, guarded, sentences_for_errors, user_code_error


def imported(path: str) -> Any:
    """Return what `package.module:name` stands for; the current folder is looked into first.

    A function is `guarded`, so that its errors are known as the user's.

    Raises:
        InputError: for a path that is none, and for what goes wrong in importing it.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise InputError(f"got {path!r}, expected an import path such as my_package.module:name")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        value: Any = guarded(f"importing {module}", importlib.import_module)(module)
    except Exception as error:
        theirs = user_code_error(error) or UserCodeError("")
        raise UserCodeError(f"got {path!r}, but {theirs}", theirs.traceback) from error
    at = module
    for part in name.split("."):
        if not hasattr(value, part):
            names = [
                key
                for key in dir(value)
                if not key.startswith("_") and not isinstance(getattr(value, key), ModuleType)
            ]
            has = f"; it has {', '.join(names[:20])}" if names else ""
            raise InputError(
                f"got {path!r}, but {at} has no {part}{did_you_mean(part, names)}{has}"
            )
        value, at = getattr(value, part), f"{at}.{part}"
    return guarded(path, value) if callable(value) and not isinstance(value, nn.Module) else value


def imported_function(path: str, example: str) -> Callable[..., Any]:
    """Return the function at an import path; the example says how it is called.

    Raises:
        InputError: as `imported`, and for what cannot be called.
    """
    function = imported(path)
    if not callable(function):
        raise InputError(
            f"got {path!r}, which is a {type(function).__name__}; expected a function, {example}"
        )
    return function


def imported_loss(path: str | None) -> Callable[..., Any]:
    """Return the loss at an import path, or the default one for None."""
    if path is None:
        return guarded("the default loss", loss_of)
    return imported_function(path, "loss(model, batch), which returns a scalar")


def imported_optimizer(path: str | None) -> Callable[..., Any] | None:
    """Return the function from a model to its optimizer at an import path, if there is one."""
    if path is None:
        return None
    return imported_function(path, "optimizer(model), which returns yours")


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
    value = imported(path)
    value = value if isinstance(value, nn.Module) else called(path, value, "a model")
    if not isinstance(value, nn.Module):
        raise InputError(
            f"got {path!r}, which gives a {type(value).__name__}; expected a torch.nn.Module, or a "
            "function that returns one"
        )
    return value


def imported_batches(path: str, count: int) -> list[Any]:
    """Return the first batches at an import path, or of what the function there returns.

    Raises:
        InputError: as `imported`, and for what is neither.
    """
    return taken(path, imported_stream(path), count)


def taken(path: str, stream: Iterator[Any], count: int) -> list[Any]:
    """Return the next batches of a stream that was imported from a path.

    Raises:
        InputError: for a count below 1, for batches that no memory can hold, and for what goes
            wrong in the user's code.
    """
    if count < 1:
        raise InputError(f"got {count} batches to take, expected at least 1")
    with sentences_for_errors():
        return guarded(path, list)(that_fit(path, stream, count))


def that_fit(path: str, stream: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield so many batches of a stream, if memory can hold so many of the size of the first.

    Raises:
        InputError: at the first one, if it cannot.
    """
    count = min(count, operator.length_hint(stream, count))  # a list may have fewer
    for i, batch in enumerate(itertools.islice(stream, count)):
        if i == 0:
            check_fits(f"{count} batches of {path} to keep", count * bytes_of(batch), "take fewer")
        yield batch


def imported_stream(path: str) -> Iterator[Any]:
    """Return an iterator over the batches at an import path, or of what the function there returns.

    Raises:
        InputError: as `imported`, and for what is neither.
    """
    value = imported(path)
    value = called(path, value, "batches") if callable(value) else value
    if not isinstance(value, Iterable):
        raise InputError(
            f"got {path!r}, which gives a {type(value).__name__}; expected an iterable of batches, "
            "or a function that returns one"
        )
    return iter(value)


def called(path: str, function: Any, kind: str) -> Any:
    """Return what the function at an import path returns; `kind` says what it should be.

    Raises:
        InputError: for what cannot be called, and for what goes wrong in it.
    """
    if not callable(function):
        raise InputError(
            f"got {path!r}, which gives a {type(function).__name__}; expected {kind}, or a "
            f"function that takes no arguments and returns {kind}"
        )
    try:
        return function()
    except Exception as error:
        theirs = user_code_error(error) or UserCodeError(str(error))
        if not theirs.traceback:  # it was called in another way than it wants
            raise InputError(
                f"{theirs}; expected {kind}, or a function that takes no arguments and returns "
                f"{kind}"
            ) from error
        raise theirs from error
