"""Data sets of huggingface.co, through `datasets`: text is streamed, images are read whole."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steepest.lab.data.cache import cached
from steepest.lab.data.documents import SEPARATOR, VALIDATION_SHARE
from steepest.lab.data.hub_access import hub_answers
from steepest.lab.data.image_files import TrainAndTest, pixels_of
from steepest.lab.data.images import Labelled, labelled
from steepest.lab.data.stream import Shards, Stream
from steepest.lab.data.tokenizers import Tokenizer, joined, tokenizer_for
from steepest.lab.errors import InputError

HUB_PREFIX = "hub:"
HELD_OUT_DOCUMENTS = 1000
"""Of a stream without a validation split, or of this split, at most."""
TRAINED_ON = 10_000_000
"""Bytes of the first documents that a byte-pair encoding is trained on."""
_FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@dataclass(frozen=True)
class HubSet:
    """Where a data set is, and what its columns are called.

    Attributes:
        path: its owner and name on the hub, or a local folder of `.parquet` or `.jsonl` files.
        configuration: its part, where it has several.
        image: the column of images; None for text, which is in the column `text`.
        label: the column of their classes.
        judge: the split to judge a text by, or the test images; None where there is none.
        lines: whether each entry is a line of a text.
    """

    path: str
    configuration: str | None = None
    image: str | None = None
    label: str = "label"
    judge: str | None = None
    lines: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return Path(self.path).expanduser().is_dir()


HUB = {
    "fineweb": HubSet("HuggingFaceFW/fineweb", "sample-10BT"),
    "c4": HubSet("allenai/c4", "en", judge="validation"),
    "wikitext-103": HubSet(
        "Salesforce/wikitext", "wikitext-103-raw-v1", judge="validation", lines=True
    ),
    "cifar10": HubSet("uoft-cs/cifar10", image="img", judge="test"),
    "cifar100": HubSet("uoft-cs/cifar100", image="img", label="fine_label", judge="test"),
    "tiny-imagenet": HubSet("zh-plus/tiny-imagenet", image="image", judge="valid"),
    "mnist": HubSet("ylecun/mnist", image="image", judge="test"),
}
"""Data sets by their short names."""


def hub_set(source: str) -> HubSet:
    """Return where a set is, and its columns.

    Args:
        source: a short name, "hub:OWNER/NAME", "hub:OWNER/NAME:CONFIGURATION" or "hub:FOLDER".

    Raises:
        InputError: for a set that has neither text nor images with classes, and without network.
    """
    if source in HUB:
        return HUB[source]
    folder = source.removeprefix(HUB_PREFIX)
    path, _, configuration = folder.partition(":")
    place = HubSet(folder) if HubSet(folder).is_local else HubSet(path, configuration or None)
    if not folder:
        raise InputError(f"got {source!r}, expected a name or a folder behind it: hub:OWNER/NAME")
    if Path(folder).expanduser().is_file():
        raise InputError(
            f"got {source!r}, but {folder} is a file; expected its folder, or for a text or an "
            ".npz file its path alone"
        )
    if not place.is_local and re.match(r"[./~]", path):
        raise InputError(f"got {source!r}, but {folder} is no folder; give one that is there")
    splits = _splits(place)
    entry: dict[str, Any] = next(_entries(source, _opened(place, "train")), {})
    if isinstance(entry.get("text"), str):
        judge = _first_of(("validation", "valid"), splits)
        return HubSet(place.path, place.configuration, judge=judge)
    image = next((key for key, value in entry.items() if hasattr(value, "convert")), None)
    label = next((key for key, value in entry.items() if isinstance(value, int)), None)
    if image is None or label is None:
        raise InputError(
            f"{source} has the columns {', '.join(entry) or 'of nothing'}, expected text, or "
            "images and whole numbers as their classes"
        )
    judge = _first_of(("test", "validation", "valid"), splits)
    return HubSet(place.path, place.configuration, image, label, judge)


def _first_of(names: tuple[str, ...], splits: dict[str, list[Path]]) -> str | None:
    return next((name for name in names if name in splits), None)


def hub_images(place: HubSet) -> TrainAndTest:
    """Return all images of a set; those of the hub are kept in the cache.

    Raises:
        InputError: without network, and as `labelled`.
    """

    def read() -> dict[str, Any]:
        train = _images(place, "train")
        arrays: dict[str, Any] = {"x_train": train.images, "y_train": train.classes}
        if place.judge is not None:
            test = _images(place, place.judge)
            arrays |= {"x_test": test.images, "y_test": test.classes}
        return arrays

    key = f"{place.path} {place.configuration} {place.label}"
    arrays = (
        read()
        if place.is_local
        else cached("images", key, f"reading the images of {place.path}", read)
    )
    train = Labelled(np.asarray(arrays["x_train"]), np.asarray(arrays["y_train"]))
    if "x_test" not in arrays:
        return train, None
    return train, Labelled(np.asarray(arrays["x_test"]), np.asarray(arrays["y_test"]))


def hub_text(source: str, place: HubSet, tokenizer_name: str, judge: list[bytes] | None) -> Stream:
    """Return a stream of text.

    It is judged by its own validation split, its first 1,000 entries if it has more; or by its own
    first 1,000 documents, or a twentieth if that is less, which training skips. "bpe:N" is trained
    on the first 10 MB of the training documents.

    Raises:
        InputError: without network, and where too little is left to train on.
    """
    revision = _revision(place)
    shards = _shards(source, place, "train", revision)
    if judge is not None:
        sentence = "judged by a text of yours"
    elif place.judge is not None:
        held_out = _shards(source, place, place.judge, revision).all()
        limit = None if place.lines else HELD_OUT_DOCUMENTS
        judge = list(itertools.islice(held_out, limit))
        sentence = f"judged by {len(judge):,} documents of its split {place.judge}"
    else:
        judge, shards = _first_documents(shards)
        sentence = f"its first {len(judge):,} documents held out"
    tokenizer = tokenizer_for(tokenizer_name, _beginning(shards, tokenizer_name))
    if place.lines:
        judge = [b"".join(judge)]
    tokens = joined(tokenizer, judge)
    facts = [
        source,
        place.path,
        place.configuration,
        revision,
        tokenizer.sha256,
        hashlib.sha256(tokens.tobytes()).hexdigest(),
    ]
    return Stream(
        name=source,
        description=f"a stream of {place.path}, {sentence}{_vocabulary(tokenizer)}",
        sha256=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        shards=shards,
        validation_tokens=tokens,
        bytes_per_token=len(SEPARATOR.join(judge)) / len(tokens),
        tokenizer=tokenizer,
    )


def _vocabulary(tokenizer: Tokenizer) -> str:
    if tokenizer.name == "bytes":
        return ""
    note = f"; a vocabulary of {tokenizer.vocabulary:,} by {tokenizer.name}"
    trained = f", trained on the first {TRAINED_ON // 10**6} MB"
    return note + (trained if tokenizer.name.startswith("bpe:") else "")


def _first_documents(shards: Shards) -> tuple[list[bytes], Shards]:
    first = list(itertools.islice(shards.read(0, 0), round(HELD_OUT_DOCUMENTS / VALIDATION_SHARE)))
    size = min(HELD_OUT_DOCUMENTS, max(1, round(VALIDATION_SHARE * len(first))))
    rest = shards.without_first(size)
    if next(rest.all(), None) is None:
        raise InputError(
            f"{shards.name} has {len(first)} documents, too few to hold one out; give more, or a "
            "text to judge by: --validation"
        )
    return first[:size], rest


def _beginning(shards: Shards, tokenizer_name: str) -> list[bytes]:
    documents: list[bytes] = []
    if tokenizer_name.startswith("bpe:"):
        size = 0
        for text in shards.all():
            documents.append(text)
            size += len(text)
            if size >= TRAINED_ON:
                break
    return documents


def _shards(source: str, place: HubSet, split: str, revision: str | None = None) -> Shards:
    dataset = _opened(place, split, revision)

    def read(shard: int, start: int) -> Iterator[bytes]:
        for entry in _entries(source, dataset.shard(dataset.num_shards, shard).skip(start)):
            if not isinstance(entry.get("text"), str):
                raise InputError(f"{source} has an entry without text, expected text in each")
            yield entry["text"].encode()

    return Shards(source, dataset.num_shards, read, place.lines)


def _images(place: HubSet, split: str) -> Labelled:
    images, classes = [], []
    column = str(place.image)
    for entry in _entries(place.path, _opened(place, split)):
        images.append(pixels_of(entry[column]))
        classes.append(entry[place.label])
    if not images:
        raise InputError(f"{place.path} has no images in its split {split}, expected some")
    if any(image.ndim == 3 for image in images):  # a few of them are grey
        images = [x if x.ndim == 3 else np.repeat(x[..., None], 3, axis=2) for x in images]
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise InputError(
            f"{place.path} has images of {len(sizes)} sizes, expected one; make an .npz file of "
            "images that you have cropped"
        )
    return labelled(place.path, np.stack(images), np.array(classes))


def _entries(source: str, entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Entries of a split, and a sentence where they cannot be read."""
    try:
        yield from entries
    except Exception as error:  # of the network or of a file: there are dozens of kinds
        raise InputError(
            f"could not read {source} ({type(error).__name__}: {error!s:.200}); check its files, "
            "or the network"
        ) from error


def _opened(place: HubSet, split: str, revision: str | None = None) -> Any:
    """A split as an iterable of entries."""
    datasets = _library()
    if place.is_local:
        files = _splits(place)[split]
        kind = _FILES[files[0].suffix]
        paths = [str(file) for file in files]
        try:
            return datasets.load_dataset(kind, data_files=paths, split="train", streaming=True)
        except Exception as error:  # of a file: there are dozens of kinds
            reason = "they are empty" if isinstance(error, StopIteration) else str(error)[:200]
            raise InputError(
                f"could not read the files of {place.path} for {split}: {reason}"
            ) from error
    _check_network(place)
    try:
        return datasets.load_dataset(
            place.path, place.configuration, split=split, streaming=True, revision=revision
        )
    except Exception as error:  # of the network or of the hub: there are dozens of kinds
        raise InputError(
            f"could not open {place.path} on huggingface.co ({type(error).__name__}: {error}); "
            "check its name and configuration"
        ) from error


def _splits(place: HubSet) -> dict[str, list[Path]]:
    """The files of each split of a local folder; of the hub, names of splits without files."""
    if not place.is_local:
        _check_network(place)
        try:
            names = _library().get_dataset_split_names(place.path, place.configuration)
        except Exception as error:
            raise InputError(
                f"could not open {place.path} on huggingface.co ({type(error).__name__}: {error}); "
                "check its name and configuration"
            ) from error
        return {name: [] for name in names}
    folder = Path(place.path).expanduser()
    files = sorted(p for p in folder.rglob("*") if p.suffix in _FILES)
    if len({_FILES[p.suffix] for p in files}) != 1:
        raise InputError(
            f"{folder} has {len(files)} files of .parquet or .jsonl, expected files of one of them"
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.relative_to(folder).as_posix().lower())
        name = "train"
        if {"val", "valid", "validation"} & set(words):
            name = "validation"
        elif "test" in words:
            name = "test"
        splits.setdefault(name, []).append(file)
    if "train" not in splits:
        raise InputError(f"{folder} has no files to train on, only for validation or test")
    return splits


def _revision(place: HubSet) -> str:
    """The commit of a set on the hub; of a folder, the names and sizes of its files."""
    if place.is_local:
        files = [file for group in _splits(place).values() for file in group]
        facts = [(file.name, file.stat().st_size) for file in files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    _check_network(place)
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(place.path, timeout=10).sha or "main"
    except Exception as error:
        raise InputError(
            f"could not find {place.path} on huggingface.co ({type(error).__name__}); check its "
            "name"
        ) from error


def _check_network(place: HubSet) -> None:
    if hub_answers():
        return
    kind = (
        "a path of images (an .npz file, or a folder with a folder for each class), or digits"
        if place.image
        else "the path of a text, of token files (.bin), or hub:FOLDER with .parquet or .jsonl "
        "files; or stdlib, which needs no network"
    )
    raise InputError(f"huggingface.co does not answer, and {place.path} is there; give {kind}")


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "data of the hub needs the library datasets, which is not installed; install it with: "
            "pip install 'steepest[data]'"
        ) from error
    return datasets
