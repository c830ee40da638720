"""Commands that are interrupted, killed, or lose their folder, as processes of their own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from steepest import cli
from steepest.lab.studies import edge_of_stability
from steepest.lab.sweep import runs

STEEPEST = [sys.executable, "-m", "steepest_command"]
SMALL = ["--width", "16", "--depth", "1", "--model-options", "heads=2", "--context", "16"]
SMALL += ["--batch", "2", "--data", "text.txt"]
TRAIN = ["train", *SMALL, "--steps", "1000000", "--checkpoint-every", "0", "--out", "run"]
STUDY = ["study", *SMALL, "--steps", "100000", "--out", "run", "--workers", "2"]
REPRODUCE = ["reproduce", "edge-of-stability", "--out", "run", "--workers", "2"]

MINE = """
import torch
from torch import nn
def build(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
def batches():
    torch.manual_seed(1)
    while True:
        x = torch.randn(20, 6)
        yield x, x[:, :3].argmax(1)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("how vexingly quick daft zebras jump. " * 300)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def _begun(arguments: list[str], place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*STEEPEST, *arguments],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a script, they and their children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    for _ in range(2400):
        if condition():
            return
        assert process is None or process.poll() is None
        time.sleep(0.05)
    pytest.fail("nothing happened in two minutes")


def _gone(group: int) -> bool:
    """Whether no process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_ctrl_c_at_any_moment_is_a_sentence(place: Path) -> None:
    """While Python starts nobody can tell; from the import of torch on."""
    rng = random.Random(0)
    begun = 'import sys; print("on", flush=True); import steepest_command; steepest_command.main()'
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", begun, *TRAIN],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.02 + rng.uniform(0, 4))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "interrupted" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_saves_itself_before_it_ends(place: Path, number: int, times: int) -> None:
    process = _begun(TRAIN, place)
    metrics = place / "run" / "metrics.jsonl"
    _wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 3, process)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.001)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "interrupted; run the same command to go on" in said
    assert "Traceback" not in said
    if times == 1:
        [saved] = (place / "run" / "checkpoints").iterdir()
        assert f"stopped after step {int(saved.name[-8:])} of 1000000" in said


@pytest.mark.parametrize("arguments", [STUDY, REPRODUCE], ids=["study", "reproduce"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(place: Path, arguments: list[str], number: int) -> None:
    process = _begun(arguments, place)
    if arguments is STUDY:
        _wait_for(lambda: len(list(place.glob("run/runs/*/metrics.jsonl"))) == 2, process)
    else:
        _wait_for(lambda: (place / "run" / "runs").exists(), process)
        time.sleep(4)  # the workers train, or are about to
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    _wait_for(lambda: _gone(process.pid))
    assert "Traceback" not in said


COMMANDS = {
    "study": ["study", *SMALL, "--steps", "2", "--seeds", "1", "--optimizers", "muon"],
    "reproduce": [
        *REPRODUCE[:2], "--steps", "10", "--every", "2", "--seeds", "1", "--optimizers", "gd",
    ],
    "diagnose": ["diagnose", "mine:build", "--batches", "mine:batches", "--level", "quick"],
    "transfer": [
        "transfer", "mine:build", "--batches", "mine:batches", "--steps", "4", "--seeds", "1",
        "--sizes", "width=8", "width=16",
    ],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("happens", ["removed", "renamed"])
def test_a_folder_that_goes_away_is_an_error_of_every_command(
    place: Path,
    command: str,
    happens: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from steepest.lab.studies import diagnosis_study, transfer_study

    out = place / "run"

    def go_away() -> None:
        if out.exists():
            out.rename(place / "other")
            if happens == "removed":
                shutil.rmtree(place / "other")

    def one_after_another(
        work: Callable[..., None], tasks: Mapping[str, Any], workers: int
    ) -> Iterator[tuple[str, Any]]:
        for number, (name, task) in enumerate(tasks.items()):
            work(task, lambda message: None)
            if number == 1:
                go_away()
            yield name, None

    def in_the_middle(module: Any, name: str) -> None:
        function = getattr(module, name)

        def called(*positional: Any, **named: Any) -> Any:
            go_away()
            return function(*positional, **named)

        monkeypatch.setattr(module, name, called)

    monkeypatch.setattr(runs, "in_processes", one_after_another)
    monkeypatch.setattr(edge_of_stability, "in_processes", one_after_another)
    in_the_middle(diagnosis_study, "started")
    in_the_middle(transfer_study, "check_transfer")
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    with pytest.raises(SystemExit, match="2"):
        cli.main([*COMMANDS[command], "--out", str(out)])
    assert "was removed or renamed while this command wrote to it" in capsys.readouterr().err
