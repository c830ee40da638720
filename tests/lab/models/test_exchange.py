"""Weights to and from Hugging Face's models, by equal logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.lab.errors import InputError
from steepest.lab.models import (
    GPT,
    GPTConfig,
    Llama,
    LlamaConfig,
    from_hugging_face,
    to_hugging_face,
)
from steepest.lab.models.gpt import GPT2

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"width": 24, "depth": 2, "heads": 4, "context": 12}
SIZES = [
    replace(GPT2, **SMALL),
    replace(GPT2, **SMALL, tied=False, mlp="gelu"),
    LlamaConfig(**SMALL | {"width": 32}, inner=40),
    LlamaConfig(**SMALL | {"width": 32}, inner=48, kv_heads=2, base=500.0, eps=1e-5, tied=True),
    LlamaConfig(**SMALL | {"width": 32}, inner=48, kv_heads=1),
]


def _model(sizes: Any) -> GPT | Llama:
    model: GPT | Llama = GPT(sizes, 31) if isinstance(sizes, GPTConfig) else Llama(sizes, 31)
    for parameter in model.parameters():  # biases and gains that differ from each other
        nn.init.normal_(parameter, std=0.3)
    return model


def _precise_norm(self: Any, x: Tensor) -> Tensor:
    """Theirs without its detour through float32."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_logits_are_equal_in_both_directions(
    sizes: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float64:
        norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
        monkeypatch.setattr(norm, "forward", _precise_norm)
    model = _model(sizes).to(dtype)
    theirs = to_hugging_face(model)
    tokens = torch.randint(31, (3, 12))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    with torch.no_grad():
        expected = model(tokens)
        assert expected.std() > 0.1
        for logits in (theirs(tokens).logits, from_hugging_face(theirs)(tokens)):
            torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    back = from_hugging_face(theirs)
    assert back.config == sizes
    state = model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in back.state_dict().items())


def test_a_model_of_theirs_comes_from_a_folder(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=12, n_embd=24, n_layer=1, n_head=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model, tokens = from_hugging_face(tmp_path), torch.randint(31, (2, 12))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_copy_shares_no_memory() -> None:
    model = _model(SIZES[0])
    before = model.embedding.weight.clone()
    with torch.no_grad():
        for parameter in to_hugging_face(model).parameters():
            parameter.zero_()
    assert torch.equal(model.embedding.weight, before)


def test_other_forms_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="positions=rotary, expected GPT-2's form"):
        to_hugging_face(GPT(GPTConfig(**SMALL), 31))
    with pytest.raises(InputError, match="got a Linear"):
        to_hugging_face(nn.Linear(2, 2))
    changed: list[tuple[dict[str, Any], str]] = [
        ({"n_inner": 8}, "n_inner=8"),
        ({"activation_function": "relu"}, "activation_function=relu"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001"),
    ]
    for fields, sentence in changed:
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, **fields)
        with pytest.raises(InputError, match=sentence):
            from_hugging_face(transformers.GPT2LMHeadModel(config))
    with pytest.raises(InputError, match="no weights for transformers"):
        from_hugging_face(tmp_path)
