"""What is trained, and on what: the settings that a run and a study have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from steepest.lab.errors import InputError
from steepest.lab.models import is_model_of_images, preset_context
from steepest.lab.train.schedule import Schedule

CONTEXT = 128
"""Tokens of the longest sequence, where neither the user nor a preset says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model, its data, and where it is trained."""

    model: str = "gpt"
    """For text: gpt, llama, or a size of the papers such as gpt-124m or llama-60m. For images: mlp,
    residual-mlp, convnet, residual-convnet, random-features or linear. For both: a Hugging Face
    model such as hf:vit, hf:OWNER/NAME or hf:FOLDER (with a config.json), and your own function
    that returns a model, such as my_package.module:build."""
    width: int | None = None
    """Width of the model; by default that of the named model. Other sizes scale with it."""
    depth: int | None = None
    """Number of blocks or layers; by default that of the named model."""
    model_options: tuple[str, ...] = ()
    """More sizes and variants of the model by name, such as heads=8 mlp=swiglu; fields of the
    configuration of a Hugging Face model; arguments of your own function."""
    weights: str | None = None
    """Weights to start from: a file of this model's state dict, the folder of a checkpoint, or, for
    GPT-2 and LLaMA, a folder or a name of Hugging Face. By default they are drawn at random."""
    data: str | None = None
    """Text: stdlib (the source code of Python's standard library), reference (its language
    reference as prose), a file, a folder, .bin or .npy files of tokens, or a stream from
    huggingface.co: fineweb, c4, wikitext-103 or hub:OWNER/NAME. Images: digits, an .npz file, a
    folder with a folder for each class, cifar10, cifar100, tiny-imagenet, mnist or hub:OWNER/NAME.
    By default stdlib, or digits for models of images."""
    batches: str | None = None
    """Batches of your own in place of --data, by import path such as my_package.module:batches: a
    list of batches, a Dataset, a DataLoader or another iterable, or a function that returns one."""
    validation: str | None = None
    """What judges the model: a file or folder of the same kind of data, the word test for the test
    part of images, or batches of your own by import path. By default about a twentieth of the data
    is held out."""
    loss: str | None = None
    """A function loss(model, batch) of your own, by import path, that returns a scalar. By default
    the cross entropy of model(inputs) for batches (inputs, classes)."""
    tokenizer: str = "bytes"
    """How text becomes tokens: bytes; bpe:SIZE, a byte-pair encoding of SIZE tokens that is trained
    on the text; gpt2; a tokenizer.json; or a folder with vocab.json and merges.txt."""
    context: int | None = None
    """Longest sequence of text, in tokens; by default that of the preset, or 128."""
    batch: int | None = None
    """Sequences, images or examples in each forward pass; by default 64 for models of images, and 8
    for all others."""
    adamw_lr: float = 4e-3
    """Learning rate of AdamW for embeddings, head and vectors, the same for every optimizer."""
    momentum: float = 0.9
    """How much of the past the updates of the matrices average over; for AdamW on the matrices its
    first beta."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""
    accumulate: int = 1
    """Forward passes in each update, whose gradients are averaged."""
    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up. wsd: it is constant, then falls linearly over
    the last 40% of all steps. teon and galore: as in these two papers."""
    clip: float | None = None
    """Largest norm of the gradient over all parameters, above 0; longer gradients are shortened to
    it. By default none are."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the forward pass under autocast."""
    recompute: bool = False
    """Whether blocks are computed again in the backward pass. That takes less memory and about a
    third more time."""
    compile: bool = False
    """Whether to compile the model and its loss with torch.compile; the optimizer is not."""
    deterministic: bool = True
    """Whether only deterministic algorithms may run. Without them, runs with equal settings may
    differ in their last bits."""
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
        if self.batch is None:
            object.__setattr__(self, "batch", 64 if is_model_of_images(self.model) else 8)
        check_clip(self.clip)
        if not 0 <= self.momentum < 1:
            raise InputError(f"got momentum={self.momentum}, expected 0 or more and less than 1")
        for name in ("adamw_lr", "weight_decay"):
            check_rate(name, getattr(self, name))
        for name in ("width", "depth", "context", "batch", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"got {name}={value}, expected at least 1")

    @property
    def sequences(self) -> int:
        """Sequences or images in each forward pass."""
        assert self.batch is not None
        return self.batch


def check_rate(name: str, value: float | None) -> None:
    """Refuse a rate or a decay that is negative or not finite.

    Raises:
        InputError: with its name.
    """
    if value is not None and not 0 <= value < math.inf:
        raise InputError(f"got {name}={value}, expected a finite number of at least 0")


def check_clip(clip: float | None) -> None:
    """Refuse a norm to clip at that no gradient can have: 0 means "off" in some other programs.

    Raises:
        InputError: for 0 and less, NaN and infinity.
    """
    if clip is not None and not 0 < clip < math.inf:
        raise InputError(
            f"got clip={clip}, expected a finite number above 0; leave --clip out for no clipping"
        )
