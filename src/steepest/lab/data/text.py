"""Text as a stream of tokens, split into training and validation documents.

Embedded: the interpreter's own standard library ("stdlib") and its language reference as prose
("reference"). Own: a text file, a folder of text files, or `.bin` files of 16-bit tokens.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steepest.lab.errors import InputError

EMBEDDED = ("stdlib", "reference")
VALIDATION_SHARE = 0.05
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SEPARATOR = b"\0"  # between documents; no text contains it

Tokens = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, and what is known of them.

    Attributes:
        name: what was asked for.
        description: what it is, in a sentence.
        train, validation: the tokens, as one array each; no text is in both.
        vocabulary: number of different tokens.
        documents: number of documents.
        sha256: of all tokens and of the split; two runs compare only if it is equal.
        is_bytes: whether a token is a byte, so that losses can be given in bits per byte.
    """

    name: str
    description: str
    train: Tokens
    validation: Tokens
    vocabulary: int
    documents: int
    sha256: str
    is_bytes: bool

    def __str__(self) -> str:
        """Return what it is, what was left out of it, and how much it is."""
        return f"{self.description}; {len(self.train):,} tokens to train on"


def load(source: str) -> Corpus:
    """Load "stdlib", "reference", or the file or folder at a path.

    Raises:
        InputError: for data that is missing, empty, binary or not UTF-8.
    """
    if source == "stdlib":
        return _from_documents(
            source, "source code of Python's standard library", _standard_library()
        )
    if source == "reference":
        return _from_documents(source, "Python's language reference, as prose", _reference())
    path = Path(os.path.expanduser(source))
    try:
        if not source or not path.exists():  # Path("") would be the current folder
            raise InputError(
                f"got data {source!r}, which is neither {' nor '.join(map(repr, EMBEDDED))} nor an "
                "existing path; give one of these, or a text file, a folder or a .bin file"
            )
        if path.suffix == ".bin":
            return _from_bin(source, [path])
        if path.is_dir():
            return _from_folder(source, path)
        return _from_documents(source, f"the file {path.name}", [(path.name, _text(path))])
    except OSError as error:
        raise InputError(f"could not read {error.filename}: {error.strerror}") from error


def _standard_library() -> list[tuple[str, bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix())
    return [
        (file.relative_to(root).as_posix(), file.read_bytes())
        for file in files
        if not _NOT_LIBRARY & set(file.relative_to(root).parts)
    ]


def _reference() -> list[tuple[str, bytes]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "this Python comes without its language reference (pydoc_data); use --data stdlib"
        ) from error
    return [(name, topics[name].encode()) for name in sorted(topics)]


def _text(path: Path) -> bytes:
    content = path.read_bytes()
    if not content:
        raise InputError(f"{path} is empty, expected text")
    if _SEPARATOR in content:
        raise InputError(f"{path} is binary (it has NUL bytes), expected UTF-8 text")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); "
            f"convert it, for instance with: iconv -f LATIN1 -t UTF-8 {path.name}"
        ) from error
    return content


def _from_folder(source: str, folder: Path) -> Corpus:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    files = [p for p in files if not any(s[0] == "." for s in p.relative_to(folder).parts)]
    bins = [p for p in files if p.suffix == ".bin"]
    if bins:
        return _from_bin(source, bins)
    names: dict[bytes, str] = {}  # by text: of a link or a copy, one part must not know the other
    rejected = 0
    for file in files:
        try:
            names.setdefault(_text(file), file.relative_to(folder).as_posix())
        except InputError:
            rejected += 1
    if not names:
        raise InputError(
            f"found no UTF-8 text among the {len(files)} files in {folder}; expected text files or "
            ".bin token files"
        )
    what = f"the folder {folder.name}, {len(names)} files"
    if rejected:
        what += f"; {rejected} files left out: not UTF-8 text"
    if copies := len(files) - rejected - len(names):
        what += f"; {copies} files left out: copies of others"
    return _from_documents(source, what, [(name, text) for text, name in names.items()])


def _from_documents(source: str, what: str, documents: list[tuple[str, bytes]]) -> Corpus:
    """Bytes as tokens. Whole documents are held out; of a single one, its last part."""
    if len(documents) == 1:
        content = documents[0][1]
        cut = len(content) - max(1, len(content) // 10)
        train, validation = [content[:cut]], [content[cut:]]
        what += ", its last tenth held out"
    else:
        held_out = _held_out(documents)
        train = [text for name, text in documents if name not in held_out]
        validation = [text for name, text in documents if name in held_out]
        what += f", {len(held_out)} of {len(documents)} documents held out"
    joined = [np.frombuffer(_SEPARATOR.join(part), dtype=np.uint8) for part in (train, validation)]
    sha256 = _sha256(joined)
    return Corpus(source, what, joined[0], joined[1], 256, len(documents), sha256, is_bytes=True)


def _held_out(documents: list[tuple[str, bytes]]) -> set[str]:
    """Documents for validation: in the order of their names' hashes, a twentieth of all bytes."""
    total = sum(len(text) for _, text in documents)
    order = sorted(documents, key=lambda each: _hash_of_name(each[0]))
    chosen: set[str] = set()
    size = 0
    for name, text in order:
        if size + len(text) <= 2 * VALIDATION_SHARE * total:
            chosen.add(name)
            size += len(text)
        if size >= VALIDATION_SHARE * total:
            break
    if chosen and size >= VALIDATION_SHARE * total / 2:
        return chosen
    enough = [each for each in documents if len(each[1]) >= VALIDATION_SHARE * total / 2]
    return {min(enough, key=lambda each: len(each[1]))[0]}


def _hash_of_name(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()  # names may be any bytes


def _from_bin(source: str, files: list[Path]) -> Corpus:
    """Files of 16-bit tokens: bare, or behind a header of 256 integers (magic number 20240520)."""
    validation = [p for p in files if re.search(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", p.stem)]
    train = [p for p in files if p not in validation]
    if not train:
        raise InputError(f"got only validation files in {source}, expected training tokens too")
    tokens = [_read_bin(p) for p in train]
    held_out = [_read_bin(p) for p in validation]
    if not held_out:
        cut = len(tokens[-1]) - max(1, len(tokens[-1]) // 10)
        held_out, tokens[-1] = [tokens[-1][cut:]], tokens[-1][:cut]
    parts = [one[0] if len(one) == 1 else np.concatenate(one) for one in (tokens, held_out)]
    vocabulary = 1 + max(int(part.max()) for part in parts)
    what = f"{len(files)} token files, the last tenth held out"
    if validation:
        what = f"{len(train)} token files, {len(validation)} more held out"
    return Corpus(
        source, what, parts[0], parts[1], vocabulary, len(files), _sha256(parts), is_bytes=False
    )


def _read_bin(path: Path) -> NDArray[np.uint16]:
    size = path.stat().st_size
    if size < 4 or size % 2:
        raise InputError(f"{path} has {size} bytes, expected 16-bit tokens")
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[0] != 20240520:
        return np.memmap(path, dtype="<u2", mode="r")
    if size != 1024 + 2 * int(header[2]):
        raise InputError(f"{path} is torn: its header promises {header[2]} tokens")
    if size == 1024:
        raise InputError(f"{path} has a header and no tokens, expected 16-bit tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


def _sha256(parts: Iterable[Tokens]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype} {len(part)} ".encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
