"""Real data for the papers' claims: a folder of the user's, with a subfolder for each set."""

from __future__ import annotations

from pathlib import Path

from steepest.lab.errors import InputError

SETS = {
    "wikitext2": ("valid.txt",),
    "tinyshakespeare": ("input.txt",),
    "gutenberg": ("corpus.txt",),
    "mnist": ("mnist.npz",),
    "cifar10": ("cifar10.npz", "cifar10_5k_1k.npz"),
}
"""Of each set the files that `--data` of `steepest train` takes; the first one that is there."""


def find_data(name: str, folder: Path | None) -> str:
    """Return what `--data` takes for a data set.

    Args:
        name: one of `SETS`, or what `--data` takes itself: "stdlib", "digits", "hub:...".
        folder: with a subfolder for each set.

    Raises:
        InputError: if the set is not in the folder.
    """
    if missing := missing_data(name, folder):
        raise InputError(missing)
    return str(_file(name, folder) or name)


def missing_data(name: str | None, folder: Path | None) -> str:
    """Return the sentence about a data set that is not there; empty if it is, or is not needed."""
    if name not in SETS or _file(name, folder):
        return ""
    places = " or ".join(f"{name}/{file}" for file in SETS[name])
    return f"it needs {places} in the folder of data; give --data, or set STEEPEST_DATA"


def _file(name: str, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    places = [folder / name / file for file in SETS.get(name, ())]
    return next((place.resolve() for place in places if place.is_file()), None)
