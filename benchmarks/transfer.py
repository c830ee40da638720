"""Do learning rates transfer under the rules, and does the curvature say why?

Thresholds, set before anything was measured: the best rate moves by at most one octave over the
sizes (goal: half of one), at half of the steps and at all of them. The best rate of the smallest
size costs the largest at most 1% of its loss. Layers pass the coordinate check with |slope| of at
most 0.1. Sharpness at the end (mean of the last three snapshots) differs by at most 25% over widths
under muP and by more than 2x under NTP. The movement of the tangent kernel has a slope of about 0
under muP and below -0.4 under NTP. Controls are expected to fail. Some choices were made after
first runs, which docs/transfer.md tells of: the problems, their lengths, and the rate of the
coordinate check on attention. The carried rate is the better one of the grid's and the interpolated
since then. The rate that smaller sizes advise, width 64, and the GPT with large batches were added
when the rest was known. SOAP with steps of spectral norm 1 was added when without them it had
failed on that GPT. SOAP with all sides was added when `max_side=1024` had failed too.

Rates: a neural language model (four bytes in, the next one out, as in Bengio et al., 2003) on
embedded text; a GPT for TEON, which stacks what attention has, and, with large batches and on a
grid alone, for all others. Depth: a residual network on the same text. Curvature: 8 x 8
digits, full batch. Everything resumes from --runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro
from rich.console import Console

import transfer_networks as nets
from measure import save
from peers import Peer
from steepest.transfer import coordinate_check, parametrize, rate_transfer, super_consistency
from steepest.transfer.runs import Finished, named

BLOCK: dict[str, Any] = {"settings": {"block": 32}}
NORM_ONE: dict[str, Any] = {
    "settings": {"max_side": None, "length": "spectral", "scale": "spectral"}
}
FIRST: dict[str, tuple[float, dict[str, Any]]] = {  # where to look first, and what is set
    "sgd": (0.5, {}),
    "adamw": (0.02, {}),
    "signum": (0.004, {}),
    "muon": (0.1, {}),
    "soap": (0.02, {}),
    "shampoo": (0.02, BLOCK),
    "kl-shampoo": (0.02, BLOCK),
}
ON_GPT = {
    "adamw": 0.005,
    "signum": 0.004,
    "sgd": 0.5,
    "muon": 0.05,
    "soap": 0.01,
    "shampoo": 0.01,
    "kl-shampoo": 0.01,
}


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
    """Folder of finished runs."""
    out: Path = Path(__file__).parent / "results"
    """Where the figures go, if all were measured."""


def sizes(name: str, *values: int) -> list[dict[str, int]]:
    return [{name: value} for value in values]


Study = Callable[[Settings, Path], Any]


def studies() -> dict[str, Study]:
    """What can be measured, by name."""
    found: dict[str, Study] = {}
    widths, depths = sizes("width", 32, 64, 128, 512), sizes("depth", 2, 8, 32)
    branches = {"branches": ["blocks.*.last"]}

    def rates(name: str, build: Any, along: Any, batches: Any, lr: float, **how: Any) -> None:
        loss = how.pop("loss", nets.cross_entropy)
        found[f"rates, {name}"] = lambda settings, path: rate_transfer(
            build, along, batches, loss, lr=lr, seeds=settings.seeds, path=path,
            **{"steps": settings.steps, **how},
        )  # fmt: skip

    text = partial(rates, build=nets.LanguageModel, along=widths, batches=nets.next_byte)
    many = {"batches": nets.many_next_bytes}  # Adam's steps follow the noise of a batch
    for optimizer, (lr, how) in FIRST.items():
        short = {"steps": 100} if how else {}  # many small blocks take their time
        text(f"width, {optimizer}", lr=lr, optimizer=optimizer, **how, **short)
    text("width, large batches, adam", lr=0.02, optimizer="adamw", steps=100, **many)
    rates(  # TEON stacks what attention has
        "width, gpt, teon", nets.gpt, widths, nets.sequences, 0.05, optimizer="teon", steps=100
    )
    on_gpt = partial(  # a run of width 512 takes minutes, so on a grid alone
        rates, build=nets.gpt, along=widths, batches=nets.many_sequences, steps=300, grid_only=True
    )
    for optimizer, (_, how) in FIRST.items():
        own = BLOCK if optimizer == "soap" else how
        on_gpt(f"gpt, {optimizer}", lr=ON_GPT[optimizer], optimizer=optimizer, **own)
    on_gpt("gpt, whole matrices, soap", lr=ON_GPT["soap"], optimizer="soap")
    on_gpt("gpt, norm one, soap", lr=0.05, optimizer="soap", **NORM_ONE)
    for optimizer, lr in (("sgd", 0.5), ("adamw", 0.01), ("muon", 0.05)):
        for rule in ("completep", "depth-mup"):
            rates(
                f"depth, {optimizer}, {rule}", nets.Residual, depths, nets.next_byte, lr,
                optimizer=optimizer, rule=rule, **branches,
            )  # fmt: skip
    text("control, ntp, sgd", lr=0.5, rule="ntp", optimizer="sgd")
    full = partial(rates, along=widths, batches=nets.all_digits, optimizer="sgd", steps=60)
    full("digits, mup", build=nets.small_readout, lr=32.0)
    full("control, digits, ntp", build=nets.small_readout, lr=32.0, rule="ntp")
    error = partial(full, build=nets.plain, lr=1.0, loss=nets.squared_error)
    error("digits, squared error, mup")
    error("control, digits, squared error, sp", rule="sp")
    other = {"optimizer": "muon", "settings": {"scale": "match-rms-adamw"}}
    error("control, digits, squared error, muon match-rms-adamw", lr=0.03, rule="sp", **other)
    for optimizer, (_, how) in FIRST.items():
        if optimizer != "sgd":
            error(f"digits, squared error, {optimizer}", lr=0.03, **how, optimizer=optimizer)

    def curvature(name: str, build: Any, along: Any, lr: float, **how: Any) -> None:
        how = {"optimizer": "sgd", "steps": 120, "every": 10, **how}
        found[name] = lambda settings, path: super_consistency(
            build, along, nets.all_digits, nets.cross_entropy, lr=lr, seeds=settings.seeds,
            path=path, **how,
        )  # fmt: skip

    five, deep = sizes("width", 32, 64, 128, 256, 512), sizes("depth", 2, 4, 8, 16, 32)
    curvature("sharpness, width, mup", nets.small_readout, five, 16.0)
    curvature("sharpness, width, ntp", nets.large_readout, five, 0.5, rule="ntp")
    curvature("sharpness, width, random features", nets.random_features, five, 16.0)
    curvature("sharpness, width, adam", nets.plain, five, 0.003, optimizer="adamw")
    curvature("sharpness, width, muon", nets.plain, five, 0.02, optimizer="muon")
    for rule in ("depth-mup", "completep"):
        curvature(f"sharpness, depth, {rule}", nets.deep_digits, deep, 32.0, rule=rule, **branches)
    curvature("sharpness, depth, unscaled", nets.deep_digits, deep, 32.0)
    curvature(
        "sharpness, depth, two layers, depth-mup", nets.deeper_digits, deep, 32.0,
        rule="depth-mup", **branches,
    )  # fmt: skip
    to_1024: Sequence[Any] = sizes("width", 64, 128, 256, 512, 1024)
    short = {"steps": 20, "every": 5}
    curvature("kernel, mup", nets.small_readout, to_1024, 16.0, **short)
    curvature("kernel, ntp", nets.large_readout, to_1024, 0.5, rule="ntp", **short)

    def coordinates(
        name: str, build: Any, batch: Any, lr: float, optimizer: Any, **how: Any
    ) -> None:
        found[f"coordinates, {name}, {optimizer}"] = lambda settings, path: coordinate_check(
            build, to_1024, batch, nets.cross_entropy, lr=lr, optimizer=optimizer, seeds=3,
            path=path, **how,
        )  # fmt: skip

    found["rates of single layers, adam"] = layer_rates
    for optimizer, lr in (("sgd", 0.5), ("adamw", 0.01), ("signum", 0.003), ("muon", 0.1)):
        coordinates("mlp", nets.plain, nets.digits(), lr, optimizer)
    coordinates("mlp, norm one", nets.plain, nets.digits(), 0.1, "soap", **NORM_ONE)
    for optimizer in ("muon", "teon"):
        coordinates("attention", nets.Attention, nets.some_digits(), 0.1, optimizer)
    return found


def layer_rates(settings: Settings, path: Path) -> dict[str, dict[str, float]]:
    """By how much the loss changes if one layer alone has 1/2, 2 or 4 times its rate under Adam.

    At a rate near the best of width 32. Under a rule that is right for every layer no width gains
    more than another.
    """
    finished, found = Finished(path), {}
    layers = ("embedding", "mix", "hidden", "head")
    for size in sizes("width", 32, 128, 512):

        def loss(layer: str, factor: float, size: dict[str, int] = size) -> float:
            def run(seed: int) -> float:
                torch.manual_seed(seed)
                made = parametrize(nets.LanguageModel, {"width": 32}, size)
                optimizer = made.optimizer(0.012)
                own = made.model.get_submodule(layer).weight if layer else None
                for group in optimizer.param_groups:
                    kept = [p for p in group["params"] if p is not own]
                    if len(kept) < len(group["params"]):
                        group["params"] = kept
                        other = {key: group[key] for key in group if key not in ("name", "params")}
                        optimizer.add_param_group(
                            {**other, "params": [own], "lr": factor * group["lr"]}
                        )
                        break
                warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / 20))
                losses = []
                for step in range(200):
                    optimizer.zero_grad()
                    value = nets.cross_entropy(made.model, nets.next_byte(step))
                    losses.append(value.item())
                    value.backward()
                    optimizer.step()
                    warm.step()
                return fmean(losses[-10:])

            names = (named("layer", size, layer, factor, seed) for seed in range(settings.seeds))
            return fmean(finished(n, partial(run, seed)) for seed, n in enumerate(names))

        plain = loss("", 1.0)
        found[str(size["width"])] = {
            f"{layer} x {factor:g}": loss(layer, factor) / plain - 1
            for layer in layers
            for factor in (0.5, 2.0, 4.0)
        }
    return found


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
        figures[name] = found if isinstance(found, dict) else found.as_dict()
    if not settings.only:
        ours = [Peer("steepest", lambda *_: None, "steepest")]
        save(settings.out / "transfer.json", settings, ours, {}, figures=figures)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
