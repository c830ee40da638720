"""What a diagnosis costs, in the gradients that it takes anyway, and a monitor in training steps.

On a GPT of 10.8 million parameters on a CPU. Everything is timed in turns with what it is compared
to, in CPU time; reported are medians of ratios. Memory is what is allocated beyond the model and
the batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import steepest
from measure import MIB, peak_bytes, quiet, save, table
from peers import Peer
from steepest.lab.models import GPT, GPTConfig


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    width: int = 384
    """Of the GPT."""
    depth: int = 6
    """Blocks of the GPT."""
    tokens: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens in a batch, in sequences of 128."""
    batches: int = 4
    """For a diagnosis."""
    repeats: int = 3
    """Of each pair of timings."""
    threads: int = 1
    """Of the processor."""
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


Batch = tuple[Tensor, Tensor]


def batch(tokens: int) -> Batch:
    given = torch.randint(256, (tokens // 128, 128))
    return given, given.roll(-1, 1)


def loss(model: Any, given: Batch) -> Tensor:
    return model.loss(*given)


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def ratio(work: Callable[[], object], reference: Callable[[], object], repeats: int) -> float:
    reference()
    pairs = [(seconds(reference), seconds(work)) for _ in range(repeats)]
    return statistics.median(mine / theirs for theirs, mine in pairs)


def gradients(model: nn.Module, given: list[Batch]) -> None:
    for each in given:
        torch.autograd.grad(loss(model, each), list(model.parameters()))


def monitored(settings: Settings, tokens: int, every: int) -> float:
    """Time of training steps with a monitor over without, over whole periods of it."""
    models = [GPT(GPTConfig(width=128, depth=4, heads=4, context=128), 256) for _ in range(2)]
    optimizers = [steepest.Muon(model, lr=0.02) for model in models]
    given = batch(tokens)

    def steps(model: nn.Module, optimizer: Any) -> None:
        for _ in range(every):
            optimizer.zero_grad()
            loss(model, given).backward()
            optimizer.step()

    with steepest.Monitor(models[0], optimizers[0], every=every):
        return ratio(
            lambda: steps(models[0], optimizers[0]),
            lambda: steps(models[1], optimizers[1]),
            settings.repeats,
        )


def main(settings: Settings) -> None:
    quiet()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    config = GPTConfig(width=settings.width, depth=settings.depth, heads=6, context=128)
    model = GPT(config, 256)
    parameters = sum(p.numel() for p in model.parameters())
    one = "blocks.0.mlp.up.weight"
    found: dict[str, dict[str, float]] = {}
    for tokens in settings.tokens:
        given = [batch(tokens) for _ in range(settings.batches)]

        def diagnose(level: Any, names: list[str] | None, given: list[Batch] = given) -> None:
            steepest.diagnose(model, loss, given, level=level, parameters=names, warmup_steps=0)

        def plain(given: list[Batch] = given) -> None:
            gradients(model, given)

        found[str(tokens)] = {
            "quick over its gradients": ratio(
                lambda f=diagnose: f("quick", None), plain, settings.repeats
            ),
            "quick, MiB": peak_bytes(lambda f=diagnose: f("quick", None), torch.device("cpu"))
            / MIB,
            "one gradient, MiB": peak_bytes(
                lambda g=given: gradients(model, g[:1]), torch.device("cpu")
            )
            / MIB,
        }
    fewest = [batch(settings.tokens[0]) for _ in range(settings.batches)]
    standard = ratio(
        lambda: steepest.diagnose(model, loss, fewest, parameters=[one], warmup_steps=0),
        lambda: gradients(model, fewest),
        1,
    )
    figures = {
        "standard, gradients for a matrix and batch": standard,
        "parameters": parameters,
        "gradients of all batches, MiB": settings.batches * parameters * 4 / MIB,
        "by tokens": found,
        "step with a monitor": monitored(settings, 1024, 100),
    }
    names = list(next(iter(found.values())))
    table(
        f"a GPT of {parameters / 1e6:.1f} million parameters, {settings.batches} batches",
        ["", *(f"{tokens} tokens" for tokens in found)],
        [[name, *(f"{each[name]:.3g}" for each in found.values())] for name in names],
    )
    print(f"standard: {standard:.3g} gradients for a matrix and batch")
    print(f"a step with a monitor over one without: {figures['step with a monitor']:.4f}")
    peers = [Peer("steepest", lambda *_: None, "steepest")]
    save(settings.out / "diagnosis_cpu.json", settings, peers, {}, **figures)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
