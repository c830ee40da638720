"""Parts of a diagnosis that are finished, a line each, so that a stopped one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from steepest.diagnosis.descent import Descent
from steepest.diagnosis.plan import modern_geometry
from steepest.diagnosis.race import RaceResult
from steepest.files import read_lines
from steepest.statistics import Interval


class FinishedParts:
    """Results by name, in a file; lines that are torn, or of other weights, do not count.

    Args:
        path: the file.
        of: the fingerprint of weights, batches and losses.
    """

    def __init__(self, path: Path, of: str):
        self._path, self._of = path, of
        self._known: dict[str, Any] = {}
        for entry in read_lines(path)[0] if path.is_file() else []:
            try:
                if entry["sha256"] == _digest(of, entry["name"], entry["result"]):
                    self._known[entry["name"]] = _loaded(entry["name"], entry["result"])
            except (ValueError, KeyError, TypeError):
                continue

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what is known under a name, or compute it and keep it."""
        if name not in self._known:
            self._known[name] = result = compute()
            plain = _plain(result)
            line = {"name": name, "result": plain, "sha256": _digest(self._of, name, plain)}
            before = self._path.read_bytes() if self._path.is_file() else b""
            torn = "\n" if before and not before.endswith(b"\n") else ""
            with self._path.open("a") as file:
                file.write(f"{torn}{json.dumps(line)}\n")
        return self._known[name]


def fingerprint(model: nn.Module, batches: Sequence[Any], losses: Sequence[float]) -> str:
    """Return a hash of weights, batches, and the losses that tell of the code."""
    hashed = hashlib.sha256(repr([float(loss).hex() for loss in losses]).encode())
    for name, value in model.state_dict().items():
        hashed.update(name.encode())
        _update(hashed, value)
    for leaf in tree_leaves(list(batches)):
        _update(hashed, leaf)
    return hashed.hexdigest()


def _update(hashed: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        hashed.update(repr((value.dtype, tuple(value.shape))).encode())
        hashed.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    else:
        hashed.update(repr(value).encode())


def _digest(of: str, name: str, result: Any) -> str:
    return hashlib.sha256(json.dumps([of, name, result]).encode()).hexdigest()


def _plain(result: Any) -> Any:
    if isinstance(result, dict):  # descents by geometry
        return {
            name: {"sizes": list(walk.sizes), "falls": walk.falls.tolist()}
            for name, walk in result.items()
        }
    return [asdict(raced) | {"decreases": list(raced.decreases)} for raced in result]


def _loaded(name: str, result: Any) -> Any:
    if name.startswith("descent "):
        return {
            modern_geometry(name): Descent(
                tuple(walk["sizes"]), torch.tensor(walk["falls"], dtype=torch.float64)
            )
            for name, walk in result.items()
        }
    return tuple(
        RaceResult(
            **{
                **raced,
                "geometry": modern_geometry(raced["geometry"]),
                "decreases": tuple(raced["decreases"]),
                "log_ratio": None if raced["log_ratio"] is None else Interval(**raced["log_ratio"]),
            }
        )
        for raced in result
    )
