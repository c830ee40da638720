"""Time of one optimizer step on the matrices of GPT-2 small, beside torch's own optimizers.

The optimizers take turns, step by step, so that a slow moment of the machine hits all of them; what
is printed are medians and ratios. Beside each time stands the error of its orthogonalization,
‖X - UVᵀ‖_F / ‖UVᵀ‖_F against the exact polar factor in float64, on gradients with a Gaussian and
with a power-law spectrum.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.optim.optimizer import Optimizer

import steepest
from steepest.lab.train.run_folder import environment

Matrices = list[torch.nn.Parameter]
REFERENCE = "torch.optim.Muon"


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    layers: int = 12
    """Blocks of GPT-2 small: four 768 x 768 matrices and two of 3072 x 768 each."""
    repeats: int = 7
    """Timed steps of each optimizer, after one to warm up."""
    threads: int | None = None
    """Threads on the CPU; by default as many as PyTorch takes."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


def optimizers() -> dict[str, Callable[[Matrices], Optimizer]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "torch.optim.AdamW (fused)": lambda p: torch.optim.AdamW(p, fused=True),
        "torch.optim.AdamW (foreach)": lambda p: torch.optim.AdamW(p, foreach=True),
        REFERENCE: lambda p: torch.optim.Muon(p, lr=0.02),
        "Muon, jordan": lambda p: steepest.Muon(p, method="jordan", dtype=bf16),
        "Muon, polar-express (default)": lambda p: steepest.Muon(p),
        "Muon, polar-express, float32": lambda p: steepest.Muon(p, dtype=fp32),
        "SpectralDescent": lambda p: steepest.SpectralDescent(p),
        "Signum": lambda p: steepest.Signum(p),
        "SignSGD": lambda p: steepest.SignSGD(p),
    }


def matrices(settings: Settings) -> Matrices:
    """The weights, with a gradient each."""
    generator = torch.Generator().manual_seed(0)
    weights = []
    for _ in range(settings.layers):
        for shape in ((768, 768),) * 4 + ((3072, 768), (768, 3072)):
            weight = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
            weight.grad = torch.randn(shape, generator=generator) * 1e-3
            weights.append(torch.nn.Parameter(weight.data.to(settings.device)))
            weights[-1].grad = weight.grad.to(settings.device)
    return weights


def step_seconds(settings: Settings) -> dict[str, list[float]]:
    built = {name: make(matrices(settings)) for name, make in optimizers().items()}
    times: dict[str, list[float]] = {name: [] for name in built}
    for repeat in track(range(settings.repeats + 1), "stepping", console=Console(stderr=True)):
        for name, optimizer in built.items():
            _wait(settings.device)
            began = time.perf_counter()
            optimizer.step()
            _wait(settings.device)
            if repeat:
                times[name].append(time.perf_counter() - began)
    return times


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gradient(spectrum: str, m: int, n: int) -> Tensor:
    """A matrix of unit spectral norm with the spectrum of noise, or one that falls as 1/i."""
    generator = torch.Generator().manual_seed(1)
    G = torch.randn(m, n, generator=generator)
    if spectrum == "gaussian":
        return G
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U * (1.0 / torch.arange(1, len(S) + 1)) @ Vh


def errors(device: str) -> dict[str, dict[str, float]]:
    """Relative error of the direction each optimizer takes from zero weights and memory."""
    found: dict[str, dict[str, float]] = {}
    for spectrum in ("gaussian", "power law"):
        G = gradient(spectrum, 768, 768)
        exact = steepest.linalg.polar(G.double(), "svd")
        for name, make in optimizers().items():
            if "AdamW" in name or "Sign" in name:
                continue
            weight = torch.nn.Parameter(torch.zeros_like(G, device=device))
            weight.grad = G.to(device)
            make([weight]).step()
            lr = 0.02  # of all of them; the scale of a square matrix is 1
            found.setdefault(name, {})[spectrum] = float(
                torch.linalg.norm(-weight.detach().cpu().double() / lr - exact)
                / torch.linalg.norm(exact)
            )
    return found


def main(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    wrong = errors(settings.device)
    times = step_seconds(settings)
    reference = times[REFERENCE]
    table = Table(
        title=f"one step, {settings.layers} layers of GPT-2 small, {settings.device}",
        caption="ratio: median over interleaved steps of time / time of torch.optim.Muon",
    )
    for title in ("optimizer", "ms", "ratio", "min to max", "error, gaussian", "error, power law"):
        table.add_column(title, justify="left" if title == "optimizer" else "right")
    rows = []
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, reference, strict=True))
        row = {
            "optimizer": name,
            "milliseconds": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[0],
            "ratio_high": ratios[-1],
            "error": wrong.get(name),
        }
        rows.append(row)
        each = wrong.get(name, {})
        table.add_row(
            name,
            f"{row['milliseconds']:.1f}",
            f"{row['ratio']:.3f}",
            f"{ratios[0]:.3f} to {ratios[-1]:.3f}",
            *(f"{each[s]:.3f}" if s in each else "-" for s in ("gaussian", "power law")),
        )
    Console(width=110).print(table)
    settings.out.mkdir(parents=True, exist_ok=True)
    place = settings.out / f"optimizer_step_{settings.device}.json"
    where = {**environment(), "threads": torch.get_num_threads(), "layers": settings.layers}
    place.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    print(f"figures: {place}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
