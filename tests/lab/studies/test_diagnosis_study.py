"""A diagnosis in a folder: stopped at any moment, it goes on, and ends the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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
    return {key: content[key] for key in ("rows", "stacks", "plan", "warm_up", "notes")}


def _place(path: Path) -> Path:
    path.mkdir()
    (path / "mine.py").write_text(MINE)
    return path


@pytest.mark.parametrize("level", ["standard", "thorough"])
def test_a_killed_diagnosis_goes_on_and_ends_the_same(level: str, tmp_path: Path) -> None:
    more = ["--level", level, "--parameters", "qkv.weight", "unused.weight"]
    more += ["--count", "8"] if level == "thorough" else []
    whole, torn = _place(tmp_path / "whole"), _place(tmp_path / "torn")
    first = _run(whole, *more)
    out, told = first.communicate(timeout=300)
    assert first.returncode in (0, 3), told  # 3: no matrix has a verdict
    assert "gradients of" in told.splitlines()[0]  # an estimate before it starts
    assert not (whole / "out" / "finished.jsonl").exists()

    lines, restarts = 0, 0
    while restarts < 9:
        process = _run(torn, *more)
        finished = torn / "out" / "finished.jsonl"
        while process.poll() is None:
            now = len(finished.read_text().splitlines()) if finished.exists() else 0
            if now > lines:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        _, told = process.communicate()
        if process.returncode in (0, 3):
            break
        assert process.returncode == -signal.SIGKILL, told
        lines, restarts = len(finished.read_text().splitlines()), restarts + 1
        if restarts == 1:  # torn in the middle of a line, and one bit wrong in another
            text = finished.read_text()
            finished.write_text(text[: len(text) - 40].replace("0.", "1.", 1))
            lines = len(finished.read_text().splitlines())
    assert restarts >= 2
    assert "goes on with" in told
    assert _measured(torn / "out") == _measured(whole / "out")
    rows = {row["matrix"]: row for row in _measured(whole / "out")["rows"]}
    assert {"qkv.weight[query]", "qkv.weight[key]", "qkv.weight[value]"} < set(rows)
    assert "zero on some batch" in rows["unused.weight"]["reason"]
    assert "60 steps of Muon" in (whole / "out" / "plan.toml").read_text()
    assert "60 steps of Muon" in (whole / "out" / "report.html").read_text()
    assert "qkv[query]" in out


def test_what_is_finished_counts_for_the_same_weights_alone(tmp_path: Path) -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def stopped(done: int, total: int, message: str) -> None:
        if message == "descent 2.weight":
            raise KeyboardInterrupt

    torch.manual_seed(0)
    batches = [(x := torch.randn(40, 6), x[:, :3].argmax(1)) for _ in range(4)]
    settings = {
        "level": "standard", "parameters": None, "warmup_steps": 0, "optimizer": None,
        "clip": None, "monitored": None, "settings": {"model": "mine"},
    }  # fmt: skip
    said: list[str] = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
        said.clear()
        with pytest.raises(KeyboardInterrupt):
            diagnosis_study(
                model, loss, batches, out=tmp_path / "out", on_progress=stopped, say=said.append,
                **settings,
            )  # fmt: skip
        goes_on = bool(said)
        lines = (tmp_path / "out" / "finished.jsonl").read_text().splitlines()
        assert (goes_on, len(lines)) == {0: (goes_on, 1), 1: (False, 2)}[seed]
    assert os.listdir(tmp_path / "out")


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
