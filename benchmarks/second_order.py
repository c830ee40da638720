"""Time of Shampoo, KL-Shampoo and SOAP on one layer of GPT-2 small, beside their peers.

All renew their roots or bases every 10 steps, but one, which does at every step and cannot be set.
So what counts is the mean over whole intervals, after one to warm up. A user also meets the slowest
step of an interval, and the first one. The optimizers take turns, and get new gradients in each
round. Which sides of the matrices are decomposed decides much of the cost. So peers are compared
with the fastest of their kind, and with the fastest that decomposes the same.

Install the peers with `pip install -e '.[bench]'`; those that are missing are left out, and named.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from measure import interleaved, memory, quiet, save, start, table
from peers import INTERVAL, Peer, present, second_order
from problems import Matrices, shapes

COLUMNS = ["optimizer", "decomposes", "roots", "mean", "median", "dearest", "by mean", "first"]
COLUMNS += ["extra MiB", "by best peer", "by best alike"]


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    layers: int = 1
    """Layers of GPT-2 small: in each four 768 x 768 matrices, a 3072 x 768 and a 768 x 3072."""
    intervals: int = 1
    """Intervals of 10 steps that are timed, after one to warm up."""
    only: tuple[str, ...] = ()
    """Parts of names of optimizers; all by default."""
    memory: bool = True
    """Whether to measure the peak of extra memory, over one more interval."""
    threads: int | None = None
    """Threads on the CPU; by default as many as PyTorch takes."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


def row(peer: Peer, seconds: list[float], extra: dict[str, float]) -> dict[str, Any]:
    milliseconds = [1e3 * s for s in seconds[INTERVAL:]]
    mean = statistics.mean(milliseconds)
    return {
        "optimizer": peer.name,
        "family": peer.family,
        "decomposes": peer.sides,
        "roots": peer.roots,
        "mean": mean,
        "median": statistics.median(milliseconds),
        "dearest": max(milliseconds),
        "dearest_by_mean": max(milliseconds) / mean,
        "first": 1e3 * seconds[0],
        **extra,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row its mean by that of the fastest peer, of its kind and of the same sides."""
    for each in rows:
        others = [
            r
            for r in rows
            if r["family"] == each["family"] and not r["optimizer"].startswith("steepest")
        ]
        same = [r for r in others if r["decomposes"] == each["decomposes"]]
        for key, peers in (("ratio_best", others), ("ratio_same", same)):
            best = min((r["mean"] for r in peers), default=None)
            each[key] = each["mean"] / best if best else None


def main(settings: Settings) -> None:
    quiet()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    wanted = [
        p for p in second_order() if not settings.only or any(s in p.name for s in settings.only)
    ]
    peers, missing = present(wanted, settings.device)
    device = settings.device
    matrices = Matrices(shapes("gpt2-small", settings.layers), device, torch.float32, fresh=True)
    running = start(peers, matrices)
    rounds = INTERVAL * (1 + settings.intervals)
    seconds, failures = interleaved(running, matrices, rounds, f"{len(peers)} optimizers")
    extra = memory(running, matrices, failures, INTERVAL) if settings.memory else {}
    rows = [row(p, seconds[p.name], extra.get(p.name, {})) for p in peers if p.name not in failures]
    compare(rows)
    table(
        f"a step on {settings.layers} layer(s) of GPT-2 small, {device}, "
        f"{torch.get_num_threads()} threads, ms",
        COLUMNS,
        [
            [
                r["optimizer"],
                r["decomposes"],
                r["roots"],
                *(f"{r[k]:.0f}" for k in ("mean", "median", "dearest")),
                f"{r['dearest_by_mean']:.1f}",
                f"{r['first']:.0f}",
                f"{r['extra_mib']:.0f}" if "extra_mib" in r else "-",
                *(f"{r[k]:.2f}" if r[k] else "-" for k in ("ratio_best", "ratio_same")),
            ]
            for r in sorted(rows, key=lambda r: (r["family"], r["mean"]))
        ],
        "last columns: mean by that of the fastest peer of its kind, and of those that decompose "
        "the same",
    )
    place = settings.out / f"second_order_{device.partition(':')[0]}.json"
    save(place, settings, wanted, missing | failures, rows=rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
