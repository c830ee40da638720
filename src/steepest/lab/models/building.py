"""A model from its name and the data that it is made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from steepest.lab.data.shapes import Shape
from steepest.lab.models.family import own_model, own_sizes


def build_model(
    name: str,
    shape: Shape,
    *,
    width: int | None = None,
    depth: int | None = None,
    options: Sequence[str] = (),
) -> nn.Module:
    """Return a model with fresh weights, drawn from torch's generator, on the default device.

    Args:
        name: a model of the lab ("gpt", "llama", "mlp", "convnet", ...), a preset ("gpt-124m"),
            "hf:" and a Hugging Face model (a path, a type such as "resnet", or a name on the hub),
            or a function of the user's own by import path ("my_package.module:build").
        shape: of the data; None for batches of the user's own.
        width, depth: by default those of the model. What follows from the width scales with it.
        options: such as "heads=8" and "mlp=swiglu".

    Returns:
        `model(inputs)` gives logits, as a tensor or as `.logits`: `(batch, context, vocabulary)`
        for text, `(batch, classes)` for images.

    Raises:
        InputError: for an unknown name or option, data that the model is not made for, and sizes
            that cannot be.

    >>> from steepest.lab.data.shapes import TextShape
    >>> model = build_model("llama-60m", TextShape(vocabulary=256, context=32), width=64, depth=1)
    >>> model.config.heads, model.config.inner
    (1, 176)
    """
    return own_model(name, shape, width=width, depth=depth, options=options)


def sizes_of(
    name: str,
    shape: Shape,
    *,
    width: int | None = None,
    depth: int | None = None,
    options: Sequence[str] = (),
) -> Any | None:
    """Return the sizes of a model of the lab, without making it; None behind a door.

    They are a frozen dataclass with `count(shape)`, the numbers of parameters and constants.

    Raises:
        InputError: as `build_model`.
    """
    if is_door(name):
        return None
    return own_sizes(name, shape, width=width, depth=depth, options=options)


def is_door(name: str) -> bool:
    """Return whether a name leads out of the lab: to Hugging Face, or to the user's code."""
    return ":" in name
