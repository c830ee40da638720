from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.errors import InputError
from steepest.lab.sweep import Run, run_all
from steepest.lab.train import TrainConfig, train
from steepest.lab.train.run_folder import read_metrics

SMALL: dict[str, Any] = {
    "width": 16, "depth": 1, "context": 16, "model_options": ("heads=2",)
}  # fmt: skip


def _runs(folder: Path, text: Path, seeds: range = range(3), **changes: Any) -> list[Run]:
    settings: dict[str, Any] = {
        "data": str(text), **SMALL, "steps": 6, "batch": 2, "threads": 1,
        "validate_windows": 4, **changes,
    }  # fmt: skip
    return [Run(TrainConfig(seed=s, **settings), folder / f"seed{s}") for s in seeds]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return path


def test_runs_side_by_side_equal_runs_in_this_process(tmp_path: Path, text: Path) -> None:
    runs = _runs(tmp_path / "sweep", text)
    seen: dict[Path, int] = {}
    run_all(runs, workers=2, on_progress=seen.update)
    for run in runs:
        alone = train(run.config, tmp_path / "alone" / run.out.name)
        assert run.result["status"] == "finished"
        assert run.result["validation_loss"] == alone["validation_loss"]


def test_what_is_finished_is_not_run_again(tmp_path: Path, text: Path) -> None:
    runs = _runs(tmp_path, text)
    run_all(runs[:2], workers=2)
    stamps = [(run.out / "result.json").stat().st_mtime_ns for run in runs[:2]]
    run_all(runs, workers=2)
    assert [(run.out / "result.json").stat().st_mtime_ns for run in runs[:2]] == stamps
    assert runs[2].finished


def test_a_run_that_diverges_is_a_result_and_the_others_go_on(tmp_path: Path, text: Path) -> None:
    bad = _runs(tmp_path / "bad", text, range(1), optimizer="adamw", lr=1e30, adamw_lr=1e30)
    good = _runs(tmp_path / "good", text)
    run_all([*bad, *good], workers=2)
    assert bad[0].result["status"] == "diverged"
    assert bad[0].result["validation_loss"] is None
    assert all(run.result["status"] == "finished" for run in good)


def test_bad_input_in_a_run_reaches_the_caller_as_its_sentence(tmp_path: Path, text: Path) -> None:
    runs = _runs(tmp_path, text, range(1), device="nonsense")
    with pytest.raises(InputError, match="not to be had here"):
        run_all(runs, workers=1)


def test_a_killed_sweep_leaves_no_process_behind_and_goes_on(tmp_path: Path, text: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from steepest.lab.sweep import Run, run_all\n"
        "from steepest.lab.train import TrainConfig\n"
        "if __name__ == '__main__':\n"
        f"    c = TrainConfig(data={str(text)!r}, width=16, depth=1, context=16,"
        " model_options=('heads=2',), steps=100000, batch=2, threads=1,"
        " checkpoint_every=50, log_every=1)\n"
        f"    run_all([Run(c, Path({str(tmp_path / 'run')!r}))], workers=1)\n"
    )
    script = tmp_path / "sweep.py"
    script.write_text(code)
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 60:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(100):  # the worker notices
        before = metrics.stat().st_size
        time.sleep(0.2)
        if metrics.stat().st_size == before:
            break
    else:
        pytest.fail("the worker outlived its parent")
    config = TrainConfig(
        data=str(text), **SMALL, steps=100000, batch=2, threads=1, checkpoint_every=50,
        log_every=1,
    )  # fmt: skip
    said: list[str] = []

    class Stop(Exception):
        pass

    def stop(step: int, values: dict[str, Any]) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(config, tmp_path / "run", on_step=stop, say=said.append)
    assert any("going on from step" in sentence for sentence in said)
    assert read_metrics(tmp_path / "run")
