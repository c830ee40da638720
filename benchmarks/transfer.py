"""Do learning rates transfer under the rules, and does the curvature say why?

Criteria, written before anything was measured: the best rate moves by at most one octave over the
sizes (goal: half of one), at half of the steps and at all of them, and that of the smallest size
costs the largest at most 1% of its loss; layers pass the coordinate check with |slope| of at most
0.1; sharpness at the end (mean of the last three snapshots) differs by at most 25% over widths
under muP and by more than 2x under NTP; the movement of the tangent kernel has a slope of about 0
under muP and below -0.4 under NTP. Controls are expected to fail.

Rates: a neural language model (four bytes in, the next one out, as in Bengio et al., 2003) on
embedded text, all optimizers; a GPT for TEON, which stacks what attention has. Depth: a residual
network on the same text. Curvature: 8 x 8 digits, full batch. Everything resumes from --runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from measure import save
from peers import Peer
from steepest.lab.data import Sampler, load
from steepest.lab.models import GPT, GPTConfig
from steepest.transfer import coordinate_check, rate_transfer, super_consistency

CONTEXT, BATCH = 4, 128
BLOCK: dict[str, Any] = {"settings": {"block": 32}}
FIRST: dict[str, tuple[float, dict[str, Any]]] = {  # where to look first, and what is set
    "sgd": (0.5, {}),
    "adam": (0.02, {}),
    "signum": (0.004, {}),
    "muon": (0.1, {}),
    "teon": (0.1, {}),
    "shampoo": (0.02, BLOCK),
    "kl-shampoo": (0.02, BLOCK),
    "soap": (0.02, {}),
}
WIDTHS = tuple({"width": width} for width in (32, 128, 512))
DEPTHS = tuple({"depth": depth} for depth in (2, 8, 32))


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    only: tuple[str, ...] = ()
    """Names, or their beginnings; all by default."""
    steps: int = 200
    """Of the runs on text."""
    seeds: int = 2
    """Initializations for every rate and size."""
    threads: int = 1
    """For torch."""
    runs: Path = Path("runs/transfer")
    """Folder of finished runs and figures."""
    out: Path = Path(__file__).parent / "results"
    """Where the figures go."""


class LanguageModel(nn.Module):
    """Four bytes -> embeddings, side by side -> two hidden layers -> the next byte."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.mix = nn.Linear(CONTEXT * width, width, bias=False)
        self.hidden = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.mix.weight, std=(CONTEXT * width) ** -0.5)
        nn.init.normal_(self.hidden.weight, std=(2 / width) ** 0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embedding(tokens).flatten(1)).relu()
        logits: Tensor = self.head(self.hidden(x).relu())
        return logits


class Branch(nn.Module):
    """x + W tanh(x), or with a second layer inside."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False) if layers == 2 else None
        self.last = nn.Linear(width, width, bias=False)
        for layer in (self.inner, self.last):
            if layer is not None:
                nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.tanh()
        h = h if self.inner is None else self.inner(h).tanh()
        out: Tensor = x + self.last(h)
        return out


class Residual(nn.Module):
    """The same language model with residual blocks of one layer in place of hidden layers."""

    def __init__(self, depth: int, width: int = 64, layers: int = 1):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.mix = nn.Linear(CONTEXT * width, width, bias=False)
        nn.init.normal_(self.mix.weight, std=(CONTEXT * width) ** -0.5)
        self.blocks = nn.ModuleList(Branch(width, layers) for _ in range(depth))
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embedding(tokens).flatten(1))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def gpt(width: int) -> nn.Module:
    model = GPT(GPTConfig(width=width, depth=2, heads=2, context=32), vocabulary=256)
    nn.init.zeros_(model.get_parameter("head.weight"))
    return model


@cache
def _sampler(batch: int, context: int) -> Sampler:
    return Sampler(load("reference").train, batch, context, seed=0)


def next_byte(i: int) -> tuple[Tensor, Tensor]:
    """Batch i: four bytes each, and the one that follows."""
    inputs, targets = _sampler(BATCH, CONTEXT).batch(i)
    return inputs, targets[:, -1]


def sequences(i: int) -> tuple[Tensor, Tensor]:
    return _sampler(8, 32).batch(i)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits: Tensor = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


# Digits, as in the pilot of super consistency: standard normal weights behind fixed multipliers,
# the fans of which are those of the base; the rule has all the dependence on the size.


class Scaled(nn.Module):
    """64 -> N -> N -> 10 with ReLU; `readout` is what its output is multiplied with."""

    def __init__(self, width: int, readout: float):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(*fans, bias=False) for fans in ((64, width), (width, width), (width, 10))
        )
        for layer in self.layers:
            nn.init.normal_(layer.weight)
        self.scales = (1 / 8, (2 / 32) ** 0.5, readout)

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = layer(x) * scale
            x = x if layer is self.layers[-1] else x.relu()
        return x


def small_readout(width: int) -> nn.Module:
    return Scaled(width, 1 / 32)


def large_readout(width: int) -> nn.Module:
    return Scaled(width, 32**-0.5)


def random_features(width: int) -> nn.Module:
    model = Scaled(width, 1 / 32)
    for layer in list(model.layers)[:2]:
        layer.weight.requires_grad_(False)
    return model


def plain_mlp(width: int) -> nn.Module:
    """The same in standard parametrization."""
    model = nn.Sequential(
        nn.Linear(64, width, bias=False), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, 10, bias=False),
    )  # fmt: skip
    for k, gain in ((0, 1.0), (2, 2**0.5), (4, 1.0)):
        weight = model.get_parameter(f"{k}.weight")
        nn.init.normal_(weight, std=gain / weight.shape[1] ** 0.5)
    return model


class DeepDigits(nn.Module):
    """64 -> 64 -> residual tanh blocks -> 10, standard normal weights behind multipliers."""

    def __init__(self, depth: int, layers: int = 1):
        super().__init__()
        self.input = nn.Linear(64, 64, bias=False)
        self.blocks = nn.ModuleList(Branch(64, layers) for _ in range(depth))
        self.head = nn.Linear(64, 10, bias=False)
        nn.init.normal_(self.input.weight, std=1 / 8)
        nn.init.normal_(self.head.weight, std=1 / 64)
        for block in self.blocks:  # the base has depth 2: branches over sqrt(2)
            block.last.weight.data /= 2**0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def deep_digits(depth: int) -> nn.Module:
    return DeepDigits(depth)


def deeper_digits(depth: int) -> nn.Module:
    return DeepDigits(depth, layers=2)


class Attention(nn.Module):
    """Digits as eight rows of eight: two layers of attention, mean, readout; for TEON's stacks."""

    def __init__(self, width: int):
        super().__init__()
        self.input = nn.Linear(8, width, bias=False)
        self.position = nn.Parameter(torch.randn(8, width))
        self.blocks = nn.ModuleList(_Heads(width) for _ in range(2))
        self.head = nn.Linear(width, 10, bias=False)
        nn.init.normal_(self.input.weight, std=8**-0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.input(x.unflatten(1, (8, 8))) + self.position
        for block in self.blocks:
            h = h + block(h)
        logits: Tensor = self.head(h.mean(1))
        return logits


class _Heads(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.normal_(layer.weight, std=width**-0.5)
        self.heads = 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.output(y.transpose(1, 2).flatten(-2))
        return out


@cache
def digits() -> tuple[Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[:512], dtype=torch.float32) / 8 - 1, torch.tensor(y[:512])


def all_digits(i: int) -> tuple[Tensor, Tensor]:
    return digits()


def some_digits(i: int) -> tuple[Tensor, Tensor]:
    X, y = digits()
    return X[:128], y[:128]


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - F.one_hot(batch[1], 10)).square().sum(1).mean()


def widths(*values: int) -> tuple[dict[str, int], ...]:
    return tuple({"width": value} for value in values)


def depths(*values: int) -> tuple[dict[str, int], ...]:
    return tuple({"depth": value} for value in values)


Study = Callable[[Settings, Path], Any]


def studies() -> dict[str, Study]:
    """What can be measured, by name."""
    found: dict[str, Study] = {}

    def rates(
        name: str,
        build: Any,
        sizes: Sequence[Any],
        batches: Any,
        loss: Any,
        lr: float,
        steps: int | None = None,
        **how: Any,
    ) -> None:
        found[name] = lambda settings, path: rate_transfer(
            build, sizes, batches, loss, lr=lr, steps=steps or settings.steps,
            seeds=settings.seeds, path=path, **how,
        )  # fmt: skip

    for optimizer, (lr, how) in FIRST.items():
        if optimizer != "teon":
            name = f"rates, width, {optimizer}"
            rates(
                name,
                LanguageModel,
                WIDTHS,
                next_byte,
                cross_entropy,
                lr,
                optimizer=optimizer,
                **how,
            )
    for optimizer in ("muon", "teon"):
        name = f"rates, width, gpt, {optimizer}"
        rates(name, gpt, WIDTHS, sequences, cross_entropy, 0.05, optimizer=optimizer)
    for optimizer, lr in (("sgd", 0.5), ("adam", 0.01), ("muon", 0.05)):
        for rule in ("completep", "depth-mup"):
            rates(
                f"rates, depth, {optimizer}, {rule}", Residual, DEPTHS, next_byte, cross_entropy, lr,
                optimizer=optimizer, rule=rule, branches=["blocks.*.last"],
            )  # fmt: skip
    rates(
        "rates, control, ntp",
        LanguageModel,
        WIDTHS,
        next_byte,
        cross_entropy,
        0.5,
        rule="ntp",
        optimizer="sgd",
    )
    rates(
        "rates, control, digits, ntp",
        large_readout,
        WIDTHS,
        all_digits,
        cross_entropy,
        8.0,
        60,
        rule="ntp",
        optimizer="sgd",
    )
    rates(
        "rates, digits, mup",
        small_readout,
        WIDTHS,
        all_digits,
        cross_entropy,
        32.0,
        60,
        rule="mup",
        optimizer="sgd",
    )
    rates(
        "rates, digits, squared error, mup",
        small_readout,
        WIDTHS,
        all_digits,
        squared_error,
        32.0,
        60,
        rule="mup",
        optimizer="sgd",
    )
    rates(
        "rates, control, digits, squared error, sp",
        plain_mlp,
        WIDTHS,
        all_digits,
        squared_error,
        0.05,
        60,
        rule="sp",
        optimizer="sgd",
    )
    rates(
        "rates, control, muon match-rms-adamw", LanguageModel, WIDTHS, next_byte, cross_entropy,
        0.02, rule="sp", optimizer="muon", settings={"scale": "match-rms-adamw"},
    )  # fmt: skip

    def curvature(name: str, build: Any, sizes: Sequence[Any], lr: float, **how: Any) -> None:
        how = {"optimizer": "sgd", "steps": 120, "every": 10, **how}
        found[name] = lambda settings, path: super_consistency(
            build, sizes, all_digits, cross_entropy, lr=lr, seeds=settings.seeds, path=path, **how
        )

    five = widths(32, 64, 128, 256, 512)
    curvature("sharpness, width, mup", small_readout, five, 16.0)
    curvature("sharpness, width, ntp", large_readout, five, 0.5, rule="ntp")
    curvature("sharpness, width, random features", random_features, five, 16.0)
    for rule, lr in (("depth-mup", 0.5), ("completep", 0.5), ("mup", 0.5)):
        branches = {"branches": ["blocks.*.last"]} if rule != "mup" else {}
        curvature(
            f"sharpness, depth, {rule}", deep_digits, depths(2, 4, 8, 16, 32), lr, rule=rule,
            **branches,
        )  # fmt: skip
    curvature(
        "sharpness, depth, two layers, depth-mup", deeper_digits, depths(2, 4, 8, 16, 32), 0.5,
        rule="depth-mup", branches=["blocks.*.last"],
    )  # fmt: skip
    for optimizer, lr in (("adam", 0.003), ("muon", 0.02)):
        curvature(f"sharpness, width, {optimizer}", plain_readout, five, lr, optimizer=optimizer)
    six = widths(64, 128, 256, 512, 1024)
    curvature("kernel, mup", small_readout, six, 16.0, steps=20, every=5)
    curvature("kernel, ntp", large_readout, six, 0.5, steps=20, every=5, rule="ntp")

    def coordinates(name: str, build: Any, batch: Any, lr: float, **how: Any) -> None:
        found[name] = lambda settings, path: coordinate_check(
            build, six, batch, cross_entropy, lr=lr, seeds=3, path=path, **how
        )

    for optimizer, lr in (("sgd", 0.5), ("adam", 0.01), ("signum", 0.003), ("muon", 0.1)):
        coordinates(
            f"coordinates, mlp, {optimizer}", plain_readout, digits(), lr, optimizer=optimizer
        )
    for optimizer in ("muon", "teon"):
        coordinates(
            f"coordinates, attention, {optimizer}",
            Attention,
            some_digits(0),
            0.05,
            optimizer=optimizer,
        )
    return found


def plain_readout(width: int) -> nn.Module:
    """In standard parametrization, but for a small readout."""
    model = plain_mlp(width)
    nn.init.normal_(model.get_parameter("4.weight"), std=1 / width)
    return model


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    settings.runs.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for name, study in studies().items():
        if settings.only and not any(name.startswith(only) for only in settings.only):
            continue
        file = name.replace(", ", "-").replace(" ", "_")
        found = study(settings, settings.runs / f"{file}.jsonl")
        Console().print(f"[bold]{name}[/]", found)
        figures[name] = found.as_dict()
    if not settings.only:
        save(
            settings.out / "transfer.json",
            settings,
            [Peer("steepest", lambda *_: None, "steepest")],
            {},
            **figures,
        )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
