from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from steepest.lab.data.cache import cached
from steepest.lab.errors import InputError


def test_arrays_are_made_once_for_each_key_and_mapped() -> None:
    calls = []

    def make() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"a": np.arange(5), "b": np.zeros((2, 3), dtype=np.uint8)}

    first, second = cached("kind", "key", "", make), cached("kind", "key", "", make)
    assert len(calls) == 1
    assert isinstance(first["a"], np.memmap)
    assert all(np.array_equal(first[name], second[name]) for name in ("a", "b"))
    cached("kind", "another key", "", make)
    assert len(calls) == 2


def test_one_that_fails_leaves_nothing_and_the_next_one_starts_again(own_cache: Path) -> None:
    class Unwritable:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("kind", "key", "", lambda: {"a": np.arange(3), "b": Unwritable()})
    assert not [p for p in own_cache.iterdir() if p.is_dir()]
    (own_cache / next(own_cache.glob("kind-*.lock")).stem).with_suffix(".aside.steepest-0").mkdir()
    assert cached("kind", "key", "", lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]
    assert len([p for p in own_cache.iterdir() if p.is_dir()]) == 1  # the killed one's has gone


def test_several_at_once_wait_for_the_first() -> None:
    calls: list[int] = []
    results = []

    def make() -> dict[str, np.ndarray]:
        calls.append(1)
        time.sleep(0.05)
        return {"a": np.arange(1000)}

    def load() -> None:
        results.append(cached("kind", "key", "", make)["a"].sum())

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert results == [499_500] * 6


def test_a_folder_that_cannot_be_written_and_a_damaged_one_get_sentences(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached("kind", "key", "", lambda: {"a": np.arange(1000)})
    [file] = own_cache.rglob("a.npy")
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(InputError, match=r"is damaged .* delete this folder"):
        cached("kind", "key", "", dict)
    (own_cache / "file").write_text("")
    monkeypatch.setenv("STEEPEST_CACHE", str(own_cache / "file"))
    with pytest.raises(InputError, match="STEEPEST_CACHE"):
        cached("kind", "key", "", dict)
