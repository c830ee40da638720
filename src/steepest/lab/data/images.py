"""Images in memory, with their classes: what is held out, and how batches are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steepest.lab.data.documents import VALIDATION_SHARE
from steepest.lab.data.permutations import Permutations, generator_at
from steepest.lab.data.shapes import ImageShape
from steepest.lab.errors import InputError

LEAST_AUGMENTED_SIDE = 32
"""Photos of at least this side are cropped and flipped at random, unless something else is said."""


@dataclass(frozen=True)
class Labelled:
    """Images `(count, channels, side, side)` of 8 bits, and their classes `(count,)`."""

    images: NDArray[np.uint8]
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def at(self, index: NDArray[np.int64]) -> Labelled:
        """Return the images at some places."""
        return Labelled(self.images[index], self.classes[index])


class Images:
    """Images to train on, a part to judge by, and perhaps a test part that is kept apart.

    Pixels are shifted and scaled so that each channel of the training part has mean 0 and
    standard deviation 1.

    Attributes:
        name: what was asked for.
        description: what it is, in a sentence.
        sha256: of all images and classes and of the split.
        unit: "images".
        augment: whether training images are cropped and flipped at random.
    """

    unit = "images"
    bytes_per_token: float | None = None

    def __init__(
        self,
        name: str,
        description: str,
        train: Labelled,
        test: Labelled | None = None,
        judge: Labelled | None = None,
        augment: bool | None = None,
    ):
        _check(name, [part for part in (train, test, judge) if part is not None])
        if judge is None:
            train, judge = held_out_of(train)
            description += f", {len(judge):,} of {len(train) + len(judge):,} images held out"
        if test is not None and test is not judge:
            description += f", {len(test):,} test images kept apart"
        self.name, self._train, self._judge, self._test = name, train, judge, test
        channels, side = train.images.shape[1:3]
        photos = channels == 3 and side >= LEAST_AUGMENTED_SIDE
        self.augment = photos if augment is None else augment
        if self.augment:
            description += "; cropped and flipped at random in training"
        self.description = description
        self.sha256 = _sha256_of_images([train, judge, *([] if test is None else [test])])
        self._mean, deviation = map(torch.from_numpy, _moments(train.images))
        self._deviation = deviation.where(deviation > 0, torch.ones(()))

    def __str__(self) -> str:
        """Return what it is, what was left out of it, and how much it is."""
        return f"{self.description}; {len(self._train):,} images to train on"

    def shape(self, context: int | None) -> ImageShape:
        """Return channels, side and number of classes."""
        channels, side = self._train.images.shape[1:3]
        return ImageShape(channels, side, 1 + int(self._train.classes.max()))

    def training(
        self, *, batch: int, context: int | None, seed: int, parts: int = 1
    ) -> ImageBatches:
        """Return batches in which each epoch is a permutation of all training images."""
        return ImageBatches(self, batch, seed, parts)

    def validation(
        self, *, batch: int, context: int | None, count: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield at most `count` images of the part to judge by, in one order."""
        return self._batches(self._judge, batch, count)

    def test(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test images: to be scored once, when all is decided.

        Raises:
            InputError: where there is no test part.
        """
        if self._test is None:
            raise InputError(f"got {self.name}, which has no test part; score the validation part")
        return self._batches(self._test, batch, len(self._test))

    def decode(self, tokens: Sequence[int]) -> str:
        """Refuse: images have no text."""
        self._no_text()

    def encode(self, text: str) -> list[int]:
        """Refuse: images have no text."""
        self._no_text()

    def _no_text(self) -> NoReturn:
        raise InputError(f"got {self.name}, which has images; only text has tokens")

    def drawn(self, index: NDArray[np.int64], generator: np.random.Generator) -> Any:
        """Return training images and their classes, cropped and flipped if they are to be."""
        part = self._train.at(index)
        images = torch.from_numpy(part.images)
        if self.augment:
            images = cropped_and_flipped(images, generator)
        return self._scaled(images), torch.from_numpy(part.classes)

    def number_of_training_images(self) -> int:
        """Return how many images an epoch has."""
        return len(self._train)

    def _batches(self, part: Labelled, batch: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = generator_at(0, 0).permutation(len(part))[:count]  # files may be sorted by class
        for start in range(0, len(order), batch):
            rows = part.at(order[start : start + batch])
            yield self._scaled(torch.from_numpy(rows.images)), torch.from_numpy(rows.classes)

    def _scaled(self, images: Tensor) -> Tensor:
        mean, deviation = (x.float()[:, None, None] for x in (self._mean, self._deviation))
        return images.float().sub_(mean).div_(deviation)


class ImageBatches:
    """Training batches of images: a function of seed, step and part."""

    def __init__(self, images: Images, size: int, seed: int, parts: int):
        self.images, self.size, self.seed, self.parts = images, size, seed, parts
        self.order = Permutations(images.number_of_training_images(), seed)

    def batch(self, step: int, part: int = 0) -> tuple[Tensor, Tensor]:
        """Return images `(batch, channels, side, side)` and classes `(batch,)`."""
        start = (step * self.parts + part) * self.size
        index = self.order.window(start, self.size)
        return self.images.drawn(index, generator_at(self.seed, step, part, 1))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: seed and step say all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


def cropped_and_flipped(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Return each image shifted by up to an eighth of its side, half of them mirrored.

    The border that comes into view is black. This is the usual augmentation of small photos (He et
    al., Deep Residual Learning, 2016, section 4.2: 4 pixels of 32).

    Args:
        images: `(count, channels, side, side)`, of 8 bits.
        generator: where the shifts and the choice come from.

    >>> one = torch.arange(1, 257).reshape(1, 1, 16, 16).to(torch.uint8)
    >>> cropped_and_flipped(one, generator_at(0, 0)).shape
    torch.Size([1, 1, 16, 16])
    """
    count, _, side, _ = images.shape
    border = side // 8
    down, right = torch.from_numpy(generator.integers(0, 2 * border + 1, size=(2, count)))
    mirrored = torch.from_numpy(generator.random(count) < 0.5)
    padded = torch.nn.functional.pad(images, (border, border, border, border))
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # a view of all shifts of all images
    cropped = windows[torch.arange(count), :, down, right]
    return torch.where(mirrored[:, None, None, None], cropped.flip(3), cropped)


def held_out_of(part: Labelled) -> tuple[Labelled, Labelled]:
    """Return what stays and what is held out: a twentieth of each class, at least one image.

    Nothing is held out of a class with a single image.
    """
    order = generator_at(0, 0).permutation(len(part))
    classes = part.classes[order]
    chosen = np.zeros(len(part), dtype=bool)
    for name in np.unique(classes):
        members = order[classes == name]
        size = max(1, round(VALIDATION_SHARE * len(members))) if len(members) > 1 else 0
        chosen[members[:size]] = True
    if not chosen.any():
        raise InputError("got one image of each class, expected several, to hold some out")
    return part.at(np.flatnonzero(~chosen)), part.at(np.flatnonzero(chosen))


def labelled(name: str, images: NDArray[Any], classes: NDArray[Any]) -> Labelled:
    """Return images with their channels first, and their classes as whole numbers.

    Args:
        name: what to call them in an error.
        images: of 8 bits: (count, side, side), (count, side, side, channels) or (count, channels,
            side, side).
        classes: whole numbers, `(count,)` or `(count, 1)`.

    Raises:
        InputError: for other shapes and types.
    """
    if images.dtype != np.uint8:
        raise InputError(f"{name} has images of {images.dtype}, expected whole numbers of 8 bits")
    shape = images.shape
    if len(shape) == 3:
        images = images[:, None]
    elif len(shape) == 4 and shape[3] in (1, 3) and shape[1] == shape[2]:
        images = images.transpose(0, 3, 1, 2)
    elif len(shape) != 4 or shape[1] not in (1, 3):
        raise InputError(
            f"{name} has images of shape {shape}, expected (count, side, side), (count, side, "
            "side, channels) or (count, channels, side, side), with 1 or 3 channels"
        )
    if images.shape[2] != images.shape[3]:
        raise InputError(
            f"{name} has images of {images.shape[2]} x {images.shape[3]} pixels, expected squares; "
            "crop or pad them"
        )
    if classes.ndim == 2 and classes.shape[1] == 1:
        classes = classes[:, 0]
    if classes.dtype.kind not in "iu" or classes.shape != shape[:1]:
        raise InputError(
            f"{name} has classes of {classes.dtype} and shape {classes.shape}, expected a whole "
            f"number for each of its {shape[0]} images"
        )
    return Labelled(np.ascontiguousarray(images), classes.astype(np.int64))


def _check(name: str, parts: list[Labelled]) -> None:
    train = parts[0]
    for part in parts:
        if not len(part):
            raise InputError(f"{name} has no images in one of its parts, expected some")
        if part.classes.min() < 0:
            raise InputError(f"{name} has a class {part.classes.min()}, expected 0 or more")
        if part.images.shape[1:] != train.images.shape[1:]:
            raise InputError(
                f"{name} has images of shape {train.images.shape[1:]} to train on and of shape "
                f"{part.images.shape[1:]} to judge by, expected the same"
            )
    classes = np.unique(train.classes)
    if len(classes) < 2:
        raise InputError(
            f"{name} has images of one class only, number {classes[0]}; expected at least two"
        )
    largest = max(int(part.classes.max()) for part in parts)
    if largest > classes[-1]:
        raise InputError(
            f"{name} has class {largest} to judge by, but its training images have classes up to "
            f"{classes[-1]} only"
        )


def _moments(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel, from how often it has each of its 256 values."""
    count, channels = images.shape[:2]
    often = np.zeros((channels, 256))
    for start in range(0, count, 1024):  # so that no large array is needed
        for channel in range(channels):
            part = images[start : start + 1024, channel]
            often[channel] += np.bincount(part.ravel(), minlength=256)
    share, values = often / often[0].sum(), np.arange(256)
    mean = share @ values
    return mean, np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))


def _sha256_of_images(parts: list[Labelled]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.images.shape} ".encode())
        digest.update(np.ascontiguousarray(part.images).data)
        digest.update(part.classes.data)
    return digest.hexdigest()
