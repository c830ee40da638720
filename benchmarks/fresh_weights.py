"""Do weights look fresh where they are, and only there?

Two rules were written down, measured and dropped. By the first, a matrix looks fresh if the
nuclear rank of its gradient across batches is below 2: it did not see an untrained GPT, LLaMA and
LSTM, and took an MLP for fresh after 300 steps. The mean cosine between gradients of two batches
failed as well: 0.45 for an MLP before and after, 0.61 and 0.90 for a network with group norm. By
the second, a matrix looks fresh if no singular value stands out of those of independent entries
(Marchenko and Pastur, 1967). It saw every untrained network, but took those for fresh that Muon
had trained, whose steps have no direction that stands out.

The third rule, written before its run: weights look fresh if they do no better than their own
entries in random order. Every trained matrix is shuffled 16 times; independent entries of one
distribution may as well be shuffled, and what an optimizer has learned is lost. Weights look
trained if their loss lies below the lowest loss of shuffled ones by more than that lies below the
median. Where losses are positive all are logarithms. One untrained network, the SwiGLU one, was at
2.03 times that distance, so the bound became 3 times before the others were run. The rule should
say yes for networks that are
untrained, and no after 300 steps of AdamW or Muon; after 30 or 60 steps either is right. Later the
losses were taken on one batch in place of two, which costs half as much.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

import steepest
from measure import save, table
from networks import HUGGING_FACE, KINDS, problem
from peers import Peer
from steepest.curvature.loss_function import LossFunction
from steepest.diagnosis.warmup import LEARNED, learned

STAGES = (0, 30, 60, 300)
MEANT = {0: True, 300: False}


@dataclass(frozen=True)
class Settings:
    """What to run."""

    networks: tuple[str, ...] = (*KINDS, *HUGGING_FACE)
    """Which."""
    sizes: tuple[int, ...] = (48, 8)
    """Examples in a batch."""
    optimizers: tuple[str, ...] = ("adamw", "muon")
    """What trains."""
    raw: Path = Path("runs/fresh_weights.jsonl")
    """Answers, so that a stopped run goes on."""
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


def measured(name: str, size: int, optimizer: str) -> dict[int, float]:
    """How much the weights have learned by the rule, at each stage."""
    task = problem(name, size)
    if optimizer == "adamw":
        made: Any = torch.optim.AdamW(task.model.parameters(), 3e-3, weight_decay=0.0)
    else:
        made = steepest.Muon(task.model)
    batches = [task.train(10**5 + i) for i in range(8)]
    answers = {}
    for step in range(max(STAGES) + 1):
        if step in STAGES:
            answers[step] = learned(LossFunction(task.model, task.loss), batches)
        made.zero_grad()
        task.loss(task.model, task.train(step)).backward()
        made.step()
    return answers


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    console = Console(stderr=True)
    settings.raw.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[int, float]] = {}
    if settings.raw.exists():
        for line in settings.raw.read_text().splitlines():
            key, answers = json.loads(line)
            known[key] = {int(step): answer for step, answer in answers.items()}
    for size in settings.sizes:
        for optimizer in settings.optimizers:
            for name in settings.networks:
                key = f"{name}, {optimizer}, {size}"
                if key not in known:
                    known[key] = measured(name, size, optimizer)
                    with settings.raw.open("a") as file:
                        file.write(json.dumps([key, known[key]]) + "\n")
                wrong = [s for s, meant in MEANT.items() if (known[key][s] < LEARNED) != meant]
                said = ", ".join(f"{step}: {value:.2f}" for step, value in known[key].items())
                console.print(f"{key}: {said}{'  WRONG' if wrong else ''}", highlight=False)
    rows = [
        [
            f"{optimizer}, batches of {size}",
            *(
                f"{sum(known[key][step] < LEARNED for key in keys)} of {len(keys)}"
                for step in STAGES
            ),
        ]
        for size in settings.sizes
        for optimizer in settings.optimizers
        if (keys := [f"{name}, {optimizer}, {size}" for name in settings.networks])
    ]  # fmt: skip
    table("networks that look fresh after so many steps", ["", *map(str, STAGES)], rows)
    peers = [Peer("steepest", lambda *_: None, "steepest")]
    save(settings.out / "fresh_weights.json", settings, peers, {}, answers=known)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
