"""Sizes of a model from what a user says of them: a width, a depth, and options such as heads=8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from steepest.lab.arguments import did_you_mean
from steepest.lab.errors import InputError

SMALLEST_HEAD = 8


def resized(
    name: str, sizes: Any, width: int | None, depth: int | None, options: Sequence[str]
) -> Any:
    """Return the sizes at another width and depth, and with options.

    What follows from the width scales with it. Heads keep their size where the width is a multiple
    of it. Where it is not, they keep their number if each has 8 units or more; otherwise one head
    is left. Heads of keys and values keep their share. The inner size keeps its ratio, rounded to
    a multiple of 8.

    Args:
        name: of the model, for errors.
        sizes: where to start from, a frozen dataclass.
        width, depth: None for those of `sizes`.
        options: texts such as "heads=8", which go before what follows from the width.

    Raises:
        InputError: for an option that the model does not have, a value of another type, and sizes
            that cannot be.

    >>> from steepest.lab.models.llama import LlamaConfig
    >>> sizes = resized("llama", LlamaConfig(), 256, None, ["eps=1e-5"])
    >>> sizes.heads, sizes.inner, sizes.eps
    (8, 688, 1e-05)
    """
    known = {f.name for f in fields(sizes)} - {"context"}  # the data's
    changes = options_by_type(name, type(sizes), options, known)
    for axis, value in (("width", width), ("depth", depth)):
        if value is None:
            continue
        if axis not in known:
            raise InputError(f"got {axis}={value}, but the model {name!r} has no {axis}")
        changes[axis] = value
    attempts = [_following(sizes, changes, heads) for heads in _heads(sizes, changes)]
    for attempt in attempts[:-1]:
        try:
            return replace(sizes, **attempt)
        except InputError:
            continue
    return replace(sizes, **attempts[-1])


def _heads(sizes: Any, changes: Mapping[str, Any]) -> list[int | None]:
    """Numbers of heads to try, the best first."""
    old, new = getattr(sizes, "width", None), changes.get("width")
    if not hasattr(sizes, "heads"):
        return [None]
    if "heads" in changes or new is None or new == old:
        return [changes.get("heads", sizes.heads)]
    return list(heads_for(new, sizes.width // sizes.heads, sizes.heads))


def heads_for(width: int, size: int, number: int) -> Iterator[int]:
    """Yield numbers of heads for a width, the best first, from a head's size and their number.

    >>> list(heads_for(256, 32, 4)), list(heads_for(48, 32, 4)), list(heads_for(24, 32, 4))
    ([8, 4, 1], [4, 1], [1])
    """
    if width >= size and width % size == 0:
        yield width // size
    if width % number == 0 and width >= SMALLEST_HEAD * number:
        yield number
    yield 1


def _following(sizes: Any, changes: Mapping[str, Any], heads: int | None) -> dict[str, Any]:
    """The changes, with what follows from the width and the number of heads."""
    changed = dict(changes)
    if heads is not None:
        changed["heads"] = heads
        kv_heads = getattr(sizes, "kv_heads", None)
        if kv_heads is not None and heads != sizes.heads:
            shared = sizes.heads // kv_heads
            changed.setdefault("kv_heads", heads // shared if heads % shared == 0 else 1)
    width = changes.get("width")
    if width is not None and width != sizes.width and any(f.name == "inner" for f in fields(sizes)):
        changed.setdefault("inner", max(8, 8 * round(sizes.inner * width / sizes.width / 8)))
    return changed


def options_by_type(
    name: str, settings: type, options: Sequence[str], known: set[str]
) -> dict[str, Any]:
    """Return the values of options such as "heads=8", read by the types of a dataclass's fields.

    Raises:
        InputError: for an unknown option, and for a value of another type.
    """
    types = get_type_hints(settings)
    values = {}
    for option in options:
        key, text = split_option(option)
        if key not in known:
            raise InputError(
                f"got the option {option!r}, but the model {name!r} has no {key}"
                f"{did_you_mean(key, known)}; it has {', '.join(sorted(known))}"
            )
        values[key] = value_by_type(option, text, types[key])
    return values


def split_option(option: str) -> tuple[str, str]:
    """Return the name and the text behind the = of an option such as "heads=8"."""
    key, equals, text = (part.strip() for part in option.partition("="))
    if not (key and equals and text):
        raise InputError(f"got the option {option!r}, expected name=value, such as heads=8")
    if key in ("width", "depth"):
        raise InputError(f"got the option {option!r}, expected it as --{key} {text}")
    return key.replace("-", "_"), text


def value_by_type(option: str, text: str, kind: Any) -> Any:
    """Return the value of an option, read as a number, a bool, text, or one of some words.

    Raises:
        InputError: for text that is none of the type.
        TypeError: for another type.

    >>> value_by_type("heads=8", "8", int), value_by_type("eps=none", "none", float | None)
    (8, None)
    """
    if get_origin(kind) in (Union, UnionType):
        if text == "none":
            return None
        kind = next(member for member in get_args(kind) if member is not NoneType)
    words = {str(word): word for word in get_args(kind)} if get_origin(kind) is Literal else {}
    words |= {"true": True, "false": False} if kind is bool else {}
    if words:
        if text in words:
            return words[text]
        raise InputError(
            f"got the option {option!r}{did_you_mean(text, words)}, expected one of "
            f"{', '.join(words)}"
        )
    if kind not in (int, float, str):
        raise TypeError(f"got the type {kind}, expected a number, a bool, text or words")
    try:
        return kind(text)
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        raise InputError(f"got the option {option!r}, expected {expected}") from error
