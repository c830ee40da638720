"""Arrays that take long to make, kept in a folder of the user: whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from steepest.files import sync, unfinished
from steepest.lab.announcements import announce
from steepest.lab.errors import InputError

Arrays = dict[str, NDArray[Any]]


def cache_folder() -> Path:
    """Return the folder of `STEEPEST_CACHE`, or `~/.cache/steepest`."""
    return Path(os.environ.get("STEEPEST_CACHE") or Path.home() / ".cache" / "steepest")


def cached(kind: str, key: str, purpose: str, make: Callable[[], Arrays]) -> Arrays:
    """Return arrays, mapped from files; the first process that asks for them makes them.

    Args:
        kind: the first word of the name of their folder.
        key: all that they depend on.
        purpose: the sentence to announce before they are made.
        make: returns them by name. Other processes wait meanwhile.

    Raises:
        InputError: where the folder cannot be written, or is damaged.
    """
    place = cache_folder() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    try:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{place}.lock"):
                if not place.exists():
                    announce(f"{purpose}; kept in {place.parent} for the next time")
                    _write(place, make())
        return {path.stem: np.load(path, mmap_mode="r") for path in place.glob("*.npy")}
    except OSError as error:
        raise InputError(
            f"could not use the cache {place.parent} ({error.strerror or error}); set "
            "STEEPEST_CACHE to a folder that can be written"
        ) from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{place} is damaged ({error}); delete this folder") from error


def _write(place: Path, arrays: Arrays) -> None:
    for leftover in place.parent.glob(f"{place.name}{_ASIDE}*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    aside = place.with_name(place.name + _ASIDE + unfinished())
    aside.mkdir()
    try:
        for name, array in arrays.items():
            with open(aside / f"{name}.npy", "xb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        aside.rename(place)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(place.parent)


_ASIDE = ".aside"
