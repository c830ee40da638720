"""What is trained, and on what: the settings that a run and a study have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steepest.lab.errors import InputError
from steepest.lab.models import is_model_of_images, preset_context

CONTEXT = 128
"""Tokens of the longest sequence, where neither the user nor a preset says otherwise."""

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model, its data, and where it is trained."""

    model: str = "gpt"
    """gpt, llama, mlp, residual-mlp, convnet, residual-convnet, random-features, linear; a size of
    the papers, such as gpt-124m or llama-60m; hf:CONFIG_OR_NAME, such as hf:vit or a folder with a
    config.json; or your own function, such as my_package.module:build."""
    width: int | None = None
    """Width of the model; by default that of the model's name."""
    depth: int | None = None
    """Number of blocks or layers; by default that of the model's name."""
    model_options: tuple[str, ...] = ()
    """More sizes and variants of the model by name, such as heads=8 mlp=swiglu."""
    weights: str | None = None
    """Weights to start from: a folder or a name of Hugging Face, for GPT-2 and LLaMA; or a file of
    this model's state dict."""
    data: str | None = None
    """Text: "stdlib", the source code of Python's standard library; "reference", its language
    reference as prose; a file, a folder, or .bin files of tokens; fineweb, c4, wikitext-103 or
    hub:NAME as streams. Images: digits, an .npz file, a folder of class folders, cifar10, cifar100,
    tiny-imagenet, mnist. By default stdlib, or digits for models of images."""
    batches: str | None = None
    """Batches of your own in place of data: my_package.module:batches, a list, a Dataset or another
    iterable, or a function that returns one."""
    validation: str | None = None
    """What judges, in place of a part of the data that is held out: a file of text, or batches of
    your own by import path."""
    loss: str | None = None
    """A function loss(model, batch) -> scalar of your own, by import path; by default the cross
    entropy."""
    tokenizer: str = "bytes"
    """bytes; bpe:SIZE, trained on the text; gpt2; a tokenizer.json; or a folder with vocab.json and
    merges.txt."""
    context: int | None = None
    """Longest sequence of text, in tokens; by default that of the preset, or 128."""
    batch: int = 8
    """Sequences or images in each forward pass."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": the accelerator if there is one."""

    def __post_init__(self) -> None:
        own = self.batches is not None
        if own and self.data is not None:
            raise InputError("got --data and --batches, expected one of them")
        if not own and self.data is None:
            images = is_model_of_images(self.model)
            object.__setattr__(self, "data", "digits" if images else "stdlib")
        if self.context is None:
            object.__setattr__(self, "context", preset_context(self.model) or CONTEXT)
        for name in ("width", "depth", "context", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"got {name}={value}, expected at least 1")
