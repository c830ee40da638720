"""Many runs on one machine: a process for each, a few at a time, nothing finished run again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from steepest.lab.errors import Diverged, InputError
from steepest.lab.files import read_json, write_json
from steepest.lab.train import TrainConfig, train


@dataclass(frozen=True)
class Run:
    """A run to be made: its settings and its folder, whose name says what it is."""

    config: TrainConfig
    out: Path

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.out / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """The result; "status" is "finished" or "diverged"."""
        return read_json(self.out / "result.json")


OnProgress = Callable[[dict[Path, int]], None]


def run_all(
    runs: Sequence[Run], workers: int, on_progress: OnProgress = lambda steps: None
) -> None:
    """Bring every run to its result, `workers` of them at a time, each in a process of its own.

    A run that diverges gets a result that says so. Interrupting ends all processes at once; their
    checkpoints let the next call go on. `on_progress` is called about twenty times a second with
    the steps that the running ones have done.

    Raises:
        InputError: what a run raised; the others are stopped.
    """
    waiting = [run for run in runs if not run.finished]
    context = _context()
    active: list[tuple[Run, BaseProcess, Connection]] = []
    steps: dict[Path, int] = {}
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                run = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(run, sender), daemon=True)
                process.start()
                sender.close()
                active.append((run, process, receiver))
            time.sleep(0.05)
            for entry in list(active):
                run, process, receiver = entry
                ended = not process.is_alive()  # asked first: what it sent last is still read
                _receive(receiver, run, steps)
                if ended:
                    active.remove(entry)
                    steps.pop(run.out, None)
                    if not run.finished:
                        raise InputError(
                            f"the run in {run.out} ended without a result (exit code "
                            f"{process.exitcode}; -9 usually means out of memory); run the same "
                            "command again to go on from its last checkpoint"
                        )
            on_progress(steps)
    finally:
        for _, process, _ in active:
            process.terminate()
        for _, process, _ in active:
            process.join()


def _receive(receiver: Connection, run: Run, steps: dict[Path, int]) -> None:
    try:
        while receiver.poll():
            message = receiver.recv()
            if isinstance(message, int):
                steps[run.out] = message
            else:
                raise InputError(f"{run.out.name}: {message}")
    except EOFError:
        pass


def _context() -> Any:
    """Processes forked from a clean one that has imported torch: quick to start, own memory."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # torch.optim imports the second one at its first use, which takes seconds
    context.set_forkserver_preload(["steepest.lab.train", "torch._dynamo"])
    # Ctrl-C goes to all processes of a terminal. The clean one and its forks are born deaf to it,
    # or they would die of it while they import, with a traceback each: the parent decides. (The
    # tracker is started first because its start would let the signal in again.)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return context


def _work(run: Run, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    latest = 0.0

    def report(step: int, _: dict[str, Any]) -> None:
        nonlocal latest
        if time.monotonic() - latest > 0.25:
            latest = time.monotonic()
            sender.send(step)

    try:
        train(run.config, run.out, on_step=report)
    except Diverged as error:
        write_json(
            run.out / "result.json",
            {"status": "diverged", "validation_loss": None, "reason": str(error)},
        )
    except InputError as error:
        sender.send(str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
