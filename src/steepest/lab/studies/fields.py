"""Whether a stored value has the fields and types of a schema, which is a `TypedDict`."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import (
    Any,
    Literal,
    NotRequired,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)


def problems(value: Any, wanted: Any, name: str) -> Iterator[str]:
    """The fields of a value that are missing or of another type than is wanted."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is NotRequired:
        yield from problems(value, parts[0], name)
    elif origin in (Union, UnionType) and value is not None and len(parts) == 2:
        yield from problems(value, parts[0], name)  # something or None
    elif is_typeddict(wanted) and isinstance(value, dict):
        yield from _of_fields(value, wanted, name)
    elif origin is list and isinstance(value, list):
        for i, item in enumerate(value):
            yield from problems(item, parts[0], f"{name}[{i}]")
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from problems(item, parts[1], f"{name}[{key!r}]")
    elif not _is(value, wanted):
        yield f"with {name} = {value!r:.60}, expected {_named(wanted)}"


def _of_fields(value: dict[str, Any], schema: Any, name: str) -> Iterator[str]:
    dotted = f"{name}." if name else ""
    hints = get_type_hints(schema, include_extras=True)
    for field, wanted in hints.items():
        if field in value:
            yield from problems(value[field], wanted, dotted + field)
        elif get_origin(wanted) is not NotRequired:
            yield f"without {dotted}{field}, expected {_named(wanted)}"


def _is(value: Any, wanted: Any) -> bool:
    """Whether a value that holds no others is of a type; a whole number is a number too."""
    if wanted is Any:
        return True
    if get_origin(wanted) is Literal:
        return value in get_args(wanted)
    if get_origin(wanted) in (Union, UnionType):
        return any(_is(value, part) for part in get_args(wanted))
    if isinstance(value, bool) or wanted is bool:
        return wanted is bool and isinstance(value, bool)
    if wanted is float:
        return isinstance(value, int | float)
    return isinstance(wanted, type) and not is_typeddict(wanted) and isinstance(value, wanted)


def _named(wanted: Any) -> str:
    """A type as a reader says it.

    >>> _named(float | None), _named(list[str]), _named(Literal["study"])
    ('a number or null', 'a list', "'study'")
    """
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return " or ".join(map(_named, parts))
    if origin is Literal:
        return ", ".join(map(repr, parts))
    if is_typeddict(wanted):
        return "an object"
    names = {
        float: "a number", int: "a whole number", str: "a text", bool: "true or false",
        list: "a list", dict: "an object", type(None): "null",
    }  # fmt: skip
    return names.get(cast(type, origin or wanted), "a value")
