"""A GPT in training by Muon, stopped in every step between the gradient and the update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from steepest.lab.train import TrainConfig
from steepest.lab.train.loop import optimizer_of
from steepest.lab.train.schedule import factor
from steepest.lab.train.setup import RunSetup, data_of, set_up
from steepest.model.parameter_roles import roles
from steepest.optim.momentum import MOMENTUM

ATTENTION_KINDS = {"q": "queries", "k": "keys", "v": "values"}
"""The letter of a kind of matrices in a table of roles, and its name."""


def run_of_muon(
    seed: int, data: str, *, width: int, depth: int, context: int, batch: int, steps: int
) -> tuple[RunSetup, Optimizer]:
    """Return a GPT with its data, and Muon at the default rate."""
    config = TrainConfig(
        data=data, width=width, depth=depth, context=context, batch=batch, steps=steps,
        seed=seed, threads=1,
    )  # fmt: skip
    setup = set_up(config, data_of(config))
    return setup, optimizer_of(setup)


def stopped_steps(setup: RunSetup, optimizer: Optimizer) -> Iterator[int]:
    """Train, and yield in every step when there are gradients; the update comes after that.

    In the end the number of all steps is yielded, with the gradients of a further batch.
    """
    config = setup.config
    for step in range(config.steps + 1):
        optimizer.zero_grad()
        setup.loss(setup.model, setup.batch(step)).backward()
        yield step
        if step == config.steps:
            return
        share = factor(step, config.steps, config.warmup_steps, config.schedule, config.final)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        optimizer.step()


def attention_matrices(setup: RunSetup, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """Return gradients of queries, keys and values, (layers, out, in) each by kind, in float64.

    With an optimizer it is their momentum, before this step's gradient.
    """
    members: dict[str, list[Tensor]] = {}
    for row in roles(setup.model).matrices:
        for kind in row.attention:
            p = row.parameter
            G = p.grad if optimizer is None else optimizer.state[p][MOMENTUM]
            assert G is not None
            members.setdefault(kind, []).append(G.double())
    return {name: torch.stack(members[kind]) for kind, name in ATTENTION_KINDS.items()}
