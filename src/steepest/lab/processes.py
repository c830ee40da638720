"""Work in processes, a few at a time. They all end when their parent does, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from steepest.lab.errors import InputError
from steepest.lab.user_code import UserCodeError

PATIENCE = 20.0  # seconds for a worker to save itself when it is stopped

Task = TypeVar("Task")
Job = Callable[[Task, Callable[[Any], None]], None]
"""`work(task, send)` does a task; it may send what the parent is to know meanwhile."""


@dataclass(frozen=True)
class _Refusal:
    """The sentence of an `InputError` in a worker, and the traceback of the user's code in it."""

    sentence: str
    traceback: str = ""


class Engine(Protocol):
    """Where tasks are done: three calls. What a task has reached stands in its folder, not here."""

    def submit(self, name: str, work: Job[Any], task: Any) -> None:
        """Take in a task; it begins when there is room."""

    def poll(self) -> list[tuple[str, Any]]:
        """Wait for news; return what tasks sent, and `(name, None)` for one that is done.

        Raises:
            InputError: what a task raised, or that it ended before it was done.
        """

    def cancel(self) -> None:
        """Stop every task that is not done."""


class LocalProcesses:
    """The engine of this machine: a process for each task, so many at a time."""

    def __init__(self, workers: int):
        self._workers = workers
        self._context = _context()
        self._waiting: list[tuple[str, Job[Any], Any]] = []
        self._active: dict[Connection, tuple[str, BaseProcess]] = {}

    def submit(self, name: str, work: Job[Any], task: Any) -> None:
        """Take in a task; a process begins it when fewer than `workers` are at work."""
        self._waiting.append((name, work, task))

    def poll(self) -> list[tuple[str, Any]]:
        """Begin what there is room for, and wait until a process has something to say."""
        while self._waiting and len(self._active) < self._workers:
            self._begin(*self._waiting.pop(0))
        news = []
        for receiver in wait(list(self._active)):
            assert isinstance(receiver, Connection)
            name, process = self._active[receiver]
            try:
                message = receiver.recv()
            except (EOFError, OSError):  # the end of the process
                process.join()
                del self._active[receiver]
                if process.exitcode:
                    raise InputError(
                        f"{name} ended without a result (exit code {process.exitcode}; -9 "
                        "usually means out of memory); run the same command again to go on"
                    ) from None
                message = None
            if isinstance(message, _Refusal):
                raise UserCodeError(f"{name}: {message.sentence}", message.traceback)
            news.append((name, message))
        return news

    def _begin(self, name: str, work: Job[Any], task: Any) -> None:
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_do, args=(work, task, sender), daemon=True)
        process.start()
        sender.close()
        self._active[receiver] = name, process

    def cancel(self) -> None:
        """Ask every process to end, and kill it if it does not."""
        self._waiting.clear()
        for _, process in self._active.values():
            process.terminate()
        for _, process in self._active.values():
            process.join(PATIENCE)
            process.kill()
        self._active.clear()


def in_processes(
    work: Job[Task], tasks: Mapping[str, Task], workers: int, engine: Engine | None = None
) -> Iterator[tuple[str, Any]]:
    """Do every task in a process of its own; yield what each sends, and None when it is done.

    Args:
        work: a function at the top of a module. An `InputError` in it stops all tasks.
        tasks: by a name, which errors begin with.
        workers: processes at a time.
        engine: where to do them; by default on this machine.

    Raises:
        InputError: what a task raised, or that its process ended before it was done.
    """
    engine = engine or LocalProcesses(workers)
    for name, task in tasks.items():
        engine.submit(name, work, task)
    left = len(tasks)
    try:
        while left:
            for name, message in engine.poll():
                left -= message is None
                yield name, message
    finally:
        engine.cancel()


def _context() -> Any:
    """Processes forked from a clean one that has imported torch: quick to start, own memory."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # torch.optim imports the last one at its first use, which takes seconds
    context.set_forkserver_preload(
        ["steepest.lab.train", "steepest.lab.studies.edge_of_stability", "torch._dynamo"]
    )
    # Ctrl-C goes to all processes of a terminal. The clean one and its forks are born deaf to it,
    # or they would die of it while they import, with a traceback each: the parent decides. (The
    # tracker is started first because its start would let the signal in again.)
    resource_tracker.ensure_running()
    deaf = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, deaf)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _do(work: Job[Task], task: Task, sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        work(task, sender.send)
    except InputError as error:
        sender.send(_Refusal(str(error), getattr(error, "traceback", "")))
    except (KeyboardInterrupt, BrokenPipeError):  # stopped, or left by the parent
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
