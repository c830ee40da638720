from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from steepest.lab.data import judged_by_text, load
from steepest.lab.data.tokenizers import (
    Bytes,
    LibraryTokenizer,
    bytes_of_tokens,
    cut_at_lines,
    joined,
    tokenizer_for,
)
from steepest.lab.errors import InputError

TEXT = "The cat sat on the mat.\nA dog — naïve, 東京, 🐈 — sat on the  cat's mat!\n" * 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> LibraryTokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEEPEST_CACHE", str(tmp_path_factory.mktemp("cache")))
        tokenizer = tokenizer_for("bpe:300", [TEXT.encode()])
    assert isinstance(tokenizer, LibraryTokenizer)
    return tokenizer


def _folders(tokenizer: LibraryTokenizer, folder: Path) -> dict[str, str]:
    """The same tokenizer as GPT-2's two files, and as one file."""
    content = json.loads(tokenizer._library.to_str())["model"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    pairs = [" ".join(m) if isinstance(m, list) else m for m in content["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]))
    tokenizer._library.save(str(folder.parent / "tokenizer.json"))
    return {"folder": str(folder), "file": str(folder.parent / "tokenizer.json")}


@pytest.mark.parametrize("kind", ["bytes", "bpe", "folder", "file"])
def test_every_tokenizer_gives_the_text_back(
    kind: str, trained: LibraryTokenizer, tmp_path: Path
) -> None:
    names = {"bytes": "bytes", **_folders(trained, tmp_path / "gpt2")}
    tokenizer = trained if kind == "bpe" else tokenizer_for(names[kind], [])
    for text in ("", " a\r\n\t b ", TEXT, "zß水🍌", "<|endoftext|>", "\x01\x7f"):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.end not in tokens  # also where a document spells its name
        assert all(0 <= token < tokenizer.vocabulary for token in tokens)
    assert kind == "bytes" or tokenizer.encode(TEXT) == trained.encode(TEXT)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_comes_back_from_bytes(text: str) -> None:
    assert Bytes().decode(Bytes().encode(text)) == text


@given(st.text("ab \n'.1é", max_size=60), st.integers(1, 20))
def test_long_documents_are_cut_where_it_changes_no_token(text: str, longest: int) -> None:
    library = pytest.importorskip("tokenizers")
    words = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = list(cut_at_lines(text, longest))
    assert "".join(pieces) == text
    whole = [word for word, _ in words.pre_tokenize_str(text)]
    assert [word for piece in pieces for word, _ in words.pre_tokenize_str(piece)] == whole


def test_documents_are_joined_by_one_end_of_text(trained: LibraryTokenizer) -> None:
    row = joined(trained, [b"cat", b"", b"the mat"])
    expected = [*trained.encode("cat"), trained.end, trained.end, *trained.encode("the mat")]
    assert row.tolist() == expected
    assert joined(Bytes(), [b"cat", b"mat"]).tolist() == list(b"cat\0mat")


def test_the_split_is_the_same_for_every_tokenizer_and_training_sees_no_other_text(
    tmp_path: Path,
) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"document {i} of common words " * 20 + "q" * i)
    plain, encoded = load(str(tmp_path)), load(str(tmp_path), tokenizer="bpe:280")
    for part in ("train_tokens", "validation_tokens"):
        tokens = getattr(encoded, part)
        text = encoded.decode(tokens.tolist()).replace("<|endoftext|>", "\0")
        assert text.encode() == bytes(getattr(plain, part))
    held_out = bytes(plain.validation_tokens)
    assert encoded.bytes_per_token == len(held_out) / len(encoded.validation_tokens)
    assert encoded.shape(16).vocabulary == 280


def test_a_trained_encoding_does_not_depend_on_the_text_held_out(tmp_path: Path) -> None:
    text = "common words here " * 400
    digests = []
    for end in ("zxzxzxzxzx", "kvkvkvkvkv"):
        (tmp_path / "a.txt").write_text(text + end * 30)
        corpus = load(str(tmp_path / "a.txt"), tokenizer="bpe:270", validation=None)
        digests.append(corpus.tokenizer.sha256)
    assert digests[0] == digests[1]


_PROGRAM = """
import sys
from steepest.lab.data import load
corpus = load(sys.argv[1], tokenizer="bpe:300")
print(corpus.sha256, corpus.tokenizer.sha256)
"""


def test_processes_with_empty_caches_train_the_same_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 3)
    outputs = []
    for i, threads in enumerate("14"):
        environment = {
            "STEEPEST_CACHE": str(tmp_path / f"cache{i}"),
            "PYTHONHASHSEED": str(i),
            "RAYON_NUM_THREADS": threads,
            "PYTHONPATH": ":".join(sys.path),
        }
        command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "a.txt")]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        outputs.append(run.stdout)
    assert outputs[0] == outputs[1] != ""


def test_a_second_load_takes_the_tokens_from_the_cache(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    first = load(str(tmp_path / "a.txt"), tokenizer="bpe:300")
    monkeypatch.setattr(LibraryTokenizer, "encoded", None)
    second = load(str(tmp_path / "a.txt"), tokenizer="bpe:300")
    assert first.sha256 == second.sha256
    assert sorted(p.name.split("-")[0] for p in own_cache.iterdir() if p.is_dir()) == [
        "bpe",
        "tokens",
    ]


def test_bits_per_byte_of_a_uniform_model_are_known(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    for name in ("bytes", "bpe:300"):
        data = load(str(tmp_path / "a.txt"), tokenizer=name)
        [(inputs, targets)] = data.validation(batch=1, context=16, count=1)
        vocabulary = data.shape(16).vocabulary
        logits = inputs.new_zeros((16, vocabulary), dtype=float)
        bits = F.cross_entropy(logits, targets[0]).item() / math.log(2) / data.bytes_per_token
        text = (tmp_path / "a.txt").read_bytes()[-round(len(TEXT.encode()) / 20) :]
        tokens = len(data.encode(text.decode(errors="ignore")))
        assert bits == pytest.approx(math.log2(vocabulary) * tokens / len(text), rel=0.02)
        if name == "bytes":
            assert bits == pytest.approx(8)


def test_the_bytes_of_shards_are_counted_by_their_tokenizer(
    trained: LibraryTokenizer, tmp_path: Path
) -> None:
    name = _folders(trained, tmp_path / "gpt2")["folder"]
    shards = tmp_path / "shards"
    shards.mkdir()
    row = joined(trained, [TEXT.encode(), b"the cat"])
    for part in ("train", "val"):
        row.tofile(shards / f"{part}.bin")
    corpus = load(str(shards), tokenizer=name)
    size = len(TEXT.encode()) + 1 + len(b"the cat")
    assert corpus.bytes_per_token == size / len(row)
    assert corpus.shape(8).vocabulary == trained.vocabulary
    assert corpus.decode(trained.encode("the mat")) == "the mat"
    many = np.tile(row, 40)
    assert bytes_of_tokens(trained, many, pieces=1) == pytest.approx(
        (40 * size) / len(many), rel=0.02
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bpe:10", "from 257"),
        ("bpe:many", "from 257"),
        ("wordpiece", "expected bytes, bpe:4096"),
        ("", "expected bytes, bpe:4096"),
        ("{folder}/broken.json", "could not read a tokenizer"),
        ("{folder}/endless.json", "no end-of-text token"),
    ],
)
def test_what_is_no_tokenizer_gets_a_sentence(name: str, sentence: str, tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    (tmp_path / "broken.json").write_text("{")
    library.Tokenizer(library.models.BPE()).save(str(tmp_path / "endless.json"))
    with pytest.raises(InputError, match=sentence):
        tokenizer_for(name.replace("{folder}", str(tmp_path)), [b"text"])


def test_tokens_of_another_tokenizer_get_a_sentence(
    trained: LibraryTokenizer, tmp_path: Path
) -> None:
    name = _folders(trained, tmp_path / "gpt2")["folder"]
    np.arange(1000, dtype="<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"has a token 999, but .* has 2"):
        load(str(tmp_path / "a.bin"), tokenizer=name)
    with pytest.raises(InputError, match="trained on text"):
        load(str(tmp_path / "a.bin"), tokenizer="bpe:300")


def test_without_the_library_a_sentence_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(InputError, match=r"pip install 'steepest\[data\]'"):
        load(str(tmp_path / "a.txt"), tokenizer="bpe:300")
    assert load(str(tmp_path / "a.txt")).bytes_per_token == 1


def test_gpt2_without_network_names_a_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("steepest.lab.data.tokenizers._GPT2", "nobody/nothing")
    with pytest.raises(InputError, match=r"vocab.json and merges.txt, or train one"):
        tokenizer_for("gpt2", [])


def test_a_text_of_its_own_judges(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 500)
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(name * 500)
    corpus = load(str(folder), validation=str(tmp_path / "c.txt"))
    assert set(bytes(corpus.train_tokens)) == {*b"ab\0"}
    assert bytes(corpus.validation_tokens) == b"c" * 500
    overlapping = load(str(folder), validation=str(tmp_path / "b.txt"))
    assert bytes(overlapping.train_tokens) == b"a" * 500
    assert "1 documents left out" in overlapping.description
    with pytest.raises(InputError, match="same text"):
        load(str(tmp_path / "b.txt"), validation=str(tmp_path / "b.txt"))


def test_a_test_text_is_scored_in_the_tokenizer_of_the_training_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "test.txt").write_text("a cat, a mat")
    corpus = load(str(tmp_path / "a.txt"), tokenizer="bpe:300")
    scored = judged_by_text(corpus, str(tmp_path / "test.txt"))
    assert scored.train_tokens is corpus.train_tokens
    assert scored.validation_tokens.tolist() == corpus.encode("a cat, a mat")
    assert scored.bytes_per_token == 12 / len(scored.validation_tokens)
    assert scored.sha256 != corpus.sha256
    with pytest.raises(InputError, match="got digits, expected text"):
        judged_by_text(load("digits"), str(tmp_path / "test.txt"))


def test_wikitext_with_a_trained_encoding(real_data: Path) -> None:
    corpus = load(str(real_data / "wikitext2" / "valid.txt"), tokenizer="bpe:1024")
    text = (real_data / "wikitext2" / "valid.txt").read_bytes()
    end = text[-len(text) // 20 :]
    assert 2 < corpus.bytes_per_token < 4
    tokens = corpus.validation_tokens
    assert end.decode(errors="ignore").endswith(corpus.decode(tokens[-50:].tolist()))
    assert hashlib.sha256(tokens[:].tobytes()).hexdigest()


def test_a_vocabulary_that_would_lose_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<|endoftext|>": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match="no token for 254 of the 256 bytes"):
        tokenizer_for(str(tmp_path), [])
