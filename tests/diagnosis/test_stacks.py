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
from steepest.diagnosis.evidence import ASCENTS, gather
from steepest.diagnosis.stacks import diagnose_stacks
from steepest.geometry import LayerwiseSpectral, Spectral, StackedSpectral
from steepest.lab.models import GPT, GPTConfig

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


def test_bounds_of_a_stack_against_dense_matrices() -> None:
    model, batches = _gpt(), _batches(3)
    names = [f"blocks.{i}.attention.value.weight" for i in range(2)]
    found = gather(model, _loss, batches, names, curvature=False)
    [stack] = diagnose_stacks(model, _loss, batches, found, 2)
    assert stack.matrices == tuple(names)
    G = torch.stack([place.gradients for place in found], dim=1)
    bounds = []
    for geometry in (StackedSpectral(1, Spectral("svd")), LayerwiseSpectral(Spectral("svd"))):
        D = geometry.direction(G)
        gain = sum(float((D[i] * G[j]).sum()) for i in range(3) for j in range(3) if i != j) / 6
        largest = 0.0
        for i in range(3):
            B = GaussNewton(model, _loss, batches[(i + 1) % 3], names).to_dense()
            step, values = D[i], []
            for _ in range(ASCENTS + 1):
                image = (B @ step.flatten()).view_as(step)
                values.append(float((step * image).sum()))
                step = geometry.direction(image)
            largest += max(values) / 3
        bounds.append(gain**2 / largest)
    assert stack.log_ratio is not None
    assert stack.log_ratio.value == pytest.approx(math.log(bounds[0] / bounds[1]), abs=0.05)


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


@pytest.mark.parametrize(("added", "expected"), [(True, 0.0), (False, math.log(2.02 / 1.21))])
def test_two_layers_whose_bounds_are_known(added: bool, expected: float) -> None:
    """With polar factor Q and norm N of a gradient G, smoothness L of a layer alone.

    Added up, both layers have G, and [Q | Q] / sqrt 2 halves gain² (4 N²) and smoothness (4 L).
    Side by side with gradients G and G / 10: gain² (1 + 1/100) N² and smoothness L as one, 1.1² N²
    and 2 L apart.
    """
    torch.manual_seed(0)
    target = torch.linalg.qr(torch.randn(6, 6))[0]
    inputs = [torch.randn(4000, 6) for _ in range(3)]
    outputs = [x @ target.T for x in inputs]
    batches = [
        (x, y if added else torch.cat([y, y / 10], 1)) for x, y in zip(inputs, outputs, strict=True)
    ]

    def loss(model: Any, batch: Batch) -> Tensor:
        return 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()

    [stack] = diagnose(_Pair(added), loss, batches).stacks
    assert stack.log_ratio is not None
    assert stack.log_ratio.value == pytest.approx(expected, abs=0.03)
    assert added or stack.verdict == "stacked"


def test_a_plan_stacks_what_is_better_as_one() -> None:
    found = diagnose(_gpt(), _loss, _batches(3), parameters=["*attention*"])
    assert len(found.stacks) == 3
    assert "stacks of neighbouring layers" in str(found)
    rows = [replace(row, verdict="spectral") for row in found]
    for verdict, geometry in (("stacked", "stacked"), ("spectral", "spectral")):
        stacks = [replace(stack, verdict=verdict) for stack in found.stacks]
        whole = Diagnosis(rows, "standard", 3, found._default, stacks=stacks)
        plan = {row.parameter: row.geometry for row in whole.plan()}
        assert plan["blocks.1.attention.key.weight"] == geometry
        assert plan["blocks.1.attention.output.weight"] == "spectral"


def test_stacks_are_saved_and_loaded(tmp_path: Any) -> None:
    found = diagnose(_gpt(), _loss, _batches(3), parameters=["*value*"])
    found.save(tmp_path / "d.json")
    assert Diagnosis.load(tmp_path / "d.json").stacks == found.stacks
