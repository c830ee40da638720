"""Time of one optimizer step, here and at another commit: `python benchmarks/against.py REV`.

Both versions run in processes of their own. They take turns, in an order that changes from round
to round, so a slow moment of the machine hits both. A round lasts about `round_seconds` in each
version. Processes are started anew a few times: where memory happens to lie moves a time by several
percent. The ratio is that of the times in the same round. Its interval is that of the median, by
resampling the rounds.

The criterion, written before any measurement: no step became slower if the upper end of the 95%
interval of each ratio lies below 1.05.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from scipy import stats

from measure import save, table
from problems import SETS, Set, shapes

HERE = Path(__file__).resolve().parent
LIMIT = 1.05
"""Above it a step has become slower."""


@dataclass(frozen=True)
class Settings:
    """What to compare."""

    revision: Annotated[str, tyro.conf.Positional]
    """The other commit, as git names it."""
    optimizers: tuple[str, ...] = ("Muon",)
    """Names in the package, or "AdamW group" for the parameters that are no matrices."""
    sets: tuple[Set, ...] = SETS
    """The shapes of `optimizer_step.py`."""
    layers: int = 2
    """Layers of gpt2-small and tiny."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions of the parameters."""
    rounds: int = 30
    """Of each comparison, after one that is not counted in each process."""
    restarts: int = 3
    """How often both processes are started."""
    round_seconds: float = 0.2
    """Time that the steps of a round take in one version."""
    threads: int = 1
    """Threads of each process."""
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


class Stepper:
    """A process that takes steps with one version of the package."""

    def __init__(self, source: Path, setting: dict[str, Any]):
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "stepper.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(source)},
        )
        package = self._answer(json.dumps(setting))["package"]
        if not Path(package).is_relative_to(source):
            raise SystemExit(f"got the package at {package}, expected one below {source}")

    def seconds(self, steps: int) -> float:
        """Take steps and return the time of one."""
        return self._answer(str(steps)) / steps

    def stop(self) -> None:
        self._process.communicate()

    def _answer(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a process ended with status {self._process.wait()}")
        return json.loads(answer)


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """The sources of a commit, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tree"
        git = ["git", "-C", str(HERE)]
        subprocess.run(
            [*git, "worktree", "add", "--quiet", "--detach", place, revision], check=True
        )
        try:
            yield (place / "src").resolve()
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", place], check=True)


def ratios(sources: tuple[Path, Path], setting: dict[str, Any], settings: Settings) -> list[float]:
    """The time of a step here over that at the other commit, for each round."""
    order = random.Random(0)
    counts = [len(part) for part in np.array_split(np.arange(settings.rounds), settings.restarts)]
    values = []
    for count in counts:
        steppers = [Stepper(source, setting) for source in sources]
        try:
            first = [stepper.seconds(3) for stepper in steppers]
            steps = max(1, round(settings.round_seconds / min(first)))
            for _ in range(count):
                times = [0.0, 0.0]
                for which in order.sample((0, 1), 2):
                    times[which] = steppers[which].seconds(steps)
                values.append(times[0] / times[1])
        finally:
            for stepper in steppers:
                stepper.stop()
    return values


def summary(values: list[float]) -> dict[str, Any]:
    interval = stats.bootstrap(
        (values,), np.median, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    return {"ratio": statistics.median(values), "low": low, "high": high, "slower": high >= LIMIT}


def main(settings: Settings) -> None:
    comparisons = [
        (optimizer, name, dtype)
        for optimizer in settings.optimizers
        for name in settings.sets
        for dtype in settings.dtypes
    ]
    rows = []
    with checked_out(settings.revision) as before:
        sources = ((HERE.parent / "src"), before)
        for optimizer, name, dtype in track(comparisons, "steps", console=Console(stderr=True)):
            setting = {
                "optimizer": optimizer,
                "shapes": shapes(name, settings.layers),
                "dtype": dtype,
                "threads": settings.threads,
            }
            values = ratios(sources, setting, settings)
            rows.append({"optimizer": optimizer, "set": name, "dtype": dtype, **summary(values)})
    table(
        f"time of a step here over that at {settings.revision}",
        ["optimizer", "set", "parameters", "ratio", "95% interval", ""],
        [
            [
                row["optimizer"],
                row["set"],
                row["dtype"],
                f"{row['ratio']:.3f}",
                f"{row['low']:.3f} to {row['high']:.3f}",
                "slower" if row["slower"] else "",
            ]
            for row in rows
        ],
    )
    save(settings.out / "against.json", settings, [], {}, rows=rows)
    sys.exit(any(row["slower"] for row in rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
