"""Every kind of file that a command writes: flipped bits, cut ends and kills are noticed.

What is read is what was written, or a part of its records, or there is a sentence. Files of before,
without checksums, still load.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steepest
from steepest.diagnosis import Diagnosis, diagnose
from steepest.files import (
    PREFIX,
    json_line,
    read_json,
    read_lines,
    remove_leftovers,
    sealed,
    unsealed,
    write_atomically,
    write_json,
    write_lines,
)
from steepest.lab import report
from steepest.lab.data import Sampler
from steepest.lab.errors import InputError
from steepest.lab.files import read_json as read_with_remedy
from steepest.lab.studies.diagnosis_study import _records, _sha256, _unedited
from steepest.lab.sweep import Run
from steepest.lab.train import TrainConfig, checkpoint
from steepest.lab.train.run_folder import Metrics, locked, opened, read_metrics
from steepest.records import Records
from steepest.transfer.runs import Finished

SETTINGS = {"lr": 0.02, "steps": 120, "sizes": {"width": 32, "names": ["a", "é"]}, "clip": None}
NUMBERS = {"status": "finished", "validation_loss": 1.2345678, "scores": {0.5: [1e-7, 2.0]}}
SUMMARY = {"kind": "study", "baseline": "adamw", "optimizers": [], **NUMBERS}
ROWS = [{"kind": "condition", "step": k, "loss": 1 / k, "matrix": f"m{k}"} for k in range(1, 9)]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def _trained() -> tuple[nn.Module, Any]:
    model = _network()
    optimizer = steepest.Muon(model)
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def _opened(folder: Path) -> Any:
    with opened(folder, SETTINGS):
        (folder / "metrics.jsonl").touch()  # so that the folder is bound to its settings
    return read_with_remedy(folder / "config.json"), read_with_remedy(folder / "environment.json")


def _with_metrics(folder: Path) -> None:
    metrics = Metrics(folder, 0)
    for row in ROWS:
        metrics.write(**row)
    metrics.close()


def _with_runs(folder: Path) -> None:
    finished = Finished(folder / "runs.jsonl")
    for row in ROWS:
        finished(json.dumps(["rate", row["step"]]), lambda row=row: row["loss"])


def _runs(folder: Path) -> list[Any]:
    """The results that need no new run."""
    finished = Finished(folder / "runs.jsonl")
    results = [finished(json.dumps(["rate", row["step"]]), lambda: None) for row in ROWS]
    return [result for result in results if result is not None]


def _with_records(folder: Path) -> None:
    Records(folder / "layers.jsonl").append(*ROWS)


def _rewound(folder: Path) -> list[Any]:
    records = Records(folder / "layers.jsonl")
    records.rewind(99)
    assert read_lines(folder / "layers.jsonl") == (records.rows, [])
    return records.rows


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> checkpoint.RunState:
    batches = Sampler(np.arange(9, dtype=np.uint8), batch=1, context=2, seed=0)
    return checkpoint.RunState(model, optimizer, batches)


def _with_checkpoint(folder: Path) -> None:
    checkpoint.save(folder, 7, _state(*_trained()), {"seconds": 1.5})


def _checkpoint(folder: Path) -> list[Any]:
    model, optimizer = _network(), steepest.Muon(_network())
    step, progress, _ = checkpoint.load_latest(folder, _state(model, optimizer))
    return [step, progress, [p.tolist() for p in model.parameters()]]


def _with_diagnosis(folder: Path) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    found = diagnose(
        _network(), lambda model, x: model(x).square().mean(), [x, x + 1, x - 1], level="quick"
    )
    found.save(folder / "saved.json")
    found.plan().save(folder / "plan.toml")
    summary = {**found.as_dict(), "plan_sha256": _sha256(folder / "plan.toml"), **SETTINGS}
    write_json(folder / "diagnosis.json", summary)


def _plan(folder: Path) -> str:
    _unedited(folder / "plan.toml")
    return (folder / "plan.toml").read_text()


def _with_page(folder: Path) -> None:
    page = '<html>\n<script type="application/json" id="steepest-summary">'
    page += json.dumps(sealed(SUMMARY)) + "</script>\n</html>"
    write_atomically(folder / "report.html", page.encode())


def _json(name: str, content: Any = NUMBERS) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / name, content)


KINDS: dict[str, tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = {
    # file: what writes it, what reads it
    "config.json": ("config.json", _opened, _opened),
    "environment.json": ("environment.json", _opened, _opened),
    "result.json": (
        "result.json", _json("result.json"), lambda folder: Run(TrainConfig(), folder).result,
    ),
    "plan.json": ("plan.json", _json("plan.json"), lambda f: read_with_remedy(f / "plan.json")),
    "run of an edge": (
        "gd-0.1-seed0.json", _json("gd-0.1-seed0.json"),
        lambda folder: read_with_remedy(folder / "gd-0.1-seed0.json"),
    ),
    "summary.json": (
        "summary.json", _json("summary.json", SUMMARY), lambda folder: report.find(folder)[0],
    ),
    "diagnosis.json": ("diagnosis.json", _with_diagnosis, lambda folder: report.find(folder)[0]),
    "a saved diagnosis": (
        "saved.json", _with_diagnosis, lambda f: Diagnosis.load(f / "saved.json").as_dict(),
    ),
    "plan.toml": ("plan.toml", _with_diagnosis, _plan),
    "report.html": ("report.html", _with_page, lambda f: report.find(f / "report.html")[0]),
    "metrics.jsonl": ("metrics.jsonl", _with_metrics, read_metrics),
    "runs.jsonl": ("runs.jsonl", _with_runs, _runs),
    "layers.jsonl": ("layers.jsonl", _with_records, _rewound),
    "layers.jsonl, to a diagnosis": (
        "layers.jsonl", _with_records, lambda folder: _records(folder / "layers.jsonl"),
    ),
    **{
        f"checkpoint, {name}": (f"step-00000007/{name}", _with_checkpoint, _checkpoint)
        for name in ("model.safetensors", "state.pt", "progress.json", "manifest.json")
    },
}  # fmt: skip


def _check(read: Callable[[Path], Any], folder: Path, whole: Any) -> None:
    """There is a sentence, or what is read is what was written, or some of its rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            content = read(folder)
        except (InputError, ValueError) as error:
            sentence = str(error)
        else:
            sentence = ""
    if sentence:
        assert folder.name in sentence, "the sentence names the file"
    elif content != whole:
        assert isinstance(whole, list)
        assert [row for row in whole if row in content] == content


@pytest.fixture(params=KINDS)
def kind(request: Any, tmp_path: Path) -> Any:
    name, write, read = KINDS[request.param]
    folder = tmp_path / "original"
    folder.mkdir()
    write(folder)
    whole = read(shutil.copytree(folder, tmp_path / "copy"))
    return name, read, folder, whole, np.random.default_rng(sum(request.param.encode()))


def _damaged(folder: Path, name: str, content: bytes) -> Path:
    place = folder.parent / "damaged"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    (place / name).write_bytes(content)
    return place


def test_a_flipped_bit_is_noticed(kind: Any) -> None:
    name, read, folder, whole, rng = kind
    content = (folder / name).read_bytes()
    for _ in range(60):
        place, bit = int(rng.integers(len(content))), 1 << int(rng.integers(8))
        changed = bytes([content[place] ^ bit])
        where = _damaged(folder, name, content[:place] + changed + content[place + 1 :])
        _check(read, where, whole)


def test_a_cut_end_is_noticed(kind: Any) -> None:
    name, read, folder, whole, rng = kind
    content = (folder / name).read_bytes()
    for length in {0, 1, len(content) - 1, *map(int, rng.integers(len(content), size=25))}:
        _check(read, _damaged(folder, name, content[:length]), whole)


def test_every_bit_of_what_counts_is_seen(tmp_path: Path) -> None:
    """All flips, one by one: none of them changes a number, or a name, without being noticed."""
    write_json(tmp_path / "a.json", NUMBERS)
    write_lines(tmp_path / "a.jsonl", ROWS[:1])
    content = (tmp_path / "a.json").read_bytes()
    for i, flipped in enumerate(_flips(content)):
        try:
            assert unsealed(json.loads(flipped)) == json.loads(json.dumps(NUMBERS)), i
        except ValueError:
            continue
    content = (tmp_path / "a.jsonl").read_bytes()
    for i, flipped in enumerate(_flips(content)):
        (tmp_path / "b.jsonl").write_bytes(flipped)
        rows, damaged = read_lines(tmp_path / "b.jsonl")
        assert rows == ROWS[:1] or (rows == [] and (damaged or flipped[-1:] != b"\n")), i


def _flips(content: bytes) -> Iterator[bytes]:
    for i in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        yield bytes(flipped)


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    model, optimizer = _trained()
    x = {"old": 1, "numbers": [1.5] * 50}, {"new": 2, "numbers": [2.5] * 50}

    def write(folder: Path, new: int) -> None:
        write_json(folder / "a.json", x[new])
        write_lines(folder / "b.jsonl", [x[new]] * 3)
        (folder / "c.toml").exists() or write_atomically(folder / "c.toml", b"old = 1")
        checkpoint.save(folder / "checkpoints", new + 1, _state(model, optimizer), {})

    original = tmp_path / "original"
    original.mkdir()
    write(original, 0)
    for moment in range(60):
        folder = tmp_path / str(moment)
        shutil.copytree(original, folder)
        if not (child := os.fork()):
            _die_at(moment)
            write(folder, 1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert read_json(folder / "a.json") in x
        assert read_lines(folder / "b.jsonl") in [([y] * 3, []) for y in x]
        step, _, damaged = checkpoint.load_latest(folder / "checkpoints", _state(model, optimizer))
        assert (step in (1, 2), damaged) == (True, [])
        names = {p.name for p in folder.rglob("*")} - {p.name for p in original.rglob("*")}
        assert all(
            name.startswith(PREFIX) or "." in name or name == "step-00000002" for name in names
        )
        with locked(folder):  # too young to be removed: they may be of a command without a lock
            pass
        remove_leftovers(folder, before=float("inf"))
        assert not list(folder.rglob(f"{PREFIX}*"))
        if code == 0:
            assert step == 2
            break
    assert 15 < moment < 59


def _die_at(moment: int) -> None:
    """End this process before its call of that number to the file system."""
    left = moment

    def mortal(call: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return call(*arguments, **named)

        return wrapped

    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, mortal(getattr(os, name)))


def test_files_of_before_have_no_checksum_and_load(tmp_path: Path) -> None:
    plain = json.loads(json.dumps(NUMBERS))
    (tmp_path / "a.json").write_text(json.dumps(NUMBERS, indent=1))
    assert read_json(tmp_path / "a.json") == plain
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "layers.jsonl").write_text(lines)
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert _rewound(tmp_path) == ROWS == read_metrics(tmp_path)
    assert all("checksum" in line for line in (tmp_path / "layers.jsonl").read_text().splitlines())
    names = [json.dumps(["rate", row["step"]]) for row in ROWS]
    old = "".join(json.dumps([n, r["loss"]]) + "\n" for n, r in zip(names, ROWS, strict=True))
    (tmp_path / "runs.jsonl").write_text(old)
    assert _runs(tmp_path) == [row["loss"] for row in ROWS]
    Finished(tmp_path / "runs.jsonl")("more", lambda: 1.0)
    assert len(_runs(tmp_path)) == len(ROWS)  # old lines beside new ones are no damage
    _with_checkpoint(tmp_path)
    manifest = tmp_path / "step-00000007" / "manifest.json"
    manifest.write_text(json.dumps(read_json(manifest)))
    assert _checkpoint(tmp_path)[0] == 7
    summary = json.loads(json.dumps(SUMMARY))
    page = f'<script type="application/json" id="steepest-summary">{json.dumps(summary)}</script>'
    (tmp_path / "report.html").write_text(page)
    assert report.read(tmp_path / "report.html") == summary


@pytest.mark.parametrize("begin", ['{"name": "[\\"rate\\"', '["[\\"rate\\", 1', "[", "{", ""])
def test_a_torn_first_line_loses_nothing(tmp_path: Path, begin: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(begin)
    finished = Finished(path)
    assert finished("a", lambda: 1.5) == 1.5
    assert Finished(path)("a", lambda: 2.5) == 1.5
    (tmp_path / "layers.jsonl").write_text('{"step": 1, "lo\n' + "".join(map(json_line, ROWS)))
    with pytest.warns(UserWarning, match=r"layers\.jsonl .* line 1: "):
        assert _rewound(tmp_path) == ROWS
    path.write_text('{"name": "[\\"ra\n' + path.read_text())
    with pytest.warns(UserWarning, match=r"runs\.jsonl .* line 1: "):
        assert Finished(path)("a", lambda: 2.5) == 1.5


def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    for text in ("my notes\n", "my notes", '{"a": 1}', '{"a": 1}\n{"b": 2}\n', "[1, 2]\n"):
        (tmp_path / "layers.jsonl").write_text(text)
        with pytest.raises(ValueError, match="lines that are no records"):
            Records(tmp_path / "layers.jsonl").rewind(4)
        assert (tmp_path / "layers.jsonl").read_text() == text


def test_a_file_that_is_removed_in_the_middle_is_an_error(tmp_path: Path) -> None:
    finished = Finished(tmp_path / "new" / "runs.jsonl")
    finished("a", lambda: 1.5)
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        finished("b", lambda: 2.5)
    assert not (tmp_path / "new").exists()


def test_names_of_unfinished_files_are_new_and_no_link_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    (tmp_path / f"{PREFIX}{'0' * 16}").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a.json", b"{}")
    assert (tmp_path / "precious").read_text() == "mine"
    (tmp_path / "b.json").symlink_to(tmp_path / "precious")
    monkeypatch.undo()
    write_atomically(tmp_path / "b.json", b"{}")  # takes the place of the link
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "b.json").is_symlink()


def test_leftovers_older_than_the_holder_of_the_lock_are_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    places = [tmp_path / f"{PREFIX}1", tmp_path / "runs" / f"{PREFIX}2", tmp_path / ".step-1.99"]
    for place in (*places, tmp_path / f"{PREFIX}young", tmp_path / ".hidden"):
        place.mkdir(parents=True)
        (place / "inside").write_text("")
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "precious")
    for place in (*places, tmp_path / ".hidden", tmp_path / f"{PREFIX}link"):
        os.utime(place, (1, 1), follow_symlinks=False)
    with locked(tmp_path):
        left = {p.name for p in tmp_path.iterdir()}
    assert left == {"precious", "runs", f"{PREFIX}young", ".hidden", ".lock"}
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["fifo", "/dev/zero"])
def test_a_device_or_a_pipe_is_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "fifo":
        os.mkfifo(path)
    readers: list[Callable[[Path], Any]] = [
        read_json, read_lines, report.find, _records, Diagnosis.load, read_with_remedy,
    ]  # fmt: skip
    for read in readers:
        with pytest.raises((ValueError, InputError), match="a device"):
            read(path)


def test_a_record_with_a_checksum_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="own checksum"):
        sealed({"checksum": "mine"})
    assert unsealed({}) == unsealed(sealed({})) == {}
