"""What `steepest train` costs beside the simplest loop: `python benchmarks/lab_overhead.py`.

The same model, optimizer and sizes of batches, a step of each in turn. The criterion, written
before any measurement: the lab trains at least 0.95 times as many tokens a second as the plain
loop, and loading data takes less than 2% of a step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch.nn import functional as F

from measure import paired, save, table
from steepest.lab.models import GPT, GPTConfig
from steepest.lab.train import TrainConfig
from steepest.lab.train.loop import Training
from steepest.lab.train.optimizers import build
from steepest.lab.train.setup import data_of, set_up


@dataclass(frozen=True)
class Settings:
    """What to compare."""

    width: int = 320
    depth: int = 8
    heads: int = 5
    context: int = 256
    batch: int = 8
    optimizers: tuple[str, ...] = ("adamw", "muon")
    rounds: int = 20
    threads: int = 2
    out: Path = Path(__file__).resolve().parent / "results" / "lab_overhead.json"


class PlainLoop:
    """A page of PyTorch: random windows, cross-entropy, a step."""

    def __init__(self, settings: Settings, optimizer: str, tokens: np.ndarray):
        torch.manual_seed(0)
        sizes = GPTConfig(
            width=settings.width, depth=settings.depth, heads=settings.heads,
            context=settings.context,
        )  # fmt: skip
        self.settings, self.tokens = settings, torch.from_numpy(np.ascontiguousarray(tokens))
        self.model = GPT(sizes, 256)
        first = self.batch()[0]
        self.optimizer = build(
            optimizer, self.model, 1e-3, momentum=0.9, weight_decay=0.0, adamw_lr=4e-3,
            example=lambda model: model(first),
        )  # fmt: skip

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        context = self.settings.context
        starts = torch.randint(len(self.tokens) - context, (self.settings.batch,))
        rows = torch.stack([self.tokens[s : s + context + 1] for s in starts.tolist()]).long()
        return rows[:, :-1], rows[:, 1:]

    def step(self) -> None:
        inputs, targets = self.batch()
        logits = self.model(inputs)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measured(settings: Settings, optimizer: str) -> dict[str, Any]:
    config = TrainConfig(
        width=settings.width, depth=settings.depth, model_options=(f"heads={settings.heads}",),
        context=settings.context, batch=settings.batch, optimizer=optimizer, lr=1e-3,
        threads=settings.threads, steps=10 * settings.rounds,
    )  # fmt: skip
    data: Any = data_of(config)
    setup = set_up(config, data)
    plain = PlainLoop(settings, optimizer, data.train_tokens)
    seconds: dict[str, list[float]] = {"lab": [], "plain": [], "loading": []}
    with tempfile.TemporaryDirectory() as folder:
        training = Training(setup, Path(folder), lambda sentence: None, time.perf_counter())
        for turn in range(settings.rounds + 1):
            steps = {"lab": lambda turn=turn: training.update(turn), "plain": plain.step}
            names = ("lab", "plain") if turn % 2 else ("plain", "lab")
            for name in names:
                began = time.perf_counter()
                steps[name]()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
            began = time.perf_counter()
            setup.batch(turn)
            if turn:
                seconds["loading"].append(time.perf_counter() - began)
    tokens = settings.batch * settings.context
    return {
        "parameters": sum(p.numel() for p in setup.model.parameters()),
        "tokens_per_second": {
            name: tokens / statistics.median(seconds[name]) for name in ("lab", "plain")
        },
        "speed_of_lab_over_plain": paired(seconds["plain"], seconds["lab"]),
        "loading_share": statistics.median(seconds["loading"]) / statistics.median(seconds["lab"]),
    }


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    results = {name: measured(settings, name) for name in settings.optimizers}
    rows = [
        [
            name,
            f"{result['parameters']:,}",
            f"{result['tokens_per_second']['lab']:,.0f}",
            f"{result['tokens_per_second']['plain']:,.0f}",
            f"{result['speed_of_lab_over_plain']['ratio']:.3f}",
            f"{result['loading_share']:.2%}",
        ]
        for name, result in results.items()
    ]
    columns = ["optimizer", "parameters", "lab, tokens/s", "plain, tokens/s", "ratio", "loading"]
    table("the lab's loop beside a plain one", columns, rows)
    save(settings.out, settings, [], {}, results=results)


if __name__ == "__main__":
    main()
