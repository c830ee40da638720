"""Hugging Face's models from their configs, and a CNN: not edited, saved, loaded, trained."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.transfer import Parametrized, coordinate_check, parametrize

transformers = pytest.importorskip("transformers")


def gpt2(width: int = 32, depth: int = 2) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=depth, n_head=2, n_embd=width, vocab_size=64, n_positions=16,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(width: int = 32, depth: int = 2, heads: int = 4) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=heads // 2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def qwen3(width: int = 32, depth: int = 2) -> nn.Module:
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def neox(width: int = 32, depth: int = 2) -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


def vit(width: int = 32, depth: int = 2) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=2,
        intermediate_size=2 * width, image_size=8, patch_size=4, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(self.first(self.norm(x)).relu())
        return out


class CNN(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(h.mean((-2, -1)))
        return out


def _tokens(model: Any) -> Tensor:
    batch = torch.arange(32).reshape(2, 16) % 7
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def _images(model: Any) -> Tensor:
    x = torch.linspace(-1, 1, 4 * 3 * 64).reshape(4, 3, 8, 8).sin()
    out = model(x)
    return F.cross_entropy(getattr(out, "logits", out), torch.arange(4))


MODELS: list[Any] = [
    pytest.param(gpt2, _tokens, {}, id="gpt2"),
    pytest.param(llama, _tokens, {"heads": 8}, id="llama"),
    pytest.param(qwen3, _tokens, {}, id="qwen3"),
    pytest.param(neox, _tokens, {}, id="neox"),
    pytest.param(vit, _images, {}, id="vit"),
    pytest.param(CNN, _images, {"branches": ["blocks.*.second"]}, id="cnn"),
]


def _made(build: Any, more: dict[str, Any], **settings: Any) -> Parametrized:
    width = 8 if build is CNN else 32
    sizes = {key: value for key, value in more.items() if key == "heads"}
    settings |= {key: value for key, value in more.items() if key != "heads"}
    base = {"width": width, "depth": 2} | dict.fromkeys(sizes, 4)
    return parametrize(
        build, base, {"width": 2 * width, "depth": 4} | sizes, rule="completep", **settings
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("build", "loss", "more"), MODELS)
def test_parametrized_trained_and_loaded(
    build: Any, loss: Callable[[Any], Tensor], more: dict[str, Any], optimizer: Any
) -> None:
    torch.manual_seed(0)
    made = _made(build, more, optimizer=optimizer)
    stepper = made.optimizer(2e-3 if optimizer == "adamw" else 1e-2, weight_decay=0.1)
    losses = []
    for _ in range(4):
        stepper.zero_grad()
        value = loss(made.model)
        value.backward()
        stepper.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    file = io.BytesIO()
    torch.save(made.model.state_dict(), file)
    file.seek(0)
    again = _made(build, more, optimizer=optimizer)
    again.model.load_state_dict(torch.load(file, weights_only=True))
    made.model.eval()
    again.model.eval()
    assert torch.equal(loss(again.model), loss(made.model))


@pytest.mark.parametrize(("build", "loss", "more"), MODELS)
def test_branches_and_attention_are_found(
    build: Any, loss: Callable[[Any], Tensor], more: dict[str, Any]
) -> None:
    folds: dict[str, float] = {}
    for row in _made(build, more).rows:
        if row.multiplier != 1:
            key = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
            folds[key] = row.multiplier
    root = 0.5**0.5  # of logits: heads of twice the size; for fused ones half of it on each side
    fused = root**0.5
    expected = {
        gpt2: {
            "transformer.h.*.attn.c_attn.weight": fused,
            "transformer.h.*.attn.c_attn.bias": fused,
            "transformer.h.*.attn.c_proj.weight": 0.5 / fused,
            "transformer.h.*.attn.c_proj.bias": 0.5,
            "transformer.h.*.mlp.c_proj.weight": 0.5,
            "transformer.h.*.mlp.c_proj.bias": 0.5,
        },
        llama: {  # twice as many heads of the same size
            "model.layers.*.self_attn.o_proj.weight": 0.5,
            "model.layers.*.mlp.down_proj.weight": 0.5,
        },
        qwen3: {  # the norm would undo what comes before it
            "model.layers.*.self_attn.q_norm.weight": root,
            "model.layers.*.self_attn.o_proj.weight": 0.5,
            "model.layers.*.mlp.down_proj.weight": 0.5,
        },
        neox: {
            "gpt_neox.layers.*.attention.query_key_value.weight": fused,
            "gpt_neox.layers.*.attention.query_key_value.bias": fused,
            "gpt_neox.layers.*.attention.dense.weight": 0.5 / fused,
            "gpt_neox.layers.*.attention.dense.bias": 0.5,
            "gpt_neox.layers.*.mlp.dense_4h_to_h.weight": 0.5,
            "gpt_neox.layers.*.mlp.dense_4h_to_h.bias": 0.5,
        },
        vit: {
            "vit.layers.*.attention.q_proj.weight": root,
            "vit.layers.*.attention.q_proj.bias": root,
            "vit.layers.*.attention.o_proj.weight": 0.5,
            "vit.layers.*.attention.o_proj.bias": 0.5,
            "vit.layers.*.mlp.fc2.weight": 0.5,
            "vit.layers.*.mlp.fc2.bias": 0.5,
        },
        CNN: {"blocks.*.second.weight": 0.5, "blocks.*.second.bias": 0.5},
    }
    assert folds == pytest.approx(expected[build])


def test_grouped_queries_grow_with_the_heads() -> None:
    made = _made(llama, {"heads": 8})
    row = made["model.layers.3.self_attn.k_proj.weight"]
    assert (row.fan_in, row.fan_out, row.kind) == (2, 2, "hidden")
    few = parametrize(llama, {"width": 32}, {"width": 128})  # larger heads
    assert few["model.layers.0.self_attn.q_proj.weight"].multiplier == 0.5


def test_a_transposed_matrix_and_its_fans() -> None:
    """Hugging Face's Conv1D stores (in, out)."""
    made = parametrize(
        lambda width: gpt2(width), {"width": 32}, {"width": 64}, rule="mup", optimizer="sgd"
    )
    assert made["transformer.h.0.mlp.c_fc.weight"].fan_in == 2
    assert made["transformer.wte.weight"].lr == 2
    assert made.readout == {"lm_head": 0.5}


def test_the_coordinate_check_reads_logits() -> None:
    """GPT-2 ties its head to the embedding; without the multiplier the logits would grow."""
    sizes = [{"width": 32}, {"width": 128}]

    def loss(model: Any, batch: None) -> Tensor:
        return _tokens(model)

    slopes = {
        rule: coordinate_check(gpt2, sizes, None, loss, rule=rule, lr=2e-3, steps=(3,), seeds=2)[
            "output", 3
        ].slope
        for rule in ("mup", "sp")
    }
    assert abs(slopes["mup"]) < 0.2
    assert slopes["sp"] > 0.5


def test_gpt2_compiles() -> None:
    made = _made(gpt2, {})
    batch = torch.arange(32).reshape(2, 16)
    compiled: Any = torch.compile(made.model, backend="eager")
    torch.testing.assert_close(
        compiled(input_ids=batch, use_cache=False).logits,
        made.model(input_ids=batch, use_cache=False).logits,
    )


def bert(depth: int) -> nn.Module:
    config = transformers.BertConfig(
        num_hidden_layers=depth, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        vocab_size=64, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    return transformers.BertModel(config)


def gpt2_with_cross_attention(depth: int) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=depth, n_head=2, n_embd=32, vocab_size=64, n_positions=16, add_cross_attention=True
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("build", "end"),
    [
        (gpt2_with_cross_attention, "transformer.h.7.crossattention.c_proj.weight"),
        (bert, "encoder.layer.7.crossattention.output.dense.weight"),
    ],
)
def test_cross_attention_is_a_branch(build: Any, end: str) -> None:
    made = parametrize(build, {"depth": 2}, {"depth": 8}, rule="completep")
    assert made[end].multiplier == 0.25
    assert sum(row.multiplier != 1 for row in made.rows) == 8 * 3 * 2  # weight and bias


def test_a_branch_that_a_known_block_does_not_have() -> None:
    def build(depth: int) -> nn.Module:
        model: Any = gpt2(32, depth)
        for block in model.transformer.h:
            block.adapter = nn.Linear(32, 32)
        return model

    with pytest.raises(ValueError, match=r"h\.0\.adapter, .*GPT2Bl"):
        parametrize(build, {"depth": 2}, {"depth": 8}, rule="completep")


def test_a_norm_that_multiplies_with_one_plus_its_gain() -> None:
    def gemma(width: int) -> nn.Module:
        config = transformers.Gemma3TextConfig(
            vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4,
        )  # fmt: skip
        return transformers.Gemma3ForCausalLM(config)

    with pytest.raises(ValueError, match=r"q_norm\.weight, .* zeros"):
        parametrize(gemma, {"width": 32}, {"width": 64})
    assert parametrize(gemma, {"width": 32}, {"width": 64}, head_size=lambda model: 1)


def test_attention_without_a_scale() -> None:
    """T5 has no 1/sqrt(d), so 1/d relative to the base is all of it; its heads may stay, too."""

    def t5(width: int, size: int = 8) -> nn.Module:
        config = transformers.T5Config(
            vocab_size=64, d_model=width, d_kv=size, d_ff=2 * width, num_layers=1, num_heads=4,
            decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)

    def found(target: dict[str, int], **settings: Any) -> set[float]:
        made = parametrize(t5, {"width": 32, "size": 8}, target, **settings)
        return {row.multiplier for row in made.rows} - {1.0}

    both = {"width": 128, "size": 32}
    assert found({"width": 128}) == set()  # heads of size 8 at both
    assert found(both) == {0.5}
    assert found(both, head_size=lambda model: model.config.d_kv**2) == {0.25}
