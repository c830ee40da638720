"""The door to the user's own models: a function, a class or a module by import path."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from steepest.lab.arguments import did_you_mean
from steepest.lab.data.shapes import Shape
from steepest.lab.errors import InputError
from steepest.lab.imports import imported
from steepest.lab.models.resizing import split_option, value_by_type
from steepest.lab.user_code import UserCodeError, user_code_error


def user_model(
    path: str, shape: Shape, width: int | None, depth: int | None, options: Sequence[str]
) -> nn.Module:
    """Return what a function of the user's own builds, or a copy of the module at the path.

    The function gets those of width, depth, vocabulary, context, channels, side, classes and the
    options that its signature names. Width and depth are left out where the user gave none, so
    that the function's own defaults hold.

    Args:
        path: such as "my_package.module:build".
        shape, width, depth, options: see `build_model`.

    Raises:
        InputError: for a path that leads nowhere, a width, depth or option that the function does
            not take, a parameter of it without a value, and for what is no module.
        UserCodeError: for errors of the function.
    """
    value = imported(path)
    if isinstance(value, nn.Module):
        if width is not None or depth is not None or options:
            raise InputError(
                f"got a width, depth or option for {path!r}, which is a module already; expected "
                "a function that takes them and returns a module"
            )
        return copy.deepcopy(value)
    if not callable(value):
        raise InputError(
            f"got {path!r}, which is a {type(value).__name__}; expected a torch.nn.Module, or a "
            "function that returns one"
        )
    arguments = _arguments(path, value, shape, width, depth, options)
    try:
        model = value(**arguments)
    except Exception as error:
        raise (user_code_error(error) or UserCodeError(str(error))) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"got {path!r}, which gives a {type(model).__name__}; expected a torch.nn.Module"
        )
    return model


def user_sizes(path: str, width: int | None, depth: int | None) -> tuple[int | None, int | None]:
    """Return the width and depth that the function gets or has as defaults, None where unknown."""
    value = imported(path)
    if isinstance(value, nn.Module) or not callable(value):
        return None, None
    parameters = _parameters(value)
    sizes = []
    for name, size in (("width", width), ("depth", depth)):
        default = parameters[name].default if name in parameters else None
        size = size if size is not None and name in parameters else default
        sizes.append(size if isinstance(size, int) else None)
    return sizes[0], sizes[1]


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function, eval_str=True).parameters)
    except NameError:  # an annotation that only a type checker can read
        return dict(inspect.signature(function).parameters)


def _arguments(
    path: str,
    function: Any,
    shape: Shape,
    width: int | None,
    depth: int | None,
    options: Sequence[str],
) -> dict[str, Any]:
    parameters = _parameters(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unnamed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = [name for name, p in parameters.items() if p.kind not in unnamed]
    taken = f"it takes {', '.join(names)}" if names else "it takes no arguments"
    arguments = {k: v for k, v in asdict(shape).items() if k in names} if shape else {}
    for name, size in (("width", width), ("depth", depth)):
        if size is None:
            continue
        if name not in names and not takes_all:
            raise InputError(f"got {name}={size}, but {path} takes no {name}; {taken}")
        arguments[name] = size
    for option in options:
        key, text = split_option(option)
        if key not in names and not takes_all:
            raise InputError(
                f"got the option {option!r}, but {path} takes no {key}{did_you_mean(key, names)}; "
                f"{taken}"
            )
        arguments[key] = _value(option, text, parameters.get(key))
    for name in names:
        if name not in arguments and parameters[name].default is inspect.Parameter.empty:
            say = f"--{name}" if name in ("width", "depth") else f"an option {name}=..."
            raise InputError(
                f"got {path!r}, whose parameter {name} has no default and no value; give {say}"
            )
    return arguments


def _value(option: str, text: str, parameter: inspect.Parameter | None) -> Any:
    """Read a value by the annotation of its parameter, by its default, or as JSON or text."""
    kind: Any = parameter.annotation if parameter else inspect.Parameter.empty
    if kind is inspect.Parameter.empty and parameter is not None:
        kind = type(parameter.default)
    try:
        return value_by_type(option, text, kind)
    except TypeError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        return text
