"""Blocks that run again in the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.lab.data.shapes import ImageShape, TextShape
from steepest.lab.errors import InputError
from steepest.lab.models import build_model, loss_of, recompute_activations

TEXT, IMAGES = TextShape(vocabulary=23, context=12), ImageShape(channels=1, side=16, classes=5)


class Dropping(nn.Module):
    """Blocks of a Sequential, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(256, 256), nn.Dropout(0.5), nn.ReLU()) for _ in range(3)]
        self.layers = nn.Sequential(nn.Flatten(), *blocks, nn.Linear(256, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "dropping":
        return Dropping()
    if name.startswith("hf:"):
        pytest.importorskip("transformers")
    shape = TEXT if name in ("gpt", "llama", "hf:gpt2", "hf:llama") else IMAGES
    sizes: dict[str, Any] = {"width": 32} | ({"depth": 3} if name != "hf:resnet" else {})
    return build_model(name, shape, **sizes)


def _gradients(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)  # of dropout
    loss = loss_of(model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("gpt", 3), ("llama", 3), ("mlp", 3), ("residual-mlp", 3), ("residual-convnet", 3),
        ("dropping", 3), ("hf:gpt2", 3), ("hf:llama", 3), ("hf:vit", 3), ("hf:resnet", 4),
    ],
)  # fmt: skip
def test_gradients_keep_their_bits(name: str, blocks: int) -> None:
    model = _model(name)
    again = copy.deepcopy(model)
    assert recompute_activations(again) == blocks
    assert list(again.state_dict()) == list(model.state_dict())
    torch.manual_seed(2)
    tokens, images = torch.randint(23, (2, 13)), torch.randn(4, 1, 16, 16)
    batch: Any = (tokens[:, :-1], tokens[:, 1:])
    if name not in ("gpt", "llama", "hf:gpt2", "hf:llama"):
        batch = (images, torch.randint(5, (4,)))
    for tried in (again, copy.deepcopy(again)):
        loss, gradients = _gradients(model, batch)
        loss_again, gradients_again = _gradients(tried, batch)
        assert torch.equal(loss, loss_again)
        assert gradients.keys() == gradients_again.keys()
        assert all(torch.equal(g, gradients_again[n]) for n, g in gradients.items())
        model.zero_grad()


def test_blocks_keep_less_for_the_backward_pass() -> None:
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        model, size = _model("gpt"), 0
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        if recompute:
            recompute_activations(model)

        def keep(tensor: Tensor, own: set[int] = own) -> Tensor:
            nonlocal size
            size += tensor.nbytes if tensor.untyped_storage().data_ptr() not in own else 0
            return tensor

        tokens = torch.randint(23, (2, 12))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(model, (tokens, tokens))
        kept[recompute] = size
    assert kept[True] < kept[False] / 3


def test_blocks_run_twice_only_for_a_gradient() -> None:
    model, runs = _model("gpt"), []
    recompute_activations(model)
    model.blocks[0].norm_attention.register_forward_hook(lambda *_: runs.append(1))
    tokens = torch.randint(23, (2, 12))
    with torch.no_grad():
        loss_of(model, (tokens, tokens))
    assert len(runs) == 1
    loss_of(model, (tokens, tokens)).backward()
    assert len(runs) == 3


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to recompute"):
        recompute_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
