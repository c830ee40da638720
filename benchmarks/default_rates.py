"""One learning rate and nothing else: how far are Muon's defaults from the best they could be?

Trains a GPT on embedded text and, with --images, a convolutional network. Each scale convention has
a grid of rates, and AdamW beside them its own. The AdamW group of Muon keeps its
default rate relative to `lr`. One seed: this finds defaults, it compares no optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer

import steepest
from steepest.lab.data import Sampler, load, validation_batches
from steepest.lab.models import GPT, GPTConfig
from steepest.lab.train.schedule import factor

GRIDS: dict[str, tuple[float, ...]] = {
    "spectral": (0.005, 0.01, 0.02, 0.04, 0.08),
    "original": (0.005, 0.01, 0.02, 0.04, 0.08),
    "match-rms-adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
}


@dataclass(frozen=True)
class Settings:
    """What to train."""

    steps: int = 300
    widths: tuple[int, ...] = (64, 128)
    """Widths of the GPT, of 4 blocks."""
    images: Path | None = None
    """A file with arrays x_train, y_train, x_test, y_test of small colour images."""


def optimizer(model: nn.Module, scale: str, lr: float) -> Optimizer:
    if scale == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    return steepest.Muon(model, lr, scale=scale)  # type: ignore[arg-type]


def fit(chosen: Optimizer, loss: Callable[[int], torch.Tensor], steps: int) -> None:
    peaks = [group["lr"] for group in chosen.param_groups]
    for step in range(steps):
        for group, peak in zip(chosen.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step, steps, 20, "linear", 0.0)
        chosen.zero_grad()
        loss(step).backward()
        chosen.step()


def gpt(width: int, scale: str, lr: float, steps: int) -> float:
    torch.manual_seed(0)
    corpus, config = load("stdlib"), GPTConfig(width=width)
    model, sampler = GPT(config, 256), Sampler(corpus.train, 8, config.context, 0)
    fit(optimizer(model, scale, lr), lambda step: model.loss(*sampler.batch(step)), steps)
    with torch.no_grad():
        held_out = validation_batches(corpus.validation, 8, config.context, 64)
        return float(np.mean([model.loss(x, y).item() for x, y in held_out]))


def cnn(images: dict[str, torch.Tensor], scale: str, lr: float, steps: int) -> float:
    torch.manual_seed(0)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    blocks = [*block(3, 32), *block(32, 64), *block(64, 64)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(1024, 10))
    order = torch.Generator().manual_seed(0)

    def loss(step: int) -> torch.Tensor:
        rows = torch.randint(0, len(images["y_train"]), (64,), generator=order)
        return F.cross_entropy(model(images["x_train"][rows]), images["y_train"][rows])

    fit(optimizer(model, scale, lr), loss, steps)
    model.eval()
    with torch.no_grad():
        return F.cross_entropy(model(images["x_test"]), images["y_test"]).item()


def main(settings: Settings) -> None:
    tasks: dict[str, Callable[[str, float], float]] = {
        f"GPT, width {w}": lambda scale, lr, w=w: gpt(w, scale, lr, settings.steps)
        for w in settings.widths
    }
    if settings.images:
        arrays = np.load(settings.images)
        images = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k[:2] in ("x_", "y_")}
        for key in ("x_train", "x_test"):
            images[key] = (images[key].float() / 64 - 2).permute(0, 3, 1, 2)
        for key in ("y_train", "y_test"):
            images[key] = images[key].long().flatten()
        tasks["CNN"] = lambda scale, lr: cnn(images, scale, lr, settings.steps)
    console = Console(width=110)
    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task("training", total=len(tasks) * sum(map(len, GRIDS.values())))
        for name, task in tasks.items():
            table = Table(title=f"{name}: held-out loss after {settings.steps} steps")
            table.add_column("scale")
            for position in range(5):
                table.add_column(f"rate {position + 1}", justify="right")
            for scale, rates in GRIDS.items():
                losses = []
                for lr in rates:
                    losses.append(task(scale, lr))
                    bars.advance(bar)
                cells = [f"{lr:g}: {loss:.3f}" for lr, loss in zip(rates, losses, strict=True)]
                best = int(np.argmin(losses))
                cells[best] = f"[bold]{cells[best]}[/]"
                table.add_row(scale, *cells)
            console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
