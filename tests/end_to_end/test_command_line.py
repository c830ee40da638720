"""The commands as a person types them."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEEPEST = [sys.executable, "-m", "steepest.cli"]
SMALL = ["--width", "16", "--depth", "1", "--model-options", "heads=2", "--context", "16"]
SMALL += ["--batch", "2"]


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*STEEPEST, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("how vexingly quick daft zebras jump. " * 300)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a small study was run."""
    place = tmp_path_factory.mktemp("study")
    (place / "text.txt").write_text("how vexingly quick daft zebras jump. " * 300)
    done = _run(
        "study", "--data", "text.txt", "--steps", "6", "--seeds", "2", "--out", "out",
        "--optimizers", "adamw", "signum", "muon", *SMALL, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "report: file://" in done.stdout
    return place


def test_a_study_ends_with_a_table_and_a_report_with_every_number(finished: Path) -> None:
    again = _run(
        "study", "--data", "text.txt", "--steps", "6", "--seeds", "2", "--out", "out",
        "--optimizers", "adamw", "signum", "muon", *SMALL, cwd=finished,
    )  # fmt: skip
    assert again.returncode == 0
    assert "going on with the study" in again.stderr
    for label in ("AdamW", "Signum", "Muon", "bits/byte", "gap to AdamW", "verdict"):
        assert label in again.stdout
    from steepest.files import read_json
    from steepest.lab import report

    embedded = report.read(finished / "out" / "report.html")
    stored = read_json(finished / "out" / "summary.json")
    assert embedded == stored


def test_report_rebuilds_the_page_from_folder_and_from_page(finished: Path) -> None:
    page = finished / "out" / "report.html"
    original = page.read_text()
    copy = finished / "copy.html"
    copy.write_text(original)
    page.unlink()
    assert _run("report", "out", cwd=finished).returncode == 0
    assert page.read_text() == original
    assert _run("report", "copy.html", "--out", "new.html", cwd=finished).returncode == 0
    assert (finished / "new.html").read_text() == original


def test_train_prints_its_result_and_goes_on_without_being_asked(
    tmp_path: Path, text: Path
) -> None:
    arguments = ["train", "--data", str(text), "--steps", "5", *SMALL]
    first = _run(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "validation loss" in first.stdout
    assert "step 5 of 5" in first.stderr
    again = _run(*arguments, cwd=tmp_path)
    assert "finished already" in again.stderr
    assert again.stdout == first.stdout


BAD: list[tuple[list[str], str]] = [
    (["train", "--optimzer", "muon"], "--optimizer"),  # did you mean
    (["train", "--optimizer", "mun"], "got 'mun' (did you mean muon?)"),
    (["study", "--optimizers", "adamw", "mun"], "mun"),
    (["train", "--steps", "many"], "steps"),
    (["train", "--steps", "0"], "got steps=0, expected at least 1"),
    (["train", "--lr", "nan"], "got lr=nan"),
    (["train", "--model-options", "heads=3"], "expected heads to divide the width"),
    (["train", "--data", "missing.txt"], "nor an existing path"),
    (["train", "--data", "empty.txt"], "is empty"),
    (["train", "--data", "binary.txt"], "binary"),
    (["train", "--data", "latin.txt"], "not UTF-8"),
    (["train", "--data", "short.txt"], "more than the context"),
    (["train", "--device", "nonsense"], "not to be had here"),
    (["study", "--minutes", "-1"], "got minutes=-1"),
    (["study", "--data", "missing.txt"], "nor an existing path"),
    (["report", "missing"], "does not exist"),
    (["report", "."], "no summary.json"),
    (["report", "short.txt"], "short.txt"),
    (["report", "odd"], "cannot use odd/summary.json"),
    (["report"], "got no path"),
    (["report", "begun", "begun"], "expected each path once"),
    (["report", "torn"], "Run once more the command that made it"),
    (["report", "begun"], "nothing is finished there; run once more the command that began it"),
    (["report", "trained"], "expected the folder of `steepest train`, which has a config.json"),
    (["train", "--data", "good.txt", "--out", "good.txt"], "not a folder"),
    (["train", "--data", "good.txt", "--out", "."], "no config.json"),
    (["train", "--data", "good.txt", "--out", "/dev/null/run"], "not a folder"),
    (["train", "--data", "good.txt", "--out", "/proc/nowhere"], "cannot use /proc/nowhere"),
    (["nonsense"], "nonsense"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_gets_a_sentence_and_exit_code_2(
    tmp_path: Path,
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from steepest.cli import main

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "good.txt").write_text("good " * 1000)
    (tmp_path / "odd" / "summary.json").mkdir(parents=True)
    (tmp_path / "begun").mkdir()
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "metrics.jsonl").write_text("")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "summary.json").write_text('{"kind": ')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    printed = capsys.readouterr()
    said = " ".join((printed.out + printed.err).replace("│", " ").split())
    assert exit_.value.code == 2
    assert sentence in said
    assert "Traceback" not in said


def test_a_loss_that_is_not_finite_is_a_sentence_and_exit_code_2(
    tmp_path: Path, text: Path
) -> None:
    done = _run(
        "train", "--data", str(text), "--optimizer", "adamw", "--lr", "1e30", "--adamw-lr", "1e30",
        "--warmup", "0", *SMALL, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "NaN or infinite loss" in done.stderr
    assert "Try a smaller --lr" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("files", "count"), [("plan.json", 1), ("runs/*/metrics.jsonl", 2)], ids=["start", "training"]
)
def test_ctrl_c_in_a_study_says_how_to_go_on_and_leaves_nothing_running(
    tmp_path: Path, text: Path, files: str, count: int
) -> None:
    """In a real terminal, with its progress bars; at the start while helpers import torch."""
    master, slave = pty.openpty()
    arguments = ["study", "--data", str(text), "--steps", "3000", "--out", "out", *SMALL]
    process = subprocess.Popen(
        [*STEEPEST, *arguments], cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True,
        # Where the tests run in the background of a script, they and their children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(slave)
    printed = b""
    while len(list(tmp_path.glob(f"out/{files}"))) < count:
        assert process.poll() is None
        if select.select([master], [], [], 0.05)[0]:  # or a full terminal would stop the study
            printed += os.read(master, 65536)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to all of the group
    try:
        while chunk := os.read(master, 65536):
            printed += chunk
    except OSError:  # the terminal is closed when the last process of the group has ended
        pass
    assert process.wait(20) == 130
    assert b"interrupted; run the same command to go on" in printed
    assert b"Traceback" not in printed
    assert b"tuning" in printed  # the bar
    sizes = [p.stat().st_size for p in tmp_path.glob("out/runs/*/metrics.jsonl")]
    time.sleep(0.5)
    assert [p.stat().st_size for p in tmp_path.glob("out/runs/*/metrics.jsonl")] == sizes
    for _ in range(100):  # helpers end a moment later
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process of the study is still there")


def test_studies_of_other_minutes_have_other_folders(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the minutes decide how long the runs are: one of four is no answer to one of thirty."""
    from steepest import cli
    from steepest.commands import study as command
    from steepest.lab.errors import InputError

    folders: list[Path] = []

    def study(config: object, out: Path, progress: object) -> None:
        folders.append(out)
        raise InputError("enough")

    monkeypatch.setattr(command, "conducted", study)
    for minutes in ("4", "30", "4"):
        with pytest.raises(SystemExit):
            cli.main(["study", "--data", str(text), "--minutes", minutes])
    assert folders[0] == folders[2] != folders[1]


def test_help_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for command in ("study", "train", "report"):
        done = _run(command, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert "--out" in done.stdout
        assert f"For instance:\n  steepest {command} " in done.stdout
    assert "Several runs, or several studies, are compared" in done.stdout  # no break of the source
    assert _run("--version", cwd=tmp_path).stdout.startswith("steepest ")
