"""`diagnose` takes models as they come: Hugging Face's, adapters, compiled, half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.diagnosis import diagnose

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=32,
        vocab_size=64,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _lora() -> nn.Module:
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(_llama(), settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at first, so that A has no gradient
                p.normal_(std=0.02)
    return model


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def _frozen() -> nn.Module:
    model = _gpt2()
    for p in model.transformer.h[0].parameters():
        p.requires_grad_(False)
    return model


def _tokens(model: Any, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


@pytest.mark.parametrize(
    ("build", "matrices"),
    [
        (_gpt2, 14),  # embeddings, and in each layer query, key, value and three more
        (lambda: torch.compile(_gpt2()), 14),
        (_llama, 16),
        (lambda: _llama().to(torch.bfloat16), 16),
        (_lora, 8),
        (_mixtral, 36),
        (_frozen, 8),
    ],
    ids=["gpt2", "compiled", "llama", "bfloat16", "lora", "mixtral", "frozen"],
)
def test_language_models(build: Callable[[], nn.Module], matrices: int) -> None:
    torch.manual_seed(0)
    model = build()
    batches = [torch.randint(64, (16, 16)) for _ in range(4)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = diagnose(model, _tokens, batches, level="quick")
    assert len(found) == matrices
    trained = {n.removeprefix("_orig_mod.") for n, p in model.named_parameters() if p.requires_grad}
    assert {row.parameter for row in found} <= trained
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    one = diagnose(model, _tokens, batches, parameters=[found[0].parameter])
    assert all(each.curvature is not None for row in one for each in row.predictions)
    optimizer = found.plan().optimizer(model, lr=1e-3)
    _tokens(model, batches[0]).backward()
    optimizer.step()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    batches = [(torch.randn(6, 3, 16, 16), torch.randint(5, (6,))) for _ in range(4)]

    def loss(model: Any, batch: Any) -> Tensor:
        return model(pixel_values=batch[0], labels=batch[1]).loss

    found = diagnose(model, loss, batches)
    unknown = [row.matrix for row in found if row.stable_rank is None]
    assert unknown == ["vit.embeddings.position_embeddings"]
    assert len(found) == 15
