"""From a name or a path to data: the one door, but for batches of the user's own."""

from __future__ import annotations

import os
from pathlib import Path

from steepest.lab.arguments import did_you_mean
from steepest.lab.data.documents import (
    EMBEDDED,
    Documents,
    documents_at,
    embedded_documents,
    files_below,
    hold_out,
    judged_by,
)
from steepest.lab.data.hub import HUB, HUB_PREFIX, hub_images, hub_set, hub_text
from steepest.lab.data.image_files import (
    TrainAndTest,
    embedded_digits,
    in_folder,
    in_npz,
    is_image_folder,
)
from steepest.lab.data.images import Images
from steepest.lab.data.protocols import Data
from steepest.lab.data.stream import Stream
from steepest.lab.data.text import Corpus, corpus_of_documents, corpus_of_token_files
from steepest.lab.data.token_files import SUFFIXES
from steepest.lab.errors import InputError

NAMES = ("digits", *HUB)
"""Data sets with a name, beside the embedded texts."""


def load(
    source: str = "stdlib",
    *,
    tokenizer: str = "bytes",
    validation: str | None = None,
    augment: bool | None = None,
) -> Data:
    """Return the data of a name, or of the file or folder at a path.

    Args:
        source: "stdlib" or "reference" (text that comes with Python), "digits" (images that come
            with scikit-learn), or a path: a text file, a folder of them, tokens (`.bin`, `.npy`,
            or a folder of them), images (`.npz`, or a folder with a folder for each class). From
            huggingface.co: "fineweb", "c4", "wikitext-103", "cifar10", "cifar100",
            "tiny-imagenet", "mnist", "hub:OWNER/NAME" or "hub:OWNER/NAME:CONFIGURATION"; from
            local .parquet or .jsonl files, in the same way, "hub:FOLDER".
        tokenizer: of text: "bytes"; "bpe:4096", or another number of tokens, trained on the
            training text; "gpt2"; a folder with vocab.json and merges.txt; a tokenizer.json. Of
            token files, the one that wrote them.
        validation: data of the same kind to judge by; then nothing is held out. "test" stands for
            the test part of images.
        augment: whether training images are cropped and flipped at random; by default colour
            images of at least 32 x 32 pixels are.

    Raises:
        InputError: for data that is missing, empty or torn, for a device or a pipe, without
            network where it is needed, and where a library that is needed is not installed.

    >>> data = load("digits")
    >>> data.shape(None)
    ImageShape(channels=1, side=8, classes=10)
    >>> images, classes = data.training(batch=4, context=None, seed=0).batch(step=0)
    >>> images.shape, classes.shape
    (torch.Size([4, 1, 8, 8]), torch.Size([4]))
    """
    if source == "digits":
        description = "scikit-learn's digits of 8 x 8 pixels"
        return _images(source, description, embedded_digits(), validation, augment)
    if source in HUB or source.startswith(HUB_PREFIX):
        return _from_hub(source, tokenizer, validation, augment)
    path = None if source in EMBEDDED else existing(source)
    try:
        if path is not None and _has_images(path):
            description = f"images of the {'folder' if path.is_dir() else 'file'} {path.name}"
            return _images(source, description, _images_at(path), validation, augment)
        return _text(source, path, tokenizer, validation)
    except OSError as error:
        raise InputError(f"could not read {error.filename or path}: {error.strerror}") from error


def judged_by_text(data: Data, source: str) -> Corpus:
    """Return the same tokens to train on, and another text to judge by, in the same tokenizer.

    This is how a test text is scored once, after all has been decided on the validation text.

    Args:
        data: text in memory, with a known tokenizer.
        source: "stdlib", "reference", or the path of a text file or a folder of them.

    Raises:
        InputError: as `load`, for tokens without a tokenizer, and for images and streams.

    >>> corpus = load("reference")
    >>> judged_by_text(corpus, "reference").train_tokens is corpus.train_tokens
    True
    """
    if not isinstance(data, Corpus):
        raise InputError(f"got {data.name}, expected text from a file, a folder or Python itself")
    return data.judged_by([text for _, text in _documents(source)[1]], source)


def existing(source: str) -> Path:
    """Return the path of data, or say that there is none.

    Raises:
        InputError: for a path that leads nowhere, or to a device, a pipe or a socket.
    """
    path = Path(os.path.expanduser(source))
    try:
        if not source or not path.exists():  # Path("") would be the current folder
            raise InputError(
                f"got data {source!r}, which is neither {' nor '.join(map(repr, EMBEDDED))} nor an "
                f"existing path{did_you_mean(source, [*EMBEDDED, *NAMES])}; give one of these, or "
                f"{', '.join(NAMES)}, or a text file, a folder, a .bin, .npy or .npz file"
            )
        if not path.is_dir() and not path.is_file():
            raise InputError(
                f"{path} is a device, a pipe or a socket, which cannot be read twice; write the "
                "text to a file, and name that file"
            )
    except OSError as error:
        raise InputError(f"could not read {error.filename or path}: {error.strerror}") from error
    return path


def _has_images(path: Path) -> bool:
    return is_image_folder(path) if path.is_dir() else path.suffix == ".npz"


def _from_hub(
    source: str, tokenizer: str, validation: str | None, augment: bool | None
) -> Images | Stream:
    place = hub_set(source)
    if place.image is not None:
        return _images(source, f"images of {place.path}", hub_images(place), validation, augment)
    judge = None if validation is None else [text for _, text in _documents(validation)[1]]
    return hub_text(source, place, tokenizer, judge)


def _images_at(path: Path) -> TrainAndTest:
    return in_folder(path) if path.is_dir() else in_npz(path)


def _images(
    source: str,
    description: str,
    parts: TrainAndTest,
    validation: str | None,
    augment: bool | None,
) -> Images:
    train, test = parts
    judge = None
    if validation == "test":
        if test is None:
            raise InputError(f"{source} has no test part to judge by; leave out --validation test")
        judge, description = test, f"{description}, judged by its {len(test):,} test images"
    elif validation is not None:
        judge, _ = _images_at(existing(validation))
        description = f"{description}, judged by {len(judge):,} images of {validation}"
    return Images(source, description, train, test, judge, augment)


def _text(source: str, path: Path | None, tokenizer: str, validation: str | None) -> Corpus:
    if path is not None and (files := _token_files(path)):
        judge = None if validation is None else _token_files(existing(validation))
        if validation is not None and judge is None:
            raise InputError(f"got text in {validation}, expected token files, as in {source}")
        return corpus_of_token_files(source, *files, tokenizer, judge[0] if judge else None)
    description, documents = _documents(source)
    if validation is None:
        return corpus_of_documents(source, description, hold_out(documents), tokenizer)
    judge_documents = _documents(validation)[1]
    return corpus_of_documents(
        source, description, judged_by(documents, judge_documents, validation), tokenizer
    )


def _documents(source: str) -> tuple[str, Documents]:
    return embedded_documents(source) if source in EMBEDDED else documents_at(existing(source))


def _token_files(path: Path) -> tuple[list[Path], list[str]] | None:
    """Files of tokens at a path, and sentences about others; None where it has none."""
    if path.is_file():
        return ([path], []) if path.suffix in SUFFIXES else None
    files, notes = files_below(path)
    tokens = [p for p in files if p.suffix in SUFFIXES]
    if texts := len(files) - len(tokens):
        notes.append(f"{texts} files left out: no tokens")
    return (tokens, notes) if tokens else None
