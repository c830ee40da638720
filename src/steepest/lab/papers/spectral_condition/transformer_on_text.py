"""The condition in every block of a transformer that Muon trains on text (Fig. 2 and 5 to 10).

The input of a matrix is taken behind the nonlinearity, as the theory has it. The paper's code
records that of the second MLP matrix before it, so both are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import fmean, median
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from steepest import Muon, diagnose
from steepest.diagnosis import LayerConditions
from steepest.lab.data.sampler import Sampler
from steepest.lab.losses import loss_of
from steepest.lab.models import GPT, GPTConfig
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.train import TrainConfig
from steepest.lab.train.setup import data_of

_BURN_IN = 0.2
"""Share of the steps before what claims call training."""
_INNER = ("query", "key", "value", "output", "up", "down")
_NAMES = {
    "query": "query", "key": "key", "value": "value", "output": "attention output",
    "up": "MLP in", "down": "MLP out", "embedding": "embedding", "head": "head",
}  # fmt: skip


def condition_on_text(
    seed: int, data: str, model: dict[str, Any], batch: int, steps: int, every: int, judged: int
) -> Numbers:
    """Train by Muon, and measure the condition of all matrices; then judge them by real steps.

    Args:
        seed: of weights and batches.
        data: text, as `--data` takes it.
        model: fields of `GPTConfig`.
        batch: sequences in a step.
        steps: how many, at a rate that falls linearly to a tenth.
        every: steps between two measurements.
        judged: batches of a quarter of the sequences for `steepest.diagnose`; 0 leaves it out.
    """
    text: Any = data_of(TrainConfig(data=data))
    network = GPT(GPTConfig(**model), text.vocabulary)
    sampler = Sampler(text.train_tokens, batch, network.config.context, seed)
    optimizer = Muon(network)
    schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    at, rows = [], []
    for step in range(steps + 1):
        optimizer.zero_grad()
        measuring = LayerConditions(network) if step % every == 0 else nullcontext()
        with measuring as conditions:
            loss_of(network, _moved(sampler.batch(step), network)).backward()
            if conditions is not None:
                at.append(step)
                rows.append({row.matrix: row for row in conditions.measure()})
        optimizer.step()
        schedule.step()
    series = {
        matrix: {
            "nuclear": [measured[matrix].nuclear_rank for measured in rows],
            "stable": [measured[matrix].stable_rank for measured in rows],
            "before": [measured[matrix].stable_rank_output for measured in rows],
        }
        for matrix in rows[0]
    }
    numbers: Numbers = {"steps": at, "matrices": series, "judged": []}
    if judged:
        fewer = Sampler(text.train_tokens, batch // 4, network.config.context, seed)
        batches = [_moved(fewer.batch(steps + 1 + i), network) for i in range(judged)]
        found = diagnose(network, loss_of, batches, warmup_steps=0)
        for row in found:
            gain = next((p.log_ratio for p in row.predictions if p.geometry == "spectral"), None)
            if gain is not None and row.bound is not None:
                numbers["judged"].append([row.matrix, row.bound.value, gain.value])
    return numbers | {"curves": _figures(at, series)}


def _moved(batch: tuple[Tensor, Tensor], network: GPT) -> tuple[Tensor, Tensor]:
    """A batch on the device of the network."""
    device = network.head.weight.device
    return batch[0].to(device), batch[1].to(device)


def _figures(at: list[int], series: dict[str, Any]) -> list[dict[str, Any]]:
    """The ranks by kind of matrix, means over blocks."""
    lines: dict[str, dict[str, list[float]]] = {"nuclear": {}, "stable": {}}
    for kind, name in _NAMES.items():
        members = [values for matrix, values in series.items() if _kind(matrix) == kind]
        for which, found in lines.items():
            found[name] = [fmean(point) for point in zip(*(m[which] for m in members), strict=True)]
    titles = {"nuclear": "Nuclear rank of the gradient", "stable": "Stable rank of the input"}
    return [
        curve(f"{titles[which]}, mean over blocks", at, found,
              across="step", up="rank", log=True)
        for which, found in lines.items()
    ]  # fmt: skip


def _kind(matrix: str) -> str:
    """What a matrix is: "query", "up", "head" and so on."""
    return matrix.removesuffix(".weight").rpartition(".")[2]


_TINY = {"width": 32, "depth": 2, "heads": 2, "context": 64}
_SMALL = {"width": 128, "depth": 4, "heads": 4, "context": 128}
_LARGE = {"width": 768, "depth": 12, "heads": 6, "context": 1024}

TEXT = Experiment(
    name="condition-on-text",
    title="The condition in a transformer in training on text",
    kind="real data",
    measure=condition_on_text,
    scales={
        "quick": Setting(
            sizes={"model": _TINY, "batch": 8, "steps": 60, "every": 10, "judged": 0},
            seeds=2,
            data="stdlib",
            minutes=0.3,
        ),
        "cpu": Setting(
            sizes={"model": _SMALL, "batch": 16, "steps": 400, "every": 20, "judged": 4},
            seeds=3,
            data="wikitext2",
            minutes=20,
            gigabytes=1.5,
        ),
        "gpu": Setting(
            sizes={
                "model": _LARGE | {"depth": 6, "width": 384, "context": 512},
                "batch": 64, "steps": 1000, "every": 50, "judged": 4,
            },
            seeds=3,
            data="gutenberg",
            minutes=30,
            gigabytes=20,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={"model": _LARGE, "batch": 384, "steps": 1750, "every": 100, "judged": 0},
            seeds=1,
            data="gutenberg",
            minutes=600,
            gigabytes=80,
            on_gpu=True,
        ),
    },
)  # fmt: skip


def _ratios(numbers: Numbers, kinds: Sequence[str], trained: bool = True) -> list[float]:
    """nr(G) / st(A) of all matrices of some kinds at all measurements after the burn-in."""
    start = _BURN_IN * numbers["steps"][-1] if trained else 0
    return [
        nuclear / stable
        for matrix, values in numbers["matrices"].items()
        if _kind(matrix) in kinds
        for step, nuclear, stable in zip(
            numbers["steps"], values["nuclear"], values["stable"], strict=True
        )
        if step >= start
    ]


def _inner_share(numbers: Numbers) -> float:
    ratios = _ratios(numbers, _INNER)
    return sum(ratio >= 1 for ratio in ratios) / len(ratios)


def _of_inner(kind: str) -> Callable[[Numbers], float]:
    """The median ratio of one kind over that of the inner matrices."""
    return lambda numbers: median(_ratios(numbers, [kind])) / median(_ratios(numbers, _INNER))


def _last_stable(numbers: Numbers, kind: str, which: str = "stable") -> float:
    """The mean over blocks at the last measurement."""
    found = [v[which][-1] for m, v in numbers["matrices"].items() if _kind(m) == kind]
    return fmean(found)


def _rank_correlation(numbers: Numbers) -> float:
    """Spearman's correlation of the bound's ratio and the measured one, over matrices."""
    from scipy.stats import spearmanr

    _, bounds, gains = zip(*numbers["judged"], strict=True)
    return float(spearmanr(bounds, gains).statistic)


CLAIMS = (
    Claim(
        name="inner-matrices-hold",
        sentence="In training all inner matrices of a transformer satisfy the condition.",
        place="Section 1.2, p. 12; Fig. 5 to 8",
        source="first-hand",
        experiment=TEXT,
        quantity="share of inner matrices and measurements with nr(G) at least st(A)",
        value=_inner_share,
        low=0.95,
        paper="all",
        checks=("G1",),
    ),
    Claim(
        name="value-is-modest",
        sentence="Value matrices have a smaller margin than the inner matrices together.",
        place="Section 1.2, p. 12",
        source="first-hand",
        experiment=TEXT,
        quantity="median ratio of value matrices over that of all inner matrices",
        value=_of_inner("value"),
        high=1.0,
        paper="more modestly sized",
        checks=("G1",),
    ),
    Claim(
        name="head-is-smaller",
        sentence="The head satisfies the condition with a much smaller margin than inner matrices.",
        place="Section 1.2, p. 13",
        source="first-hand",
        experiment=TEXT,
        quantity="median ratio of the head over that of all inner matrices",
        value=_of_inner("head"),
        high=0.5,
        paper="much smaller",
        checks=("G1",),
    ),
    Claim(
        name="embedding-is-marginal",
        sentence="The embedding satisfies the condition only marginally.",
        place="Section 1.2, p. 12",
        source="first-hand",
        experiment=TEXT,
        quantity="median ratio of the embedding over that of all inner matrices",
        value=_of_inner("embedding"),
        high=0.5,
        paper="marginal",
        checks=("G1",),
    ),
    Claim(
        name="behind-activation-in-training",
        sentence="Behind the activation the stable rank stays small through training.",
        place="Fig. 2",
        source="first-hand",
        experiment=TEXT,
        quantity="stable rank behind the activation at the end, mean over blocks",
        value=lambda numbers: _last_stable(numbers, "down"),
        high=6.5,
        paper="1.8 to 2.5",
        checks=("G1",),
    ),
    Claim(
        name="before-activation-in-training",
        sentence="What the paper's code records, before the activation, is as small.",
        place="code, tracker of stable ranks",
        source="first-hand",
        experiment=TEXT,
        quantity="stable rank before over that behind the activation at the end",
        value=lambda numbers: _last_stable(numbers, "up", "before") / _last_stable(numbers, "down"),
        low=0.5,
        high=2.0,
        checks=("G1",),
    ),
    Claim(
        name="ratio-predicts-gain",
        sentence="The larger nr(G) / st(A), the more real spectral steps gain over Euclidean ones.",
        place="Section 1, eq. 1.8",
        source="ours",
        experiment=TEXT,
        quantity="rank correlation over matrices of the bound's ratio with the gain of real steps",
        value=lambda numbers: _rank_correlation(numbers) if numbers["judged"] else float("nan"),
        low=0.0,
        checks=("G7",),
    ),
)
