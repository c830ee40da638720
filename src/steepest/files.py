"""Files that are whole or not there, and that tell when they are not what was written.

A JSON object, and each line of a file of JSON lines, ends with a "checksum": the CRC-32 of the JSON
text without it. A reader takes it out again. Files of before have none, and load without the check.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KEY = "checksum"
PREFIX = ".steepest-"
"""How the names of files begin that are not finished."""
_STARTED = time.time()  # of this process, as far as files are concerned


class DamagedFile(ValueError):
    """A file is torn, cut off or changed, or something other than what was expected."""


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, in one piece."""
    write_atomically(path, json.dumps(sealed(content), indent=1).encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Return what `write_json` wrote.

    Raises:
        DamagedFile: for what is no JSON object, or has another checksum than its own.
        OSError: for a file that cannot be read.
    """
    content = read_bytes(path)
    try:
        return unsealed(json.loads(content))
    except DamagedFile as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: it is not a JSON object ({error})") from error


def write_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, in one piece."""
    write_atomically(path, "".join(map(json_line, records)).encode())


def read_lines(path: str | Path) -> tuple[list[Any], list[int]]:
    """Return the records of a file of JSON lines, and the numbers of its damaged lines.

    The beginning of a record as the last line was cut off while it was written: it is left out and
    not counted. Where some lines have a checksum, those without are damaged.

    Raises:
        OSError: for a file that cannot be read.
    """
    *lines, cut = read_bytes(path).split(b"\n")
    records: dict[int, Any] = {}
    plain, damaged = [], []
    for number, line in enumerate([*lines, cut], start=1):
        if not line and number > len(lines):
            continue
        try:
            record = json.loads(line)
            is_sealed = isinstance(record, dict) and KEY in record
            if isinstance(record, dict):
                record = unsealed(record)
            records[number] = record
            plain += [] if is_sealed else [number]
        except (ValueError, RecursionError):
            if number <= len(lines) or line[:1] not in (b"{", b"["):
                damaged.append(number)
    if len(plain) < len(records):
        damaged = sorted(damaged + plain)
        for number in plain:
            del records[number]
    return list(records.values()), damaged


def json_line(record: Mapping[str, Any]) -> str:
    """Return a record with its checksum as a line of JSON."""
    return json.dumps(sealed(record)) + "\n"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum as the last entry.

    >>> unsealed(sealed({"loss": 0.5}))
    {'loss': 0.5}
    """
    if KEY in content:
        raise ValueError(f"got an entry {KEY!r}, which is the name of a file's own checksum")
    return {**content, KEY: _checksum(content)}


def unsealed(content: Any) -> dict[str, Any]:
    """Return a JSON object without its checksum, if it has one, which must be right.

    Raises:
        DamagedFile: for another checksum, and for what is no object.
    """
    if not isinstance(content, dict):
        raise DamagedFile(f"it is not a JSON object (got {content!r:.40})")
    if not content:
        return content
    rest = dict(content)
    key, value = rest.popitem()
    is_right = value == _checksum(rest)
    if key == KEY and is_right:
        return rest
    if KEY in content or is_right:  # or the name of the checksum has changed
        raise DamagedFile("it is not what was written, as its checksum tells")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file; a device or a pipe, which may have no end, is refused.

    Raises:
        DamagedFile: for a device, a pipe or a socket.
        OSError: for a file that cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DamagedFile(f"{path} is a device, a pipe or a socket; give a file in its place")
    return path.read_bytes()


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file beside its place, force it to disk, and rename it: the old one or the new one.

    The name beside is random and new, so no link is followed and no other process disturbed.
    """
    path = Path(path)
    aside = path.with_name(unfinished())
    try:
        with open(aside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is not None:
            error.filename = str(path)  # the name that the caller knows
        raise
    sync(path.parent)


def unfinished() -> str:
    """Return a new name for what is not finished."""
    return PREFIX + secrets.token_hex(8)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk; Windows cannot."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, before: float = _STARTED) -> None:
    """Remove what killed processes left unfinished in a folder, and in folders inside it.

    Only the holder of the folder's lock may call this. What is younger than its process may be of
    a command that needs no lock, such as a report, and stays.
    """
    for leftover in [*folder.rglob(f"{PREFIX}*"), *folder.rglob(".step-*.*")]:
        try:
            if leftover.lstat().st_mtime >= before:
                continue
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        except FileNotFoundError:  # inside one that is removed already
            continue
