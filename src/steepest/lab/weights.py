"""Weights from a file into a model."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from steepest.lab.errors import InputError

PREFIXES = ("module.", "_orig_mod.")
"""Put before names by data parallelism and `torch.compile`."""
INSIDE = ("state_dict", "model", "model_state_dict")
"""Keys under which a checkpoint holds the weights of its model."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict, as `torch.save` or safetensors write it, into a model.

    Names may have the prefixes of data parallelism and `torch.compile`; the state dict may be an
    entry "state_dict", "model" or "model_state_dict" of what the file holds.

    Raises:
        InputError: for a file that cannot be read or holds no state dict, and for names and shapes
            that are not those of the model.
    """
    state = {_plain(name): value for name, value in _state(path).items()}
    ours = {_plain(name): (name, value) for name, value in model.state_dict().items()}
    if unknown := [name for name in state if name not in ours]:
        close = difflib.get_close_matches(unknown[0], list(ours), n=1)
        hint = (
            f"did you mean {close[0]!r}?" if close else f"it has {', '.join(list(ours)[:4])}, ..."
        )
        raise InputError(
            f"got {unknown[0]!r} in {path} ({len(unknown)} of {len(state)} names), which the model "
            f"does not have; {hint}"
        )
    for name, value in state.items():
        if value.shape != ours[name][1].shape:
            raise InputError(
                f"got {name!r} of shape {tuple(value.shape)} in {path} and "
                f"{tuple(ours[name][1].shape)} in the model, expected the model that was saved"
            )
    loaded = {ours[name][1].data_ptr() for name in state}  # tied weights are saved once
    missing = [name for name, (_, value) in ours.items() if name not in state]
    missing = [name for name in missing if ours[name][1].data_ptr() not in loaded]
    if missing:
        raise InputError(
            f"got {path} without {missing[0]!r} ({len(missing)} of {len(ours)} names are missing), "
            "expected all weights of the model"
        )
    model.load_state_dict({ours[name][0]: value for name, value in state.items()}, strict=False)


def _plain(name: str) -> str:
    """The name without prefixes, wherever they are."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix).replace(f".{prefix}", ".")
    return name if not name.startswith(PREFIXES) else _plain(name)


def _state(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"got {path}, which cannot be read ({error.strerror or error}); expected a file of "
            "weights, from torch.save or safetensors"
        ) from error
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise InputError(
            f"got {path}, which holds no weights ({reason}); expected a state_dict from torch.save "
            "or safetensors"
        ) from error
    if isinstance(content, Mapping) and not _is_state(content):
        content = next((content[key] for key in INSIDE if _is_state(content.get(key))), content)
    if not _is_state(content):
        keys = list(map(str, content))[:4] if isinstance(content, Mapping) else []
        named = f" with {', '.join(keys)}" if keys else ""
        raise InputError(
            f"got {path}, which holds a {type(content).__name__}{named}; expected a state_dict, or "
            f"a dict with one under {', '.join(INSIDE)}"
        )
    return content


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(value, Tensor) for value in content.values())
    )
