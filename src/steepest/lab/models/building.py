"""A model from its name and the data that it is made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from steepest.lab.data.shapes import Shape
from steepest.lab.models.family import own_model, own_sizes, own_takes_images
from steepest.lab.models.hugging_face import (
    DOOR,
    hugging_face_model,
    hugging_face_sizes,
    hugging_face_takes_images,
)
from steepest.lab.models.resizing import SMALLEST_HEAD
from steepest.lab.models.user_models import user_model, user_sizes


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
    if name.startswith(DOOR):
        return hugging_face_model(name, shape, width, depth, options)
    if is_door(name):
        return user_model(name, shape, width, depth, options)
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


def is_model_of_images(name: str) -> bool:
    """Whether a model takes images, as far as its name says; of the user's own it says nothing.

    >>> is_model_of_images("mlp"), is_model_of_images("gpt")
    (True, False)
    """
    if name.startswith(DOOR):
        return hugging_face_takes_images(name)
    return own_takes_images(name)


def is_door(name: str) -> bool:
    """Return whether a name leads out of the lab: to Hugging Face, or to the user's code."""
    return ":" in name


def smaller(
    name: str,
    shape: Shape,
    width: int | None = None,
    depth: int | None = None,
    options: Sequence[str] = (),
) -> tuple[int, int | None] | None:
    """Return the width and depth of the next smaller model, for a study that must save time.

    The width is halved while heads have 8 units or more after it, or, in a model without heads,
    while 8 units are left. Then the depth is halved. None if there is no smaller one, or if the
    model of a user takes no width.

    >>> from steepest.lab.data.shapes import TextShape
    >>> smaller("gpt", TextShape(256, 128), 64, 4), smaller("gpt", TextShape(256, 128), 8, 4)
    ((32, 4), (8, 2))
    """
    heads: int | None = None
    if name.startswith(DOOR):
        wide, deep, heads = hugging_face_sizes(name, shape, width, depth, options)
    elif is_door(name):
        wide, deep = user_sizes(name, width, depth)
    else:
        own = own_sizes(name, shape, width=width, depth=depth, options=options)
        wide, deep, heads = own.width, own.depth, getattr(own, "heads", None)
    if wide is None:
        return None
    parts = heads or 1
    if wide >= 2 * SMALLEST_HEAD * parts and wide % (4 * parts) == 0:
        return wide // 2, deep
    return (wide, deep // 2) if deep is not None and deep > 1 else None
