from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.data.stream import Shards, StreamBatches
from steepest.lab.data.tokenizers import Bytes
from steepest.lab.errors import InputError

Files = list[list[bytes]]
texts = st.integers(0, 40).map(lambda size: bytes(97 + (size + i) % 26 for i in range(size)))
files = st.lists(st.lists(texts, max_size=5), min_size=1, max_size=4).filter(lambda f: any(f))


def _shards(content: Files, lines: bool = False) -> Shards:
    def read(shard: int, start: int) -> Iterator[bytes]:
        return iter(content[shard][start:])

    return Shards("texts", len(content), read, lines)


def _batches(content: Files, size: int, context: int, seed: int = 0) -> StreamBatches:
    return StreamBatches(_shards(content), Bytes(), size, context, seed, parts=1)


@given(files, st.integers(1, 4), st.integers(1, 30))
def test_windows_are_the_documents_of_each_epoch_in_a_row(
    content: Files, size: int, context: int
) -> None:
    batches = _batches(content, size, context)
    rows = [batches.batch(step) for step in range(8)]
    inputs = torch.cat([x.flatten() for x, _ in rows]).numpy().astype(np.uint8).tobytes()
    targets = torch.cat([y.flatten() for _, y in rows]).numpy().astype(np.uint8).tobytes()
    assert inputs[1:] == targets[:-1]
    position = 0
    while position < len(inputs):  # an epoch: the files in some order
        rest = {i: b"".join(text + b"\0" for text in file) for i, file in enumerate(content)}
        epoch = sum(map(len, rest.values()))
        part = inputs[position : position + epoch]
        if len(part) == epoch:
            assert sorted(part.split(b"\0")[:-1]) == sorted(t for file in content for t in file)
        position += epoch


@given(
    files,
    st.integers(1, 3),
    st.integers(1, 30),
    st.lists(st.integers(0, 6), min_size=3, max_size=3),
    st.integers(0, 9),
)
def test_three_interruptions_at_any_place_change_no_window(
    content: Files, size: int, context: int, stops: list[int], seed: int
) -> None:
    through = _batches(content, size, context, seed)
    step = 0
    batches = _batches(content, size, context, seed)
    for stop in stops:
        for _ in range(stop):
            for ours, theirs in zip(batches.batch(step), through.batch(step), strict=True):
                assert torch.equal(ours, theirs)
            step += 1
        state = json.loads(json.dumps(batches.state_dict()))
        assert batches.state_dict() == state == through.state_dict()
        batches = _batches(content, size, context, seed)
        batches.load_state_dict(state)
        assert batches.state_dict() == state
    assert torch.equal(batches.batch(step)[1], through.batch(step)[1])


def test_the_seed_gives_the_order_of_files() -> None:
    content = [[bytes([97 + i])] for i in range(20)]
    firsts = {
        _batches(content, 1, 20, seed).batch(0)[0].numpy().astype(np.uint8).tobytes()
        for seed in range(5)
    }
    assert len(firsts) == 5


def test_lines_have_no_end_of_text_between_them() -> None:
    shards = _shards([[b"one\n", b"", b"two\n"]], lines=True)
    batches = StreamBatches(shards, Bytes(), 1, 8, seed=0, parts=1)
    assert bytes(batches.batch(0)[0][0].tolist()) == b"one\ntwo\n"


def test_another_document_at_the_position_is_noticed() -> None:
    batches = _batches([[b"first", b"second", b"third"]], 1, 8)
    batches.batch(0)
    state = batches.state_dict()
    assert state["document"] == 1
    changed = _batches([[b"first", b"other", b"third"]], 1, 8)
    with pytest.raises(InputError, match=r"file 0, document 1\) than before"):
        changed.load_state_dict(state)


def test_batches_out_of_order_and_empty_streams_get_a_sentence() -> None:
    with pytest.raises(InputError, match=r"got batch 3 .* expected number 0"):
        _batches([[b"text"]], 1, 2).batch(3)
    with pytest.raises(InputError, match="no text to train on"):
        StreamBatches(_shards([[b"", b""]], lines=True), Bytes(), 1, 2, 0, 1).batch(0)


def test_parts_of_a_step_come_one_after_another() -> None:
    content = [[bytes(range(1, 200))]]
    parted = StreamBatches(_shards(content), Bytes(), 1, 4, seed=0, parts=3)
    whole = StreamBatches(_shards(content), Bytes(), 3, 4, seed=0, parts=1)
    for step in range(5):
        rows = torch.cat([parted.batch(step, part)[0] for part in range(3)])
        assert torch.equal(rows, whole.batch(step)[0])
