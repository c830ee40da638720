from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from steepest.diagnosis import LayerCondition, LayerConditions

transformers = pytest.importorskip("transformers")


def _stable(A: Tensor) -> float:
    S = torch.linalg.svdvals(A.detach().double())
    return float(S.square().sum() / S[0] ** 2)


def _nuclear(G: Tensor) -> float:
    S = torch.linalg.svdvals(G.double())
    return float(S.sum() ** 2 / S.square().sum())


def _measure(model: nn.Module, *inputs: Tensor) -> dict[str, LayerCondition]:
    """Measure with a loss that is neither linear nor symmetric; inputs are micro-batches."""
    with LayerConditions(model) as conditions:
        for x in inputs:
            _loss(model(x)).backward()
        return {row.matrix: row for row in conditions.measure()}


def _loss(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    weights = torch.linspace(-1, 2, output.shape[-1]).to(output)
    return (output.tanh() * weights + 0.1 * output.square()).sum()


def _check(row: LayerCondition, A: Tensor, G: Tensor, output: Tensor) -> None:
    """Against dense matrices: tokens in rows of A and of the output, G as (out, in)."""
    assert row.shape == tuple(G.shape)
    assert row.tokens == len(A)
    assert row.stable_rank == pytest.approx(_stable(A), rel=1e-5)
    assert row.nuclear_rank == pytest.approx(_nuclear(G), rel=1e-4)
    assert row.stable_rank_output == pytest.approx(_stable(output), rel=1e-5)
    assert row.ratio == row.nuclear_rank / row.stable_rank


def _mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16, bias), nn.ReLU(), nn.Linear(16, 5, bias))


# --------------------------------------------------------------------------------- linear layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(32, 8), (4, 6, 8), (2, 3, 4, 8), (8,)])
def test_mlp(bias: bool, shape: tuple[int, ...]) -> None:
    model, x = _mlp(bias), torch.randn(shape) + 0.5
    rows = _measure(model, x)
    assert list(rows) == ["0.weight", "2.weight"]
    before = model[0](x)
    after = before.relu()
    flat = [t.detach().reshape(-1, t.shape[-1]) for t in (x, before, after, model(x))]
    _check(rows["0.weight"], flat[0], model[0].weight.grad, flat[1])
    _check(rows["2.weight"], flat[2], model[2].weight.grad, flat[3])
    assert [row.role for row in rows.values()] == ["hidden", "head"]


def test_taps_before_and_after_the_nonlinearity_are_kept_apart() -> None:
    model = nn.Sequential(nn.Linear(20, 60, bias=False), nn.ReLU(), nn.Linear(60, 9))
    x = torch.randn(200, 20)
    up, down = _measure(model, x).values()
    before = x @ model[0].weight.detach().mT
    assert up.stable_rank_output == pytest.approx(_stable(before), rel=1e-5)
    assert down.stable_rank == pytest.approx(_stable(before.relu()), rel=1e-5)
    assert up.stable_rank_output > 2 * down.stable_rank  # the mean that ReLU leaves is the spike


def test_swiglu_features_have_a_stable_rank_that_grows_with_the_width() -> None:
    """Products of a gate and a linear map have no common direction, as ReLU features have."""
    torch.manual_seed(0)
    ranks = []
    for width in (32, 128, 512):
        x = torch.randn(2048, 64)
        gate, up = (torch.randn(64, width) / 8 for _ in range(2))
        ranks.append(_stable(F.silu(x @ gate) * (x @ up)))
    assert ranks[1] > 1.3 * ranks[0]
    assert ranks[2] > 1.3 * ranks[1]


def test_relu_features_of_the_paper_have_stable_rank_three() -> None:
    """Davis and Drusvyatskiy's example: width 100, 50 inputs, 400 tokens."""
    ranks = []
    for _ in range(5):
        model = nn.Sequential(nn.Linear(50, 100, bias=False), nn.ReLU(), nn.Linear(100, 9))
        nn.init.normal_(model[0].weight)
        ranks.append(_measure(model, torch.randn(400, 50))["2.weight"].stable_rank)
    assert sum(ranks) / 5 == pytest.approx(3.0, abs=0.1)


def test_relu_features_have_stable_rank_pi() -> None:
    """Davis and Drusvyatskiy, theorem 2.6: (1 + o(1)) π, whatever the width."""
    for k in (128, 256):
        model = nn.Sequential(nn.Linear(k // 2, k, bias=False), nn.ReLU(), nn.Linear(k, 1 + k))
        nn.init.normal_(model[0].weight)
        rows = _measure(model, torch.randn(2 * k, k // 2))
        assert 0.9 * math.pi < rows["2.weight"].stable_rank < 1.05 * math.pi


def test_float64_models_are_measured_in_float64() -> None:
    model, x = _mlp(bias=False).double(), torch.randn(30, 8).double()
    x[:, 1] = x[:, 0] * (1 + 1e-6)
    rows = _measure(model, x * 1e25)  # squares overflow in float32
    assert rows["0.weight"].stable_rank == pytest.approx(_stable(x), rel=1e-12)


def test_autocast_does_not_round_the_sums() -> None:
    model, x = _mlp(), 3 + torch.randn(64, 8) * torch.logspace(0, -2, 8)
    with LayerConditions(model) as conditions:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _loss(model(x).float())
        loss.backward()
        rows = conditions.measure()
    assert rows[0].stable_rank - 1 == pytest.approx(_stable(x) - 1, rel=1e-3)


def test_bfloat16_model() -> None:
    model, x = _mlp().bfloat16(), torch.randn(32, 8).bfloat16()
    rows = _measure(model, x)
    assert rows["0.weight"].stable_rank == pytest.approx(_stable(x), rel=1e-5)
    assert rows["0.weight"].nuclear_rank == pytest.approx(_nuclear(model[0].weight.grad), rel=1e-4)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(input=self.first(x))


def test_input_given_by_keyword() -> None:
    model, x = Keyword(), torch.randn(20, 8)
    rows = _measure(model, x)
    assert rows["last.weight"].stable_rank == pytest.approx(_stable(model.first(x)), rel=1e-5)


def test_a_shared_layer_sees_all_its_inputs() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(10, 6)
    rows = _measure(model, x)
    both = torch.cat([x, layer(x).relu()]).detach()
    assert rows["0.weight"].tokens == 20
    assert rows["0.weight"].stable_rank == pytest.approx(_stable(both), rel=1e-5)


# ---------------------------------------------------------------------------------- convolutions

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 2, "stride": 2, "groups": 4, "bias": False},
    {"kernel_size": 3, "dilation": 2, "padding": 1},
    {"kernel_size": 3, "stride": 3, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
]


def _dense_patches(layer: Any, x: Tensor, group: int) -> Tensor:
    """What one group multiplies, read off the layer itself: its response to unit kernels."""
    size = layer.weight[0].numel()
    unit = type(layer)(
        layer.in_channels // layer.groups,
        size,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        bias=False,
    ).double()
    nn.init.zeros_(unit.weight)
    unit.weight.data.view(size, size).fill_diagonal_(1)
    part = x.double().chunk(layer.groups, 1)[group]
    return unit(part).movedim(1, -1).flatten(0, -2).detach()


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions(dims: int, options: dict[str, Any]) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d)[dims - 1]
    layer = kind(4, 8, **options)
    model = nn.Sequential(layer, nn.Tanh())
    x = torch.randn(3, 4, *(11, 9)[:dims]) + 0.3
    rows = list(_measure(model, x).values())
    assert len(rows) == layer.groups
    output = layer(x).detach().movedim(1, -1).flatten(0, -2)
    for group, row in enumerate(rows):
        G = layer.weight.grad.flatten(1).chunk(layer.groups)[group]
        _check(row, _dense_patches(layer, x, group), G, output)
        assert row.matrix == ("0.weight" if layer.groups == 1 else f"0.weight[{group}]")
        assert row.role == "conv"


def test_convolution_with_unequal_sides() -> None:
    layer = nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 3))
    x = torch.randn(2, 3, 7, 12)
    (row,) = _measure(nn.Sequential(layer, nn.Tanh()), x).values()
    patches = F.unfold(x, (3, 2), (1, 3), (2, 0), (1, 2)).mT.flatten(0, 1)
    assert row.tokens == len(patches)
    assert row.stable_rank == pytest.approx(_stable(patches), rel=1e-5)


def test_convolution_without_a_batch_axis() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), torch.randn(3, 8, 8)
    one, batch = (_measure(model, each)["0.weight"] for each in (x, x[None]))
    assert one.tokens == batch.tokens == 36
    assert one.stable_rank == pytest.approx(batch.stable_rank)
    assert one.stable_rank_output == pytest.approx(batch.stable_rank_output)


# ------------------------------------------------------------- embeddings, heads, fused, HF layers


class Language(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 30, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(tokens)).relu())


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_has_the_stable_rank_of_the_token_indicator(tied: bool) -> None:
    model = Language(tied)
    tokens = (30 * torch.rand(6, 50) ** 3).long()
    rows = _measure(model, tokens)
    row, counts = rows["embed.weight"], torch.bincount(tokens.flatten(), minlength=30)
    assert row.stable_rank == 300 / int(counts.max())  # exactly 1 / p_max
    G = model.embed.weight.grad
    assert row.nuclear_rank == pytest.approx(_nuclear(G), rel=1e-4)
    embedded = model.embed(tokens).detach().flatten(0, 1)
    assert row.stable_rank_output == pytest.approx(_stable(embedded), rel=1e-5)
    assert (row.role, row.tokens) == ("embedding", 300)
    assert ("head.weight" in rows) != tied  # one row for a tied matrix, by its first use
    assert rows["hidden.weight"].stable_rank == pytest.approx(_stable(embedded), rel=1e-5)


def test_sparse_gradients_of_an_embedding() -> None:
    dense, sparse = (
        nn.Sequential(nn.Embedding(30, 8, sparse=s), nn.Linear(8, 8), nn.Linear(8, 3))
        for s in (False, True)
    )
    sparse.load_state_dict(dense.state_dict())
    tokens = torch.randint(0, 30, (4, 9))
    rows = [_measure(model, tokens)["0.weight"] for model in (dense, sparse)]
    assert rows[0].nuclear_rank == pytest.approx(rows[1].nuclear_rank, rel=1e-6)


class Shifted(nn.Embedding):
    """As the learned positions of OPT: takes a mask and counts positions itself."""

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward(mask.long().cumsum(-1) - 1)


def test_an_embedding_with_its_own_forward_is_not_taken_for_a_plain_one() -> None:
    model = nn.Sequential(Shifted(10, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    conditions = LayerConditions(model)
    assert conditions.not_covered == ["0.weight"]
    assert "0.weight" not in _measure(model, torch.ones(2, 9))


class Fused(nn.Module):
    num_heads, num_kv_heads = 4, 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([8, 4, 4], -1)
        q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.head(mixed.transpose(1, 2).flatten(2))


def test_fused_projection_is_measured_slice_by_slice() -> None:
    model, x = Fused(), torch.randn(3, 7, 8)
    rows = _measure(model, x)
    assert list(rows) == ["qkv.weight[0]", "qkv.weight[1]", "qkv.weight[2]", "head.weight"]
    output = model.qkv(x).detach().flatten(0, 1)
    for row, G in zip(rows.values(), model.qkv.weight.grad.split([8, 4, 4]), strict=False):
        _check(row, x.flatten(0, 1), G, output)
        assert row.role == "qkv"


def test_layers_of_gpt2() -> None:
    config = transformers.GPT2Config(
        n_layer=1,
        n_embd=16,
        n_head=2,
        vocab_size=40,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    nn.init.normal_(model.transformer.h[0].ln_1.bias)  # so that no gradient is trivial
    seen: dict[str, Tensor] = {}
    block = model.transformer.h[0]
    layers = {
        "attn.c_attn": block.attn.c_attn,
        "attn.c_proj": block.attn.c_proj,
        "mlp.c_fc": block.mlp.c_fc,
        "mlp.c_proj": block.mlp.c_proj,
    }
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, i, o, name=name: seen.update({name: i[0].detach()}))
    tokens = torch.randint(0, 40, (3, 10))
    rows = _measure(model, tokens)
    for name, layer in layers.items():
        A, G = seen[name].flatten(0, -2), layer.weight.grad.mT
        parts = G.chunk(3) if name == "attn.c_attn" else (G,)
        for i, part in enumerate(parts):
            suffix = f"[{i}]" if len(parts) > 1 else ""
            output = A @ layer.weight.detach() + layer.bias.detach()
            _check(rows[f"transformer.h.0.{name}.weight{suffix}"], A, part, output)
    wte = rows["transformer.wte.weight"]
    assert wte.stable_rank == 30 / int(torch.bincount(tokens.flatten()).max())
    assert "lm_head.weight" not in rows


def test_what_is_not_covered_is_named() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "core": nn.LSTM(8, 8, 2),
            "up": nn.ConvTranspose2d(3, 4, 2),
            "bag": nn.EmbeddingBag(9, 8),
            "linear": nn.Linear(8, 8),
            "norm": nn.LayerNorm(8),
            "depthwise": nn.Conv1d(4, 4, 3, groups=4),
        }
    )
    assert LayerConditions(model).not_covered == [
        "attention.out_proj.weight",
        "core.weight_hh_l0",
        "core.weight_ih_l1",
        "up.weight",
        "bag.weight",
    ]


def test_what_is_covered_is_measured() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rows = _measure(model, torch.randn(2, 5, 8))
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    assert {name.partition("[")[0] for name in rows} == matrices - set(
        LayerConditions(model).not_covered
    )
    qkv = {f"self_attn.in_proj_weight[{i}]" for i in range(3)}
    assert set(rows) == qkv | {"linear1.weight", "linear2.weight"}


# ------------------------------------------------------------------- what counts, what is changed


def test_micro_batches_add_up_to_one_batch() -> None:
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    tokens = torch.randint(0, 20, (12, 5))
    whole = _measure(model, tokens)
    model.zero_grad()
    pieces = _measure(model, *tokens.split([1, 4, 7]))
    for name, row in whole.items():
        assert pieces[name].tokens == row.tokens == 60
        for field in ("stable_rank", "stable_rank_output", "nuclear_rank"):
            assert getattr(pieces[name], field) == pytest.approx(getattr(row, field), rel=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_in_between_does_not_count(mode: Callable[[], Any]) -> None:
    model, x = _mlp(), torch.randn(30, 8)
    expected = _measure(model, x)
    model.zero_grad()
    with LayerConditions(model) as conditions:
        with mode():
            model(1000 + torch.rand(50, 8))
        _loss(model(x)).backward()
        with mode():
            model(1000 + torch.rand(50, 8))
        assert {row.matrix: row for row in conditions.measure()} == expected


def test_a_second_block_starts_anew() -> None:
    model, x = _mlp(), torch.randn(30, 8)
    conditions = LayerConditions(model)
    for _ in range(2):
        model.zero_grad()
        with conditions:
            _loss(model(x)).backward()
            assert [row.tokens for row in conditions.measure()] == [30, 30]


def _train(measure: bool) -> list[Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(20, 8),
        nn.Linear(8, 2),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        x = torch.randn(6, 3, 5)
        optimizer.zero_grad()
        if measure:
            with LayerConditions(model) as conditions:
                _loss(model(x)).backward()
                assert len(conditions.measure()) == 3
        else:
            _loss(model(x)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()] + [torch.get_rng_state()]


def test_training_is_not_changed_by_a_bit() -> None:
    for with_hooks, without in zip(_train(True), _train(False), strict=True):
        assert torch.equal(with_hooks, without)


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_hooks_with_kwargs) for m in model.modules())


def test_no_hook_is_left_behind() -> None:
    model = _mlp()
    with LayerConditions(model):
        assert _hooks(model) > 0
    assert _hooks(model) == 0
    with pytest.raises(RuntimeError, match="cannot be multiplied"), LayerConditions(model):
        model(torch.randn(3, 7))
    assert _hooks(model) == 0


def test_the_graph_of_activations_is_not_kept() -> None:
    model, x = _mlp(), torch.randn(9, 8, requires_grad=True)
    with LayerConditions(model) as conditions:
        _loss(model(x)).backward()
        conditions.measure()
        grams = [gram._sum for pair in conditions._grams.values() for gram in pair]
    assert [tuple(g.shape) for g in grams if g is not None] == [(8, 8), (16, 16), (16, 16), (5, 5)]
    assert all(g is not None and not g.requires_grad and g.dtype == torch.float64 for g in grams)


def test_layers_without_gradient_or_use_have_no_row() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight.requires_grad_(False)
    with LayerConditions(model) as conditions:
        _loss(model["b"](model["a"](torch.randn(5, 8)))).backward()
        assert [row.matrix for row in conditions.measure()] == ["a.weight"]


def test_an_idle_slice_has_no_row() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 2, groups=2), nn.Tanh())
    x = torch.randn(3, 4, 6)
    with LayerConditions(model) as conditions:
        model(x)[:, :2].sum().backward()  # nothing of the second group
        assert [row.matrix for row in conditions.measure()] == ["0.weight[0]"]


# ------------------------------------------------------------------------------------ the errors


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradient_raises_and_names_the_layer(bad: float) -> None:
    model = _mlp()
    with LayerConditions(model) as conditions:
        _loss(model(torch.randn(5, 8))).backward()
        assert model[2].weight.grad is not None
        model[2].weight.grad[0, 0] = bad
        with pytest.raises(FloatingPointError, match=r"gradient of 2\.weight"):
            conditions.measure()


def test_nonfinite_activations_raise() -> None:
    model = _mlp()
    with LayerConditions(model) as conditions:
        x = torch.randn(5, 8)
        _loss(model(x)).backward()
        x[0, 0] = float("nan")
        model(x)
        with pytest.raises(FloatingPointError, match="infinite activations"):
            conditions.measure()


def test_measuring_without_a_forward_pass_raises() -> None:
    model, x = _mlp(), torch.randn(5, 8)
    conditions = LayerConditions(model)
    with pytest.raises(RuntimeError, match="within the `with` block"):
        conditions.measure()
    with conditions, pytest.raises(RuntimeError, match="expected a forward pass"):
        conditions.measure()
    with conditions:
        _loss(model(x)).backward()
    with pytest.raises(RuntimeError, match="expected a forward pass"):
        conditions.measure()


def test_a_row_can_be_written_down() -> None:
    row = LayerCondition("a", "hidden", (3, 4), 3.0, 2.0, 1.5, 10)
    assert row.ratio == 1.5
    assert LayerCondition(**row.as_dict()) == row


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_pass_that_is_done_again_counts_once(reentrant: bool) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(10, 6), torch.randn(4, 6)
    plain = _measure(inner, *inputs)
    inner.zero_grad()
    again = _measure(_Checkpointed(inner, reentrant), *inputs)
    assert [row.tokens for row in again.values()] == [14, 14]
    for row, expected in zip(again.values(), plain.values(), strict=True):
        assert row.stable_rank == expected.stable_rank
        assert row.nuclear_rank == expected.nuclear_rank
