from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from steepest.lab.data import load
from steepest.lab.errors import InputError


def _folder(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def test_the_standard_library_is_some_megabytes_of_code_with_whole_files_held_out() -> None:
    corpus = load("stdlib")
    assert corpus.is_bytes
    assert corpus.vocabulary == 256
    assert 5e6 < len(corpus.train) < 40e6
    assert 0.04 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.11
    documents = bytes(corpus.validation).split(b"\0")
    train = bytes(corpus.train)
    long_ones = [document for document in documents if len(document) > 2000]
    assert long_ones
    assert not any(document in train for document in long_ones)
    assert load("stdlib").sha256 == corpus.sha256


def test_the_reference_is_prose() -> None:
    corpus = load("reference")
    assert b"statement" in bytes(corpus.train)
    assert len(corpus.train) > 1e5


def test_a_folder_is_split_by_file_and_the_split_depends_on_names_only(tmp_path: Path) -> None:
    files = {f"part{i}/text{i}.txt": f"document number {i} " * 50 for i in range(40)}
    corpus = load(str(_folder(tmp_path / "a", files)))
    held_out = bytes(corpus.validation).split(b"\0")
    assert 1 <= len(held_out) <= 4
    assert corpus.documents == 40
    assert not set(held_out) & set(bytes(corpus.train).split(b"\0"))
    assert load(str(_folder(tmp_path / "b", files))).sha256 == corpus.sha256
    assert (
        load(str(_folder(tmp_path / "b", {"part0/text0.txt": "x" * 900}))).sha256 != corpus.sha256
    )


def test_a_tiny_file_does_not_become_the_whole_validation_text(tmp_path: Path) -> None:
    files = {"README": "short", "train.txt": "a" * 5000, "valid.txt": "b" * 4000}
    corpus = load(str(_folder(tmp_path, files)))
    assert len(corpus.validation) == 4000


def test_of_a_single_file_the_last_tenth_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("abcdefghij" * 100)
    corpus = load(str(path))
    assert len(corpus.validation) == 100
    assert bytes(corpus.train) + bytes(corpus.validation) == path.read_bytes()


def test_files_of_a_folder_that_are_no_text_are_left_out_and_counted(tmp_path: Path) -> None:
    _folder(tmp_path, {"a.txt": "a" * 100, "b.txt": "b" * 100})
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("secret")
    corpus = load(str(tmp_path))
    assert "1 files left out" in corpus.description
    assert b"secret" not in bytes(corpus.train) + bytes(corpus.validation)


def test_a_link_or_a_copy_does_not_bring_training_text_into_validation(tmp_path: Path) -> None:
    _folder(tmp_path, {"a.txt": "a" * 900, "b.txt": "b" * 100, "copy/a.txt": "a" * 900})
    (tmp_path / "z.txt").symlink_to("b.txt")
    corpus = load(str(tmp_path))
    assert corpus.documents == 2
    assert "2 files left out: copies" in corpus.description
    assert not set(bytes(corpus.train)) & set(bytes(corpus.validation))


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    for i in range(3):
        try:
            (tmp_path / os.fsdecode(b"\xff%d.txt" % i)).write_text(f"{i}" * 500)
        except OSError:
            pytest.skip("this file system wants names in UTF-8")
    assert load(str(tmp_path)).documents == 3


@pytest.mark.parametrize("header", [False, True])
def test_token_files_with_and_without_a_header(tmp_path: Path, header: bool) -> None:
    tokens = np.arange(2000, dtype="<u2")
    front = np.zeros(256, dtype="<i4")
    front[:3] = 20240520, 1, len(tokens)
    content = (front.tobytes() if header else b"") + tokens.tobytes()
    (tmp_path / "train_000.bin").write_bytes(content)
    corpus = load(str(tmp_path / "train_000.bin"))
    assert not corpus.is_bytes
    assert corpus.vocabulary == 2000
    assert np.array_equal(np.concatenate([corpus.train, corpus.validation]), tokens)
    (tmp_path / "val_000.bin").write_bytes(content)
    corpus = load(str(tmp_path))
    assert len(corpus.train) == len(corpus.validation) == 2000


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", "is empty"),
        ("binary.txt", b"abc\0def", "binary"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("odd.bin", b"\1\2\3\4\5", "expected 16-bit tokens"),
        ("bare.bin", np.array([20240520, 1, 0] + 253 * [0], "<i4").tobytes(), "no tokens"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        load(str(tmp_path / name))


def test_what_only_sounds_like_validation_is_for_training(tmp_path: Path) -> None:
    for name in ("interval.bin", "medieval.bin", "fineweb_val_000.bin"):
        np.arange(500, dtype="<u2").tofile(tmp_path / name)
    corpus = load(str(tmp_path))
    assert (len(corpus.train), len(corpus.validation)) == (1000, 500)


def test_a_torn_token_file_is_detected(tmp_path: Path) -> None:
    front = np.zeros(256, dtype="<i4")
    front[:3] = 20240520, 1, 5000
    (tmp_path / "a.bin").write_bytes(front.tobytes() + b"\0" * 100)
    with pytest.raises(InputError, match="torn"):
        load(str(tmp_path / "a.bin"))


def test_a_token_file_shorter_than_a_header_is_bare_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(np.array([20240520], "<i4").tobytes())
    assert len(load(str(tmp_path / "a.bin")).train) == 1


@pytest.mark.parametrize("source", ["", "~nobody-of-that-name/text", "x" * 5000])
def test_paths_that_cannot_be_get_a_sentence(source: str) -> None:
    with pytest.raises(InputError, match=r"existing path|could not read"):
        load(source)


def test_missing_data_and_empty_folders_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither 'stdlib' nor 'reference' nor an existing path"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="found no UTF-8 text"):
        load(str(tmp_path))
