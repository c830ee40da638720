"""Trackers get every measurement once, also of a run that is resumed, and stop no run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from steepest.lab.errors import InputError
from steepest.lab.train.sinks import identity, sink

CONFIG = {"optimizer": "muon", "lr": 0.02}


class Tracker(ModuleType):
    """A library that remembers its runs: by identity what was logged at which step."""

    def __init__(self, name: str):
        super().__init__(name)
        self.runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.started: list[dict[str, Any]] = []
        self.finished = 0
        self.failing: set[str] = set()
        self.calls = 0

    def init(self, **settings: Any) -> SimpleNamespace:
        self._check("init")
        self.started.append(settings)
        self._current = str(settings.get("id") or settings["name"])
        self.runs.setdefault(self._current, [])
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls += 1
        self._check("log")
        self.runs[self._current].append((step, values))

    def finish(self) -> None:
        self._check("finish")
        self.finished += 1

    def _check(self, call: str) -> None:
        if call in self.failing:
            raise ConnectionError(f"no network in {call}.")


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    library = Tracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, library)
    return library


def steps(library: Tracker) -> list[int]:
    [run] = library.runs.values()
    return [step for step, _ in run]


def test_measurements_arrive_with_their_step_and_kind(tracker: Tracker, tmp_path: Path) -> None:
    run = sink(tracker.__name__, tmp_path, pytest.fail)
    run.start("a run", CONFIG)
    run.write("train", 10, {"loss": 2.5, "lr": 0.02, "step_seconds": None, "seconds": float("nan")})
    run.write("condition", 10, {"matrix": "head.weight", "role": "head", "stable_rank": 3})
    parts = [{"measure": "one step", "ratio": 0.5}, {"measure": "one step", "ratio": None}]
    run.write("sharpness", 10, {"sharpness": 7.0, "stability": parts})
    run.write("sample", 10, {"text": "once </script> µ"})
    run.finish()
    [logged] = tracker.runs.values()
    assert logged == [
        (10, {"train/loss": 2.5, "train/lr": 0.02}),
        (10, {"condition/head.weight/stable_rank": 3}),
        (10, {"sharpness/sharpness": 7.0, "sharpness/ratio 0": 0.5}),
        (10, {"sample/text": "once </script> µ"}),
    ]
    assert tracker.finished == 1
    [settings] = tracker.started
    assert settings["config"] == CONFIG
    assert settings["resume"] == "allow"
    assert settings["project"] == "steepest"


def test_a_resumed_run_goes_on_with_the_same_run_and_writes_nothing_twice(
    tracker: Tracker, tmp_path: Path
) -> None:
    first = sink(tracker.__name__, tmp_path, pytest.fail)
    first.start("a run", CONFIG)
    for step in (1, 10, 20):
        first.write("train", step, {"loss": 1.0})
    first.write("validation", 10, {"loss": 1.0})  # and killed before that of step 20
    second = sink(tracker.__name__, tmp_path, pytest.fail)
    second.start("a run", CONFIG)
    for step in (10, 20, 30):  # from the checkpoint of step 5
        second.write("train", step, {"loss": 1.0})
        second.write("validation", step, {"loss": 1.0})
    assert len(tracker.runs) == 1
    assert steps(tracker) == [1, 10, 20, 10, 20, 30, 30]
    other = tmp_path / "other"
    other.mkdir()
    sink(tracker.__name__, other, pytest.fail).start("a run", CONFIG)
    assert len(tracker.runs) == 2


def test_the_identity_is_that_of_the_place(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert identity(Path("a")) == identity(tmp_path / "b" / ".." / "a") != identity(Path("b"))
    assert identity(Path("a")).isalnum()


def test_a_failure_is_said_once_and_stops_nothing(tracker: Tracker, tmp_path: Path) -> None:
    sentences: list[str] = []
    run = sink(tracker.__name__, tmp_path, sentences.append)
    run.start("a run", CONFIG)
    run.write("train", 1, {"loss": 3.0})
    tracker.failing = {"log", "finish"}
    for step in (2, 3, 4):
        run.write("train", step, {"loss": 3.0})
    run.finish()
    assert sentences == [
        f"the tracker '{tracker.__name__}' failed: ConnectionError: no network in log. The run "
        "goes on without it, and metrics.jsonl has everything"
    ]
    assert tracker.calls == 2
    tracker.failing = set()
    again = sink(tracker.__name__, tmp_path, pytest.fail)
    again.start("a run", CONFIG)
    for step in (1, 2, 3):
        again.write("train", step, {"loss": 3.0})
    assert steps(tracker) == [1, 2, 3]


def test_a_failure_is_a_warning_where_nobody_listens(tracker: Tracker, tmp_path: Path) -> None:
    run = sink(tracker.__name__, tmp_path)
    run.start("a run", CONFIG)
    tracker.failing = {"finish"}
    with pytest.warns(UserWarning, match="no network in finish"):
        run.finish()


def test_a_tracker_that_does_not_start_is_a_sentence(tracker: Tracker, tmp_path: Path) -> None:
    tracker.failing = {"init"}
    with pytest.raises(InputError, match=r"did not start: ConnectionError: no network in init\. R"):
        sink(tracker.__name__, tmp_path).start("a run", CONFIG)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_library_is_named_with_its_command(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"'{name}', .*pip install 'steepest\[{name}\]'"):
        sink(name, tmp_path)


def test_an_unknown_tracker_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'mlflow', expected one of tensorboard, wandb, trackio"):
        sink("mlflow", tmp_path)  # type: ignore[arg-type]


def test_a_damaged_note_of_what_was_written_begins_again(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / f".{tracker.__name__}.json").write_text('{"train": 5, "checksum": "0"}')
    run = sink(tracker.__name__, tmp_path, pytest.fail)
    run.start("a run", CONFIG)
    run.write("train", 1, {"loss": 3.0})
    assert steps(tracker) == [1]


def test_no_tracker_is_imported_unless_asked_for() -> None:
    code = (
        "import sys, steepest.cli, steepest.lab.train.sinks;"
        "print([m for m in sys.modules if m.split('.')[0] in ('tensorboard', 'wandb', 'trackio')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []


# --- TensorBoard itself


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra steepest[tensorboard] is not installed")
    first = sink("tensorboard", tmp_path, pytest.fail)
    first.start("a run", CONFIG)
    for step in (1, 10, 20):
        first.write("train", step, {"loss": float(step)})
    first.write("sample", 20, {"text": "once"})
    assert scalars(tmp_path, "train/loss") == [(1, 1), (10, 10), (20, 20)]  # before it is finished
    second = sink("tensorboard", tmp_path, pytest.fail)
    second.start("a run", CONFIG)
    for step in (10, 20, 30):
        second.write("train", step, {"loss": float(step)})
    second.finish()
    assert scalars(tmp_path, "train/loss") == [(1, 1), (10, 10), (20, 20), (30, 30)]


def test_tensorboard_purges_what_was_written_but_not_noted(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra steepest[tensorboard] is not installed")
    first = sink("tensorboard", tmp_path, pytest.fail)
    first.start("a run", CONFIG)
    first.write("train", 10, {"loss": 1.0})
    noted = (tmp_path / ".tensorboard.json").read_bytes()
    first.write("train", 20, {"loss": 2.0})
    (tmp_path / ".tensorboard.json").write_bytes(noted)  # as if killed between the two
    second = sink("tensorboard", tmp_path, pytest.fail)
    second.start("a run", CONFIG)
    second.write("train", 20, {"loss": 2.0})
    second.finish()
    assert scalars(tmp_path, "train/loss") == [(10, 1), (20, 2)]
