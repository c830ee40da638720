from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import MatrixView, roles
from steepest.parameter_roles import ParameterRole, Role, RoleTable

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
    family = name.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    family = family.removesuffix("ForImageClassification").removesuffix("Model")
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**config))


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
        ("lm_head", (30, 8), "head"),
        ("w_in", (6, 8), "hidden"),
        ("experts_in", (4, 6, 8), "experts"),
        ("logit_scale", (4, 1, 1), "vector"),
        ("gate_up_proj_bias", (4, 12), "vector"),
        ("relative_position_bias_table", (49, 2), "vector"),
        ("kernel", (3, 3, 3, 3), "vector"),
        ("gain", (8,), "vector"),
        ("temperature", (), "vector"),
    ],
)
def test_parameters_of_unknown_modules(name: str, shape: tuple[int, ...], role: Role) -> None:
    table = roles(_with_head(core=Bare(**{name: shape})))
    assert table[f"core.{name}"].role == role
    assert table[f"core.{name}"].reason


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
    ],
)
@pytest.mark.parametrize("name", ["qkv", "Wqkv", "qkv_proj", "c_attn", "to_qkv"])
def test_fused_projections(
    out: int, sizes: dict[str, int], splits: tuple[int, ...], name: str
) -> None:
    table = roles(_with_head(attention=Attention(8, out, name, **sizes)))
    row = table[f"attention.{name}.weight"]
    assert row.view is not None
    assert row.view.splits == splits
    assert row.role == ("qkv" if splits else "hidden")
    assert splits or "override with a view" in row.reason


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
    table = roles(_hugging("Phi3ForCausalLM", **TINY, num_key_value_heads=2, pad_token_id=0))
    assert _views(table)["model.layers.0.self_attn.qkv_proj.weight"] == "(16+8+8, 16)"


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


def test_mixtral_has_a_matrix_for_each_expert() -> None:
    model = _hugging("MixtralForCausalLM", **TINY, num_key_value_heads=2, num_local_experts=3)
    table = roles(model)
    assert _complete(model, table)
    experts = {row.name.rpartition(".")[2]: str(row.view) for row in table if row.role == "experts"}
    assert experts == {"gate_up_proj": "3 x (48, 16)", "down_proj": "3 x (16, 24)"}


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
    with pytest.raises(ValueError, match=r"'hiden.weight', which matches no.*hidden\.weight"):
        roles(Language(), {"hiden.weight": "vector"})
    with pytest.raises(ValueError, match=r"matches no parameter$"):
        roles(Language(), {"@": "vector"})


def test_a_pattern_behind_another_is_no_error() -> None:
    table = roles(Language(), {"*.bias": "vector", "hidden.bias": "embedding"})
    assert table["hidden.bias"].role == "vector"


def test_impossible_overrides() -> None:
    with pytest.raises(ValueError, match=r"got 'matrix' for 'hidden\.weight', expected a Matrix"):
        roles(Language(), {"hidden.weight": "matrix"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"which is no matrix.*narrower pattern"):
        roles(Language(), {"hidden.*": "hidden"})
    with pytest.raises(ValueError, match=r"1 x \(3, 8\) for a parameter of shape \(8, 8\)"):
        roles(Language(), {"hidden.weight": MatrixView(1, 3, 8)})


# ------------------------------------------------------------------------- warnings and the table


def test_warns_if_nothing_gets_a_matrix_update() -> None:
    with pytest.warns(UserWarning, match="none of the 62 entries.*print steepest.roles"):
        roles(nn.Sequential(nn.Embedding(9, 30), nn.LayerNorm(30), nn.Linear(30, 2)))


def test_warns_if_almost_nothing_gets_a_matrix_update() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), Bare(kernel=(5, 5, 5, 5))])
    with pytest.warns(UserWarning, match="only 16 of the 641 entries"):
        roles(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        roles(nn.ModuleList([nn.Linear(9, 9), Bare(kernel=(5, 5, 5, 5))]))


def test_a_model_without_parameters() -> None:
    with pytest.raises(ValueError, match="got a ReLU without parameters"):
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
    with pytest.raises(KeyError, match=r"got 'hidden\.wieght'.*similar names: hidden\.weight"):
        table["hidden.wieght"]
