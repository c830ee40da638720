"""Text as a stream of tokens, split into training and validation documents.

Embedded: the interpreter's own standard library ("stdlib") and its language reference as prose
("reference"). Own: a text file, a folder of text files, or files of tokens (`.bin`, `.npy`).

A twentieth is held out: whole documents where there are such of about that size together, else the
end of the largest one.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steepest.lab.data.token_files import Tokens, read_tokens
from steepest.lab.errors import InputError

EMBEDDED = ("stdlib", "reference")
VALIDATION_SHARE = 0.05
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SEPARATOR = b"\0"  # between documents; no text contains it
_TOKEN_FILES = (".bin", ".npy")


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
        InputError: for data that is missing, empty, binary or not UTF-8, for a device or a pipe.
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
                "existing path; give one of these, or a text file, a folder, a .bin or a .npy file"
            )
        if path.is_dir():
            return _from_folder(source, path)
        if not path.is_file():
            raise InputError(
                f"{path} is a device, a pipe or a socket, which cannot be read twice; write the "
                "text to a file, and name that file"
            )
        if path.suffix in _TOKEN_FILES:
            return _from_token_files(source, [path])
        return _from_documents(source, f"the file {path.name}", [(path.name, _text(path))])
    except OSError as error:
        raise InputError(f"could not read {error.filename or path}: {error.strerror}") from error


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
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(
            f"{path} is UTF-16 text; convert it, for instance with: iconv -f UTF-16 -t UTF-8 "
            f"{path.name}"
        )
    if _SEPARATOR in content:
        raise InputError(
            f"{path} is binary (it has NUL bytes), expected UTF-8 text, or tokens as .bin or .npy"
        )
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); "
            f"convert it, for instance with: iconv -f LATIN1 -t UTF-8 {path.name}"
        ) from error
    return content


def _from_folder(source: str, folder: Path) -> Corpus:
    """All files below the folder. Links to files are followed, links to folders are not."""
    entries = sorted(folder.rglob("*"))
    entries = [p for p in entries if not any(s[0] == "." for s in p.relative_to(folder).parts)]
    files = [p for p in entries if p.is_file()]
    notes = _left_out(folder, entries)
    tokens = [p for p in files if p.suffix in _TOKEN_FILES]
    if tokens:
        if texts := len(files) - len(tokens):
            notes.append(f"{texts} files left out: no tokens")
        return _from_token_files(source, tokens, notes)
    names: dict[bytes, str] = {}  # by text: of a link or a copy, one part must not know the other
    rejected = 0
    for file in files:
        try:
            names.setdefault(_text(file), file.relative_to(folder).as_posix())
        except InputError:
            rejected += 1
    if not names:
        raise InputError(
            f"found no UTF-8 text among the {len(files)} files in {folder}; expected text files, "
            f"or .bin or .npy token files{''.join('; ' + note for note in notes)}"
        )
    if rejected:
        notes.append(f"{rejected} files left out: not UTF-8 text")
    if copies := len(files) - rejected - len(names):
        notes.append(f"{copies} files left out: copies of others")
    description = "; ".join([f"the folder {folder.name}, {len(names)} files", *notes])
    return _from_documents(source, description, [(name, text) for text, name in names.items()])


def _left_out(folder: Path, entries: list[Path]) -> list[str]:
    """Sentences about links, and about entries that are no files."""
    home = folder.resolve()
    links = [p for p in entries if p.is_symlink()]
    out = sum(p.is_file() and not p.resolve().is_relative_to(home) for p in links)
    folders = sum(p.is_dir() for p in links)
    broken = sum(not p.exists() for p in links)
    others = sum(p.exists() and not p.is_file() and not p.is_dir() for p in entries)
    return [
        f"{count} {note}"
        for count, note in (
            (out, "files are links that lead out of the folder, and were followed"),
            (folders, "links to folders were not followed"),
            (broken, "links left out: they lead nowhere"),
            (others, "left out: devices, pipes or sockets"),
        )
        if count
    ]


def _from_documents(source: str, description: str, documents: list[tuple[str, bytes]]) -> Corpus:
    """Bytes as tokens; a twentieth of them is held out, as whole documents where that is possible.

    Otherwise the end of the largest document joins those that are held out.
    """
    held_out, missing = _held_out(documents)
    train = [text for name, text in documents if name not in held_out]
    validation = [text for name, text in documents if name in held_out]
    if missing:
        largest = max(range(len(train)), key=lambda i: len(train[i]))
        text = train[largest]
        train[largest], end = text[:-missing], text[-missing:]
        validation.append(end)
    said = [f"{len(held_out)} of {len(documents)} documents"] if held_out else []
    if missing:
        one = len(documents) == 1
        said.append("its last twentieth" if one else f"the last {missing:,} bytes of the largest")
    description += f", {' and '.join(said)} held out"
    joined = [np.frombuffer(_SEPARATOR.join(part), dtype=np.uint8) for part in (train, validation)]
    sha256 = _sha256(joined)
    return Corpus(
        source, description, joined[0], joined[1], 256, len(documents), sha256, is_bytes=True
    )


def _held_out(documents: list[tuple[str, bytes]]) -> tuple[set[str], int]:
    """Documents for validation, and how many bytes are missing to a twentieth of all.

    Documents come in the order of their names' hashes, those that would make it a tenth are passed
    over. Nothing is missing where they are a fortieth or more.
    """
    total = sum(len(text) for _, text in documents)
    order = sorted(documents, key=lambda document: _hash_of_name(document[0]))
    chosen: set[str] = set()
    size = 0
    for name, text in order:
        if size + len(text) <= 2 * VALIDATION_SHARE * total:
            chosen.add(name)
            size += len(text)
        if size >= VALIDATION_SHARE * total:
            break
    if size >= VALIDATION_SHARE * total / 2:
        return chosen, 0
    return chosen, max(1, round(VALIDATION_SHARE * total) - size)


def _hash_of_name(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()  # names may be any bytes


def _from_token_files(source: str, files: list[Path], notes: Iterable[str] = ()) -> Corpus:
    """Files of tokens; those named val or valid are held out, or else the last twentieth of all."""
    validation = [p for p in files if re.search(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", p.stem)]
    train = [p for p in files if p not in validation]
    if not train:
        raise InputError(f"got only validation files in {source}, expected training tokens too")
    parts = [_joined([read_tokens(p) for p in group]) for group in (train, validation) if group]
    description = f"{len(train)} token files, {len(validation)} more held out"
    if not validation:
        cut = len(parts[0]) - max(1, round(VALIDATION_SHARE * len(parts[0])))
        parts = [parts[0][:cut], parts[0][cut:]]
        description = f"{len(files)} token files, the last twentieth held out"
    description = "; ".join([f"{description}, {8 * parts[0].itemsize} bits each", *notes])
    vocabulary = 1 + max(int(part.max(initial=0)) for part in parts)
    sha256 = _sha256(parts)
    return Corpus(
        source, description, parts[0], parts[1], vocabulary, len(files), sha256, is_bytes=False
    )


def _joined(tokens: list[NDArray[Any]]) -> NDArray[Any]:
    return tokens[0] if len(tokens) == 1 else np.concatenate(tokens)


def _sha256(parts: Iterable[Tokens]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype} {len(part)} ".encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
