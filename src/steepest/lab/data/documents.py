"""Documents: the embedded ones, or text files; and which of them are held out.

Embedded: the interpreter's own standard library ("stdlib") and its language reference as prose
("reference"). Own: a text file or a folder of text files.

A twentieth is held out: whole documents where some have about that size together, else the end of
the largest one.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from steepest.lab.errors import InputError

Documents = list[tuple[str, bytes]]
"""Names, and texts as UTF-8."""
EMBEDDED = ("stdlib", "reference")
SEPARATOR = b"\0"
"""What stands between documents where bytes are tokens; no text contains it."""
VALIDATION_SHARE = 0.05
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def embedded_documents(name: str) -> tuple[str, Documents]:
    """Return a description and the documents of "stdlib" or "reference".

    Raises:
        InputError: where this Python comes without its language reference.
    """
    if name == "stdlib":
        return "source code of Python's standard library", _standard_library()
    return "Python's language reference, as prose", _reference()


def documents_at(path: Path) -> tuple[str, Documents]:
    """Return a description and the documents of a text file, or of a folder of them.

    Raises:
        InputError: for text that is missing, empty, binary or not UTF-8.
    """
    if path.is_dir():
        return _in_folder(path)
    return f"the file {path.name}", [(path.name, _text(path))]


def _standard_library() -> Documents:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix())
    return [
        (file.relative_to(root).as_posix(), file.read_bytes())
        for file in files
        if not _NOT_LIBRARY & set(file.relative_to(root).parts)
    ]


def _reference() -> Documents:
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
    if SEPARATOR in content:
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


def files_below(folder: Path) -> tuple[list[Path], list[str]]:
    """Return all files below a folder, and sentences about links and what is no file.

    Links to files are followed, links to folders are not. Hidden files are left out.
    """
    entries = sorted(folder.rglob("*"))
    entries = [p for p in entries if not any(s[0] == "." for s in p.relative_to(folder).parts)]
    return [p for p in entries if p.is_file()], _left_out(folder, entries)


def _in_folder(folder: Path) -> tuple[str, Documents]:
    files, notes = files_below(folder)
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
    return description, [(name, text) for text, name in names.items()]


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


@dataclass(frozen=True)
class Split:
    """Documents to train on, documents to judge by, and a sentence on which they are."""

    training: list[bytes]
    validation: list[bytes]
    documents: int
    sentence: str


def hold_out(documents: Documents) -> Split:
    """Hold a twentieth of the bytes out, as whole documents where that is possible.

    Otherwise the end of the largest document joins those that are held out.
    """
    held_out, missing = _held_out(documents)
    training = [text for name, text in documents if name not in held_out]
    validation = [text for name, text in documents if name in held_out]
    if missing:
        largest = max(range(len(training)), key=lambda i: len(training[i]))
        text = training[largest]
        cut = len(text) - missing
        training[largest] = text[:cut]
        validation.append(text[cut:])
    parts = [f"{len(held_out)} of {len(documents)} documents"] if held_out else []
    if missing:
        one = len(documents) == 1
        parts.append("its last twentieth" if one else f"the last {missing:,} bytes of the largest")
    return Split(training, validation, len(documents), f"{' and '.join(parts)} held out")


def judged_by(documents: Documents, judge: Documents, name: str) -> Split:
    """Train on documents, and judge by others; a training document that is there too is left out.

    Raises:
        InputError: where no document is left to train on.
    """
    known = {text for _, text in judge}
    training = [text for _, text in documents if text not in known]
    if not training:
        raise InputError(f"got the same text to train on and to judge by, {name}; give another one")
    copies = len(documents) - len(training)
    note = f"; {copies} documents left out: they are in it too" if copies else ""
    validation = [text for _, text in judge]
    return Split(training, validation, len(training) + len(validation), f"judged by {name}{note}")


def _held_out(documents: Documents) -> tuple[set[str], int]:
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
