"""Tasks behind three calls: submit, poll and cancel."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from steepest.lab.errors import InputError
from steepest.lab.processes import LocalProcesses, in_processes


def double(number: int, send: Callable[[Any], None]) -> None:
    if number < 0:
        raise InputError(f"got {number}, expected at least 0")
    if number > 100:
        os._exit(3)
    if number == 100:
        time.sleep(600)
    send(2 * number)


class Here:
    """An engine that does a task when it is polled."""

    def __init__(self) -> None:
        self.tasks: list[Any] = []
        self.cancelled = False

    def submit(self, name: str, work: Any, task: Any) -> None:
        self.tasks.append((name, work, task))

    def poll(self) -> list[tuple[str, Any]]:
        name, work, task = self.tasks.pop(0)
        news: list[tuple[str, Any]] = []
        work(task, lambda message: news.append((name, message)))
        return [*news, (name, None)]

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once(workers: int) -> None:
    tasks = {str(number): number for number in range(4)}
    news = list(in_processes(double, tasks, workers))
    assert sorted(n for n in news if n[1] is not None) == [(str(n), 2 * n) for n in range(4)]
    assert sorted(name for name, message in news if message is None) == list("0123")


def test_another_engine_does_the_same() -> None:
    engine = Here()
    news = list(in_processes(double, {"a": 1, "b": 2}, 1, engine))
    assert news == [("a", 2), ("a", None), ("b", 4), ("b", None)]
    assert engine.cancelled


@pytest.mark.parametrize(("number", "message"), [(-1, "bad: got -1"), (101, "exit code 3")])
def test_a_task_that_fails_stops_the_others(number: int, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=message):
        list(in_processes(double, {"slow": 100, "bad": number}, 2))
    assert time.monotonic() - began < 60


def test_cancel_ends_what_runs_and_what_waits() -> None:
    engine = LocalProcesses(1)
    for name in ("first", "second"):
        engine.submit(name, double, 100)
    engine.submit("third", double, 1)
    processes = engine._active
    engine._begin(*engine._waiting.pop(0))
    process = next(iter(processes.values()))[1]
    engine.cancel()
    assert not process.is_alive()
    assert not engine._waiting
    assert not engine._active
