"""Time, memory and error of one optimizer step, beside every peer that is installed.

The optimizers take turns, step by step, so that a slow moment of the machine hits all of them; the
ratios are of steps in the same round. `extra` is the most memory that a step holds beyond weights,
gradients and state. Its units are MiB and the largest batch of weights of one shape. The errors are
‖X - UVᵀ‖_F / ‖UVᵀ‖_F of a step in float32 against the exact polar factor in float64. Gradients are
256 x 256, with the spectra of noise, a power law 1/i, a condition of 1e4, or rank 8, where U and V
have 8 columns. Others are momenta of a GPT in training. How each peer is set up stands in
`peers.py`.

A processor without instructions for bfloat16 emulates them, and `torch.optim.Muon` computes in
bfloat16. There the algorithm of `torch.optim.Muon` in float32 is measured too, and a line says so.

Install the peers with `pip install -e '.[bench]'`; those that are missing are left out, and named.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from measure import errors, interleaved, memory, paired, quiet, save, start, table
from peers import FLOAT32_MUON, Peer, first_order, present
from problems import SETS, Matrices, Set, shapes, spectra
from steepest.linalg.planner import has_bfloat16

REFERENCE = "torch.optim.Muon"


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    sets: tuple[Set, ...] = SETS
    """gpt2-small: in each layer four 768 x 768, a 3072 x 768 and a 768 x 3072; tiny: the same with
    128 for 768; micro: 96 of 64 x 64; heads: 36 of 64 x 768; lora: 48 of 16 x 768."""
    layers: int = 12
    """Layers of gpt2-small and tiny."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions of the parameters."""
    repeats: int = 7
    """Timed steps of each optimizer, after the first, which is timed by itself."""
    only: tuple[str, ...] = ()
    """Parts of names of optimizers; all by default. The reference, torch.optim.Muon, is always
    there, in float32 too where bfloat16 is emulated."""
    compiled: bool = False
    """Whether to add HeavyBall as it is by default, compiled; `first ms` then has the warm-up, up
    to minutes on new shapes, less where PyTorch finds its cache of compiled code."""
    threads: int | None = None
    """Threads on the CPU; by default as many as PyTorch takes."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


def measured(settings: Settings, peers: list[Peer], name: Set, dtype: str) -> list[dict[str, Any]]:
    """A row for each optimizer on one set of matrices."""
    matrices = Matrices(shapes(name, settings.layers), settings.device, getattr(torch, dtype))
    running = start(peers, matrices)
    label = f"{name}, {dtype}: {len(peers)} optimizers"
    seconds, failures = interleaved(running, matrices, settings.repeats + 1, label)
    extra = memory(running, matrices, failures)
    rows: list[dict[str, Any]] = []
    for peer in peers:
        if peer.name in failures:
            rows.append({"optimizer": peer.name, "failure": failures[peer.name]})
            continue
        each = seconds[peer.name]
        rows.append(
            {
                "optimizer": peer.name,
                "milliseconds": 1e3 * statistics.median(each[1:]),
                **paired(each, seconds[REFERENCE]),
                "first_milliseconds": 1e3 * each[0],
                **extra[peer.name],
            }
        )
    return rows


def cells(row: dict[str, Any], error: dict[str, float], spectra: list[str]) -> list[str]:
    name = row["optimizer"]
    name = f"[bold]{name}[/]" if name.startswith("steepest") else name
    wrong = [f"{error[s]:.2g}" if s in error else "-" for s in spectra]
    if "failure" in row:
        return [name, row["failure"].partition(":")[0], *["-"] * 4, *wrong]
    return [
        name,
        f"{row['milliseconds']:.2f}",
        f"{row['ratio']:.2f}",
        f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
        f"{row['first_milliseconds']:.0f}",
        f"{row['extra_mib']:.1f} ({row['extra_batches']:.1f})",
        *wrong,
    ]


def main(settings: Settings) -> None:
    quiet()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    emulated = settings.device == "cpu" and not has_bfloat16()
    if emulated:
        print(
            "PyTorch sees no instructions for bfloat16 on this processor, and torch.optim.Muon "
            f"computes in bfloat16. Its algorithm in float32 is measured too: {FLOAT32_MUON}"
        )
    wanted = [
        peer
        for peer in first_order(settings.compiled, emulated)
        if not settings.only
        or peer.name in (REFERENCE, FLOAT32_MUON)
        or any(part in peer.name for part in settings.only)
    ]
    peers, missing = present(wanted, settings.device)
    gradients = spectra()
    wrong = errors(peers, gradients, settings.device)
    names = list(gradients)
    sets = []
    for name in settings.sets:
        for dtype in settings.dtypes:
            rows = measured(settings, peers, name, dtype)
            sets.append({"set": name, "dtype": dtype, "rows": rows})
            columns = ["optimizer", "ms", "ratio", "min to max", "first ms", "extra MiB"]
            table(
                f"one step, {name}, {dtype} parameters, {settings.device}, "
                f"{torch.get_num_threads()} threads",
                [*columns, *names],
                [cells(row, wrong.get(row["optimizer"], {}), names) for row in rows],
                f"ratio: median over rounds of time / time of {REFERENCE}; last columns: errors",
            )
    place = settings.out / f"optimizer_step_{settings.device.partition(':')[0]}.json"
    save(place, settings, wanted, missing, bfloat16_emulated=emulated, errors=wrong, sets=sets)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
