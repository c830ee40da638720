from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from steepest.lab.data import Corpus, load
from steepest.lab.errors import InputError


def _folder(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def _all(corpus: Corpus) -> np.ndarray:
    return np.concatenate([corpus.train_tokens, corpus.validation_tokens])


def test_the_standard_library_is_some_megabytes_of_code_with_whole_files_held_out() -> None:
    corpus = load("stdlib")
    assert corpus.bytes_per_token == 1
    assert corpus.vocabulary == 256
    assert 5e6 < len(corpus.train_tokens) < 40e6
    sizes = len(corpus.train_tokens), len(corpus.validation_tokens)
    assert 0.04 < sizes[1] / sum(sizes) < 0.11
    documents = bytes(corpus.validation_tokens).split(b"\0")
    train = bytes(corpus.train_tokens)
    long_ones = [document for document in documents if len(document) > 2000]
    assert long_ones
    assert not any(document in train for document in long_ones)
    assert load("stdlib").sha256 == corpus.sha256


def test_the_reference_is_prose() -> None:
    corpus = load("reference")
    assert b"statement" in bytes(corpus.train_tokens)
    assert len(corpus.train_tokens) > 1e5


def test_a_folder_is_split_by_file_and_the_split_depends_on_names_only(tmp_path: Path) -> None:
    files = {f"part{i}/text{i}.txt": f"document number {i} " * 50 for i in range(40)}
    corpus = load(str(_folder(tmp_path / "a", files)))
    held_out = bytes(corpus.validation_tokens).split(b"\0")
    assert 1 <= len(held_out) <= 4
    assert corpus.documents == 40
    assert not set(held_out) & set(bytes(corpus.train_tokens).split(b"\0"))
    assert load(str(_folder(tmp_path / "b", files))).sha256 == corpus.sha256
    assert (
        load(str(_folder(tmp_path / "b", {"part0/text0.txt": "x" * 900}))).sha256 != corpus.sha256
    )


@pytest.mark.parametrize(
    "sizes",
    [
        [5, 5000, 4000],
        [98_000, *[20] * 100],  # one large file among small ones: 98% were held out
        [20_000, 20_000, 10],
        [1, 1, 100_000],
        [9_999],
        [3_000] * 3,
        [700] * 30,
        [2**k for k in range(16)],
        [10**k for k in range(6)],
    ],
)
def test_a_twentieth_is_held_out_whatever_the_sizes_of_files(
    tmp_path: Path, sizes: list[int]
) -> None:
    rng = np.random.default_rng(0)
    letters = [bytes(rng.integers(97, 123, size, dtype=np.uint8)).decode() for size in sizes]
    texts = {f"text{i}.txt": f"{i}{text}" for i, text in enumerate(letters)}
    corpus = load(str(_folder(tmp_path, texts)))
    total = sum(map(len, texts.values()))
    assert 0.025 <= len(corpus.validation_tokens) / total <= 0.11  # and a separator a document
    train, held_out = bytes(corpus.train_tokens), bytes(corpus.validation_tokens)
    parts = {*train.split(b"\0"), *held_out.split(b"\0")}
    whole = {text.encode() for text in texts.values()}
    assert len(whole - parts) <= 1  # at most one document is cut
    cut = b"".join(sorted(whole - parts))
    assert not cut or any(a + b == cut for a in parts for b in parts)
    assert "held out" in corpus.description


def test_a_document_is_cut_only_where_no_whole_ones_will_do(tmp_path: Path) -> None:
    whole = load(str(_folder(tmp_path / "a", {f"{i}.txt": f"{i}" * 500 for i in range(9, 49)})))
    assert "of the largest" not in whole.description
    cut = load(str(_folder(tmp_path / "b", {"a.txt": "a" * 8000, "b.txt": "b" * 2000})))
    assert "the last 500 bytes of the largest held out" in cut.description
    assert bytes(cut.validation_tokens) == b"a" * 500


def test_of_a_single_file_the_last_twentieth_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("abcdefghij" * 100)
    corpus = load(str(path))
    assert len(corpus.validation_tokens) == 50
    assert "its last twentieth held out" in corpus.description
    assert bytes(corpus.train_tokens) + bytes(corpus.validation_tokens) == path.read_bytes()


@pytest.mark.parametrize("lengths", [[1000], [1000, 10], [10, 1000, 10], [5] * 40])
def test_a_twentieth_of_tokens_is_held_out_whatever_the_sizes_of_files(
    tmp_path: Path, lengths: list[int]
) -> None:
    tokens = np.arange(sum(lengths), dtype="<u2")
    for i, part in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        np.save(tmp_path / f"{i:03}.npy", part)
    corpus = load(str(tmp_path))
    assert len(corpus.validation_tokens) == round(len(tokens) / 20)
    assert np.array_equal(_all(corpus), tokens)


def test_files_of_a_folder_that_are_no_text_are_left_out_and_counted(tmp_path: Path) -> None:
    _folder(tmp_path, {"a.txt": "a" * 100, "b.txt": "b" * 100})
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("secret")
    corpus = load(str(tmp_path))
    assert "1 files left out" in corpus.description
    assert b"secret" not in bytes(corpus.train_tokens) + bytes(corpus.validation_tokens)


def test_a_link_or_a_copy_does_not_bring_training_text_into_validation(tmp_path: Path) -> None:
    _folder(tmp_path, {"a.txt": "a" * 900, "b.txt": "b" * 100, "copy/a.txt": "a" * 900})
    (tmp_path / "z.txt").symlink_to("b.txt")
    corpus = load(str(tmp_path))
    assert corpus.documents == 2
    assert "2 files left out: copies" in corpus.description
    assert not set(bytes(corpus.train_tokens)) & set(bytes(corpus.validation_tokens))


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
    assert corpus.tokenizer is None
    assert corpus.vocabulary == 2000
    assert np.array_equal(_all(corpus), tokens)
    (tmp_path / "val_000.bin").write_bytes(content)
    corpus = load(str(tmp_path))
    assert len(corpus.train_tokens) == len(corpus.validation_tokens) == 2000


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", "is empty"),
        ("binary.txt", b"abc\0def", "binary"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("wide.txt", "text".encode("utf-16"), "UTF-16 text; convert it"),
        ("image.png", b"\x89PNG\r\n\x1a\n\0\0", "binary"),
        ("arrays.npz", b"PK\3\4\0\0", "is torn, or no .npz file"),
        ("odd.bin", b"\1\2\3\4\5", "16, 32 or 64 bits"),
        ("empty.bin", b"", "16, 32 or 64 bits"),
        ("torn.npy", b"\x93NUMPY\1\0", "is torn, or no array"),
        ("notes.npy", b"my notes", "is torn, or no array"),
        ("bare.bin", np.array([20240520, 1, 0] + 253 * [0], "<i4").tobytes(), "no tokens"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        load(str(tmp_path / name))


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<u8", "<i4", "<i8"])
@pytest.mark.parametrize("largest", [3, 200, 50_000, 250_000])
def test_the_width_of_tokens_is_recognised(tmp_path: Path, dtype: str, largest: int) -> None:
    if largest > np.iinfo(dtype).max:
        pytest.skip("no such tokens at this width")
    tokens = np.random.default_rng(largest).integers(0, largest + 1, 4000).astype(dtype)
    tokens.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", tokens)
    for name in ("a.bin", "a.npy"):
        corpus = load(str(tmp_path / name))
        assert np.array_equal(_all(corpus), tokens)
        assert corpus.vocabulary == tokens.max() + 1


def test_a_header_of_32_bit_tokens(tmp_path: Path) -> None:
    tokens = np.arange(100_000, 102_000, dtype="<u4")
    front = np.zeros(256, dtype="<i4")
    front[:3] = 20240801, 7, len(tokens)
    (tmp_path / "a.bin").write_bytes(front.tobytes() + tokens.tobytes())
    corpus = load(str(tmp_path / "a.bin"))
    assert np.array_equal(_all(corpus), tokens)
    (tmp_path / "a.bin").write_bytes(front.tobytes() + tokens.tobytes()[:-2])
    with pytest.raises(InputError, match=r"torn: .* 2000 tokens"):
        load(str(tmp_path / "a.bin"))


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.ones(9), "holds float64 of shape"),
        (np.ones((3, 3), dtype=int), r"shape \(3, 3\), .* whole"),
        (np.array([1, -100, 2]), "numbers from -100 to 2"),
        (np.array([1, 2**30]), "from 0 to 1048575"),
        (np.array([{}]), "no array of numbers"),
        (np.zeros(0, dtype=int), "has no tokens"),
    ],
)
def test_arrays_of_something_else_get_a_sentence(
    tmp_path: Path, array: np.ndarray, sentence: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=sentence):
        load(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("name", ["fifo", "fifo.bin", "fifo.npy", "socket"])
def test_pipes_and_sockets_are_refused(tmp_path: Path, name: str) -> None:
    if name == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / name))
    else:
        os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read twice"):
        load(str(tmp_path / name))
    _folder(tmp_path, {"a.txt": "a" * 900, "b.txt": "b" * 900})
    assert "1 left out: devices, pipes or sockets" in load(str(tmp_path)).description


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/urandom"])
def test_devices_are_refused(device: str) -> None:
    with pytest.raises(InputError, match="a device"):
        load(device)


def test_links_are_said(tmp_path: Path) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    _folder(home, {"a.txt": "a" * 900, "b.txt": "b" * 900})
    _folder(away, {"c.txt": "c" * 900, "d.txt": "d" * 900})
    (home / "c.txt").symlink_to(away / "c.txt")
    (home / "d").symlink_to(away)
    (home / "loop").symlink_to(home)
    (home / "nowhere").symlink_to(away / "nothing")
    corpus = load(str(home))
    assert corpus.documents == 3
    for said in (
        "1 files are links that lead out of the folder, and were followed",
        "2 links to folders were not followed",
        "1 links left out: they lead nowhere",
    ):
        assert said in corpus.description
    assert "link" not in load(str(away)).description


def test_a_folder_may_be_called_as_a_token_file(tmp_path: Path) -> None:
    _folder(tmp_path / "data.bin", {"a.txt": "a" * 900, "b.txt": "b" * 900})
    assert load(str(tmp_path / "data.bin")).bytes_per_token == 1


def test_texts_beside_token_files_are_said_to_be_left_out(tmp_path: Path) -> None:
    np.arange(500, dtype="<u2").tofile(tmp_path / "a.bin")
    (tmp_path / "notes.txt").write_text("notes")
    assert "1 files left out: no tokens" in load(str(tmp_path)).description


def test_what_only_sounds_like_validation_is_for_training(tmp_path: Path) -> None:
    for name in ("interval.bin", "medieval.bin", "fineweb_val_000.bin"):
        np.arange(500, dtype="<u2").tofile(tmp_path / name)
    corpus = load(str(tmp_path))
    assert (len(corpus.train_tokens), len(corpus.validation_tokens)) == (1000, 500)


def test_a_torn_token_file_is_detected(tmp_path: Path) -> None:
    front = np.zeros(256, dtype="<i4")
    front[:3] = 20240520, 1, 5000
    (tmp_path / "a.bin").write_bytes(front.tobytes() + b"\0" * 100)
    with pytest.raises(InputError, match="torn"):
        load(str(tmp_path / "a.bin"))


def test_a_token_file_shorter_than_a_header_is_bare_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(np.array([20240520], "<i4").tobytes())
    assert len(load(str(tmp_path / "a.bin")).train_tokens) == 1


@pytest.mark.parametrize("source", ["", "~nobody-of-that-name/text", "x" * 5000])
def test_paths_that_cannot_be_get_a_sentence(source: str) -> None:
    with pytest.raises(InputError, match=r"existing|could not read"):
        load(source)


def test_a_name_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(InputError, match=r"did you mean .*cifar10"):
        load("cifr10")


def test_missing_data_and_empty_folders_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'stdlib' nor 'reference'"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="found no UTF-8 text"):
        load(str(tmp_path))
