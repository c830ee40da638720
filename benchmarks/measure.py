"""How time, memory and error of a step are measured, and how the figures are kept."""

from __future__ import annotations

import datetime
import json
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from peers import Make, Peer, versions
from problems import Matrices
from steepest.lab.train.run_folder import environment

MIB = 2**20
Running = dict[str, tuple[list[nn.Parameter], Optimizer]]


def start(peers: list[Peer], matrices: Matrices, lr: float = 1e-4) -> Running:
    made = {}
    for peer in peers:
        parameters = matrices.parameters()
        made[peer.name] = parameters, peer.make(parameters, lr)
    return made


def interleaved(
    running: Running, matrices: Matrices, rounds: int, label: str
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Let all optimizers step in each round, in an order of its own; return seconds and failures.

    A slow moment of the machine so hits all of them, and none always runs behind the same one.
    """
    like_a_training_process()
    seconds: dict[str, list[float]] = {name: [] for name in running}
    failures: dict[str, str] = {}
    order = random.Random(0)
    for _ in track(range(rounds), label, console=Console(stderr=True)):
        if matrices.fresh:
            matrices.draw()
        for name in order.sample(sorted(running), len(running)):
            if name in failures:
                continue
            parameters, optimizer = running[name]
            matrices.give(parameters)
            try:
                seconds[name].append(timed(optimizer.step, matrices.weights[0].device))
            except Exception as error:  # an optimizer that cannot is a row of the table
                failures[name] = f"{type(error).__name__}: {error}"
            matrices.take(parameters)
    return seconds, failures


def like_a_training_process() -> None:
    """Free one block as large as activations are.

    From then on glibc keeps blocks up to that size and hands none back to the system. So no
    optimizer pays for fresh pages at every step, as none does in a training process.
    """
    torch.zeros(2**23 - 2**12)


def timed(step: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def paired(seconds: list[float], reference: list[float]) -> dict[str, float]:
    """Median, least and largest ratio over the rounds, without the first."""
    ratios = [a / b for a, b in zip(seconds[1:], reference[1:], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most memory of tensors that a step holds beyond what was there before it.

    On the CPU it is the running sum of what PyTorch's allocator reports to the profiler. The
    workspace that a BLAS allocates for itself is not in it. (The resident size of the process
    would be no better: what an earlier step freed is often kept, and hides the next one's peak.)
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory(running: Running, matrices: Matrices, failures: dict[str, str], steps: int = 1) -> dict:
    """MiB at the peak of the steps to come, also in units of the largest batch of one shape."""
    found = {}
    for name in track(
        [n for n in running if n not in failures], "memory", console=Console(stderr=True)
    ):
        parameters, optimizer = running[name]
        peak = 0
        for _ in range(steps):
            matrices.give(parameters)
            peak = max(peak, peak_bytes(optimizer.step, matrices.weights[0].device))
            matrices.take(parameters)
        found[name] = {"extra_mib": peak / MIB, "extra_batches": peak / matrices.largest_batch()}
    return found


def direction(make: Make, G: Tensor, device: str) -> Tensor:
    """Where the first step goes, from zero weights and memory at a rate of 1."""
    weight = nn.Parameter(torch.zeros_like(G, device=device))
    weight.grad = G.clone().to(device)
    make([weight], 1.0).step()
    return -weight.detach().cpu().double()


def errors(peers: list[Peer], spectra: dict[str, list], device: str) -> dict[str, dict]:
    """‖X - UVᵀ‖_F / ‖UVᵀ‖_F of each orthogonalizer: the median over the gradients of a spectrum."""
    found: dict[str, dict[str, float]] = {}
    for peer in track([p for p in peers if p.orthogonal], "errors", console=Console(stderr=True)):
        for name, pairs in spectra.items():
            each = [
                float((direction(peer.make, G, device) - Q).norm() / Q.norm()) for G, Q in pairs
            ]
            found.setdefault(peer.name, {})[name] = statistics.median(each)
    return found


def quiet() -> None:
    """Nothing that peers warn about matters here, nor when the profiler starts and stops."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def table(title: str, columns: list[str], rows: list[list[str]], caption: str = "") -> None:
    made = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    for column in columns:
        made.add_column(
            column, justify="left" if column in ("optimizer", "decomposes", "roots") else "right"
        )
    for row in rows:
        made.add_row(*row)
    Console(width=None if Console().is_terminal else 160).print(made)


def save(place: Path, settings: Any, peers: list[Peer], missing: dict[str, str], **figures) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": {**environment(), "threads": torch.get_num_threads()},
        "settings": {
            k: str(v) if isinstance(v, Path) else v
            for k, v in asdict(settings).items()
            if k != "out"
        },
        "packages": versions(peers),
        "missing": missing,
        **figures,
    }
    place.write_text(json.dumps(content, indent=1) + "\n")
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    print(f"figures: {place}")
