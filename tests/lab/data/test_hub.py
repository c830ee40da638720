"""A folder of .jsonl or .parquet files stands in for huggingface.co."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steepest.lab.data import Images, ImageShape, load
from steepest.lab.data.hub import HUB
from steepest.lab.data.stream import Stream
from steepest.lab.errors import InputError

datasets = pytest.importorskip("datasets")


def _texts(count: int = 30) -> list[str]:
    """Documents shorter and longer than a window of 32."""
    return [f"document {i}: " + "longer " * (i * i % 17) for i in range(count)]


def _folder(folder: Path, kind: str, texts: list[str], files: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for k in range(files):
        rows = [{"text": text, "number": i} for i, text in enumerate(texts[k::files])]
        if kind == "jsonl":
            lines = "\n".join(map(json.dumps, rows))
            (folder / f"part{k}.jsonl").write_text(lines)
        else:
            table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
            pytest.importorskip("pyarrow.parquet").write_table(table, folder / f"part{k}.parquet")
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_a_stream_that_is_interrupted_three_times_gives_the_same_windows(
    tmp_path: Path, kind: str, tokenizer: str
) -> None:
    source = f"hub:{_folder(tmp_path / 'a', kind, _texts())}"
    data = load(source, tokenizer=tokenizer)
    through = data.training(batch=2, context=32, seed=1, parts=2)
    expected = [through.batch(step, part) for step in range(20) for part in range(2)]
    draw = random.Random(kind + tokenizer)
    stops = sorted(draw.sample(range(1, 20), 3))
    batches: Any = data.training(batch=2, context=32, seed=1, parts=2)
    for step in range(20):
        if step in stops:
            state = json.loads(json.dumps(batches.state_dict()))
            again = load(source, tokenizer=tokenizer)
            assert again.sha256 == data.sha256
            batches = again.training(batch=2, context=32, seed=1, parts=2)
            batches.load_state_dict(state)
        for part in range(2):
            for ours, theirs in zip(
                batches.batch(step, part), expected[2 * step + part], strict=True
            ):
                assert torch.equal(ours, theirs)


def test_the_first_documents_are_held_out_and_never_trained_on(tmp_path: Path) -> None:
    texts = _texts(60)
    data = load(f"hub:{_folder(tmp_path / 'a', 'jsonl', texts, files=2)}")
    assert isinstance(data, Stream)
    assert "its first 2 documents held out" in data.description  # a twentieth of the first file
    assert data.bytes_per_token == 1
    held_out = bytes(data.validation_tokens).decode().split("\0")
    assert held_out == [texts[0], texts[2]]
    batches = data.training(batch=1, context=200, seed=0)
    row = bytes(torch.cat([batches.batch(i)[0][0] for i in range(40)]).tolist()).decode()
    seen = set(row.split("\0")[:-1])
    assert seen == set(texts) - set(held_out)
    [(inputs, targets)] = data.validation(batch=4, context=8, count=3)
    assert inputs.shape == targets.shape == (3, 8)
    assert data.decode(data.encode("né")) == "né"
    assert data.shape(8).vocabulary == 256


def test_a_validation_file_or_a_text_of_ones_own_judges(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", "jsonl", _texts())
    (folder / "validation.jsonl").write_text('{"text": "judged"}\n{"text": "by this"}')
    data = load(f"hub:{folder}")
    assert isinstance(data, Stream)
    assert bytes(data.validation_tokens) == b"judged\0by this"
    (tmp_path / "own.txt").write_text("my own text")
    own = load(f"hub:{folder}", validation=str(tmp_path / "own.txt"))
    assert isinstance(own, Stream)
    assert bytes(own.validation_tokens) == b"my own text"
    assert own.sha256 != data.sha256


def test_a_changed_file_is_other_data(tmp_path: Path) -> None:
    before = load(f"hub:{_folder(tmp_path / 'a', 'jsonl', _texts())}").sha256
    assert load(f"hub:{_folder(tmp_path / 'a', 'jsonl', _texts(29))}").sha256 != before


def _image_rows(folder: Path, splits: tuple[str, ...]) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in splits:
        pixels = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
        rows = {"img": [image.fromarray(x) for x in pixels], "label": [i % 3 for i in range(60)]}
        columns = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)}
        )
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict(rows, columns).to_parquet(folder / f"{split}-0.parquet")
    return folder


def test_image_sets_are_read_whole(tmp_path: Path) -> None:
    data = load(f"hub:{_image_rows(tmp_path / 'a', ('train', 'test'))}")
    assert isinstance(data, Images)
    assert data.shape(None) == ImageShape(3, 8, 3)
    assert "3 of 60 images held out, 60 test images kept apart" in data.description
    assert len(next(data.test(60))[1]) == 60
    alone = load(f"hub:{_image_rows(tmp_path / 'b', ('train',))}")
    assert "kept apart" not in alone.description


def test_bad_folders_get_a_sentence(tmp_path: Path) -> None:
    def refused(sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            load(f"hub:{folder}")

    folder = tmp_path / "a"
    folder.mkdir()
    refused("expected files of one of them")
    (folder / "a.jsonl").write_text('{"sentence": "text", "number": 1}\n')
    refused("has the columns sentence, number, expected text")
    (folder / "a.jsonl").write_text('{"text": "only one"}\n')
    refused("too few to hold one out")
    (folder / "a.jsonl").write_text('{"text": torn')
    refused("could not read")
    (folder / "a.jsonl").rename(folder / "validation.jsonl")
    refused("no files to train on")
    folder = tmp_path / "nowhere"
    refused("is no folder")


class _Hub:
    """Data sets of the hub, from local entries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[tuple[Any, ...]] = []
        self.entries: dict[str, Any] = {}
        monkeypatch.setattr("steepest.lab.data.hub.hub_answers", lambda: True)
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: list(self.entries))
        info = type("Info", (), {"sha": "abc"})
        api = type("Api", (), {"dataset_info": lambda *_, **__: info})
        monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "HfApi", api)

    def load(self, path: str, part: str | None, split: str, streaming: bool, revision: str) -> Any:
        assert streaming
        self.calls.append((path, part, split, revision))
        return datasets.Dataset.from_list(self.entries[split]).to_iterable_dataset(2)


def test_lines_of_wikitext_make_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(monkeypatch)
    hub.entries = {
        "train": [{"text": text} for text in ("", " = A = \n", " one two \n", " three \n") * 9],
        "validation": [{"text": text} for text in (" = B = \n", "", " four \n")],
    }
    data = load("wikitext-103")
    assert isinstance(data, Stream)
    assert bytes(data.validation_tokens) == b" = B = \n four \n"
    row = bytes(data.training(batch=1, context=60, seed=0).batch(0)[0][0].tolist())
    assert row == (b" = A = \n one two \n three \n" * 9)[:60]
    parts = [("Salesforce/wikitext", "wikitext-103-raw-v1", s, "abc") for s in hub.entries]
    assert hub.calls == parts


def test_documents_of_the_hub_are_held_out_from_the_first_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = _Hub(monkeypatch)
    hub.entries = {"train": [{"text": text, "url": "x"} for text in _texts(60)]}
    first, again = load("fineweb"), load("hub:owner/name:part")
    assert "its first 2 documents held out" in first.description
    assert first.sha256 != again.sha256
    assert {call[:2] for call in hub.calls} == {
        ("HuggingFaceFW/fineweb", "sample-10BT"),
        ("owner/name", "part"),
    }


def test_images_of_the_hub_are_downloaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    hub = _Hub(monkeypatch)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    rows = [{"image": image.fromarray(x), "label": i % 3} for i, x in enumerate(pixels)]
    hub.entries = {"train": rows, "test": rows[:9]}
    first = load("mnist")
    assert first.shape(None) == ImageShape(1, 8, 3)
    assert "9 test images kept apart" in first.description
    monkeypatch.setattr("steepest.lab.data.hub.hub_answers", lambda: False)
    assert load("mnist").sha256 == first.sha256


@pytest.mark.parametrize("source", [*HUB, "hub:owner/name", "hub:owner/name:part"])
def test_without_network_a_sentence_says_what_to_give(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"does not answer, .* give (the path of a text|a path)"):
        load(source)


def test_without_the_library_a_sentence_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _folder(tmp_path / "a", "jsonl", _texts())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'steepest\[data\]'"):
        load(f"hub:{folder}")


def test_a_stream_without_documents_or_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "part.jsonl"
    file.write_text("")
    with pytest.raises(InputError, match=r"could not read the files .* they are empty"):
        load(f"hub:{file.parent}")
    with pytest.raises(InputError, match="is a file"):
        load(f"hub:{file}")
    with pytest.raises(InputError, match="expected a name or a folder"):
        load("hub:")
