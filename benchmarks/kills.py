"""Kill -9 at random moments: `python benchmarks/kills.py`.

One run of each family of models is killed twenty times, at moments drawn with a fixed seed, and
goes on each time by the same command. The criterion: weights, optimizer's state and losses at the
end are bit for bit those of a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.progress import track

from measure import save, table
from steepest.lab.train.run_folder import read_metrics

SMALL = ["--steps", "400", "--checkpoint-every", "10", "--log-every", "1", "--threads", "1"]
TEXT = ["--width", "32", "--depth", "2", "--context", "32", "--batch", "4"]
FAMILIES = {
    "gpt, bpe": ["--model", "gpt", *TEXT, "--tokenizer", "bpe:300", "--data", "text.txt"],
    "llama, ema": ["--model", "llama", *TEXT, "--data", "text.txt", "--ema", "0.99"],
    "gpt, stream": ["--model", "gpt", *TEXT, "--data", "hub:stream"],
    "mlp, digits": ["--model", "mlp", "--width", "32", "--optimizer", "soap"],
    "residual-convnet": ["--model", "residual-convnet", "--width", "8", "--data", "images.npz"],
    "hf:vit, dropout": [
        "--model", "hf:vit", "--width", "32", "--depth", "2", "--data", "images.npz",
        "--batch", "16", "--model-options", "patch_size=4", "hidden_dropout_prob=0.1",
    ],
    "own": ["--model", "own:build", "--batches", "own:batches", "--validation", "own:judge"],
}  # fmt: skip
OWN = """
import torch
from torch import nn
def build(width=16):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))
def rows(n):
    x = torch.randn(n, 6)
    return x, x[:, :3].argmax(1)
def batches():
    for _ in range(50):
        yield rows(16)
def judge():
    torch.manual_seed(1)
    return [rows(64)]
"""


@dataclass(frozen=True)
class Settings:
    """How often to kill."""

    kills: int = 20
    seed: int = 0
    families: tuple[str, ...] = tuple(FAMILIES)
    out: Path = Path(__file__).resolve().parent / "results" / "kills.json"


def make_data(place: Path) -> None:
    rng = np.random.default_rng(0)
    text = "".join(f"{i} and {i * i % 97}; " for i in range(4000))
    (place / "text.txt").write_text(text)
    (place / "own.py").write_text(OWN)
    (place / "stream").mkdir()
    for shard in range(3):
        lines = [
            json.dumps({"text": text[i * 7 : i * 7 + rng.integers(5, 400)]}) for i in range(900)
        ]
        (place / "stream" / f"train-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    labels = rng.integers(0, 4, 300)
    images = rng.integers(0, 100, (300, 32, 32, 3)) + 40 * labels[:, None, None, None]
    np.savez(place / "images.npz", x_train=images.astype(np.uint8), y_train=labels)


def begin(place: Path, family: str, out: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "steepest.cli", "train", *SMALL, *FAMILIES[family]]
    return subprocess.Popen(
        [*command, "--out", out], cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def end_of(folder: Path) -> dict[str, Any]:
    last = max((folder / "checkpoints").glob("step-*"))
    state = torch.load(last / "state.pt", weights_only=True)
    return {
        "weights": (last / "model.safetensors").read_bytes(),
        "state": state,
        "losses": [
            (row["kind"], row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row
        ],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def killed(place: Path, family: str, settings: Settings) -> dict[str, Any]:
    began = time.monotonic()
    whole = begin(place, family, "whole")
    assert whole.stderr is not None
    if whole.wait() != 0:
        raise SystemExit(f"{family}: {whole.stderr.read().decode()}")
    seconds = time.monotonic() - began
    rng = random.Random(settings.seed)
    kills = starts = 0
    while not (place / "parts" / "result.json").exists():
        process = begin(place, family, "parts")
        starts += 1
        if kills < settings.kills:
            # a start takes most of the time, so moments are drawn from when the run has begun
            metrics = place / "parts" / "metrics.jsonl"
            before = metrics.stat().st_mtime_ns if metrics.exists() else 0
            while process.poll() is None and (
                not metrics.exists() or metrics.stat().st_mtime_ns == before
            ):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, seconds / settings.kills / 4))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.wait()
    ends = [end_of(place / name) for name in ("whole", "parts")]
    result = {"kills": kills, "starts": starts, "equal": same(*ends), "seconds": seconds}
    for name in ("whole", "parts"):
        shutil.rmtree(place / name)
    return result


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        results = {
            family: killed(Path(folder), family, settings) for family in track(settings.families)
        }
    rows = [[name, str(r["kills"]), "yes" if r["equal"] else "NO"] for name, r in results.items()]
    table("runs killed at random moments", ["run", "kills", "equal bit for bit"], rows)
    save(settings.out, settings, [], {}, results=results)


if __name__ == "__main__":
    main()
