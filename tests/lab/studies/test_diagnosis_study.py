"""A diagnosis in a folder: stopped at any moment, it goes on, and ends the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steepest.lab.errors import InputError
from steepest.lab.studies import finished
from steepest.lab.studies.diagnosis_study import diagnosis_study

MINE = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.unused = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(3, 3)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 4)
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        y = self.out((q @ k.mT).softmax(-1) @ v)
        return self.head(self.drop((x + y).relu())).mean(1)
def batches():
    while True:
        x = torch.randn(30, 5, 8)
        yield x, x.mean(1)[:, :4].argmax(1)
"""


def _run(place: Path, *more: str, **popen: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "steepest.cli", "diagnose", "mine:Net", "--batches"]
    return subprocess.Popen(
        [*command, "mine:batches", "--count", "4", "--out", "out", *more],
        cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen,
    )  # fmt: skip


def _measured(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "diagnosis.json").read_text())
    return {key: content[key] for key in ("rows", "stacks", "advice", "warm_up", "notes")}


def _place(path: Path) -> Path:
    path.mkdir()
    (path / "mine.py").write_text(MINE)
    return path


def test_a_killed_command_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    more = ["--parameters", "qkv.weight", "unused.weight"]
    whole, torn = _place(tmp_path / "whole"), _place(tmp_path / "torn")
    first = _run(whole, *more)
    out, messages = first.communicate(timeout=300)
    assert first.returncode in (0, 3), messages  # 3: no matrix has a verdict
    assert "gradients of" in messages.splitlines()[0]  # an estimate before it starts
    assert not (whole / "out" / "finished.jsonl").exists()
    killed, finished = _run(torn, *more), torn / "out" / "finished.jsonl"
    while killed.poll() is None:
        if finished.exists() and finished.read_text().endswith("\n"):
            killed.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    lines = len(finished.read_text().splitlines())
    again = _run(torn, *more)
    _, messages = again.communicate(timeout=300)
    assert again.returncode == first.returncode, messages
    assert f"goes on with {lines} parts that are finished" in messages
    assert _measured(torn / "out") == _measured(whole / "out")
    rows = {row["matrix"]: row for row in _measured(whole / "out")["rows"]}
    assert [*rows] == ["qkv.weight[query]", "qkv.weight[key]", "qkv.weight[value]", "unused.weight"]
    assert "zero on some batch" in rows["unused.weight"]["reason"]
    assert "60 steps of Muon" in (whole / "out" / "plan.toml").read_text()
    assert "60 steps of Muon" in (whole / "out" / "report.html").read_text()
    assert "qkv[query]" in out


def _loss(model: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _study(
    out: Path,
    level: Any,
    seed: int = 0,
    stop: str = "",
    sentences: Any = None,
    name: str = "mine",
) -> None:
    """Stopped at the start of a part, where one is named."""

    def stopped(done: int, total: int, message: str) -> None:
        if stop and message == stop:
            raise KeyboardInterrupt

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    torch.manual_seed(9)
    batches = [(x := torch.randn(20, 4), x[:, :3].argmax(1)) for _ in range(16)]
    diagnosis_study(
        model, _loss, batches[:8], others=batches[8:], level=level, parameters=None,
        optimizer=None, clip=None, monitored=None, out=out, settings={"model": name},
        on_progress=stopped, say=[].append if sentences is None else sentences.append,
    )  # fmt: skip


@pytest.mark.parametrize("level", ["standard", "thorough"])
def test_stopped_anywhere_and_damaged_it_ends_the_same(level: str, tmp_path: Path) -> None:
    _study(tmp_path / "whole", level)
    finished, sentences = tmp_path / "torn" / "finished.jsonl", []
    races = ["race 2.weight"] if level == "thorough" else []
    for part in ("warm-up", "gradients", *races, "descent 2.weight", "descent 3.weight"):
        with pytest.raises(KeyboardInterrupt):
            _study(tmp_path / "torn", level, stop=part, sentences=sentences)
    text = finished.read_text()
    assert len(text.splitlines()) >= 2
    finished.write_text(text.replace("0.", "1.", 1)[:-40])  # a wrong number, and a torn line
    _study(tmp_path / "torn", level, sentences=sentences)
    assert any("goes on with" in sentence for sentence in sentences)
    assert _measured(tmp_path / "torn") == _measured(tmp_path / "whole")
    assert not finished.exists()


def test_a_finished_one_is_shown_again_without_work(tmp_path: Path) -> None:
    sentences: list[str] = []
    _study(tmp_path, "standard", sentences=sentences)
    files = {name: (tmp_path / name).read_bytes() for name in ("diagnosis.json", "plan.toml")}
    assert sentences == []
    _study(tmp_path, "standard", stop="gradients", sentences=sentences)  # which does not begin
    assert sentences.pop().startswith(f"{tmp_path} is finished already")
    (tmp_path / "plan.toml").unlink()
    _study(tmp_path, "standard", stop="warm-up", sentences=sentences)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    sentences.clear()
    with pytest.raises(KeyboardInterrupt):  # other weights, though the settings are the same
        _study(tmp_path, "standard", seed=1, stop="gradients", sentences=sentences)
    assert "of other weights, batches or losses" in sentences[0]
    with pytest.raises(InputError, match="model was 'mine', now"):
        _study(tmp_path, "standard", name="another")


def test_the_command_shows_a_finished_one_and_the_same_exit_code(tmp_path: Path) -> None:
    place = _place(tmp_path / "here")
    (place / "audited.py").write_text(
        "import torch\ndef some(m): return torch.optim.SGD(m.qkv.parameters(), lr=0.1)\n"
    )
    outputs = []
    for _ in range(2):
        run = _run(place, "--level", "quick", "--optimizer", "audited:some")
        out, messages = run.communicate(timeout=300)
        assert run.returncode == 4, messages  # of the audit, made again
        outputs.append((out, "is finished already" in " ".join(messages.split())))
        page = (place / "out" / "report.html").read_bytes()
    assert outputs == [(outputs[0][0], False), (outputs[0][0], True)]
    assert "gradients of" not in messages
    assert (place / "out" / "report.html").read_bytes() == page


def test_what_is_finished_counts_for_the_same_weights_alone(tmp_path: Path) -> None:
    for seed, messages, lines in ((0, 0, 1), (0, 1, 1), (1, 0, 2)):
        sentences: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            _study(tmp_path / "out", "standard", seed, "descent 2.weight", sentences)
        assert len(sentences) == messages
        assert len((tmp_path / "out" / "finished.jsonl").read_text().splitlines()) == lines


def test_a_checkpoint_and_few_batches_on_the_command_line(tmp_path: Path) -> None:
    place = _place(tmp_path / "here")
    (place / "few.py").write_text(
        "import itertools, mine\ndef batches(): return itertools.islice(mine.batches(), 8)\n"
    )
    (place / "save.py").write_text(
        "import torch, mine\ntorch.manual_seed(5)\n"
        "torch.save({'model': mine.Net().state_dict()}, 'weights.pt')\n"
    )
    subprocess.run([sys.executable, "save.py"], cwd=place, check=True)
    quick = [sys.executable, "-m", "steepest.cli", "diagnose", "mine:Net", "--level", "quick"]

    def run(*more: str) -> dict[str, Any]:
        done = subprocess.run(
            [*quick, "--json", *more], cwd=place, text=True, capture_output=True, timeout=200
        )
        assert done.returncode in (0, 3), done.stderr
        return json.loads(done.stdout)

    cold = run("--batches", "few:batches", "--warmup-steps", "0", "--out", "a")
    assert (cold["warm_up"], cold["fresh"], cold["batches"]) == (None, True, 8)
    few = run("--batches", "few:batches", "--out", "b")
    assert (few["warm_up"]["batches"], few["batches"]) == (4, 4)
    some = run("--batches", "mine:batches", "--warmup-steps", "7", "--out", "c")
    assert (some["warm_up"]["steps"], some["warm_up"]["batches"], some["batches"]) == (7, 7, 8)
    loaded = run("--batches", "few:batches", "--warmup-steps", "0", "--checkpoint", "weights.pt")
    ranks = [[row["nuclear_rank"] for row in result["rows"]] for result in (cold, loaded)]
    assert ranks[0] != ranks[1]
    refused = subprocess.run(
        [*quick, "--batches", "few:batches", "--checkpoint", "nofile"],
        cwd=place, text=True, capture_output=True,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "got nofile, which cannot be read" in " ".join(refused.stderr.split())


def test_finished_parts_of_version_0_1_are_known(tmp_path: Path) -> None:
    walk = {"sizes": [1.0], "falls": [[0.5]]}
    result = {"euclidean": walk, "adaptive": walk}
    name = "descent 0.weight"
    line = {"name": name, "result": result, "sha256": finished._digest("of", name, result)}
    (tmp_path / "parts.jsonl").write_text(json.dumps(line) + "\n")
    parts = finished.FinishedParts(tmp_path / "parts.jsonl", "of")
    known = parts(name, lambda: pytest.fail("it was computed again"))
    assert list(known) == ["euclidean", "adamw"]
