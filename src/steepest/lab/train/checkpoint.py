"""Checkpoints that are whole or not there: written aside, forced to disk, checked by hash, renamed
into place."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only

from steepest.curvature import SharpnessTracker
from steepest.files import read_json, remove_leftovers, sync, unfinished, write_json
from steepest.lab.data import TrainingBatches
from steepest.lab.errors import InputError

KEEP = 2


class TornFile(Exception):
    """A file of a checkpoint is missing or is not what was written."""


@dataclass
class RunState:
    """What a checkpoint holds: model, optimizer, and whatever else changes as a run goes on."""

    model: nn.Module
    optimizer: Optimizer
    batches: TrainingBatches
    tracker: SharpnessTracker | None = None
    average: AveragedModel | None = None
    """The moving average of the weights."""


def save(
    folder: Path, step: int, state: RunState, progress: dict[str, Any], keep: int | None = None
) -> None:
    """Write the checkpoint of `step` into `folder`; older ones but the last go afterwards.

    `progress` is whatever else the run needs to go on, as JSON. The state of the random generators
    and the position in a stream of data are added. The checkpoint of step `keep` stays.
    """
    folder.mkdir(exist_ok=True)  # not its parents: a run whose folder is gone has no checkpoints
    remove_leftovers(folder, before=math.inf)  # one process at a time writes here
    place = folder / f"step-{step:08d}"
    if place.exists():  # found damaged when the run went on from an earlier one
        shutil.rmtree(place)
    aside = folder / unfinished()
    aside.mkdir()
    content = {
        "optimizer": state.optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        **({"tracker": state.tracker.state_dict()} if state.tracker else {}),
        **({"average": state.average.state_dict()} if state.average else {}),
    }
    if position := state.batches.state_dict():
        progress = {**progress, "position": position}
    try:
        safetensors.torch.save_model(state.model, str(aside / "model.safetensors"))
        with open(aside / "state.pt", "wb") as file:
            torch.save(content, file)
        (aside / "progress.json").write_text(json.dumps(progress))
        hashes = {}
        for path in sorted(aside.iterdir()):
            sync(path)
            hashes[path.name] = _sha256(path)
        write_json(aside / "manifest.json", {"step": step, "sha256": hashes})
        os.rename(aside, place)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if (reason := _os_error(error)) is not None:
            raise reason from error
        raise
    for old in steps_of(folder)[:-KEEP]:
        if old != keep:
            shutil.rmtree(folder / f"step-{old:08d}")


def load_latest(
    folder: Path, state: RunState, last: int | None = None
) -> tuple[int, dict[str, Any], list[str]]:
    """Load the newest checkpoint that is whole, and say which ones are not.

    Args:
        folder: of the checkpoints.
        state: what is loaded into.
        last: leave out checkpoints after this step.

    Returns:
        The step (0 if there is no checkpoint), the `progress` saved with it, and a sentence for
        each damaged checkpoint that was passed over.

    Raises:
        InputError: if there are checkpoints but none is whole.
    """
    damaged: list[str] = []
    steps = [step for step in steps_of(folder) if last is None or step <= last]
    places = [folder / f"step-{step:08d}" for step in steps]
    for place in reversed(places):
        try:
            step = _check(place)
        except TornFile as error:
            damaged.append(f"the checkpoint {place.name} is damaged ({error})")
            continue
        safetensors.torch.load_model(state.model, str(place / "model.safetensors"))
        content = torch.load(place / "state.pt", weights_only=True, map_location="cpu")
        state.optimizer.load_state_dict(content["optimizer"])
        if state.tracker:
            state.tracker.load_state_dict(content["tracker"])
        if state.average:
            state.average.load_state_dict(content["average"])
        torch.set_rng_state(content["random"])
        if content["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(content["random_cuda"])
        progress = json.loads((place / "progress.json").read_text())
        state.batches.load_state_dict(progress.pop("position", {}))
        return step, progress, damaged
    if places and last is not None:
        raise InputError(
            f"every checkpoint in {folder} up to step {last} is damaged: {'; '.join(damaged)}. The "
            "finished run is as it was; choose another --out"
        )
    if places:
        raise InputError(
            f"every checkpoint in {folder} is damaged: {'; '.join(damaged)}. Delete that folder to "
            "start this run again"
        )
    return 0, {}, []


def steps_of(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, the last one last; copies do not count."""
    names = (re.fullmatch(r"step-(\d{8,})", place.name) for place in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def check_loadable(optimizer: Optimizer, name: str) -> None:
    """Check that what an optimizer keeps can be saved, and read again without running code.

    Args:
        optimizer: after a step.
        name: what the run calls it.

    Raises:
        InputError: if it cannot.
    """
    try:
        content = tree_map_only(torch.Tensor, lambda _: None, optimizer.state_dict())
        torch.save(content, file := io.BytesIO())
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            reason = f"it holds a {found[1]}"
        elif isinstance(error, KeyError):
            reason = "a key of it is a tensor that is no parameter"
        raise InputError(
            f"the memory of {name} cannot be saved and read again: {reason}. Keep tensors, "
            "numbers, texts, and lists or dictionaries of them, by parameter, in optimizer.state"
        ) from error


def _os_error(error: BaseException) -> OSError | None:
    """What the system said, such as that the disk is full: both writers hide it in their own."""
    if isinstance(error.__context__, OSError):  # torch
        return error.__context__
    said = re.search(r"os error (\d+)", str(error))  # safetensors
    return OSError(int(said[1]), os.strerror(int(said[1]))) if said else None


def _check(place: Path) -> int:
    """Return the step of a checkpoint, or raise `TornFile`."""
    try:
        manifest = read_json(place / "manifest.json")
        for name, expected in manifest["sha256"].items():
            if _sha256(place / name) != expected:
                raise TornFile(f"{name} is not what was written")
        return int(manifest["step"])
    except (OSError, ValueError, KeyError) as error:
        raise TornFile(f"{type(error).__name__}: {error}") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
