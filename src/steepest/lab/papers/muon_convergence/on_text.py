"""J, L and condition (4) for every matrix of a transformer that Muon trains on text.

The paper measures one matrix of a perceptron. Here J / L stands beside two ranks. Condition (4)
compares it with the nuclear rank of the gradient. For least squares the stable rank of the inputs
bounds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steepest import Muon
from steepest.curvature import Hessian, muon_conditions
from steepest.diagnosis import LayerConditions
from steepest.lab.data.sampler import Sampler
from steepest.lab.losses import loss_of
from steepest.lab.models import GPT, GPTConfig
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.train import TrainConfig
from steepest.lab.train.setup import data_of
from steepest.model.parameter_roles import roles

_PRODUCTS = 40
"""Hessian products in the search for L, at most."""


def curvature_on_text(
    seed: int, data: str, model: dict[str, Any], batch: int, steps: int, every: int
) -> Numbers:
    """Train by Muon; measure both conditions for all hidden matrices, on a batch of its own.

    Args:
        seed: of weights and batches.
        data: text, as `--data` takes it.
        model: fields of `GPTConfig`.
        batch: sequences in a step, and in the batch that is measured.
        steps: how many.
        every: steps between two measurements, the first one at the start.
    """
    text: Any = data_of(TrainConfig(data=data))
    network = GPT(GPTConfig(**model), text.vocabulary)
    hidden = [row.name for row in roles(network) if row.role == "hidden"]
    sampler = Sampler(text.train_tokens, batch, network.config.context, seed)
    optimizer = Muon(network)
    held = _drawn(sampler, steps + 1)
    rows: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step % every == 0:
            with LayerConditions(network) as conditions:
                loss_of(network, held).backward()
                stable = {row.matrix: row.stable_rank for row in conditions.measure()}
            H = Hessian(network, loss_of, held, hidden)
            rows += [
                {
                    "step": step, "matrix": row.matrix, "ratio": row.ratio,
                    "nuclear": row.nuclear_rank, "stable": stable[row.matrix],
                }
                for row in muon_conditions(H, tolerance=0.05, max_products=_PRODUCTS)
            ]  # fmt: skip
        optimizer.zero_grad()
        loss_of(network, _drawn(sampler, step)).backward()
        optimizer.step()
    at = sorted({row["step"] for row in rows})
    names = {"ratio": "J / L", "nuclear": "nuclear rank", "stable": "stable rank"}
    lines = {
        name: [_median([row[key] for row in rows if row["step"] == step]) for step in at]
        for key, name in names.items()
    }
    figure = curve(
        "Medians over the hidden matrices of a transformer", at, lines,
        across="step", up="ratio, rank", log=all(value > 0 for value in lines["J / L"]),
    )  # fmt: skip
    return {"rows": rows, "curves": [figure]}


def _drawn(sampler: Sampler, step: int) -> tuple[Tensor, Tensor]:
    """A batch, where the network is."""
    inputs, targets = (tokens.to(torch.get_default_device()) for tokens in sampler.batch(step))
    return inputs, targets


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


ON_TEXT = Experiment(
    name="curvature-on-text",
    title="J, L and both conditions in a transformer on text",
    kind="real data",
    measure=curvature_on_text,
    scales={
        "quick": Setting(
            sizes={
                "model": {"width": 16, "depth": 1, "heads": 2, "context": 32},
                "batch": 2, "steps": 10, "every": 10,
            },
            seeds=2,
            data="stdlib",
            minutes=0.1,
        ),
        "cpu": Setting(
            sizes={
                "model": {"width": 64, "depth": 2, "heads": 4, "context": 64},
                "batch": 8, "steps": 200, "every": 50,
            },
            seeds=3,
            data="wikitext2",
            minutes=5,
            gigabytes=1,
        ),
        "gpu": Setting(
            sizes={
                "model": {"width": 384, "depth": 6, "heads": 6, "context": 256},
                "batch": 32, "steps": 1000, "every": 250,
            },
            seeds=3,
            data="gutenberg",
            minutes=30,
            gigabytes=20,
            on_gpu=True,
        ),
    },
)  # fmt: skip


def _share(numbers: Numbers, limit: str) -> float:
    """Of matrices and measurements with J > 0, those whose J / L is at most a rank."""
    rows = [row for row in numbers["rows"] if row["ratio"] > 0]
    return sum(row["ratio"] <= row[limit] for row in rows) / len(rows)


CLAIMS = (
    Claim(
        name="condition-four-on-text",
        sentence="Condition (4) holds for the hidden matrices of a transformer in training.",
        place="Section 4.2, condition (4)",
        source="ours",
        experiment=ON_TEXT,
        quantity="share of matrices and measurements with J > 0 where (4) holds",
        value=lambda numbers: _share(numbers, "nuclear"),
        low=0.95,
        checks=("G6",),
    ),
    Claim(
        name="curvature-at-most-stable-rank-on-text",
        sentence="There J / L is at most the stable rank of the input, as for least squares.",
        place="Section 4.2",
        source="ours",
        experiment=ON_TEXT,
        quantity="share of matrices and measurements with J > 0 and J / L at most the stable rank",
        value=lambda numbers: _share(numbers, "stable"),
        low=0.95,
        checks=("G6",),
    ),
)
