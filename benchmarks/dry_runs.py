"""How well `steepest train --dry-run` tells memory and time: `python benchmarks/dry_runs.py`.

For three sizes, a factor of ten apart, a run of 100 steps is measured three times, and what the dry
run said before. The criterion, written before any measurement: peak memory above the imported
process, and the time of 100 steps (median of three), both within 25%.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.progress import track

from measure import save, table
from steepest.files import read_json

SIZES = {
    "0.1M": ["--width", "48", "--depth", "3", "--context", "64"],
    "1M": ["--width", "128", "--depth", "5", "--context", "128"],
    "10M": ["--width", "320", "--depth", "8", "--context", "128", "--model-options", "heads=5"],
}
SAID = """
import json, resource, sys
from steepest.cli import main  # all that the command imports
from steepest.lab.train import TrainConfig
from steepest.lab.train.dry_run import dry_run
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
from steepest.lab.arguments import parsed
from steepest.commands.train import Train
command = parsed(sys.argv[1:], {"train": Train}, "")
from dataclasses import fields
config = TrainConfig(**{f.name: getattr(command, f.name) for f in fields(TrainConfig)})
told = dry_run(config)
print(json.dumps([told.peak_bytes, told.seconds, told.parameters, imported]))
"""


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    optimizers: tuple[str, ...] = ("adamw", "muon")
    steps: int = 100
    repeats: int = 3
    out: Path = Path(__file__).resolve().parent / "results" / "dry_runs.json"


def measured(place: Path, settings: Settings, size: str, optimizer: str) -> dict[str, Any]:
    options = ["train", *SIZES[size], "--steps", str(settings.steps), "--optimizer", optimizer]
    said = subprocess.run(
        [sys.executable, "-c", SAID, *options], capture_output=True, text=True, check=True
    )
    peak, seconds, parameters, imported = json.loads(said.stdout)
    results = []
    for i in range(settings.repeats):
        out = place / f"{size}-{optimizer}-{i}"
        subprocess.run(
            [sys.executable, "-m", "steepest.cli", *options, "--out", str(out)],
            capture_output=True,
            check=True,
        )
        results.append(read_json(out / "result.json"))
    true_peak = statistics.median(r["peak_memory_bytes"] for r in results) - imported
    true_seconds = statistics.median(r["wall_seconds"] - r["start_seconds"] for r in results)
    return {
        "parameters": parameters,
        "peak_bytes": {"said": peak, "measured": true_peak, "ratio": peak / true_peak},
        "seconds": {"said": seconds, "measured": true_seconds, "ratio": seconds / true_seconds},
    }


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    pairs = [(size, name) for size in SIZES for name in settings.optimizers]
    with tempfile.TemporaryDirectory() as folder:
        results = {
            f"{size} {name}": measured(Path(folder), settings, size, name)
            for size, name in track(pairs)
        }
    rows = [
        [
            name,
            f"{r['parameters']:,}",
            *(
                f"{r[key][part] / unit:.{places}f}"
                for key, unit, places in (("peak_bytes", 1e6, 0), ("seconds", 1, 1))
                for part in ("said", "measured")
            ),
            f"{r['peak_bytes']['ratio']:.2f}",
            f"{r['seconds']['ratio']:.2f}",
        ]
        for name, r in results.items()
    ]
    columns = ["run", "parameters", "MB said", "MB", "s said", "s", "ratio MB", "ratio s"]
    table("what a dry run says, and what 100 steps took", columns, rows)
    save(settings.out, settings, [], {}, results=results)


if __name__ == "__main__":
    main()
