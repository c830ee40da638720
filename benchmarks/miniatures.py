"""The papers' kinds of models in miniature, on real data: `python benchmarks/miniatures.py`.

AdamW and Muon, each at its own best rate, with fresh seeds; and for each of the trained models one
score on the test data, which no choice was made on. Data are found in the folder that the variable
STEEPEST_DATA names: wikitext2/valid.txt and test.txt, cifar10/*.npz, mnist/mnist.npz. What is
finished is kept in --place, so a stopped benchmark goes on.

The perplexities are no comparison with published ones: models train on the validation text of
WikiText-2 (its last twentieth held out for tuning), a megabyte, with tokens of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.progress import Progress

from measure import save, table
from steepest.lab.data import judged_by_text
from steepest.lab.studies.optimizer_study import study
from steepest.lab.studies.statistics import interval
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.terminal import StudyProgress
from steepest.lab.train import TrainConfig
from steepest.lab.train.evaluation import evaluator
from steepest.lab.train.setup import data_of, set_up
from steepest.lab.weights import load_weights

TEXT: dict[str, Any] = {
    "data": "wikitext2/valid.txt", "tokenizer": "bpe:2048", "context": 128, "batch": 8, "depth": 4,
    "width": 128, "steps": 300,
}  # fmt: skip
STUDIES: dict[str, dict[str, Any]] = {
    "GPT, WikiText-2": {"model": "gpt", **TEXT},
    "LLaMA, WikiText-2": {"model": "llama", **TEXT},
    "residual ConvNet, CIFAR-10 subset": {
        "model": "residual-convnet", "data": "cifar10/cifar10_5k_1k.npz", "width": 16, "depth": 9,
        "batch": 64, "steps": 250,
    },
    "ViT of Hugging Face, CIFAR-10 subset": {
        "model": "hf:vit", "data": "cifar10/cifar10_5k_1k.npz", "width": 64, "depth": 4,
        "batch": 64, "steps": 300, "model_options": ("patch_size=4", "num_attention_heads=4"),
    },
    "MLP, MNIST": {
        "model": "mlp", "data": "mnist/mnist.npz", "width": 256, "depth": 3, "batch": 64,
        "steps": 600,
    },
}  # fmt: skip
TESTS = {"wikitext2/valid.txt": "wikitext2/test.txt"}
"""The text that scores what was trained on another; images bring a test part."""


@dataclass(frozen=True)
class Settings:
    """What to train."""

    studies: tuple[str, ...] = tuple(STUDIES)
    optimizers: tuple[str, ...] = ("adamw", "muon")
    seeds: int = 3
    steps: int | None = None
    workers: int = 2
    place: Path = Path("runs/miniatures")
    out: Path = Path(__file__).resolve().parent / "results" / "miniatures.json"


def config_of(name: str, settings: Settings) -> StudyConfig:
    chosen = dict(STUDIES[name])
    chosen["data"] = str(Path(os.environ["STEEPEST_DATA"]) / chosen["data"])
    chosen["steps"] = settings.steps or chosen["steps"]
    return StudyConfig(
        **chosen, optimizers=settings.optimizers, seeds=settings.seeds, workers=settings.workers,
        device="cpu",
    )  # fmt: skip


def test_scores(folder: Path, data_name: str) -> dict[str, float]:
    """Score the trained model of a run on the test data."""
    stored = json.loads((folder / "config.json").read_text())
    names = TrainConfig.__dataclass_fields__
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in names}
    config = TrainConfig(**stored)
    setup = set_up(config, data_of(config))
    last = max((folder / "checkpoints").glob("step-*"))
    load_weights(setup.model, last / "model.safetensors")
    judged: Any = TestImages(setup.data)
    if data_name in TESTS:  # in the tokens of the training text
        judged = judged_by_text(
            setup.data, str(Path(os.environ["STEEPEST_DATA"]) / TESTS[data_name])
        )
    setup = replace(setup, data=judged, config=replace(config, validate_windows=10**6))
    return evaluator(setup)(setup.model)


class TestImages:
    """The test part of images, in place of what was held out."""

    unit, bytes_per_token = "images", None

    def __init__(self, data: Any):
        self.data = data

    def validation(self, *, batch: int, context: int | None, count: int) -> Iterator[Any]:
        return self.data.test(batch)


def conducted(name: str, settings: Settings, progress: Progress) -> dict[str, Any]:
    config = config_of(name, settings)
    out = settings.place / name.lower().replace(" ", "-").replace(",", "")
    summary = study(config, out, StudyProgress(progress))
    baseline: dict[int, float] = {}
    results = {}
    for entry in summary["optimizers"]:
        runs = sorted((out / "runs").glob(f"{entry['name']}-lr{entry['best_lr']:g}-seed[1-9]"))
        scores = {int(run.name[-1]): test_scores(run, STUDIES[name]["data"]) for run in runs}
        losses = {seed: score["loss"] for seed, score in scores.items()}
        baseline = baseline or losses
        shown = {
            key: interval([score[key] for score in scores.values()])
            for key in ("loss", "accuracy", "bits_per_byte")
            if all(key in score for score in scores.values())
        }
        results[entry["name"]] = {
            "verdict": entry["verdict"],
            "best_lr": entry["best_lr"],
            "rates": [
                [rate["lr"], next(r["validation_loss"] for r in rate["runs"] if r["seed"] == 0)]
                for rate in entry["rates"]
            ],
            "validation_loss": entry["validation_loss"],
            "validation_gap": entry["gap_to_baseline"],
            "test": shown,
            "test_gap": interval([losses[s] - baseline[s] for s in losses if s in baseline]),
            "step_seconds": entry["step_seconds"],
        }
    return {
        "settings": summary["settings"],
        "data": {**summary["data"], "name": STUDIES[name]["data"]},
        "optimizers": results,
    }


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    if "STEEPEST_DATA" not in os.environ:
        raise SystemExit("set STEEPEST_DATA to the folder that has wikitext2, cifar10 and mnist")
    with Progress(disable=True) as progress:
        results = {name: conducted(name, settings, progress) for name in settings.studies}
    rows = [
        [
            name,
            optimizer,
            result["verdict"],
            f"{result['best_lr']:g}",
            *map(
                _with_half, (result["validation_loss"], result["test"]["loss"], result["test_gap"])
            ),
            _with_half(result["test"].get("accuracy") or result["test"].get("bits_per_byte")),
        ]
        for name, study_ in results.items()
        for optimizer, result in study_["optimizers"].items()
    ]
    columns = ["study", "optimizer", "rate is", "rate", "validation", "test", "gap",
               "accuracy or bits/byte"]  # fmt: skip
    table("AdamW and Muon on the papers' kinds of models, in miniature", columns, rows)
    save(settings.out, replace(settings, place=Path()), [], {}, results=results)


def _with_half(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    low = value["low"]
    return f"{value['mean']:.3f}" + ("" if low is None else f"±{value['mean'] - low:.3f}")


if __name__ == "__main__":
    main()
