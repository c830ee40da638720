"""GPT-2 and LLaMA to and from Hugging Face's models, with their weights: equal logits.

Both name the same matrices in other words. GPT-2 keeps matrices as (in, out), and query, key and
value as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steepest.lab.data.hub_access import hub_answers
from steepest.lab.errors import InputError
from steepest.lab.models.gpt import GPT, GPT2, GPTConfig
from steepest.lab.models.hugging_face import transformers_or_sentence
from steepest.lab.models.llama import Llama, LlamaConfig

_GPT2_EPS = 1e-5
_GELUS = {"gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh", "gelu": "gelu"}
_BLOCKS = {
    "gpt2": "transformer.h.{i}.",
    "llama": "model.layers.{i}.",
}
_OUTSIDE = {
    "gpt2": {
        "embedding": "transformer.wte",
        "position": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    "llama": {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
}
_INSIDE = {
    "gpt2": {
        "norm_attention": "ln_1",
        "attention.output": "attn.c_proj",
        "norm_mlp": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    "llama": {
        "norm_attention": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "norm_mlp": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
}
_FUSED = "attn.c_attn"
_PARTS = ("query", "key", "value")


def to_hugging_face(model: nn.Module) -> Any:
    """Return a GPT of GPT-2's form, or a LLaMA, as the model of transformers; weights are copied.

    Args:
        model: `GPT` or `Llama`, of any precision.

    Returns:
        A `GPT2LMHeadModel` or `LlamaForCausalLM` in evaluation mode, on the CPU.

    Raises:
        InputError: for other models, among them GPTs that differ from GPT-2's form.
    """
    hf = transformers_or_sentence()
    vocabulary = model.embedding.num_embeddings if isinstance(model, GPT | Llama) else 0
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if isinstance(model, GPT):
        config = hf.GPT2Config(**_gpt2_fields(model.config), vocab_size=vocabulary, **none)
        theirs = hf.GPT2LMHeadModel(config)
    elif isinstance(model, Llama):
        config = hf.LlamaConfig(**_llama_fields(model.config), vocab_size=vocabulary, **none)
        theirs = hf.LlamaForCausalLM(config)
    else:
        raise InputError(f"got a {type(model).__name__}, expected a GPT of GPT-2's form or a Llama")
    weights = _theirs(config.model_type, model.state_dict(), model.config.depth)
    theirs = theirs.to(model.embedding.weight.dtype).eval()
    theirs.load_state_dict(weights)
    return theirs


def from_hugging_face(source: Any) -> GPT | Llama:
    """Return GPT-2 or LLaMA of transformers as the lab's model; weights are copied.

    GPT-2's dropout is left behind.

    Args:
        source: a `GPT2LMHeadModel` or `LlamaForCausalLM`; or the path of a folder that
            `save_pretrained` wrote, or a name on the hub.

    Raises:
        InputError: for other models, and for variants that the lab's models do not have.
    """
    if isinstance(source, str | Path):
        try:
            hf = transformers_or_sentence()
            here = Path(source).is_dir() or not hub_answers()
            hf.AutoConfig.from_pretrained(source, local_files_only=here)  # fails soon, if it does
            source = hf.AutoModelForCausalLM.from_pretrained(source, local_files_only=here)
        except (OSError, ValueError) as error:
            raise InputError(
                f"got {str(source)!r}, which has no weights for transformers: "
                f"{str(error).splitlines()[0]}"
            ) from error
    config = source.config
    model: GPT | Llama
    if config.model_type == "gpt2":
        model = GPT(_gpt2_config(config), config.vocab_size)
    elif config.model_type == "llama":
        model = Llama(_llama_config(config), config.vocab_size)
    else:
        raise InputError(f"got a {config.model_type} of transformers, expected gpt2 or llama")
    model = model.to(next(source.parameters()).dtype)
    model.load_state_dict(_ours(config.model_type, source.state_dict(), config.num_hidden_layers))
    return model


# -------------------------------------------------------------------------------------- weights


def _names(kind: str, depth: int) -> Iterator[tuple[str, str]]:
    """Names of layers here and there, but for fused ones."""
    yield from _OUTSIDE[kind].items()
    for i in range(depth):
        there = _BLOCKS[kind].format(i=i)
        yield from ((f"blocks.{i}.{name}", there + other) for name, other in _INSIDE[kind].items())


def _turned(kind: str, layer: str) -> Callable[[Tensor], Tensor]:
    """How a weight is turned between (out, in) and (in, out)."""
    matrix = kind == "gpt2" and ".c_" in layer
    return lambda weight: weight.mT if matrix and weight.ndim == 2 else weight


def _theirs(kind: str, ours: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    weights = {}
    for name, other in _names(kind, depth):
        for end in (".weight", ".bias"):
            if name + end in ours:
                weights[other + end] = _turned(kind, other)(ours[name + end])
    for i in range(depth if kind == "gpt2" else 0):
        for end in (".weight", ".bias"):
            parts = [ours[f"blocks.{i}.attention.{part}{end}"] for part in _PARTS]
            layer = _BLOCKS[kind].format(i=i) + _FUSED
            weights[layer + end] = _turned(kind, layer)(torch.cat(parts))
    return weights


def _ours(kind: str, theirs: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    weights = {}
    for name, other in _names(kind, depth):
        for end in (".weight", ".bias"):
            if other + end in theirs:
                weights[name + end] = _turned(kind, other)(theirs[other + end])
    for i in range(depth if kind == "gpt2" else 0):
        for end in (".weight", ".bias"):
            layer = _BLOCKS[kind].format(i=i) + _FUSED
            parts = _turned(kind, layer)(theirs[layer + end]).chunk(3)
            weights |= {
                f"blocks.{i}.attention.{name}{end}": part
                for name, part in zip(_PARTS, parts, strict=True)
            }
    return weights


# ------------------------------------------------------------------------------- configurations


def _gpt2_fields(config: GPTConfig) -> dict[str, Any]:
    for name in ("positions", "norm", "bias"):
        if getattr(config, name) != getattr(GPT2, name):
            raise InputError(
                f"got a GPT with {name}={getattr(config, name)}, expected GPT-2's form: "
                f"{name}={getattr(GPT2, name)}; presets such as gpt-124m have it"
            )
    names = {ours: theirs for theirs, ours in reversed(_GELUS.items())}
    if config.mlp not in names:
        raise InputError(f"got a GPT with mlp={config.mlp}, expected one of {', '.join(names)}")
    return {
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "activation_function": names[config.mlp],
        "layer_norm_epsilon": _GPT2_EPS,
        "tie_word_embeddings": config.tied,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _gpt2_config(config: Any) -> GPTConfig:
    _refuse(config, "layer_norm_epsilon", _GPT2_EPS)
    _refuse(config, "n_inner", None, 4 * config.n_embd)
    _refuse(config, "scale_attn_weights", True)
    _refuse(config, "scale_attn_by_inverse_layer_idx", False)
    _refuse(config, "activation_function", *_GELUS)
    return GPTConfig(
        context=config.n_positions,
        width=config.n_embd,
        depth=config.n_layer,
        heads=config.n_head,
        mlp="gelu" if config.activation_function == "gelu" else "gelu-tanh",
        positions=GPT2.positions,
        norm=GPT2.norm,
        bias=GPT2.bias,
        tied=config.tie_word_embeddings,
    )


def _llama_fields(config: LlamaConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.parts.kv_heads,
        "intermediate_size": config.inner,
        "rms_norm_eps": config.eps,
        "rope_theta": config.base,
        "tie_word_embeddings": config.tied,
    }


def _llama_config(config: Any) -> LlamaConfig:
    rope = getattr(config, "rope_parameters", None) or {
        "rope_theta": config.rope_theta,  # before transformers 5
        "rope_type": (config.rope_scaling or {}).get("rope_type", "default"),
    }
    if rope.get("rope_type") != "default":
        raise InputError(f"got LLaMA with rotary positions {rope}, expected those of type default")
    _refuse(config, "attention_bias", False)
    _refuse(config, "mlp_bias", False)
    _refuse(config, "hidden_act", "silu")
    _refuse(config, "head_dim", config.hidden_size // config.num_attention_heads)
    shared = config.num_key_value_heads
    return LlamaConfig(
        context=config.max_position_embeddings,
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=shared if shared < config.num_attention_heads else None,
        inner=config.intermediate_size,
        eps=config.rms_norm_eps,
        base=rope["rope_theta"],
        tied=config.tie_word_embeddings,
    )


def _refuse(config: Any, name: str, *accepted: Any) -> None:
    value = getattr(config, name, accepted[0])
    if value not in accepted:
        raise InputError(
            f"got {config.model_type} with {name}={value}, expected one of "
            f"{', '.join(map(str, accepted))}: the lab's model has no other"
        )
