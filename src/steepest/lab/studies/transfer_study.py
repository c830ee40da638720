"""Whether a learning rate carries over to larger sizes of a user's own model."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from steepest.lab.errors import InputError
from steepest.lab.files import write_json
from steepest.lab.memory import bytes_of, check_fits
from steepest.lab.train.run_folder import environment, opened, sentences_for_os_errors
from steepest.lab.user_code import sentences_for_errors
from steepest.parametrize.rules import Rule
from steepest.random_numbers import seeded
from steepest.transfer import TransferCheck, check_transfer
from steepest.transfer.runs import ParametrizeOptions

ModelSize = dict[str, int]

SMALLER = "choose smaller sizes"
OBJECT = 1000
"""Bytes of memory for a parameter and its part of a module, at least."""


def transfer_study(
    build: Callable[..., Any],
    sizes: Sequence[str],
    batches: Sequence[Any],
    loss: Callable[[Any, Any], Any],
    *,
    target: str | None,
    lr: float,
    rule: Rule,
    optimizer: str,
    options: Sequence[str],
    branches: Sequence[str],
    seeds: int,
    grid_only: bool,
    out: Path,
    settings: dict[str, Any],
    on_run: Callable[[str, str, float], None] = lambda phase, said, done: None,
) -> tuple[TransferCheck, dict[str, Any]]:
    """Check whether the rate transfers, in a folder, and return what was found and its summary.

    Args:
        build, loss, lr, rule, optimizer, seeds, grid_only, on_run: as for `check_transfer`.
        sizes: as a user types them; see `sizes_by_axis`.
        target: the same, one of them.
        options: settings of the optimizer, as a user types them: `block=32`.
        branches: as for `parametrize`; none for those that are known.
        batches: one for each step.
        out: the folder: finished runs, `transfer.json`, `summary.json`.
        settings: what was asked for, which the folder is bound to.

    Raises:
        InputError: for sizes that cannot be read, a rate that is no rate, a folder of other
            settings, and what `check_transfer` raises for bad input.
    """
    if not 0 < lr < math.inf:
        raise InputError(f"got lr={lr}, expected a finite number above 0")
    asked = sizes_by_axis(sizes)
    base = _size(sizes[0])
    largest = None if target is None else _size(target)
    for size in (size for grown in asked for size in grown):
        _check_memory(build, size, base)
    chosen: ParametrizeOptions = {}
    if options:
        chosen["settings"] = dict(map(_option, options))
    if branches:
        chosen["branches"] = list(branches)
    with sentences_for_os_errors(out), opened(out, settings) as check_folder:

        def progressed(phase: str, said: str, done: float) -> None:
            check_folder()
            on_run(phase, said, done)

        with sentences_for_errors():
            check = check_transfer(
                build, asked, _Batches(batches), loss, base=base, target=largest, lr=lr, rule=rule,
                optimizer=optimizer, steps=len(batches), seeds=seeds, grid_only=grid_only,
                path=out / "runs.jsonl", on_run=progressed,
                **chosen,
            )  # fmt: skip
        summary = {
            "kind": "transfer",
            "title": f"Does the learning rate of {settings['build']} transfer?",
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **_plain(check.as_dict()),
            "settings": settings,
            "environment": environment(),
        }
        write_json(out / "summary.json", summary)
    return check, summary


def sizes_by_axis(sizes: Sequence[str]) -> list[list[ModelSize]]:
    """Return sizes sorted by what grows in them, each list from the base on.

    The first one is the base and names everything; each of the others what it changes, the size
    that grows first.

    Raises:
        InputError: for what is no size, and for one that the base does not name.

    >>> sizes_by_axis(["width=64,heads=2,depth=2", "width=128,heads=4", "depth=8"])
    [[{'width': 64, 'heads': 2}, {'width': 128, 'heads': 4}], [{'depth': 2}, {'depth': 8}]]
    """
    if len(sizes) < 2:
        raise InputError(f"got {len(sizes)} sizes, expected at least 2 to compare")
    base, *others = map(_size, sizes)
    axes: dict[str, list[ModelSize]] = {}
    for size in others:
        if unknown := set(size) - set(base):
            raise InputError(
                f"got the size {sorted(unknown)[0]}, which the first of the sizes does not name; "
                "expected the base first, with a number for everything, such as width=64,depth=2"
            )
        axes.setdefault(next(iter(size)), []).append(size)
    return [
        [{key: base[key] for key in dict.fromkeys(k for size in grown for k in size)}, *grown]
        for grown in axes.values()
    ]


def _check_memory(build: Callable[..., Any], size: ModelSize, base: ModelSize) -> None:
    """Refuse a size whose weights and gradients no memory can hold.

    Weights grow at least linearly with each size. So the base and twice the base bound a number of
    layers that would take too long to build even on the meta device.
    """
    changed = {name: value for name, value in size.items() if value > base[name]}
    try:
        smallest = _bytes(build, base)
        bounds = [smallest]
        for name, value in changed.items():
            step = _bytes(build, base | {name: 2 * base[name]}) - smallest
            bounds.append(smallest + step * (value - base[name]) // base[name])
    except Exception:  # such as heads that do not divide; what is left is built as it is
        bounds = [0]
    named = ",".join(f"{name}={value}" for name, value in size.items())
    check_fits(f"a model of {named}", max(bounds), SMALLER)
    try:
        exact = _bytes(build, base | size)
    except Exception:  # which the check of the rates explains
        return
    check_fits(f"a model of {named}", exact, SMALLER)


def _bytes(build: Callable[..., Any], size: ModelSize) -> int:
    """What weights and gradients take, and Python for each of them; nothing is allocated."""
    with seeded(0), torch.device("meta"):
        parameters = list(build(**size).parameters())
    return 2 * bytes_of(parameters) + OBJECT * len(parameters)


def _plain(value: Any) -> Any:
    """NaN, the slope of what does not move, as None, which JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Batches:
    """Batches by number; from the first again after the last."""

    def __init__(self, batches: Sequence[Any]):
        self._batches = batches

    def __call__(self, i: int) -> Any:
        return self._batches[i % len(self._batches)]


def _option(text: str) -> tuple[str, Any]:
    """`block=32` as a name and a Python value; what is no literal is text."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise InputError(f"got the setting {text!r}, expected a name and a value such as block=32")
    named = value.capitalize() if value.lower() in ("true", "false") else value
    try:
        return name, ast.literal_eval(named)
    except (ValueError, SyntaxError):
        return name, value


def _size(text: str) -> ModelSize:
    """`width=64,depth=2` as a dictionary."""
    size = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not name.isidentifier() or not value.isdecimal() or not 1 <= int(value) < 2**31:
            raise InputError(
                f"got the size {text!r}, expected names and whole numbers such as width=64,depth=2"
            )
        if name in size:
            raise InputError(f"got the size {text!r}, expected each name once")
        size[name] = int(value)
    return size
