from __future__ import annotations

from typing import Any

import pytest
import torch

from steepest import roles
from steepest.lab.errors import InputError
from steepest.lab.models import GPT, GPTConfig

VARIANTS: list[dict[str, Any]] = [
    {},
    {"mlp": "gelu", "positions": "learned", "bias": True},
    {"mlp": "swiglu", "tied": True},
]


def _model(**changes: Any) -> GPT:
    return GPT(GPTConfig(**{"width": 24, "depth": 2, "heads": 2, "context": 12} | changes), 31)


@pytest.mark.parametrize("changes", VARIANTS)
def test_no_position_sees_a_later_token(changes: dict[str, Any]) -> None:
    model = _model(**changes).double()
    tokens = torch.randint(0, 31, (2, 12))
    other = tokens.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 31
    assert torch.equal(model(tokens)[:, :8], model(other)[:, :8])
    assert not torch.allclose(model(tokens)[:, 8:], model(other)[:, 8:])


@pytest.mark.parametrize("changes", VARIANTS)
def test_positions_matter(changes: dict[str, Any]) -> None:
    model = _model(**changes).double()
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    swapped = torch.tensor([[2, 1, 3, 4, 5]])
    assert not torch.allclose(model(tokens)[0, -1], model(swapped)[0, -1])


def test_rotary_attention_depends_on_distances_only() -> None:
    rotary = _model().blocks[0].attention.rotary.double()
    q, k = torch.randn(2, 1, 1, 1, 12, dtype=torch.float64).expand(2, 1, 1, 12, 12)
    scores = (rotary(q) @ rotary(k).mT)[0, 0]
    for offset in range(-11, 12):
        diagonal = scores.diagonal(offset)
        same = diagonal[:1].expand_as(diagonal)
        torch.testing.assert_close(diagonal, same, atol=1e-5, rtol=0)  # float32 tables
    torch.testing.assert_close(rotary(q).norm(dim=-1), q.norm(dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient_and_the_right_role(changes: dict[str, Any]) -> None:
    model = _model(**changes)
    tokens = torch.randint(0, 31, (2, 12))
    model.loss(tokens, tokens).backward()
    table = roles(model)
    assert all(row.parameter.grad is not None and row.parameter.grad.any() for row in table)
    per_block = 7 if changes.get("mlp") == "swiglu" else 6
    assert len(table.matrices) == 2 * per_block
    others = {row.name for row in table.others if row.parameter.ndim == 2}
    expected = {"embedding.weight", "head.weight", "position.weight"}
    assert others == {name for name in expected if name in {row.name for row in table}}


def test_the_loss_starts_near_that_of_guessing() -> None:
    model = _model(width=64, heads=4)
    tokens = torch.randint(0, 31, (8, 12))
    assert abs(model.loss(tokens, tokens.roll(1)).item() - torch.tensor(31.0).log().item()) < 0.7


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"width": 0}, "width=0"),
        ({"width": 10, "heads": 4}, "divide the width"),
        ({"width": 12, "heads": 4}, "even size"),
    ],
)
def test_impossible_sizes_get_a_sentence(sizes: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        GPTConfig(**sizes)
