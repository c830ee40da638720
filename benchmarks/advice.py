"""How often the verdicts of `diagnose` agree with races, over architectures and stages of training.

Truth is the race between spectral and Euclidean steps of one matrix, on batches that neither
training nor the prediction has seen. A case is decided if the 95% interval of its log ratio leaves
out 0 and the two differ by more than 5%; what differs by less is either's to win and is counted
apart. Reported for the quick and the standard prediction: on decided cases that were told the
balanced accuracy, the share of "cannot tell", the rank correlation of predicted with raced log
ratio, and what "always spectral" and "spectral for every hidden matrix" would score. Intervals
resample whole networks. The networks in HELD_OUT are not to be looked at while anything is tuned.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from measure import save, table
from peers import Peer
from steepest.diagnosis import diagnose
from steepest.lab.data import Sampler, load
from steepest.lab.models import GPT, GPTConfig

HELD_OUT = ("mixer", "moe")
STAGES = (0, 30, 300, 1500)
JUDGED, RACED = 8, 10  # batches for the prediction, and for the race


@dataclass(frozen=True)
class Settings:
    """What to run."""

    networks: tuple[str, ...] = ("mlp", "cnn", "gpt", "swiglu", "lstm", "autoencoder", "vit", "gru")
    """Which networks."""
    batch: int = 64
    """Examples, or sequences of 32 tokens times 4, in each batch."""
    raw: Path = Path("runs/advice")
    """Folder of finished cases, so that a stopped run goes on."""
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


# Networks: a model, batches by number, and the loss.


def digits(size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    X, y = load_digits(return_X_y=True)
    images = torch.tensor(X, dtype=torch.float32) / 8 - 1
    classes = torch.tensor(y)

    def batch(i: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(i))[:size]
        return images[chosen], classes[chosen]

    return batch


def text(size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    sampler = Sampler(load("stdlib").train, max(4, size // 4), 32, 0)
    return lambda i: tuple(t.clone() for t in sampler.batch(i))  # type: ignore[return-value]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.embedding = nn.Embedding(256, 48)
        self.recurrent = kind(48, 48, batch_first=True)
        self.head = nn.Linear(48, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(tokens))[0])


class ViT(nn.Module):
    """4 patches a side of 2 x 2 pixels, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 48, 2, stride=2)
        self.position = nn.Parameter(torch.randn(16, 48) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images.view(-1, 1, 8, 8)).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    outputs = model(batch[0])
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def network(name: str, size: int) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    if name == "mlp":
        sizes = (64, 96, 96, 96)
        layers = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(96, 10)), digits(size), cross_entropy
    if name == "cnn":
        layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 24, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(48, 48, 3, padding=1, groups=2), nn.ReLU()]
        return (
            nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, 10)),
            digits(size),
            cross_entropy,
        )
    if name == "autoencoder":
        layers = [nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 12), nn.Tanh()]
        layers += [nn.Linear(12, 96), nn.Tanh(), nn.Linear(96, 64)]
        return (
            nn.Sequential(*layers),
            digits(size),
            lambda model, b: 0.5 * (model(b[0]) - b[0]).square().sum(1).mean(),
        )
    if name == "vit":
        return ViT(), digits(size), cross_entropy
    if name in ("lstm", "gru"):
        return Recurrent(nn.LSTM if name == "lstm" else nn.GRU), text(size), cross_entropy
    if name == "swiglu":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=256,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="sdpa",
        )
        model = LlamaForCausalLM(config)
        return (
            model,
            text(size),
            lambda model, b: F.cross_entropy(
                model(input_ids=b[0], use_cache=False).logits.flatten(0, 1), b[1].flatten()
            ),
        )
    return GPT(GPTConfig(width=48, depth=2, heads=4, context=32), 256), text(size), cross_entropy


def trained(name: str, size: int, steps: int) -> tuple[nn.Module, Any, Any]:
    model, batch, loss = network(name, size)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, batch(step)).backward()
        optimizer.step()
    return model, batch, loss


def cases(name: str, size: int, steps: int) -> list[dict[str, Any]]:
    """A case for each matrix: quick, standard and raced log ratio of spectral over Euclidean."""
    model, batch, loss = trained(name, size, steps)
    given = [batch(10**6 + i) for i in range(JUDGED)]
    raced = [batch(2 * 10**6 + i) for i in range(RACED)]
    quick = {row.matrix: row for row in diagnose(model, loss, given, level="quick")}
    # Half of the batches of a thorough diagnosis predict, half race: pad the first half to fit.
    found = diagnose(model, loss, given[:RACED] + raced, level="thorough")
    standard = {row.matrix: row for row in diagnose(model, loss, given)}
    rows = []
    for row in found:
        race = {each.geometry: each for each in row.race}["spectral"]
        mine, short = standard[row.matrix].prediction("spectral"), quick[row.matrix]
        rows.append(
            {
                "network": name,
                "stage": steps,
                "matrix": row.matrix,
                "role": row.role,
                "stable_rank": row.stable_rank,
                "nuclear_rank": row.nuclear_rank,
                "nuclear_rank_across": standard[row.matrix].nuclear_rank_across,
                "quick": _interval(short.prediction("spectral")),
                "standard": _interval(mine),
                "raced": None if race.log_ratio is None else asdict(race.log_ratio),
                "decreases": {each.geometry: each.decrease for each in row.race},
            }
        )
    return rows


def _interval(prediction: Any) -> dict[str, float] | None:
    ratio = None if prediction is None else prediction.log_ratio
    return None if ratio is None else asdict(ratio)


# Scores.


def said(interval: dict[str, float] | None) -> int:
    """1 for spectral, -1 for Euclidean, 0 for cannot tell."""
    if interval is None or interval["low"] <= 0 <= interval["high"]:
        return 0
    return 1 if interval["value"] > 0 else -1


def balanced(truth: np.ndarray, answer: np.ndarray) -> float:
    sides = [side for side in (-1, 1) if (truth == side).any()]
    shares = [float((answer[truth == side] == side).mean()) for side in sides]
    return float(np.mean(shares)) if len(shares) == 2 else math.nan


def score(rows: list[dict[str, Any]], level: str) -> dict[str, float]:
    decided = [row for row in rows if said(row["raced"])]
    truth = np.array([said(row["raced"]) for row in decided])
    answer = np.array([said(row[level]) for row in decided])
    told = answer != 0
    both = [row for row in rows if row["raced"] and row[level]]
    pairs = [(row[level]["value"], row["raced"]["value"]) for row in both]
    hidden = np.array([1 if row["role"] not in ("embedding", "head") else -1 for row in decided])
    return {
        "cases": len(rows),
        "decided": len(decided),
        "not spectral": float((truth < 0).mean()) if len(decided) else math.nan,
        "told": float(told.mean()) if len(decided) else math.nan,
        "balanced accuracy": balanced(truth[told], answer[told]),
        "accuracy": float((truth[told] == answer[told]).mean()) if told.any() else math.nan,
        "always spectral": balanced(truth, np.ones_like(truth)),
        "spectral for hidden": balanced(truth, hidden),
        "rank correlation": float(spearmanr(np.array(pairs))[0]) if len(pairs) > 2 else math.nan,
    }


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    console = Console(stderr=True)
    settings.raw.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in settings.networks:
        for steps in STAGES:
            place = settings.raw / f"{name}-{steps}.json"
            if not place.exists():
                began = time.perf_counter()
                found = cases(name, settings.batch, steps)
                place.write_text(json.dumps(found))
                seconds = time.perf_counter() - began
                console.print(f"{name} after {steps} steps: {len(found)} cases, {seconds:.0f} s")
            rows += json.loads(place.read_text())
    scores = {}
    for part, kept in (
        ("tuned on", [row for row in rows if row["network"] not in HELD_OUT]),
        ("held out", [row for row in rows if row["network"] in HELD_OUT]),
        ("all", rows),
    ):
        for level in ("quick", "standard"):
            scores[f"{part}, {level}"] = score(kept, level)
    names = list(next(iter(scores.values())))
    table(
        "verdicts on spectral against Euclidean steps, beside the race",
        ["", *scores],
        [[name, *(f"{each[name]:.3g}" for each in scores.values())] for name in names],
    )
    peers = [Peer("steepest", lambda *_: None, "steepest")]
    given = replace(settings, raw=str(settings.raw))
    save(settings.out / "advice.json", given, peers, {}, scores=scores, rows=rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
