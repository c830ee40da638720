"""Trackers that take the measurements of a run too: TensorBoard, Weights & Biases, trackio.

A tracker is imported when a run asks for it. The run's own folder stays the truth: whatever happens
to a tracker, training goes on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from steepest.files import DamagedFile, read_json, write_json
from steepest.lab.errors import InputError

SinkName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "steepest"
"""What the runs are filed under in a tracker that has projects."""


class Sink(Protocol):
    """Takes the measurements of one run."""

    def start(self, name: str, config: dict[str, Any]) -> None:
        """Begin a run with its settings, or go on with it; raise an `InputError` if that fails."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Take the values of a line of `metrics.jsonl`."""

    def finish(self) -> None:
        """End the run."""


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)  # of who writes


def sink(name: SinkName, folder: Path, say: Callable[[str], None] = _warn) -> Sink:
    """Return the tracker of that name for the run in a folder.

    A run that is resumed goes on with the same run of the tracker, whose identity is the path of
    the folder. Steps that were written before are not written again. If the tracker fails during
    the run, `say` gets one sentence, and nothing more is written.

    Args:
        name: "tensorboard", "wandb" or "trackio".
        folder: the run's folder; TensorBoard's files are in `tensorboard/` there.
        say: called with a sentence; a warning by default.

    Raises:
        InputError: for another name, and for a library that is not installed.
    """
    if name not in _TRACKERS:
        raise InputError(f"got the tracker {name!r}, expected one of {', '.join(_TRACKERS)}")
    tracker, module = _TRACKERS[name]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"got the tracker {name!r}, whose library is not installed; "
            f"run: pip install 'steepest[{name}]'"
        ) from error
    return _Guarded(name, folder, tracker(library, folder), say)


def identity(folder: Path) -> str:
    """Return what names a run in every tracker: a hash of where its folder is."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


class _Tracker(Protocol):
    """What a tracker is asked for; it may raise anything."""

    def start(self, name: str, config: dict[str, Any], step: int) -> None:
        """Begin, or go on behind a step."""

    def write(self, step: int, values: dict[str, float | str]) -> None:
        """Take numbers and texts by name."""

    def finish(self) -> None:
        """Write what is still in memory."""


class _Guarded:
    """A tracker that writes nothing twice and stops nobody.

    The last step of each kind is kept in a hidden file of the run's folder, because the run's own
    metrics go back to a checkpoint and the tracker's do not.
    """

    def __init__(self, name: str, folder: Path, tracker: _Tracker, say: Callable[[str], None]):
        self._name, self._tracker, self._say = name, tracker, say
        self._path = folder / f".{name}.json"
        self._written = self._before = _steps(self._path)
        self._failed = False

    def start(self, name: str, config: dict[str, Any]) -> None:
        try:
            self._tracker.start(name, config, max(self._before.values(), default=0))
        except Exception as error:
            raise InputError(
                f"the tracker {self._name!r} did not start: {_sentence(error)}. Repair that, or "
                "train without it"
            ) from error

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._failed or step <= self._before.get(kind, 0):
            return
        self._try(lambda: self._tracker.write(step, dict(_named(kind, values))))
        if not self._failed and step > self._written.get(kind, 0):
            self._written = {**self._written, kind: step}
            write_json(self._path, self._written)

    def finish(self) -> None:
        if not self._failed:
            self._try(self._tracker.finish)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._failed = True
            self._say(
                f"the tracker {self._name!r} failed: {_sentence(error)}. The run goes on without "
                "it, and metrics.jsonl has everything"
            )


def _steps(path: Path) -> dict[str, int]:
    """The last step of each kind that a tracker has; of a damaged file nothing is known."""
    try:
        return {str(kind): int(step) for kind, step in read_json(path).items()}
    except (OSError, DamagedFile, TypeError, ValueError):
        return {}


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().rstrip('.')}"


def _named(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float | str]]:
    """The finite numbers of a measurement by name, such as "train/loss", and the text of a sample.

    >>> dict(_named("condition", {"matrix": "head.weight", "stable_rank": 2.5, "shape": None}))
    {'condition/head.weight/stable_rank': 2.5}
    """
    place = f"{kind}/{values['matrix']}" if "matrix" in values else kind
    for key, value in values.items():
        if kind == "sample" and key == "text":
            yield f"{place}/{key}", str(value)
        elif key == "stability":
            ratios = {f"ratio {i}": part.get("ratio") for i, part in enumerate(value)}
            yield from _named(kind, ratios)
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{place}/{key}", value


class _TensorBoard:
    """Event files in the run's folder, one more at each start; what is behind a step is purged."""

    def __init__(self, library: Any, folder: Path):
        self._library, self._folder = library, folder / "tensorboard"

    def start(self, name: str, config: dict[str, Any], step: int) -> None:
        self._writer = self._library.SummaryWriter(str(self._folder), purge_step=step + 1)
        if not step:
            self._writer.add_text("config", f"{name}\n\n    {json.dumps(config)}", 0)

    def write(self, step: int, values: dict[str, float | str]) -> None:
        for tag, value in values.items():
            add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
            add(tag, value, step)
        self._writer.flush()  # a run may be killed at any moment

    def finish(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases; more steps may change the settings of a run that goes on."""

    def __init__(self, library: Any, folder: Path):
        self._library, self._folder = library, folder

    def start(self, name: str, config: dict[str, Any], step: int) -> None:
        self._run = self._library.init(
            project=PROJECT, name=name, id=identity(self._folder), resume="allow",
            config=config, dir=str(self._folder), allow_val_change=True,
        )  # fmt: skip

    def write(self, step: int, values: dict[str, float | str]) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of trackio, which knows runs by their name."""

    def __init__(self, library: Any, folder: Path):
        self._library, self._folder = library, folder

    def start(self, name: str, config: dict[str, Any], step: int) -> None:
        self._library.init(
            project=PROJECT, name=f"{name}-{identity(self._folder)}", resume="allow",
            config=config,
        )  # fmt: skip

    def write(self, step: int, values: dict[str, float | str]) -> None:
        self._library.log(values, step=step)

    def finish(self) -> None:
        self._library.finish()


_TRACKERS: dict[str, tuple[Callable[[Any, Path], _Tracker], str]] = {
    "tensorboard": (_TensorBoard, "torch.utils.tensorboard"),
    "wandb": (_Wandb, "wandb"),
    "trackio": (_Trackio, "trackio"),
}
"""What each name is, and the module of its library."""
