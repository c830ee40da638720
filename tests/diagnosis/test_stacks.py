"""Stacks against dense matrices, and what a plan makes of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.curvature import GaussNewton
from steepest.diagnosis import Diagnosis, diagnose
from steepest.diagnosis.descent import descents
from steepest.diagnosis.evidence import gather
from steepest.diagnosis.stacks import stack_layers
from steepest.geometry import LayerwiseSpectral, Spectral, StackedSpectral
from steepest.lab.models import GPT, GPTConfig
from steepest.parameter_roles import all_roles

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
    """The first greedy step of both ways, against dense matrices."""
    model, batches = _gpt(), _batches(4)
    names = [f"blocks.{i}.attention.value.weight" for i in range(2)]
    found = gather(model, _loss, batches, names, curvature=False)
    [layer] = stack_layers(all_roles(model), found, 2)
    assert [place.label for place in layer.places] == names
    [[descended], _] = descents(model, _loss, batches, [layer])
    G = torch.stack([place.gradients for place in found], dim=1)
    for name, geometry in {
        "stacked": StackedSpectral(1, Spectral("svd")),
        "spectral": LayerwiseSpectral(Spectral("svd")),
    }.items():
        for turn in range(4):
            B = GaussNewton(model, _loss, batches[turn - 1], names).to_dense()
            D = geometry.direction(G[turn])
            gain, price = float((D * G[turn - 1]).sum()), float(D.flatten() @ B @ D.flatten())
            mine = descended[name]
            assert float(mine.gains[turn, 0]) == pytest.approx(gain, rel=0.05, abs=1e-4)
            assert float(mine.prices[turn, 0]) == pytest.approx(price, rel=0.05)


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


@pytest.mark.parametrize(("added", "expected"), [(True, 0.0), (False, 0.5 * math.log(2.02 / 1.21))])
def test_two_layers_whose_bounds_are_known(added: bool, expected: float) -> None:
    """White inputs and an orthogonal target: one step Q, of the best size, solves a layer.

    Added up, [Q | Q] / sqrt 2 goes where Q and Q go. Side by side with targets Q and Q / 10, the
    stacked step [Q | Q / 10] solves both; separate ones of one size the share 1.1² / 2 of 1.01,
    and all with a second step, which the model sees and the single real step does not.
    """
    torch.manual_seed(0)
    target = torch.linalg.qr(torch.randn(6, 6))[0]
    inputs = [torch.randn(4000, 6) for _ in range(4)]
    outputs = [x @ target.T for x in inputs]
    batches = [
        (x, y if added else torch.cat([y, y / 10], 1)) for x, y in zip(inputs, outputs, strict=True)
    ]

    def loss(model: Any, batch: Batch) -> Tensor:
        return 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()

    [stack] = diagnose(_Pair(added), loss, batches).stacks
    assert stack.log_ratio is not None
    assert stack.log_ratio.value == pytest.approx(expected, abs=0.05)
    assert added or stack.verdict == "stacked"


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
