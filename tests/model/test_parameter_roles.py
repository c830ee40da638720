from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import MatrixView, roles
from steepest.model.parameter_roles import ParameterRole, Role, RoleTable

transformers = pytest.importorskip("transformers")
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 40,
}
TINY_GPT2 = {
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": 40,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _hugging(name: str, **config: Any) -> nn.Module:
    """A small model of this family with random weights."""
    torch.manual_seed(0)
    model = getattr(transformers, name, None) or pytest.skip(f"this transformers has no {name}")
    return model(model.config_class(**config))


def _matrices(table: RoleTable, name: str) -> list[Tensor]:
    row = table[name]
    assert row.view is not None
    return row.view.matrices(row.parameter.detach())


def _roles(table: RoleTable) -> dict[str, Role]:
    return {row.name: row.role for row in table}


def _views(table: RoleTable) -> dict[str, str]:
    return {row.name: str(row.view) for row in table.matrices}


def _complete(model: nn.Module, table: RoleTable) -> bool:
    """Every parameter once, in order, with a view that fits."""
    for row in table:
        if row.view is not None:
            row.view.check(row.parameter.shape)
    return [id(row.parameter) for row in table] == [id(p) for p in model.parameters()]


def _with_head(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict({**modules, "body": nn.Linear(99, 99), "head": nn.Linear(2, 2)})


# ------------------------------------------------------------------------------- models by hand


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.fc = nn.Linear(12, 10)


def test_convolutional_network() -> None:
    model = ResNet()
    table = roles(model)
    assert _complete(model, table)
    assert _views(table) == {"conv1.weight": "(8, 27)", "grouped.weight": "2 x (6, 36)"}
    assert table["fc.weight"].role == "head"
    assert table["depthwise.weight"].role == "vector"
    assert "single row" in table["depthwise.weight"].reason
    assert table["norm.weight"].role == table["conv1.bias"].role == "vector"


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_any_dimension(dims: int) -> None:
    conv = getattr(nn, f"Conv{dims}d")
    transposed = getattr(nn, f"ConvTranspose{dims}d")
    size = 3**dims
    model = nn.ModuleDict(
        {
            "plain": conv(4, 6, 3),
            "one_output": conv(4, 1, 3),
            "row_for_each_group": conv(8, 4, 3, groups=4),
            "grouped": conv(8, 4, 3, groups=2),
            "transposed": transposed(4, 6, 3),
            "transposed_groups": transposed(4, 6, 3, groups=2),
            "head": nn.Linear(2, 2),
        }
    )
    table = roles(model)
    assert _views(table) == {
        "plain.weight": f"(6, {4 * size})",
        "grouped.weight": f"2 x (2, {4 * size})",
        "transposed.weight": f"({6 * size}, 4)",
        "transposed_groups.weight": f"2 x ({3 * size}, 2)",
    }
    assert table["one_output.weight"].role == "vector"
    assert str(table["row_for_each_group.weight"].view) == f"4 x (1, {2 * size})"
    assert table["row_for_each_group.weight"].role == "vector"


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_split_into_gates(kind: type[nn.RNNBase], gates: int) -> None:
    table = roles(_with_head(core=kind(5, 6, bidirectional=True)))
    assert len(table.matrices) == 4 + 1
    for name, inputs in (("weight_ih_l0", 5), ("weight_hh_l0_reverse", 6)):
        row = table[f"core.{name}"]
        assert row.view is not None
        matrices = row.view.matrices(row.parameter)
        assert [tuple(W.shape) for W in matrices] == [(6, inputs)] * gates
        assert row.role == "hidden"
    assert table["core.bias_ih_l0"].role == "vector"


def test_projection_of_a_recurrent_layer_is_one_matrix() -> None:
    table = roles(nn.LSTM(5, 6, proj_size=2))
    assert str(table["weight_hr_l0"].view) == "(2, 6)"
    assert str(table["weight_ih_l0"].view) == "(4 x 6, 5)"


def test_attention_of_torch() -> None:
    same, other = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    assert _views(roles(same)) == {"in_proj_weight": "(3 x 8, 8)", "out_proj.weight": "(8, 8)"}
    assert roles(same)["in_proj_weight"].role == "qkv"
    assert _views(roles(other)) == {
        "q_proj_weight": "(8, 8)",
        "k_proj_weight": "(8, 6)",
        "v_proj_weight": "(8, 4)",
        "out_proj.weight": "(8, 8)",
    }


def test_transformer_of_torch_has_no_head() -> None:
    model = nn.Transformer(8, 2, 2, 2, 16)
    table = roles(model)
    assert _complete(model, table)
    assert {row.role for row in table} == {"qkv", "hidden", "vector"}
    assert all(row.is_matrix == (row.parameter.ndim == 2) for row in table)


class Language(nn.Module):
    def __init__(self, tied: bool = False, head_first: bool = False) -> None:
        super().__init__()
        if head_first:
            self.output = nn.Linear(8, 30, bias=False)
        self.embed = nn.Embedding(30, 8)
        self.positions = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        if not head_first:
            self.output = nn.Linear(8, 30, bias=False)
        if tied:
            self.output.weight = self.embed.weight


def test_last_linear_layer_is_the_head() -> None:
    table = roles(Language())
    assert [row.name for row in table.matrices] == ["hidden.weight"]
    assert table["output.weight"].role == "head"
    assert table["positions.weight"].role == "embedding"


@pytest.mark.parametrize("head_first", [False, True])
def test_tied_weights_are_one_embedding(head_first: bool) -> None:
    model = Language(tied=True, head_first=head_first)
    table = roles(model)
    assert _complete(model, table)
    first, second = ("output", "embed") if head_first else ("embed", "output")
    assert table[f"{first}.weight"].role == "embedding"
    assert f"tied to {second}.weight" in table[f"{first}.weight"].reason
    assert f"{second}.weight" not in _roles(table)
    assert [row.name for row in table.matrices] == ["hidden.weight"]  # and no second head


def test_a_shared_module_is_counted_once() -> None:
    layer = nn.Linear(8, 8)
    table = roles(nn.ModuleList([layer, nn.Linear(8, 4), layer]))
    assert list(_roles(table)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score", "embed_out", "lmhead"])
def test_heads_by_name_wherever_they_stand(name: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 4), "last": nn.Linear(8, 8)})
    table = roles(model)
    assert table[f"{name}.weight"].role == "head"
    assert table["last.weight"].role == "hidden"


def test_a_model_that_is_one_layer_or_ends_in_a_block_has_no_head() -> None:
    assert roles(nn.Linear(4, 4))["weight"].role == "hidden"
    blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert len(roles(blocks).matrices) == 2
    assert len(roles(nn.ModuleDict({"blocks": blocks})).matrices) == 2
    assert len(roles(nn.TransformerEncoderLayer(8, 2, 16)).matrices) == 4


class Bare(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("cls_token", (1, 1, 8), "embedding"),
        ("pos_embed", (1, 5, 8), "embedding"),
        ("position_embeddings", (1, 5, 8), "embedding"),
        ("query_tokens", (1, 5, 8), "embedding"),
        ("register_tokens", (1, 5, 8), "embedding"),
        ("latents", (5, 8), "embedding"),
        ("rel_pos_h", (5, 8), "embedding"),
        ("prompt", (1, 5, 8), "embedding"),
        ("lm_head", (30, 8), "head"),
        ("w_in", (6, 8), "hidden"),
        ("experts_in", (4, 6, 8), "experts"),
        ("logit_scale", (4, 1, 1), "vector"),
        ("gate_up_proj_bias", (4, 12), "vector"),
        ("relative_position_bias_table", (49, 2), "vector"),
        ("rpb", (2, 13, 13), "vector"),
        ("pos_bias_u", (2, 8), "vector"),
        ("scale_shift_table", (6, 8), "vector"),
        ("scale", (4, 8), "vector"),
        ("time_mix", (1, 1, 8), "vector"),
        ("A_logs", (16, 4), "vector"),
        ("D", (16, 4), "hidden"),
        ("kernel", (3, 3, 3, 3), "vector"),
        ("gain", (8,), "vector"),
        ("temperature", (), "vector"),
    ],
)
def test_parameters_of_unknown_modules(name: str, shape: tuple[int, ...], role: Role) -> None:
    table = roles(_with_head(core=Bare(**{name: shape})))
    assert table[f"core.{name}"].role == role
    assert table[f"core.{name}"].reason


def test_state_spaces_decay_and_skip_entry_by_entry() -> None:
    table = roles(_with_head(mixer=Bare(A_log=(16, 4), D=(16, 4), w_in=(16, 4))))
    assert table["mixer.A_log"].role == table["mixer.D"].role == "vector"
    assert table["mixer.w_in"].role == "hidden"


def test_weight_norm_keeps_the_layout_and_its_gains_are_vectors() -> None:
    from torch.nn.utils import parametrizations, weight_norm  # the second is the older one

    for normed in (parametrizations.weight_norm, weight_norm):
        for dim, conv in ((0, nn.Conv1d(6, 4, 3, groups=2)), (2, nn.Conv1d(6, 4, 3, groups=2))):
            model = _with_head(conv=normed(conv, dim=dim), linear=normed(nn.Linear(4, 6)))
            table = roles(model)
            assert _complete(model, table)
            assert list(_views(table).values()) == ["2 x (2, 9)", "(6, 4)", "(99, 99)"]


def test_norms_over_several_axes_are_vectors() -> None:
    table = roles(_with_head(layer=nn.LayerNorm((4, 8)), rms=nn.RMSNorm((2, 4, 8))))
    assert table["layer.weight"].role == table["layer.bias"].role == "vector"
    assert table["rms.weight"].role == "vector"
    assert table["rms.weight"].reason == "RMSNorm gain"


class Attention(nn.Module):
    def __init__(self, width: int, out: int, name: str = "qkv", **sizes: int) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(width, out))
        for key, value in sizes.items():
            setattr(self, key, value)


@pytest.mark.parametrize(
    ("out", "sizes", "splits"),
    [
        (24, {}, (8, 8, 8)),
        (16, {"num_heads": 4, "num_kv_heads": 2}, (8, 4, 4)),
        (16, {"n_head": 2, "n_kv_head": 1, "head_dim": 4}, (8, 4, 4)),
        (40, {"num_heads": 4, "num_key_value_heads": 3, "head_dim": 4}, (16, 12, 12)),
        (20, {}, ()),
        (20, {"num_heads": 4, "num_kv_heads": 2}, ()),
        (24, {"key_dim": 4, "value_dim": 16}, (4, 4, 16)),
        (24, {"key_dim": 4}, (8, 8, 8)),
        (24, {"multi_query": False}, ()),
    ],
)
@pytest.mark.parametrize("name", ["qkv", "Wqkv", "qkv_proj", "c_attn", "in_proj_qkv", "to_qkv"])
def test_fused_projections(
    out: int, sizes: dict[str, int], splits: tuple[int, ...], name: str
) -> None:
    table = roles(_with_head(attention=Attention(8, out, name, **sizes)))
    row = table[f"attention.{name}.weight"]
    assert row.view is not None
    assert row.view.splits == splits
    assert row.role == ("qkv" if splits else "hidden")
    assert splits or "override with a view" in row.reason


class Gated(nn.Module):
    def __init__(self, name: str, outputs: int) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(8, outputs))
        self.down = nn.Linear(12, 8)


def test_gate_and_up_are_two_matrices_if_the_layer_behind_is_half_as_wide() -> None:
    for name in ("gate_up_proj", "Wi", "w12", "input_linear"):
        assert _views(roles(_with_head(mlp=Gated(name, 24))))[f"mlp.{name}.weight"] == "(2 x 12, 8)"
    for name, outputs in (("gate_up_proj", 12), ("Wi", 25), ("fc1", 24)):
        row = roles(_with_head(mlp=Gated(name, outputs)))[f"mlp.{name}.weight"]
        assert (row.role, str(row.view)) == ("hidden", f"({outputs}, 8)")


class Mixture(nn.Module):
    def __init__(self, name: str, gate: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(8, 8)})] * 3)
        self.add_module(name, gate)


@pytest.mark.parametrize("name", ["gate", "gating", "router"])
def test_routers_are_heads(name: str) -> None:
    nested = nn.ModuleDict({"proj": nn.Linear(8, 3), "norm": nn.LayerNorm(8)})
    for gate, path in ((nn.Linear(8, 3), name), (nested, f"{name}.proj")):
        table = roles(_with_head(moe=Mixture(name, gate)))
        row = table[f"moe.{path}.weight"]
        assert (row.role, row.reason) == ("head", "Linear, a router, a guess")
        assert table["moe.experts.0.gate.weight"].role == "hidden"
    assert table[f"moe.{name}.norm.weight"].role == "vector"


def test_a_gate_without_experts_is_no_router() -> None:
    assert roles(_with_head(mlp=nn.ModuleDict({"gate": nn.Linear(8, 8)})))[0].role == "hidden"


def test_experts_of_unknown_order_stay_one_matrix_but_show_which_axis_is_out() -> None:
    shapes = {"gate_up_proj": (3, 8, 24), "down_proj": (3, 12, 8)}
    experts = Bare(**shapes)
    table = roles(_with_head(experts=experts))
    assert _views(table)["experts.gate_up_proj"] == "3 x (24, 8)"
    assert _views(table)["experts.down_proj"] == "3 x (8, 12)"
    assert "order of gate and up unknown" in table["experts.gate_up_proj"].reason
    experts.is_concatenated = True
    row = roles(_with_head(experts=experts), {"experts.*": "experts"})["experts.gate_up_proj"]
    assert str(row.view) == "3 x (2 x 12, 8)"  # the override keeps what is known


def test_interleaved_splits_hold_every_entry_once() -> None:
    view = MatrixView.of((2, 3, 8), batch=2, transposed=True, splits=(1, 1))
    tensor = torch.arange(48.0).view(2, 3, 8)
    matrices = view.matrices(tensor)
    assert [tuple(W.shape) for W in matrices] == view.block_shapes() == [(4, 3)] * 4
    assert torch.equal(matrices[1], tensor[0, :, 1::2].mT)
    assert torch.equal(torch.cat([W.flatten() for W in matrices]).sort().values, tensor.flatten())
    assert [tuple(W.shape) for W in view.matrices(tensor, 3)] == view.block_shapes(3)
    for W in view.matrices(tensor, 2):
        W.zero_()
    assert not tensor.any()
    assert str(view) == "2 x (2 x 4, 3)"
    with pytest.raises(ValueError, match=r"splits \(1, 1\), .* 7 "):
        MatrixView(1, 7, 3, False, (1, 1)).check((7, 3))


def test_an_interleaved_matrix_takes_the_step_of_separate_ones() -> None:
    from steepest import Muon

    fused = nn.Parameter(torch.randn(3, 8))
    apart = [nn.Parameter(fused.detach()[:, i::2].mT.contiguous()) for i in range(2)]
    fused.grad = torch.randn(3, 8)
    for i, p in enumerate(apart):
        p.grad = fused.grad[:, i::2].mT.contiguous()
    view = MatrixView(1, 3, 8, True, (1, 1))
    Muon([{"params": [fused], "views": [view]}], lr=0.1).step()
    Muon(apart, lr=0.1).step()
    for i, p in enumerate(apart):
        assert torch.allclose(fused.detach()[:, i::2].mT, p.detach(), atol=1e-6)


class Refusing:
    def __getattr__(self, name: str) -> int:
        raise RuntimeError(f"{name} differs between layers")


def test_a_config_that_refuses_to_answer_is_not_asked_again() -> None:
    attention = Attention(8, 24)
    attention.config = Refusing()
    assert _views(roles(_with_head(attention=attention)))["attention.qkv.weight"] == "(3 x 8, 8)"


# ------------------------------------------------------------------------- models of Hugging Face


def test_gpt2() -> None:
    model = _hugging("GPT2LMHeadModel", **TINY_GPT2)
    table = roles(model)
    assert _complete(model, table)
    assert [row.name for row in table if row.role == "embedding"] == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
    ]
    assert "tied to lm_head.weight" in table["transformer.wte.weight"].reason
    block = "transformer.h.1."
    assert {k: v for k, v in _views(table).items() if k.startswith(block)} == {
        block + "attn.c_attn.weight": "(3 x 16, 16)",
        block + "attn.c_proj.weight": "(16, 16)",
        block + "mlp.c_fc.weight": "(64, 16)",
        block + "mlp.c_proj.weight": "(16, 64)",
    }
    x = torch.randn(3, 16)
    layer: Any = model.get_submodule(block + "attn.c_attn")
    view = table[block + "attn.c_attn.weight"].view
    assert view is not None
    parts = torch.cat([x @ W.mT for W in view.matrices(layer.weight)], -1)
    assert torch.allclose(layer(x) - layer.bias, parts, atol=1e-6)


def test_llama_with_grouped_queries() -> None:
    model = _hugging("LlamaForCausalLM", **TINY, num_key_value_heads=2)
    table = roles(model)
    assert _complete(model, table)
    assert table["lm_head.weight"].role == "head"
    assert table["model.embed_tokens.weight"].role == "embedding"
    assert _views(table)["model.layers.1.self_attn.k_proj.weight"] == "(8, 16)"
    assert len(table.matrices) == 2 * 7
    assert len(roles(model.model).matrices) == 2 * 7  # the last layer of a bare one is no head


def test_phi3_splits_by_its_config() -> None:
    model = _hugging("Phi3ForCausalLM", **TINY, num_key_value_heads=2, pad_token_id=0)
    table = roles(model)
    assert _views(table)["model.layers.0.self_attn.qkv_proj.weight"] == "(16+8+8, 16)"
    gate, up = _matrices(table, "model.layers.0.mlp.gate_up_proj.weight")
    (down,) = _matrices(table, "model.layers.0.mlp.down_proj.weight")
    x = torch.randn(3, 16)
    expected = (nn.functional.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT
    assert torch.allclose(model.get_submodule("model.layers.0.mlp")(x), expected, atol=1e-7)


def test_modernbert() -> None:
    model = _hugging("ModernBertForMaskedLM", **TINY, pad_token_id=0).eval()
    table = roles(model)
    assert _complete(model, table)
    assert _views(table)["model.layers.0.attn.Wqkv.weight"] == "(3 x 16, 16)"
    gate, up = _matrices(table, "model.layers.0.mlp.Wi.weight")
    (down,) = _matrices(table, "model.layers.0.mlp.Wo.weight")
    x = torch.randn(3, 16)
    expected = (nn.functional.gelu(x @ gate.mT) * (x @ up.mT)) @ down.mT
    assert torch.allclose(model.get_submodule("model.layers.0.mlp")(x), expected, atol=1e-7)


def test_vit() -> None:
    config = {k: v for k, v in TINY.items() if k != "vocab_size"}
    model = _hugging("ViTForImageClassification", **config, image_size=16, patch_size=8)
    table = roles(model)
    assert _complete(model, table)
    assert table["classifier.weight"].role == "head"
    assert table["vit.embeddings.cls_token"].role == "embedding"
    assert table["vit.embeddings.position_embeddings"].role == "embedding"
    patches = table["vit.embeddings.patch_embeddings.projection.weight"]
    assert (patches.role, str(patches.view)) == ("conv", "(16, 192)")
    assert sum(row.role == "hidden" for row in table) == 2 * 6


MIXTURE = {
    **TINY,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 3,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "pad_token_id": 0,
}
DEEPSEEK = {
    "n_routed_experts": 3,
    "first_k_dense_replace": 0,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}


def _layer(model: nn.Module, name: str) -> Any:
    """The first of the modules that are called so."""
    return next((n, m) for n, m in model.named_modules() if n.rpartition(".")[2] == name)


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("MixtralForCausalLM", "gate"),
        ("Qwen2MoeForCausalLM", "gate"),
        ("Qwen3MoeForCausalLM", "gate"),
        ("DeepseekV3ForCausalLM", "gate"),
        ("GptOssForCausalLM", "router"),
        ("PhimoeForCausalLM", "router"),
        ("Llama4ForCausalLM", "router"),
        ("GraniteMoeForCausalLM", "router"),
    ],
)
def test_mixtures_of_experts(family: str, router: str) -> None:
    model = _hugging(family, **MIXTURE | (DEEPSEEK if "Deepseek" in family else {}))
    table = roles(model)
    assert _complete(model, table)
    path, gate = _layer(model, router)
    assert gate.weight.shape == (3, 16)  # a score for each expert
    assert table[f"{path}.weight"].role == "head"
    assert table[f"{path}.weight"].reason.endswith("a router, a guess")
    assert _views(table)[path.rpartition(".")[0] + ".experts.down_proj"] == "3 x (16, 24)"
    up = table[path.rpartition(".")[0] + ".experts.gate_up_proj"]
    halves = "48" if family.startswith("Llama4") else "2 x 24"  # which does not state the order
    assert (up.role, str(up.view)) == ("experts", f"3 x ({halves}, 16)")


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_gate_and_up_of_experts_are_what_the_forward_pass_uses(family: str) -> None:
    model = _hugging(family, **MIXTURE)
    path, experts = _layer(model, "experts")
    ups = _matrices(roles(model), f"{path}.gate_up_proj")
    downs = _matrices(roles(model), f"{path}.down_proj")
    x = torch.randn(5, 16)
    for expert in range(3):
        gate, up = ups[2 * expert : 2 * expert + 2]
        expected = (nn.functional.silu(x @ gate.mT) * (x @ up.mT)) @ downs[expert].mT
        given = experts(x, torch.full((5, 1), expert), torch.ones(5, 1))
        assert torch.allclose(given, expected, atol=1e-7)


def test_gpt_oss_interleaves_gate_and_up_and_stores_inputs_first() -> None:
    model = _hugging("GptOssForCausalLM", **MIXTURE)
    path, experts = _layer(model, "experts")
    for p in experts.parameters():
        nn.init.normal_(p)
    ups = _matrices(roles(model), f"{path}.gate_up_proj")
    downs = _matrices(roles(model), f"{path}.down_proj")
    x = torch.randn(5, 16)
    for expert in range(3):
        bias = experts.gate_up_proj_bias[expert]
        gate = x @ ups[2 * expert].mT + bias[::2]
        up = x @ ups[2 * expert + 1].mT + bias[1::2]
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
        inside = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        expected = inside @ downs[expert].mT + experts.down_proj_bias[expert]
        given = experts(x, torch.full((5, 1), expert), torch.ones(5, 1))
        assert torch.allclose(given, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name", "output", "settings"),
    [
        ("CodeGenForCausalLM", "qkv_proj", "out_proj", {**TINY_GPT2, "n_head": 4, "rotary_dim": 2}),
        ("GPTBigCodeForCausalLM", "c_attn", "c_proj", {**TINY_GPT2, "multi_query": False}),
        ("MiniMaxForCausalLM", "qkv_proj", "out_proj", MIXTURE),
        ("Qwen3NextForCausalLM", "in_proj_qkvz", "out_proj", MIXTURE),
        ("FalconForCausalLM", "query_key_value", "dense", TINY),
        ("BloomForCausalLM", "query_key_value", "dense", TINY),
    ],
)
def test_fused_projections_in_turns_stay_one_matrix(
    family: str, name: str, output: str, settings: dict[str, Any]
) -> None:
    model = _hugging(family, **settings)
    table = roles(model)
    assert _complete(model, table)
    path, layer = _layer(model, name)
    row = table[f"{path}.weight"]
    assert (row.role, str(row.view)) == ("hidden", "({}, {})".format(*layer.weight.shape))
    assert row.attention == ()
    assert table[f"{path.rpartition('.')[0]}.{output}.weight"].reason.endswith("Linear, a guess")


def test_linear_attention_splits_by_its_own_sizes() -> None:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes = {"linear_key_head_dim": 4, "linear_value_head_dim": 8}
    layers = ["linear_attention", "full_attention"]
    model = _hugging("Qwen3_5ForCausalLM", **MIXTURE, **heads, **sizes, layer_types=layers).eval()
    path, attention = _layer(model, "linear_attn")
    table = roles(model)
    assert table[f"{path}.in_proj_qkv.weight"].attention == ("q", "k", "v")
    assert _views(table)[f"{path}.in_proj_qkv.weight"] == "(8+8+32, 16)"
    x = torch.randn(1, 5, 16)
    with torch.no_grad():  # without the whole of one of the three nothing is left
        assert attention(x).any()
        for i in range(3):
            part = _matrices(table, f"{path}.in_proj_qkv.weight")[i]
            kept = part.clone()
            part.zero_()
            assert not attention(x).any()
            part.copy_(kept)


@pytest.mark.parametrize("family", ["MambaForCausalLM", "FalconMambaForCausalLM"])
def test_the_decay_of_mamba_is_no_matrix(family: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    model = _hugging(family, **sizes, vocab_size=40)
    table = roles(model)
    assert _complete(model, table)
    mixer = "backbone.layers.0.mixer."
    assert table[mixer + "A_log"].parameter.shape == (32, 4)
    vectors = {row.name.removeprefix(mixer) for row in table if row.role == "vector"}
    assert {"A_log", "D", "dt_proj.bias", "conv1d.weight"} < vectors
    assert [n.removeprefix(mixer) for n in _views(table)] == [
        f"{layer}_proj.weight" for layer in ("in", "x", "dt", "out")
    ]


def test_xlnet_has_an_axis_for_the_heads() -> None:
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "vocab_size": 40}
    model = _hugging("XLNetLMHeadModel", **sizes)
    table = roles(model)
    assert _complete(model, table)
    path, attention = _layer(model, "rel_attn")
    assert table[f"{path}.q"].attention == ("q",)
    (q,), (o,) = (_matrices(table, f"{path}.{name}") for name in "qo")
    x = torch.randn(3, 1, 16)
    given = torch.einsum("ibh,hnd->ibnd", x, attention.q)  # as in its forward pass
    assert torch.allclose(given.flatten(2), x @ q.mT, atol=1e-6)
    back = torch.einsum("ibnd,hnd->ibh", given, attention.o)
    assert torch.allclose(back, given.flatten(2) @ o.mT, atol=1e-6)


def test_names_that_only_look_like_heads_or_attention() -> None:
    sizes = {"block_sizes": [1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24}
    table = roles(_hugging("FunnelBaseModel", **sizes, vocab_size=40))
    row = table["encoder.blocks.0.0.attention.k_head.weight"]
    assert (row.role, row.attention) == ("hidden", ("k",))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
    table = roles(_hugging("RwkvForCausalLM", **sizes, intermediate_size=24))
    assert table["rwkv.blocks.0.attention.key.weight"].attention == ("k",)
    assert table["rwkv.blocks.0.feed_forward.key.weight"].attention == ()


def test_gains_for_each_head_are_vectors() -> None:
    table = roles(_hugging("CohereForCausalLM", **TINY, use_qk_norm=True))
    row = table["model.layers.0.self_attn.q_norm.weight"]
    assert (row.role, tuple(row.parameter.shape)) == ("vector", (4, 4))


def test_neox_interleaves_heads_and_so_stays_one_matrix() -> None:
    model = _hugging("GPTNeoXForCausalLM", **TINY)
    table = roles(model)
    assert _complete(model, table)
    fused = table["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert (fused.role, str(fused.view)) == ("hidden", "(48, 16)")
    assert "override with a view" in fused.reason


def test_only_the_stated_head_of_gptj_is_one() -> None:
    model = _hugging("GPTJForCausalLM", **TINY_GPT2, rotary_dim=4)
    table = roles(model)
    assert [row.name for row in table if row.role == "head"] == ["lm_head.weight"]
    assert table["transformer.h.0.mlp.fc_out.weight"].role == "hidden"


@pytest.mark.parametrize("tied", [False, True])
def test_encoder_and_decoder_of_t5(tied: bool) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(num_layers=1, d_model=16, d_ff=24, num_heads=4, d_kv=4, vocab_size=40)
    config.tie_word_embeddings = tied
    model = T5ForConditionalGeneration(config)
    table = roles(model)
    assert _complete(model, table)
    assert table["shared.weight"].role == "embedding"
    assert sum(row.role == "head" for row in table) == (0 if tied else 1)


class Stating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.last = nn.Linear(8, 30), nn.Linear(8, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_the_head_that_a_model_states_is_believed() -> None:
    table = roles(Stating())
    assert (table["out.weight"].role, table["last.weight"].role) == ("head", "hidden")


# ----------------------------------------------------------------------------------- overrides


def test_the_first_pattern_that_matches_decides() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    table = roles(model, {"a.weight": "embedding", "*.weight": "hidden", "c.*": "vector"})
    weights = {k: v for k, v in _roles(table).items() if k.endswith("weight")}
    assert weights == {"a.weight": "embedding", "b.weight": "hidden", "c.weight": "hidden"}
    assert table["c.weight"].reason == "override '*.weight'"
    assert table["c.bias"].reason == "override 'c.*'"


def test_a_role_keeps_the_layout_and_a_view_replaces_it() -> None:
    model = _hugging("GPT2LMHeadModel", **TINY_GPT2)
    name = "transformer.h.0.attn.c_attn.weight"
    assert _views(roles(model, {name: "hidden"}))[name] == "(48, 16)"
    assert _views(roles(model, {name: "qkv"}))[name] == "(3 x 16, 16)"
    heads = MatrixView.of((16, 48), transposed=True, splits=(8,) * 6)
    row = roles(model, {name: heads})[name]
    assert (row.view, row.role) == (heads, "hidden")


def test_the_name_qkv_keeps_known_sizes() -> None:
    model = nn.ModuleList([Attention(8, 16, num_heads=4, num_kv_heads=2), Attention(8, 24, "mix")])
    table = roles(model, {"*.weight": "qkv"})
    assert _views(table) == {"0.qkv.weight": "(8+4+4, 8)", "1.mix.weight": "(3 x 8, 8)"}
    with pytest.raises(ValueError, match="add up to 20 outputs"):
        roles(nn.ModuleList([Attention(8, 20)]), {"*.weight": "qkv"})


def test_tied_weights_can_be_overridden_by_either_name() -> None:
    for name in ("embed.weight", "output.weight"):
        assert roles(Language(tied=True), {name: "hidden"})["embed.weight"].role == "hidden"


def test_three_dimensional_parameters_can_be_called_experts() -> None:
    model = nn.ModuleDict({"a": Bare(pos_embed=(3, 4, 5)), "b": nn.Linear(8, 8)})
    assert _views(roles(model, {"a.*": "experts"}))["a.pos_embed"] == "3 x (4, 5)"


def test_unknown_pattern_names_similar_ones() -> None:
    with pytest.raises(ValueError, match=r"'hiden.*hidden\.weight"):
        roles(Language(), {"hiden.weight": "vector"})
    with pytest.raises(ValueError, match=r"matches no parameter$"):
        roles(Language(), {"@": "vector"})


def test_a_pattern_behind_another_is_no_error() -> None:
    table = roles(Language(), {"*.bias": "vector", "hidden.bias": "embedding"})
    assert table["hidden.bias"].role == "vector"


def test_a_matrix_stored_as_in_and_out() -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.lm_head = (nn.Parameter(torch.randn(4, 12)) for _ in range(2))

    table = roles(Stored(), {"*": "transposed"})
    assert [(row.role, str(row.view)) for row in table] == [
        ("hidden", "(12, 4)"),
        ("head", "(12, 4)"),
    ]


def test_impossible_overrides() -> None:
    with pytest.raises(ValueError, match=r"'matrix' for 'hidden\."):
        roles(Language(), {"hidden.weight": "matrix"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"no matrix.*narrower"):
        roles(Language(), {"hidden.*": "hidden"})
    with pytest.raises(ValueError, match=r"1 x \(3, 8\) .*\(8, 8\)"):
        roles(Language(), {"hidden.weight": MatrixView(1, 3, 8)})


# ------------------------------------------------------------------------- warnings and the table


def test_warns_if_nothing_gets_a_matrix_update() -> None:
    with pytest.warns(UserWarning, match="none of the 62 entries"):
        roles(nn.Sequential(nn.Embedding(9, 30), nn.LayerNorm(30), nn.Linear(30, 2)))


def test_warns_if_almost_nothing_gets_a_matrix_update() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), Bare(kernel=(5, 5, 5, 5))])
    with pytest.warns(UserWarning, match="16 of the 641 entries"):
        roles(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        roles(nn.ModuleList([nn.Linear(9, 9), Bare(kernel=(5, 5, 5, 5))]))


def test_a_model_without_parameters() -> None:
    with pytest.raises(ValueError, match="ReLU without parameters"):
        roles(nn.ReLU())


def test_a_compiled_model_has_the_names_of_the_original() -> None:
    model = Language()
    assert _roles(roles(torch.compile(model))) == _roles(roles(model))


def test_nothing_is_changed() -> None:
    model = _hugging("GPT2LMHeadModel", **TINY_GPT2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    roles(model, {"*.c_attn.weight": "hidden"})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())


def test_the_table_is_a_sequence_that_prints() -> None:
    table = roles(Language(tied=True))
    assert isinstance(table[0], ParameterRole)
    assert isinstance(table[0].parameter, Tensor)
    assert len(table) == len(list(table)) == len(table.matrices) + len(table.others)
    assert [row.name for row in table[1:3]] == ["positions.weight", "hidden.weight"]
    text = str(table)
    assert all(row.name in text for row in table)
    assert "64 of 408 entries (16%) get a matrix update" in text
    assert "tied to output.weight" in text
    with pytest.raises(KeyError, match=r"hidden\.wieg.*: hidden\."):
        table["hidden.wieght"]


@pytest.mark.parametrize("example", [None, torch.randn(2, 4)], ids=["guessed", "followed"])
def test_finding_roles_does_not_compute_what_is_parametrized(example: Tensor | None) -> None:
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
    model = nn.Sequential(normed, nn.Embedding(3, 4), nn.Linear(6, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    roles(nn.Sequential(model[0], model[2]) if example is not None else model, example=example)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _HeadedAttention(nn.Module):
    """Weights with an axis for the heads, and a configuration under the name that is asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], **numbers: int) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.cfg = SimpleNamespace(**numbers)


@pytest.mark.parametrize(
    ("shapes", "numbers", "views"),
    [
        ({"W_Q": (4, 16, 5), "W_V": (4, 16, 5), "W_O": (4, 5, 16)}, {"n_heads": 4, "d_head": 5},
         ["4 x (5, 16)", "4 x (5, 16)", "(16, 20)"]),
        ({"q": (4, 5, 16), "k_proj": (4, 5, 16), "o_proj": (4, 5, 16)}, {},
         ["4 x (5, 16)", "4 x (5, 16)", "(16, 20)"]),
    ],
)  # fmt: skip
def test_matrices_of_heads_by_name(shapes: Any, numbers: Any, views: list[str]) -> None:
    table = roles(_HeadedAttention(shapes, **numbers))
    assert [str(row.view) for row in table] == views
    assert {row.role for row in table} == {"hidden"}
    reasons = [row.reason for row in table]
    assert reasons[0] == "4 matrices of _HeadedAttention, one for each head, a guess"
    assert reasons[2] == "matrix of _HeadedAttention, with an axis for the heads, a guess"


def test_an_axis_that_may_be_of_experts_or_heads_says_so() -> None:
    """A number of heads that is not that of the axis makes no heads of it."""
    shapes = {"w1": (4, 16, 5), "value": (3, 16, 5)}
    for row in roles(_HeadedAttention(shapes, num_heads=2)):
        assert row.role == "experts"
        assert row.reason == (
            "3-dimensional, taken for experts or heads of _HeadedAttention, a guess"
        )
