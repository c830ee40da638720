from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.data import Sampler, load
from steepest.lab.data.token_files import JoinedTokens
from steepest.lab.errors import InputError


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_joined_tokens_are_the_concatenation(lengths: list[int], start: int, stop: int) -> None:
    arrays = [np.arange(length, dtype=np.uint16) + 10 * i for i, length in enumerate(lengths)]
    whole, joined = np.concatenate(arrays), JoinedTokens(arrays)
    assert len(joined) == len(whole)
    assert joined.nbytes == whole.nbytes
    assert np.array_equal(joined[start:stop], whole[start:stop])
    assert np.array_equal(np.asarray(joined), whole)
    if len(whole) > 1:
        first, second = joined.split(start % len(whole))
        assert np.array_equal(np.concatenate([first, second]), whole)


def _shards(folder: Path) -> np.ndarray:
    rng = np.random.default_rng(0)
    front = np.zeros(256, dtype="<i4")
    arrays = []
    for i in range(3):
        tokens = rng.integers(0, 300, 1000 + i, dtype="<u2")
        front[:3] = 20240520, 1, len(tokens)
        (folder / f"fineweb_train_{i:06}.bin").write_bytes(front.tobytes() + tokens.tobytes())
        arrays.append(tokens)
    return np.concatenate(arrays)


def test_shards_stay_in_their_files_and_give_the_same_windows_and_hash(tmp_path: Path) -> None:
    whole = _shards(tmp_path)
    corpus = load(str(tmp_path))
    assert isinstance(corpus.train_tokens, JoinedTokens)
    for part in (corpus.train_tokens, corpus.validation_tokens):
        assert all(isinstance(array, np.memmap) for array in part.arrays)
    cut = len(whole) - round(len(whole) / 20)
    ours, plain = (Sampler(t, 8, 100, seed=2) for t in (corpus.train_tokens, whole[:cut]))
    for step in range(20):
        assert (ours.batch(step)[0] == plain.batch(step)[0]).all()
    digest = hashlib.sha256()
    for part in (whole[:cut], whole[cut:]):
        digest.update(f"uint16 {len(part)} ".encode() + part.tobytes())
    assert corpus.sha256 == digest.hexdigest()


def test_without_a_tokenizer_bits_per_byte_are_unknown_and_text_too(tmp_path: Path) -> None:
    _shards(tmp_path)
    corpus = load(str(tmp_path))
    assert corpus.bytes_per_token is None
    assert "no bits per byte" in corpus.description
    with pytest.raises(InputError, match="without a tokenizer"):
        corpus.decode([1, 2])
