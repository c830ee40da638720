"""The papers' models: numbers of parameters by formula, by the model, and by Hugging Face."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steepest.lab.data.shapes import TextShape
from steepest.lab.models import GPT, PRESETS, build_model, preset_context, sizes_of
from steepest.lab.models.catalogue import catalogue
from steepest.lab.models.family import MODELS
from steepest.lab.models.gpt import GPT2

PAGE = Path(__file__).parents[3] / "docs" / "presets.md"
GPT2_SIZES = {  # width, depth, heads, and what is known of their number of parameters
    "gpt2": (768, 12, 12, 124_439_808),
    "gpt2-medium": (1024, 24, 16, 354_823_168),
    "gpt2-large": (1280, 36, 20, 774_030_080),
    "gpt2-xl": (1600, 48, 25, 1_557_611_200),
}


def _numbers(model: nn.Module) -> tuple[int, int]:
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, sum(b.numel() for b in model.buffers())


@pytest.mark.parametrize("name", PRESETS)
def test_the_formula_counts_the_parameters_of_a_preset(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        model = build_model(name, None)
    assert _numbers(model) == preset.sizes.count(preset.shape)
    assert sizes_of(name, None) == preset.sizes
    bytes_only = TextShape(256, 64)
    with torch.device("meta"):
        model = build_model(name, bytes_only)
    assert _numbers(model) == sizes_of(name, bytes_only).count(bytes_only)
    assert preset_context(name) == preset.sizes.context


@pytest.mark.parametrize("name", PRESETS)
def test_a_number_far_from_the_papers_has_a_reason(name: str) -> None:
    preset = PRESETS[name]
    assert (abs(preset.difference) > 0.05) == bool(preset.remark)
    assert preset.source


@pytest.mark.parametrize(("width", "depth", "heads", "known"), GPT2_SIZES.values(), ids=GPT2_SIZES)
def test_the_sizes_of_gpt2_are_those_of_hugging_face(
    width: int, depth: int, heads: int, known: int
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = replace(GPT2, width=width, depth=depth, heads=heads)
    with torch.device("meta"):
        config = transformers.GPT2Config(n_embd=width, n_layer=depth, n_head=heads)
        theirs = transformers.GPT2LMHeadModel(config)
        ours = GPT(sizes, 50_257)
    theirs.tie_weights()
    numbers = _numbers(ours)[0], sizes.count(TextShape(50_257, 1024))[0], _numbers(theirs)[0]
    assert numbers == (known,) * 3


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("llama")])
def test_the_sizes_of_llama_are_those_of_hugging_face(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: Any = PRESETS[name].sizes
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=32_000,
                hidden_size=sizes.width,
                intermediate_size=sizes.inner,
                num_hidden_layers=sizes.depth,
                num_attention_heads=sizes.heads,
            )
        )
    assert _numbers(theirs)[0] == PRESETS[name].parameters


def test_the_page_of_presets_is_the_one_that_is_generated() -> None:
    text = catalogue()
    assert PAGE.read_text() == text, f"write steepest.lab.models.catalogue to {PAGE.name} again"
    assert all(f"| `{name}` |" in text for name in (*PRESETS, *MODELS))
