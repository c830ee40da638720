"""Arguments of the command line: types in plain words, and the closest name for one unknown."""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from decimal import Decimal
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from steepest import __version__
from steepest.lab.errors import InputError

TYPES: dict[Any, tuple[str, str]] = {
    int: ("N", "a whole number below 2**63"),
    float: ("NUMBER", "a number"),
    str: ("TEXT", "text"),
    Path: ("PATH", "the path of a file or folder"),
}
"""How help calls the values of a type, and how errors do."""

CLOSE = 0.6
"""Similarity from which a name is worth suggesting; that of difflib."""


def parsed(arguments: Sequence[str], commands: Mapping[str, type], description: str) -> Any:
    """Return the settings of the command that the arguments ask for.

    Args:
        arguments: the name of a command, then what it takes.
        commands: their settings, dataclasses, by name.
        description: of the program.

    Raises:
        InputError: for an unknown command or option, and for arguments without an option.
        SystemExit: after help (0), and for values that cannot be read (2).
    """
    name, *rest = arguments or [""]
    if name in commands:
        rest = _modern(rest)
        rest = [*_from_file(name, commands[name], rest), *rest]
        _check_options(name, commands[name], rest)
        settings: Any = _with_help_that_wraps(commands[name])
        command, unknown = tyro.cli(
            settings,
            prog=f"steepest {name}",
            args=rest,
            return_unknown_args=True,
            config=(tyro.conf.PositionalMetavarFromFieldName,),
            registry=_registry(),
        )
        if unknown:
            raise InputError(
                f"got {' '.join(map(repr, unknown))}, which belongs to no option of `steepest "
                f"{name}`; `steepest {name} --help` lists them"
            )
        return command
    if name == "--version":
        print(f"steepest {__version__}")
        sys.exit(0)
    if name in ("-h", "--help") or name.startswith("--tyro-"):
        named = tuple(Annotated[c, tyro.conf.subcommand(n)] for n, c in commands.items())
        either: Any = Union[named]  # noqa: UP007
        tyro.cli(
            either,
            prog="steepest",
            description=f"{description}\n\n`steepest --version` prints the version.",
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes,),
            registry=_registry(),
        )
    got = f"got {name!r}, which is no command" if arguments else "got no command"
    place = " first, and its options behind it" if name.startswith("-") else ""
    raise InputError(
        f"{got}{did_you_mean(name, commands)}; expected {_one_of(commands)}{place}. `steepest "
        "--help` describes them"
    )


INSTEAD = (("steps", "tokens"), ("accumulate", "batch_tokens"), ("data", "batches"))
"""Settings of which one stands for the other: the typed one replaces that of a file."""


def _from_file(command: str, settings: type, arguments: Sequence[str]) -> list[str]:
    """The settings of the file behind `--config`, as arguments."""
    kinds = get_type_hints(settings)
    names = [argument.partition("=") for argument in arguments]
    places = [i for i, (option, _, _) in enumerate(names) if option == "--config"]
    if not places or "config" not in kinds:
        return []
    if len(places) > 1:
        raise InputError("got --config twice, expected one file of settings")
    _, equals, name = names[places[0]]
    if not equals:
        name = "".join(arguments[places[0] + 1 : places[0] + 2])
    if not name or name.startswith("--"):
        return []  # which the parser refuses
    path = Path(name)
    typed = {option.removeprefix("--").replace("-", "_") for option, _, _ in names}
    replaced = {b if a in typed else a for a, b in INSTEAD if (a in typed) != (b in typed)}
    options: list[str] = []
    for key, value in _settings_in(path).items():
        setting = key.replace("-", "_")
        if setting not in kinds:
            raise InputError(
                f"{path} has the setting {key!r}, which `steepest {command}` does not have"
                f"{did_you_mean(setting, kinds)}; `steepest {command} --help` lists them"
            )
        if setting not in replaced:
            options += _option_of(path, key, value, kinds[setting])
    return options


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"could not read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is no TOML file ({error}); a run writes one: config.toml"
        ) from None
    for key, value in settings.items():
        if isinstance(value, dict):
            raise InputError(f"{path} has a table [{key}], expected settings such as width = 64")
    return settings


def _option_of(path: Path, key: str, value: Any, kind: Any) -> list[str]:
    """A setting of a file as an option."""
    option = f"--{key.replace('_', '-')}"
    if kind is bool and isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    values = value if isinstance(value, list) and get_origin(kind) is tuple else [value]
    wrong = next((part for part in values if isinstance(part, bool | list | dict)), None)
    if kind is bool or wrong is not None:
        expected = "true or false" if kind is bool else "numbers or texts"
        expected = "one number or text" if kind is not bool and values == [value] else expected
        raise InputError(f"{path} has {key} = {value!r}, expected {expected}")
    if get_origin(kind) is tuple:
        return [option, *map(str, values)]
    return [f"{option}={value}"]  # in one, as a text may begin with a dash


RENAMED = {"--model.width": "--width", "--model.depth": "--depth", "--model.context": "--context"}
"""Options of the time when every model was a GPT; the others are now `--model-options`."""


def _modern(arguments: Sequence[str]) -> list[str]:
    """The arguments with the options of this version; a sentence says which ones were old."""
    modern: list[str] = []
    sizes: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if not option.startswith("--model."):
            modern.append(argument)
            continue
        if option in RENAMED:
            modern += [RENAMED[option], *([value] if equals else [])]
            new = RENAMED[option]
        else:
            name = option.removeprefix("--model.")
            switch = name.removeprefix("no-") in ("tied", "bias")
            value = str(not name.startswith("no-")).lower() if switch else value or next(rest, "")
            sizes.append(f"{name.removeprefix('no-')}={value}")
            new = f"--model-options {sizes[-1]}"
        print(f"{option} is now {new}; the old name works for one version more", file=sys.stderr)
    return [*modern, "--model-options", *sizes] if sizes else modern


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ` (did you mean --steps?)` with the closest name, and a second as close; or nothing.

    An option is also compared by its last part: `--width` is close to `--model.width`.

    >>> did_you_mean("trian", ["study", "train", "transfer"])
    ' (did you mean train?)'
    >>> did_you_mean("--widht", ["--model.width", "--warmup"])
    ' (did you mean --model.width?)'
    >>> did_you_mean("nonsense", ["study", "train"])
    ''
    """

    def closeness(other: str) -> float:
        forms = {other, "--" + other.rpartition(".")[2]} if "." in other else {other}
        return max(difflib.SequenceMatcher(None, name, form).ratio() for form in forms)

    near = sorted((n for n in names if closeness(n) >= CLOSE), key=closeness, reverse=True)[:2]
    near = [n for n in near if closeness(n) >= closeness(near[0]) - 0.1]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _with_help_that_wraps(settings: type) -> type:
    """A subclass whose options have the same help without the line breaks of the source."""
    texts: dict[str, str] = {}
    for kind in reversed(settings.__mro__[:-1]):
        for option in docstring_parser.parse_from_object(kind).params:
            texts[option.arg_name] = " ".join((option.description or "").split())
    annotations = {
        name: Annotated[kind, tyro.conf.arg(help=texts[name])] if name in texts else kind
        for name, kind in get_type_hints(settings, include_extras=True).items()
    }
    names = {"__annotations__": annotations, "__doc__": settings.__doc__}
    subclass = type(settings.__name__, (settings,), {**names, "__module__": settings.__module__})
    return dataclass(frozen=True, kw_only=True)(subclass)


def _check_options(command: str, settings: type, arguments: Sequence[str]) -> None:
    known = {"--help", *_options(settings)}
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option != "--" and option not in known:
            if option.startswith("--tyro-"):
                continue
            raise InputError(
                f"got {argument.partition('=')[0]!r}, which is no option of `steepest {command}`"
                f"{did_you_mean(option, known)}; `steepest {command} --help` lists them"
            )


def _options(settings: type, prefix: str = "") -> Iterator[str]:
    """Options that a dataclass makes: `--steps`, `--model.width`, `--compile`, `--no-compile`."""
    types = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        name, kind = field.name.replace("_", "-"), types[field.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _options(kind, f"{prefix}{name}.")
        elif tyro.conf.Positional not in get_args(kind):
            yield f"--{prefix}{name}"
            if kind is bool:
                yield f"--{prefix}no-{name}"


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.primitive_rule(_in_plain_words)
    return registry


def _in_plain_words(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """How a value is read: a type of `TYPES`, one of some words, or several; or none of them."""
    kind: Any = info.type
    optional = get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind)
    if optional:
        kinds = [member for member in get_args(kind) if member is not NoneType]
        kind = kinds[0] if len(kinds) == 1 else None
    several = get_origin(kind) is tuple
    if several:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        words: tuple[str, ...] = get_args(kind)
        metavar, read = "{" + ",".join(words) + "}", _reader_of_words(words)
    elif kind in TYPES:
        metavar, read = TYPES[kind][0], _reader(kind)
    else:
        return None

    def value(texts: list[str]) -> Any:
        if optional and texts == ["none"]:
            return None
        return tuple(map(read, texts)) if several else read(texts[0])

    def texts(value: Any) -> list[str]:
        if value is None:
            return ["none"]
        return list(map(str, value)) if several else [str(value)]

    return PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar=f"[{metavar} ...]" if several else metavar,
        instance_from_str=value,
        is_instance=lambda value: True,
        str_from_instance=texts,
    )


def _reader(kind: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            if b"\0" in os.fsencode(text) or (kind is Path and not text):
                raise ValueError
            value = _whole(text) if kind is int else kind(text)
            return value
        except (ValueError, ArithmeticError) as error:
            raise ValueError(f"got {text!r}, expected {TYPES[kind][1]}") from error

    return read


def _whole(text: str) -> int:
    """The whole number that a text stands for; `1.1B`, `500k` and `2e9` are numbers too."""
    number = text.replace("_", "")
    power = {"k": 3, "M": 6, "B": 9, "T": 12}.get(number[-1:], 0)
    try:
        value = int(number)
    except ValueError:
        exact = Decimal(number[:-1] if power else number) * 10**power
        if not exact.is_finite() or exact != int(exact):
            raise ValueError from None
        value = int(exact)
    if abs(value) >= 2**63:
        raise ValueError
    return value


def _reader_of_words(words: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"got {text!r}{did_you_mean(text, words)}, expected {_one_of(words)}")
        return text

    return read


def _one_of(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
