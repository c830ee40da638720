"""A run is a folder: its settings, its metrics as JSON lines, its checkpoints, its result.

    config.json      what was asked for, with the hash of the data
    config.toml      the same as a file for --config
    environment.json where it ran
    metrics.jsonl    one line for each measurement; "kind" says which
    checkpoints/     see `checkpoint`
    result.json      written last: the run is finished

All but the checkpoints are JSON with checksums, see `steepest.files`; checkpoints have hashes.
One process writes to a folder at a time.
"""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import filelock
import torch

from steepest.files import json_line, read_lines, remove_leftovers, write_lines
from steepest.lab.data.shapes import TextShape
from steepest.lab.errors import InputError
from steepest.lab.files import read_json, write_json
from steepest.lab.models import sizes_of
from steepest.lab.train.sinks import Sink
from steepest.lab.user_code import user_code_error
from steepest.optim.family import modern_name
from steepest.optim.settings import modern


@contextmanager
def opened(
    path: Path,
    config: dict[str, Any],
    defaults: Mapping[str, Any] | None = None,
    free: tuple[str, ...] = (),
) -> Iterator[Callable[[], None]]:
    """Hold the folder of a run with these settings; make it if it is not there.

    Yields a function that raises if the folder is no longer there, as when it was removed or
    renamed. Long work calls it now and then; it is called at the end too.

    Args:
        path: the folder.
        config: the settings.
        defaults: what settings are in folders of earlier versions that do not have them.
        free: settings that may differ from those in the folder.

    Raises:
        InputError: for a path that is no folder, somebody else's folder, or one of other settings;
            for one that another process holds, or that is removed or renamed meanwhile.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{path} is not a folder; choose another --out") from error
    known = path / "config.json"
    if not known.exists() and (strangers := _measured(path)):
        raise InputError(
            f"{path} has files in it ({', '.join(strangers[:3])}) but no config.json, "
            "so it is not a run to go on with; choose another --out"
        )
    with locked(path):
        wanted = json.loads(json.dumps(config))
        place = path / "environment.json"
        if not _measured(path):  # a start that came to nothing binds nobody
            write_json(place, environment())
            write_json(known, wanted)
        elif difference := _difference(stored_settings(path, defaults or {}), wanted, free):
            raise InputError(f"{path} holds a run with other settings: {difference}")
        elif place.exists():  # a study reads it at its end
            read_json(place, f"Delete {place}; the same command writes it again")
        else:
            write_json(place, environment())
        folder = path.stat()

        def check_folder() -> None:
            try:
                if os.path.samestat(folder, path.stat()):
                    return
            except (FileNotFoundError, NotADirectoryError):
                pass
            raise removed(path)

        try:
            yield check_folder
        except (OSError, InputError):
            check_folder()
            raise
        check_folder()


def stored_settings(path: Path, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a folder with the names of this version.

    A folder of an earlier version has fewer of them; the others are what they are by default.
    """
    return {**json.loads(json.dumps(defaults)), **_renamed(read_json(path / "config.json"))}


def _renamed(settings: Any) -> Any:
    """Settings with the names of this version."""
    if isinstance(settings.get("model"), dict):  # of the time when every model was a GPT
        sizes = settings.pop("model")
        own = {name: sizes.pop(name) for name in ("width", "depth", "context")}
        shape = TextShape(1, own["context"])
        sizes_now: Any = sizes_of("gpt", shape, width=own["width"], depth=own["depth"])
        usual = asdict(sizes_now)
        options = [
            f"{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in sizes.items()
            if value != usual[name]
        ]
        settings |= {"model": "gpt", **own, "model_options": options}
    if isinstance(settings, dict) and isinstance(settings.get("optimizer"), str):
        settings["optimizer"] = modern_name(settings["optimizer"], warn=False)
    if isinstance(settings, dict) and isinstance(settings.get("settings"), dict):
        settings["settings"] = modern(settings["settings"], warn=False)
    return settings


def removed(path: Path) -> InputError:
    """The error for a folder that is no longer where it was."""
    return InputError(
        f"{path} was removed or renamed while this command wrote to it, so the result would not be "
        "there; run the command again, after a renaming with the new name as --out"
    )


def _measured(path: Path) -> list[str]:
    """What is in a folder besides what every start writes."""
    ours = {"config.json", "config.toml", "environment.json"}
    return sorted(p.name for p in path.iterdir() if p.name[0] != "." and p.name not in ours)


def _difference(before: dict[str, Any], wanted: dict[str, Any], free: tuple[str, ...]) -> str:
    before, wanted = _flat(before), _flat(wanted)
    parts = [
        f"{key} was {before.get(key)!r}, now {wanted.get(key)!r}"
        for key in sorted((before.keys() | wanted.keys()) - set(free))
        if before.get(key) != wanted.get(key)
    ]
    if not parts:
        return ""
    return f"{'; '.join(parts)}. Give the same settings to go on, or another --out"


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder for one writer, and remove what killed ones left unfinished.

    Raises:
        InputError: if another process holds it.
    """
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(f"another process is writing to {path}; wait for it to end") from error
    try:
        remove_leftovers(path)
        yield
    finally:
        lock.release()


@contextmanager
def sentences_for_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a folder that cannot be used, and a lack of memory into a sentence."""
    try:
        yield
    except BrokenPipeError:  # of what is printed
        raise
    except OSError as error:
        if (theirs := user_code_error(error)) is not None:
            raise theirs from error
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"no space left while writing to {where}; what was saved before is intact. Make "
                "room and run the same command to go on"
            ) from error
        raise InputError(f"cannot use {where}: {error.strerror}; choose another --out") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise user_code_error(error) or InputError(
            f"out of memory ({error}); expected a smaller model, or fewer examples at a time"
        ) from error


class Metrics:
    """Append measurements to `metrics.jsonl`, each line as soon as it is there."""

    def __init__(self, folder: Path, step: int, sinks: Sequence[Sink] = ()):
        """Open the file and drop lines beyond `step`, where the run goes on from.

        `sinks` get every measurement too.
        """
        self.sinks = sinks
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        if not self.path.exists() or self.path.is_file():
            write_lines(self.path, kept)
        self._file: IO[str] = open(self.path, "a", buffering=1)  # noqa: SIM115

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line."""
        self._file.write(json_line({"kind": kind, "step": step, **values}))
        for sink in self.sinks:
            sink.write(kind, step, values)

    def close(self) -> None:
        """Close the file, and what else takes the measurements."""
        self._file.close()
        for sink in self.sinks:
            sink.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the measurements of a run; a torn last line is left out.

    Raises:
        InputError: if another line is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    rows, damaged = read_lines(path)
    damaged += [i for i, row in enumerate(rows, start=1) if not _is_measurement(row)]
    if damaged:
        raise InputError(
            f"{path} is damaged: line {damaged[0]} is not what was written. Delete that line to go "
            f"on without it, or {folder} to make this run again"
        )
    return rows


def _is_measurement(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row


def environment() -> dict[str, Any]:
    """What the numbers of a run may depend on besides its settings."""
    try:
        steepest = version("steepest")
    except PackageNotFoundError:
        steepest = "unknown"
    return {
        "steepest": steepest,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
