"""What the command line shows fits a terminal."""

from __future__ import annotations

from typing import Any

import pytest
from rich.progress import Progress

from steepest.lab import terminal
from steepest.lab.terminal import Countdown, bars
from steepest.printing import as_text
from steepest.transfer.consistency import SizeCurve, SuperConsistency


@pytest.mark.parametrize("size", [{"width": 32}, {"width": 1024, "depth": 16, "heads": 128}])
def test_no_number_of_the_sharpness_is_cut_at_80_columns(size: dict[str, int]) -> None:
    steps, small = tuple(range(100, 2500, 100)), (0.0000148,) * 24
    row = SizeCurve(size, steps, small, small, small[:2], small[:2])
    found = SuperConsistency(
        "mup", "adamw", 0.01, "one step", "width", (32.0, 64.0), (row, row), 1.0, 1.0, 0.0, None
    )
    shown = as_text(found.table(), 80)
    assert "…" not in shown
    assert shown.count("1.48e-05") == 2 * 7


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_where_there_is_no_terminal_lines_say_how_far_it_is(seconds: float, capsys: Any) -> None:
    """An estimate after a few gradients, then a line every fifteen seconds."""
    now = 100.0
    with bars() as shown:
        countdown = Countdown(shown, "diagnosing", "gradients", clock=lambda: now)
        for done in range(1, 101):
            countdown(done, 100, "descent qkv[query]")
            now += seconds
    lines = capsys.readouterr().err.splitlines()
    assert lines[
        0
    ] == f"about 100 gradients of {1000 * seconds:.0f} ms: {96 * seconds:.0f} s left" or (
        seconds == 3 and lines[0].endswith("4.8 min left")
    )
    assert len(lines) == 1 + (1 if seconds == 0.5 else 19) + (seconds == 0.5) * 2
    assert all("descent qkv[query]" in line and " left: " in line for line in lines[1:])


def test_in_a_terminal_a_bar_shows_the_same(monkeypatch: Any) -> None:
    monkeypatch.setattr(terminal, "screen", terminal.Console(force_terminal=True, stderr=True))
    shown = Progress(disable=True)
    countdown = Countdown(shown, "diagnosing", "gradients")
    for done in range(1, 4):
        countdown(done, 50, "gradients")
    [task] = shown.tasks
    assert (task.completed, task.total) == (3, 50)
