"""The paper's networks on a few images: no biases, ReLU between, all images in each step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steepest.lab.data import load

ImageBatch = tuple[Tensor, Tensor]


class FewImages(NamedTuple):
    """Images (count, channels, side, side) and their classes (count,); how many classes there are.

    Pixels have mean 0 and standard deviation 1.
    """

    batch: ImageBatch
    classes: int


def few_images(source: str, count: int) -> FewImages:
    """Return the same images for every seed.

    Args:
        source: images as `--data` takes them.
        count: how many.
    """
    device = torch.get_default_device()
    with torch.device("cpu"):  # data are prepared there
        images: Any = load(source, augment=False)
        pixels, classes = images.training(batch=count, context=None, seed=0).batch(0)
    return FewImages((pixels.to(device), classes.to(device)), images.shape(None).classes)


def bias_free_mlp(images: FewImages, hidden: Sequence[int]) -> nn.Sequential:
    """Return a new network with these hidden layers, as PyTorch draws its weights."""
    sizes = (images.batch[0][0].numel(), *hidden, images.classes)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cross_entropy_of(model: nn.Module, batch: ImageBatch) -> Tensor:
    """Return the mean cross entropy."""
    images, classes = batch
    return nn.functional.cross_entropy(model(images), classes)
