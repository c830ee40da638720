"""Stacks against dense matrices, and what a plan makes of them."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.curvature.loss_function import LossFunction
from steepest.diagnosis import Diagnosis, diagnose
from steepest.diagnosis.descent import Descent, Layer, descents
from steepest.diagnosis.evidence import gather
from steepest.diagnosis.stacks import judge_stack, stack_layers
from steepest.geometry import LayerwiseSpectral, Spectral, StackedSpectral
from steepest.lab.models import GPT, GPTConfig
from steepest.model.parameter_roles import all_roles

Batch = tuple[Tensor, Tensor]


def _gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=8, depth=2, heads=2, context=6), vocabulary=5).double()
    with torch.no_grad():
        for block in model.blocks:  # so that queries and keys have a gradient worth the name
            block.attention.query.weight.mul_(3)
            block.attention.key.weight.mul_(3)
    return model


def _batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(x := torch.randint(5, (32, 6), generator=generator), x) for _ in range(count)]


def _loss(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def test_a_stack_descends_in_its_own_norm() -> None:
    """Both ways against steps by hand, with exact polar factors."""
    model, batches = _gpt(), _batches(4)
    names = [f"blocks.{i}.attention.value.weight" for i in range(2)]
    found = gather(LossFunction(model, _loss), batches, names, curvature=False)
    [layer] = stack_layers(all_roles(model), found, 2)
    assert [place.label for place in layer.places] == names
    [descended] = descents(LossFunction(model, _loss), batches, [layer])
    for name, geometry in {
        "stacked": StackedSpectral(1, Spectral("svd")),
        "spectral": LayerwiseSpectral(Spectral("svd")),
    }.items():
        mine = descended[name]
        best = int(mine.falls.mean(0).argmax())
        moved = deepcopy(model)
        weights = [moved.get_parameter(each) for each in names]
        for k, batch in enumerate((*batches[:3], batches[0])):
            G = torch.stack(torch.autograd.grad(_loss(moved, batch), weights))
            with torch.no_grad():
                for W, D in zip(weights, geometry.direction(G), strict=True):
                    W.sub_(D, alpha=mine.sizes[best] * (1 - k / 4))
        expected = (_loss(model, batches[-1]) - _loss(moved, batches[-1])).item()
        assert float(mine.falls[0, best]) == pytest.approx(expected, rel=0.02)


class _Pair(nn.Module):
    """Two square layers on the same input: added up, or side by side."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(6, 6, bias=False)}) for _ in range(2)
        )
        self.added = added
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        each = [layer["q_proj"](x) for layer in self.layers]
        return each[0] + each[1] if self.added else torch.cat(each, dim=1)


@pytest.mark.parametrize("added", [True, False])
def test_two_layers_whose_descents_are_known(added: bool) -> None:
    """White inputs and an orthogonal target Q: every step is along Q, so a descent is a number.

    Added up, [Q | Q] / sqrt 2 goes where Q and Q go. Side by side with targets Q and Q / 10, the
    stacked step [Q | Q / 10] / sqrt 1.01 goes to both, separate ones of one size past the second.
    """
    torch.manual_seed(0)
    target = torch.linalg.qr(torch.randn(6, 6))[0]

    def batch() -> Batch:
        x = torch.linalg.qr(torch.randn(300, 6))[0] * 300**0.5
        y = x @ target.T
        return x, y if added else torch.cat([y, y / 10], 1)

    def loss(model: Any, batch: Batch) -> Tensor:
        return 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()

    def left(size: float, goals: list[float], stacked: bool) -> float:
        """Of the squared distance of numbers to their goals, after steps of that size."""
        at = [0.0, 0.0]
        for k in range(4):
            away = [g - x for g, x in zip(goals, [sum(at)] * 2 if added else at, strict=True)]
            length = math.hypot(*away) if stacked else 1.0
            signs = [a / length if stacked else math.copysign(1.0, a) for a in away]
            at = [x + size * (1 - k / 4) * s for x, s in zip(at, signs, strict=True)]
        return (
            (goals[0] - sum(at)) ** 2
            if added
            else sum((g - x) ** 2 for g, x in zip(goals, at, strict=True))
        )

    model, goals = _Pair(added), [1.0, 1.0] if added else [1.0, 0.1]
    batches = [batch() for _ in range(4)]
    found = gather(LossFunction(model, loss), batches, None, curvature=True)
    layers = stack_layers(all_roles(model), found, 2)
    [descended] = descents(LossFunction(model, loss), batches, layers)
    whole = 1.0 if added else 1.01
    for name, mine in descended.items():
        for size, falls in zip(mine.sizes, mine.falls.T, strict=True):
            expected = 3 * (whole - left(size, goals, name == "stacked"))
            assert falls.tolist() == pytest.approx([expected] * 4, abs=0.05)


@pytest.mark.parametrize(
    ("falls", "verdict"),
    [
        ([1.3, 1.2, 1.25, 1.3], "stacked"),
        ([1.05, 1.04, 1.06, 1.05], "spectral"),  # better, and not worth it
        ([0.8, 0.7, 0.75, 0.7], "spectral"),
        ([3.0, 0.5, 0.5, 1.5], "cannot tell"),
        ([-1.0, -1.0, -1.0, -1.0], "cannot tell"),
    ],
)
def test_a_stack_has_to_be_worth_it(falls: list[float], verdict: str) -> None:
    ones = Descent((1.0,), torch.ones(4, 1))
    mine = Descent((0.5, 1.0), torch.tensor([[fall - 0.3, fall] for fall in falls]))
    found = judge_stack(Layer([], {}, {}), {"stacked": mine, "spectral": ones})
    assert found.verdict == verdict


def test_a_plan_stacks_what_is_better_as_one() -> None:
    found = diagnose(_gpt(), _loss, _batches(4), parameters=["*attention*"])
    assert len(found.stacks) == 3
    assert "stacks of neighbouring layers" in str(found)
    rows = [replace(row, verdict="spectral") for row in found]
    for verdict, geometry in (("stacked", "stacked"), ("spectral", "spectral")):
        stacks = [replace(stack, verdict=verdict) for stack in found.stacks]
        whole = Diagnosis(rows, "standard", 4, found._default, stacks=stacks)
        plan = {row.parameter: row.geometry for row in whole.plan()}
        assert plan["blocks.1.attention.key.weight"] == geometry
        assert plan["blocks.1.attention.output.weight"] == "spectral"


def test_stacks_are_saved_and_loaded(tmp_path: Any) -> None:
    found = diagnose(_gpt(), _loss, _batches(4), parameters=["*value*"])
    found.save(tmp_path / "d.json")
    assert Diagnosis.load(tmp_path / "d.json").stacks == found.stacks
