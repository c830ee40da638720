"""Images from where they are: embedded digits, an `.npz` file, a folder with a folder a class."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steepest.lab.data.images import Labelled, labelled
from steepest.lab.errors import InputError
from steepest.lab.memory import check_fits

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_KEYS = (("x_train", "y_train"), ("images", "labels"))
TrainAndTest = tuple[Labelled, Labelled | None]
"""A training part, and the test part if there is one."""


def embedded_digits() -> TrainAndTest:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels.

    Raises:
        InputError: where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits come with scikit-learn, which is not installed; install it with: "
            "pip install 'steepest[report]'"
        ) from error
    source = load_digits()
    return labelled("digits", source.images.astype(np.uint8), source.target), None


def in_npz(path: Path) -> TrainAndTest:
    """Return the images of an `.npz` file: x_train, y_train, x_test, y_test, or images, labels.

    Raises:
        InputError: for a torn file, for other names, and as `labelled`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file)
            for x, y in _KEYS:
                if x in names and y in names:
                    train = labelled(str(path), file[x], file[y])
                    test = None
                    if "x_test" in names and "y_test" in names:
                        test = labelled(f"the test part of {path}", file["x_test"], file["y_test"])
                    return train, test
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise InputError(f"{path} is torn, or no .npz file ({error}); write it again") from error
    raise InputError(
        f"{path} has arrays named {', '.join(names) or 'nothing'}, expected x_train and y_train "
        "(and x_test and y_test), or images and labels"
    )


def is_image_folder(folder: Path) -> bool:
    """Whether most files below a folder are images in folders of their own."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."]
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and p.parent != folder]
    return 2 * len(images) > len(files)


def in_folder(folder: Path) -> TrainAndTest:
    """Return the images of a folder that has a folder for each class, or `train` and `test` of it.

    Classes are numbered in the order of their names.

    Raises:
        InputError: for an empty class, for files that are no images, for images of several sizes.
    """
    if (folder / "train").is_dir():
        names = _class_names(folder / "train")
        test = folder / "test"
        train = _images_in(folder / "train", names)
        return train, _images_in(test, names) if test.is_dir() else None
    return _images_in(folder, _class_names(folder)), None


def _class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


def _images_in(folder: Path, names: list[str]) -> Labelled:
    files = [_files_of_class(folder / name) for name in names]
    paths = [path for group in files for path in group]
    first = pixels_at(paths[0])
    check_fits(f"{len(paths):,} images", len(paths) * first.nbytes, "give fewer or smaller ones")
    images = [pixels_at(path) for path in paths]
    colours = max(image.ndim for image in images) == 3
    if colours:
        images = [np.repeat(x[..., None], 3, axis=2) if x.ndim == 2 else x for x in images]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise InputError(
                f"{path} has {image.shape[1]} x {image.shape[0]} pixels, but {paths[0]} has "
                f"{images[0].shape[1]} x {images[0].shape[0]}; give all images one size"
            )
    classes = np.repeat(np.arange(len(names)), [len(group) for group in files])
    return labelled(str(folder), np.stack(images), classes)


def _files_of_class(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not there, expected images of the class {folder.name}")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"the folder {folder} of a class has no images; fill it, or remove it")
    return paths


def pixels_at(source: Any) -> NDArray[np.uint8]:
    """Return the pixels of an image file: (side, side) where it is grey, else (side, side, 3).

    Raises:
        InputError: where Pillow is not installed, or cannot read the file.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InputError(
            "image files need Pillow, which is not installed; install it with: "
            "pip install 'steepest[data]'"
        ) from error
    try:
        with Image.open(source) as image:
            return pixels_of(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"could not read {source} as an image: {error}") from error


def pixels_of(image: Any) -> NDArray[np.uint8]:
    """Return the pixels of a Pillow image: grey where it is, else red, green and blue."""
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
