"""The runs of a sweep: how one is trained and scored, and where finished ones are kept."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from steepest.curvature.loss_function import checked
from steepest.files import json_line, read_bytes, read_lines, write_atomically
from steepest.optim.record import ADAMW
from steepest.parametrize.attention import HeadSize
from steepest.parametrize.dimensions import Overrides
from steepest.parametrize.parametrization import Parametrized

LAST_LOSSES = 10
"""Losses at the end whose mean is the score of a run."""


class ParametrizeOptions(TypedDict, total=False):
    """What `parametrize` takes besides sizes, rule, optimizer and example."""

    settings: Mapping[str, Any] | None
    roles: Overrides | None
    branches: Sequence[str] | None
    head_size: HeadSize | None


class Finished:
    """Results by name, as lines of JSON that are written as they come, each with a checksum.

    Args:
        path: of the file, made with its folder when there is a first result; `None` keeps them in
            memory. A last line that is cut off is dropped, a damaged one too, with a warning:
            their runs are made again.

    Raises:
        ValueError: for a file of something else, which stays as it is.

    >>> finished = Finished()
    >>> finished("two", lambda: 1 + 1), finished("two", lambda: 3)
    (2, 2)
    """

    def __init__(self, path: str | Path | None = None):
        self._path = None if path is None else Path(path)
        self._known: dict[str, Any] = {}
        self._is_there = False
        if self._path is not None and self._path.exists():
            self._load(self._path)

    def _load(self, path: Path) -> None:
        content = read_bytes(path)
        rows, damaged = read_lines(path)
        results = [_result(row) for row in rows]
        known = [result for result in results if result is not None]
        is_torn = any(content.startswith(b) or b.startswith(content) for b in _BEGINNINGS)
        if len(known) < len(rows) or (not known and not (is_torn and not damaged)):
            raise ValueError(
                f"got the file of runs {path}, which has a line of something else; expected what "
                "an earlier sweep wrote, or the path of no file"
            )
        if damaged:
            lines = ", ".join(map(str, damaged))
            warnings.warn(
                f"{path} is damaged in line {lines}: these runs are made again", stacklevel=4
            )
        self._known, self._is_there = dict(known), True
        whole = [json_line({"name": name, "result": result}) for name, result in known]
        if content != "".join(whole).encode():
            write_atomically(path, "".join(whole).encode())

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        """Return the result of that name; `run` makes it where there is none.

        Raises:
            FileNotFoundError: if the file was removed since it was begun.
        """
        if name not in self._known:
            self._known[name] = run()
            if self._path is not None:
                row = {"name": name, "result": self._known[name]}
                if self._is_there:
                    with open(self._path, "a", opener=_existing) as file:
                        file.write(json_line(row))
                else:  # in one piece, so that a first line is never torn
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(self._path, json_line(row).encode())
                    self._is_there = True
        return self._known[name]


_BEGINNINGS = (b'{"name": "[', b'["[')  # of a line, and of one as it was before checksums


def _existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


def _result(row: Any) -> tuple[str, Any] | None:
    """The name and the result of a line; None for a line of something else."""
    if isinstance(row, dict) and row.keys() == {"name", "result"}:
        return _renamed(row["name"]), row["result"]
    is_old = isinstance(row, list) and len(row) == 2 and str(row[0]).startswith("[")
    return (_renamed(row[0]), row[1]) if is_old else None


def _renamed(name: str) -> str:
    """The name of a run as this version gives it: AdamW was "adam" before."""
    return name.replace(', "adam", ', f', "{ADAMW}", ', 1)


def named(kind: str, *parts: Any) -> str:
    """Return a name that tells runs apart; of functions it has only their names."""
    return json.dumps([kind, *parts], default=_name)


def _name(thing: Any) -> Any:
    if isinstance(thing, functools.partial):
        return [_name(thing.func), thing.args, sorted(thing.keywords.items())]
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))


def batch_fingerprint(batch: Any) -> str:
    """Return what tells batches apart: a hash of the tensors in it, and of the rest as printed."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
        if isinstance(leaf, Tensor):
            digest.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
            digest.update(
                leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]


@contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Take torch's random numbers from this seed, and leave its generators as they were."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


def written(size: Mapping[str, Any]) -> str:
    """`width 64, depth 2`."""
    return ", ".join(f"{key} {value}" for key, value in size.items())


def training(
    made: Parametrized,
    lr: float,
    batches: Callable[[int], Any],
    loss: Callable[..., Any],
    steps: int,
) -> Iterator[tuple[float, Optimizer]]:
    """Train with a rate that rises over the first tenth of the steps, until the loss blows up.

    Yields the loss of every batch before the step on it is taken, and the optimizer.

    Raises:
        ValueError: for a loss that is no scalar or has no graph, is not finite at first, or ever
            below zero.
        TypeError: for batches that are no function.
    """
    if not callable(batches):
        raise TypeError(
            f"got batches of type {type(batches).__name__}, expected a function from a number to a "
            "batch, such as lambda i: batches[i % len(batches)]"
        )
    optimizer = made.optimizer(lr)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / warm))
    first = math.nan
    for step in range(steps):
        optimizer.zero_grad()
        value = checked(loss(made.model, batches(step)))
        now = value.item()
        first = first if step else now
        if not math.isfinite(first):
            raise ValueError(
                f"got a loss of {first} at {written(made.target)} before any step, expected a "
                "finite one"
            )
        if now < 0 or first == 0:
            raise ValueError(
                f"got a loss of {now:.4g} at {written(made.target)} after {step} steps, expected "
                "a positive one, of which the cost of a rate is a share; add a constant to it"
            )
        if not now <= 1e3 * first:
            return
        yield now, optimizer
        value.backward()
        try:
            optimizer.step()
        except FloatingPointError:
            return
        schedule.step()


def score(losses: Sequence[float], steps: int) -> float:
    """The mean of the last 10 of so many losses, at most twice the first, as for fewer of them."""
    if len(losses) < steps:
        return 2 * losses[0]
    return min(fmean(losses[max(0, steps - LAST_LOSSES) : steps]), 2 * losses[0])
