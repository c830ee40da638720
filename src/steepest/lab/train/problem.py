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
    batch: int | None = None
    """Sequences or images in each forward pass; by default 8 sequences, or 64 images."""
    adamw_lr: float = 4e-3
    """Learning rate of AdamW for embeddings, head and vectors, the same for every optimizer."""
    momentum: float = 0.9
    """How much of the past the matrices' updates average over; AdamW's first beta."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""
    accumulate: int = 1
    """Forward passes in each update."""
    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up. wsd: constant, then linearly over the last
    part; teon and galore: as these papers' groups train."""
    clip: float | None = None
    """Largest norm of the raw gradient over all parameters, above 0; by default none. Updates are
    never clipped."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the forward pass under autocast."""
    recompute: bool = False
    """Whether blocks are computed again in the backward pass, which takes less memory and a third
    more time."""
    compile: bool = False
    """Whether to compile the model; the optimizer is not, so no step recompiles."""
    deterministic: bool = True
    """Whether only deterministic algorithms may run. Without it, a run that is killed and goes on
    may differ in its last bits."""
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
