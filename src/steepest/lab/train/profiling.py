"""Where the time of a step goes: a trace of three steps, for those who ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from steepest.lab.train.config import TrainConfig

SKIPPED, WARM, TRACED = 2, 1, 3


class Profile(Protocol):
    """What is told of every step."""

    def step(self) -> None:
        """End a step."""


class NoProfile:
    """A profile that takes no note."""

    def step(self) -> None:
        """End a step."""


@contextmanager
def profiler(config: TrainConfig, out: Path, say: Callable[[str], None]) -> Iterator[Profile]:
    """Trace three steps after the third one into `profile.json`, which a browser's tracer opens."""
    if not config.profile:
        yield NoProfile()
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)

    def save(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(out / "profile.json"))
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12)
        say(f"{TRACED} steps, by operation:\n{table}\ntrace: {out / 'profile.json'}")

    plan = torch.profiler.schedule(wait=SKIPPED, warmup=WARM, active=TRACED, repeat=1)
    with torch.profiler.profile(activities=kinds, schedule=plan, on_trace_ready=save) as profile:
        yield profile
