"""The variants of TEON that its paper's controls need, and where its matrices come from."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from steepest import TEON, Muon
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.lab.papers.teon.training import attention_matrices, run_of_muon, stopped_steps
from steepest.lab.papers.teon.variants import AllStackingTEON, OutputStackingTEON, ShortStepMuon

EXACT = {"momentum": 0.0, "nesterov": False, "method": "svd"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=16, depth=2, heads=2, context=8), vocabulary=10).double()
    tokens = torch.randint(10, (3, 8))
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    return model


def moved(model, kind, **settings):
    """How far one step at rate 1 moves every parameter."""
    after = copy.deepcopy(model)
    for p, q in zip(after.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    kind(after, 1.0, **EXACT, **settings).step()
    pairs = zip(after.named_parameters(), model.parameters(), strict=True)
    return {name: (p - q).detach() for (name, p), q in pairs}


def test_short_steps_are_those_of_muon_over_the_root_of_k_for_queries_keys_and_values(model):
    muon, short = moved(model, Muon), moved(model, ShortStepMuon)
    for name, step in muon.items():
        stacked = name.split(".")[-2] in ("query", "key", "value")
        expected = step / math.sqrt(2) if stacked else step
        torch.testing.assert_close(short[name], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "count"),
    [(TEON, 3), (ShortStepMuon, 3), (OutputStackingTEON, 4), (AllStackingTEON, 6)],
)
def test_each_variant_stacks_what_it_says(model, kind, count):
    stacks = kind(model).stacks
    assert len(stacks) == count
    assert all(len({name.replace("0", "1") for name in stack}) == 1 for stack in stacks)


def test_matrices_are_those_of_the_layers_in_their_order(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text to train on, " * 400)
    setup, optimizer = run_of_muon(0, str(text), width=16, depth=2, context=8, batch=2, steps=2)
    steps = []
    for step in stopped_steps(setup, optimizer):
        steps.append(step)
        gradients = attention_matrices(setup)
        queries = [block.attention.query.weight.grad.double() for block in setup.model.blocks]
        torch.testing.assert_close(gradients["queries"], torch.stack(queries))
    assert steps == [0, 1, 2]
    momenta = attention_matrices(setup, optimizer)
    assert {M.shape for M in momenta.values()} == {(2, 16, 16)}
    assert not any(torch.equal(momenta[kind], gradients[kind]) for kind in momenta)
