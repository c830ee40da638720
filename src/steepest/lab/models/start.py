"""Weights that a model starts from: of a file, or of Hugging Face."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from steepest.lab.errors import InputError
from steepest.lab.models.gpt import GPT
from steepest.lab.models.llama import Llama
from steepest.lab.weights import load_weights

SAVED = "model.safetensors"


def load_start(model: nn.Module, source: str) -> None:
    """Load weights into a model.

    Args:
        model: any model; a GPT or a LLaMA of the lab also takes weights in Hugging Face's format.
        source: a file with a state dict, a folder that `save_pretrained` or a checkpoint wrote, or
            for GPT-2 and LLaMA a name on the hub.

    Raises:
        InputError: for a source without weights, and for names and shapes that are not the model's.
    """
    path = Path(source)
    if path.is_file():
        load_weights(model, path)
    elif isinstance(model, GPT | Llama) and not (
        (path / SAVED).is_file() and not (path / "config.json").is_file()
    ):
        from steepest.lab.models.exchange import from_hugging_face

        loaded = from_hugging_face(source)
        ours, theirs = _form(model), _form(loaded)
        if type(loaded) is not type(model) or ours != theirs:
            different = [key for key in theirs if ours.get(key) != theirs[key]]
            raise InputError(
                f"got weights={source!r} of a {type(loaded).__name__} with "
                f"{', '.join(f'{key}={theirs[key]}' for key in different)}, for a "
                f"{type(model).__name__} with "
                f"{', '.join(f'{key}={ours[key]}' for key in different if key in ours)}; choose "
                "the same model by --model, --width, --depth, --context and --model-options, and "
                "the same tokenizer"
            )
        model.load_state_dict(loaded.state_dict())
    elif (path / SAVED).is_file():
        load_weights(model, path / SAVED)
    else:
        raise InputError(
            f"got weights={source!r}, which is no file and no folder with a {SAVED}; expected one"
        )


def _form(model: GPT | Llama) -> dict[str, Any]:
    """All that has to be the same, for weights to fit and to mean the same."""
    form = {**asdict(model.config.parts), "vocabulary": model.embedding.num_embeddings}
    if model.position is None:
        del form["context"]  # positions without weights
    return form
