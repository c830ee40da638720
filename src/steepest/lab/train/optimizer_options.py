"""Options of an optimizer as text, such as `length=muon,stack=4`: which there are, and values."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

import torch

from steepest.lab.arguments import did_you_mean
from steepest.lab.errors import InputError
from steepest.optim import SteepestDescent
from steepest.optim.checks import check_of, choice
from steepest.optim.settings import Settings, checks_of, has_old_names, modern

LR = "lr"
_WORDS = {"true": True, "false": False, "none": None}
_NAME = r"[A-Za-z_][\w-]*="
_FIRST, _NEXT = re.compile(f":(?={_NAME})"), re.compile(f",(?={_NAME})")
_NO_TEXT = ("roles",)  # mappings


def without_options(name: str) -> tuple[str, str]:
    """Return what is before the options in the name of an optimizer, and the options.

    >>> without_options("my:Optimizer:lr=0.01,betas=0.9,0.99")
    ('my:Optimizer', 'lr=0.01,betas=0.9,0.99')
    >>> without_options("muon")
    ('muon', '')
    """
    head, *options = _FIRST.split(name, maxsplit=1)
    return head, "".join(options)


def parsed_options(text: str, target: Any, name: str) -> dict[str, Any]:
    """Return the options that a text gives to a class or function, sorted by name.

    Names of options that earlier versions had are understood, with a `DeprecationWarning`.

    Args:
        text: `name=value` pairs, separated by commas; hyphens count as underscores. Values are
            numbers, true, false, none, types such as bfloat16, words, and several with commas.
        target: the class or function that takes them.
        name: of the optimizer, for errors.

    Raises:
        InputError: for a name that `target` does not take, and for a value that the type or the
            check in its signature refuses.

    >>> parsed_options("lr=0.01,max-side=none,bias_correction=false", _example, "example")
    {'bias_correction': False, 'lr': 0.01, 'max_side': None}
    """
    texts = [part.split("=", 1) for part in _NEXT.split(text)] if text else []
    raw: dict[str, str] = {}
    for key, value in texts:
        key = key.replace("-", "_")
        if key in raw:
            raise InputError(f"got {key} twice for {name}, expected every option once")
        raw[key] = value
    types = arguments_of(target)
    if "length" in types:
        raw = _modern(raw, name)
    for key in raw:
        if key not in types:
            raise InputError(
                f"got {key!r}, which is no option of {name}{did_you_mean(key, types)}; expected "
                f"one of {', '.join(types)}"
            )
    checks = checks_of(target) if _is_ours(target) else {}
    settings = {}
    for key in sorted(raw):
        check = checks.get(key) or check_of(types[key])
        readings = _readings(raw[key])
        fitting = (v for v in readings if (check.is_right(v) if check else _fits(v, types[key])))
        try:
            settings[key] = next(fitting)
        except StopIteration:
            expected = check.expected if check else _expected(types[key])
            raise InputError(f"got {key}={raw[key]!r} for {name}, expected {expected}") from None
    return settings


def _example(model: Any, lr: float, max_side: int | None = 8, bias_correction: bool = True) -> None:
    """A function that takes options."""


def text_of(value: Any) -> str:
    """Return the text of an option's value, the same for equal values.

    >>> [text_of(value) for value in (True, None, 2.0, 1e-8, (0.9, 0.99), torch.bfloat16, "own")]
    ['true', 'none', '2', '1e-08', '0.9,0.99', 'bfloat16', 'own']
    """
    if isinstance(value, tuple):
        return ",".join(map(text_of, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).removeprefix("torch.")


def arguments_of(target: Any) -> dict[str, Any]:
    """Return the types of all that a class or function takes by keyword, by name.

    The first argument, the model or the parameters, is not among them. Where a class passes
    keywords on, those of the classes that it inherits from are.

    >>> list(arguments_of(torch.optim.SGD))[:4]
    ['lr', 'momentum', 'dampening', 'weight_decay']
    """
    types: dict[str, Any] = {}
    for function, first in _signatures(target):
        hints = _hints(function)
        parameters = list(inspect.signature(function).parameters.values())[first:]
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                kind = hints.get(parameter.name, Any)
                default = type(parameter.default)
                if kind is Any and default in (bool, int, float, str, tuple):
                    kind = float if default is int else default
                types.setdefault(parameter.name, kind)
        rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
        if not rest:
            break
        passed = hints.get(rest[0].name)
        if get_origin(passed) is Unpack:
            types |= get_type_hints(get_args(passed)[0], include_extras=True)
            break
    return {key: kind for key, kind in types.items() if key not in _NO_TEXT}


def _is_ours(target: Any) -> bool:
    return isinstance(target, type) and issubclass(target, SteepestDescent)


def _signatures(target: Any) -> Iterator[tuple[Any, int]]:
    """The functions whose arguments `target` takes, and how many of them are no options."""
    if not isinstance(target, type):
        yield target, 1
        return
    for kind in target.__mro__:
        if kind is SteepestDescent:
            yield _shared, 1
            return
        if "__init__" in vars(kind) and kind is not object:
            yield vars(kind)["__init__"], 2


def _shared(params: Any, **settings: Unpack[Settings]) -> None:
    """What every optimizer of this package takes."""


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except Exception:  # names that only a type checker imports
        return {}


def _modern(raw: dict[str, str], name: str) -> dict[str, str]:
    """Options by the names of this version."""
    old = {key: value for key, value in raw.items() if has_old_names({key: value})}
    if not old:
        return raw
    truths = {"true": True, "false": False}
    try:
        renamed = modern({key: truths.get(value.lower(), value) for key, value in old.items()})
    except ValueError as error:
        raise InputError(f"{error}, for {name}") from error
    rest = {key: value for key, value in raw.items() if key not in old}
    if rest.get("length", renamed["length"]) != renamed["length"]:
        raise InputError(
            f"got length={rest['length']!r} for {name} and an old name of it that says "
            f"{renamed['length']!r}, expected one of them; give length alone"
        )
    return rest | renamed


def _readings(text: str) -> Iterator[Any]:
    """What a text can mean, the narrowest meaning first."""
    if text.lower() in _WORDS:
        yield _WORDS[text.lower()]
    for number in (int, float):
        with suppress(ValueError):
            yield number(text)
    if isinstance(getattr(torch, text, None), torch.dtype):
        yield getattr(torch, text)
    if "," in text:
        yield tuple(next(_readings(part.strip())) for part in text.split(","))
    yield text


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if kind in (None, NoneType):
        return value is None
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in inner)
    if origin is Literal:
        return any(value == member and type(value) is type(member) for member in inner)
    if origin is tuple:
        if not isinstance(value, tuple) or (Ellipsis not in inner and len(value) != len(inner)):
            return False
        members = [inner[0]] * len(value) if Ellipsis in inner else inner
        return all(map(_fits, value, members))
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or kind) if isinstance(origin or kind, type) else True


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return choice(*get_args(kind)).expected
    return f"a value of the type {getattr(kind, '__name__', kind)}"
