"""Every model of the lab by its name; each says its record in its own file.

A class that is defined elsewhere joins with its `records`, or with `add_model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from steepest.lab.arguments import did_you_mean
from steepest.lab.data.shapes import ImageShape, Shape, TextShape
from steepest.lab.errors import InputError
from steepest.lab.models.convnet import ConvNet
from steepest.lab.models.gpt import GPT
from steepest.lab.models.llama import Llama
from steepest.lab.models.mlp import MLP
from steepest.lab.models.model_record import ModelRecord
from steepest.lab.models.presets import PRESETS
from steepest.lab.models.resizing import resized
from steepest.lab.models.theory import Linear, RandomFeatures

_MODELS: dict[str, ModelRecord] = {}
MODELS: Mapping[str, ModelRecord] = MappingProxyType(_MODELS)
"""From a name to its record."""


def add_model(kind: type[nn.Module]) -> type[nn.Module]:
    """Add the `records` of a class to the models, also as a decorator; return the class.

    Raises:
        ValueError: for a name that a preset has, or another model.
    """
    for record in vars(kind)["records"]:
        if record.name in _MODELS or record.name in PRESETS:
            raise ValueError(f"got the name {record.name!r}, which a model has already")
        _MODELS[record.name] = record
    return kind


_KINDS: tuple[type[nn.Module], ...] = (GPT, Llama, MLP, ConvNet, RandomFeatures, Linear)
for _kind in _KINDS:
    add_model(_kind)


def own_takes_images(name: str) -> bool:
    """Whether a name is that of a model of the lab, or a preset, that takes images."""
    family = PRESETS[name].family if name in PRESETS else name
    return family in _MODELS and _MODELS[family].takes is ImageShape


def own_model(
    name: str,
    shape: Shape,
    *,
    width: int | None = None,
    depth: int | None = None,
    options: Sequence[str] = (),
) -> nn.Module:
    """Return a model of the lab, or a preset, for data of a shape; see `build_model`."""
    sizes = own_sizes(name, shape, width=width, depth=depth, options=options)
    preset = PRESETS.get(name)
    record = _record(name)
    return record.build(sizes, preset.shape if preset and shape is None else shape)


def own_sizes(
    name: str,
    shape: Shape,
    *,
    width: int | None = None,
    depth: int | None = None,
    options: Sequence[str] = (),
) -> Any:
    """Return its sizes, a frozen dataclass.

    Raises:
        InputError: for an unknown name, data that it is not made for, and sizes that cannot be.
    """
    record, preset = _record(name), PRESETS.get(name)
    shape = preset.shape if preset and shape is None else shape
    if not isinstance(shape, record.takes):
        raise InputError(
            f"got the model {name!r}, which takes {_WORDS[record.takes]}, for {_WORDS[type(shape)]}"
            "; expected one of "
            + ", ".join(n for n, r in _MODELS.items() if isinstance(shape, r.takes))
            if shape is not None
            else f"got the model {name!r}, which has to know the shape of the data, for batches of "
            "your own; expected a model of your own, such as my_package.module:build, or a preset"
        )
    sizes = resized(name, preset.sizes if preset else record.sizes, width, depth, options)
    if isinstance(shape, TextShape) and any(f.name == "context" for f in fields(sizes)):
        sizes = replace(sizes, context=shape.context)
    sizes.count(shape)  # which refuses images that it cannot take
    return sizes


_WORDS: dict[type, str] = {TextShape: "text", ImageShape: "images"}


def _record(name: str) -> ModelRecord:
    family = PRESETS[name].family if name in PRESETS else name
    if family not in _MODELS:
        names = [*_MODELS, *PRESETS]
        raise InputError(
            f"got the model {name!r}, which is none of the lab's{did_you_mean(name, names)}; "
            f"expected one of {', '.join(names)}, a Hugging Face model such as hf:gpt2, or a "
            "function of your own such as my_package.module:build"
        )
    return _MODELS[family]
