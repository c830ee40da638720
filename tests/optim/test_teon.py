"""TEON: what stacking does to a step, and which matrices are found to be stacked."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import steepest
from steepest import TEON, MatrixView, Muon
from steepest.geometry import LayerwiseSpectral, Spectral, StackedSpectral
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.linalg import polar
from steepest.optim import reference

EXACT = {"method": "svd", "dtype": None}
# One step of the bare direction.
BARE = {**EXACT, "lr": 1.0, "momentum": 0.0, "nesterov": False, "scale": "none"}
SHAPES = [(6, 6), (4, 9), (9, 4), (20, 4)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_size = pytest.mark.parametrize("K", [2, 3])
every_mode = pytest.mark.parametrize("mode", [1, 2])


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def orthogonal(n, seed=0):
    return torch.linalg.qr(randn(n, n, seed=seed)).Q


def stacked(gradients, **settings):
    """The directions for one stack of matrices with these gradients."""
    params = [nn.Parameter(torch.zeros_like(G)) for G in gradients]
    group = {"params": params, "stacks": [[0] for _ in params]}
    optimizer = TEON([group], **{**BARE, **settings})
    for W, G in zip(params, gradients, strict=True):
        W.grad = G.clone()
    optimizer.step()
    return torch.stack([-W.detach() for W in params])


def exactly(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# The direction of a stack


@every_shape
@every_mode
@every_size
def test_a_stack_is_orthogonalized_as_one_matrix(shape, mode, K):
    G = randn(K, *shape)
    exactly(
        torch.cat(list(stacked(G, mode=mode)), 2 - mode), polar(torch.cat(list(G), 2 - mode), "svd")
    )


@every_shape
@every_size
def test_identical_layers_take_muons_direction_shorter(shape, K):
    G = randn(*shape)
    exactly(stacked([G] * K), (polar(G, "svd") / K**0.5).expand(K, *shape))


@every_size
def test_layers_with_common_left_vectors_take_muons_direction_shorter(K):
    U, S = orthogonal(6), torch.arange(1.0, 7.0, dtype=torch.float64)
    layers = [(U * S) @ orthogonal(6, seed=k + 1).mT for k in range(K)]
    exactly(stacked(layers), torch.stack([polar(G, "svd") for G in layers]) / K**0.5)


@every_size
def test_layers_of_rank_one_with_a_common_right_vector_take_muons_direction(K):
    U, v = orthogonal(6), orthogonal(6, seed=1)[0]
    layers = [(k + 1.0) * torch.outer(U[k], v) for k in range(K)]
    exactly(stacked(layers), torch.stack([polar(G, "svd") for G in layers]))
    # stacked below each other they would be shorter, as those above are
    expected = torch.stack([(k + 1.0) * torch.outer(U[k], v) for k in range(K)])
    exactly(stacked(layers, mode=2), expected / expected.norm())


@every_shape
@every_size
@pytest.mark.parametrize("mode", [1, 2])
def test_the_squares_of_a_stack_add_up_to_its_rank(shape, K, mode):
    (m, n), D = shape, stacked(randn(K, *shape), mode=mode)
    rank = min(m, n * K) if mode == 1 else min(m * K, n)
    assert float(D.square().sum()) == pytest.approx(rank, abs=1e-11)
    compensated = stacked(randn(K, *shape), mode=mode, length="muon")
    assert float(compensated.square().sum()) == pytest.approx(K * min(m, n), abs=1e-11)
    exactly(compensated, D * (K * min(m, n) / rank) ** 0.5)


@every_shape
@every_mode
def test_permuted_layers_take_permuted_steps(shape, mode):
    G, order = randn(4, *shape), [2, 0, 3, 1]
    exactly(stacked(G[order], mode=mode), stacked(G, mode=mode)[order])


@every_shape
def test_each_layer_may_be_rotated_from_the_right_and_all_together_from_the_left(shape):
    (m, n), G = shape, randn(3, *shape)
    right = torch.stack([orthogonal(n, seed=k) for k in range(3)])
    left = orthogonal(m, seed=9)
    exactly(stacked(left @ G @ right), left @ stacked(G) @ right, 1e-11)
    # and rotated each in its own way from the left they are another stack
    each = torch.stack([orthogonal(m, seed=20 + k) for k in range(3)])
    if m < 3 * n:  # otherwise neither mixes with another
        assert float((stacked(each @ G) - each @ stacked(G)).norm()) > 1e-2


@every_shape
def test_mode_2_is_mode_1_of_the_transposed_layers(shape):
    G = randn(3, *shape)
    exactly(stacked(G, mode=2), stacked(G.mT, mode=1).mT)


def test_a_single_layer_alone_in_its_stack_takes_muons_step():
    G = randn(5, 7)
    exactly(stacked([G])[0], polar(G, "svd"))


def test_only_with_momentum_is_it_the_momentum_that_is_stacked(path):
    params = [nn.Parameter(torch.zeros(4, 4, dtype=torch.float64)) for _ in range(2)]
    group = {"params": params, "stacks": [[0], [0]]}
    optimizer = TEON([group], **{**BARE, "momentum": 0.7})
    gradients = [randn(2, 4, 4, seed=t) for t in range(5)]
    settings = {"momentum": 0.7, "nesterov": False, "scale": "none"}
    weights = path(reference.teon, torch.zeros_like(gradients[0]), gradients, 1.0, **settings)
    for t, G in enumerate(gradients, start=1):
        for W, own in zip(params, G, strict=True):
            W.grad = own.clone()
        optimizer.step()
        exactly(torch.stack([W.detach() for W in params]), weights[t])


@pytest.mark.parametrize("scale", ["spectral", "original", "match-rms-adamw", "none"])
def test_the_shape_factor_is_that_of_one_layer(scale):
    G = randn(2, 12, 3)
    factor = steepest.optim.update_scale(scale, 12, 3)
    exactly(stacked(G, scale=scale), stacked(G) * factor)


def test_several_stacks_of_one_shape_and_matrices_without_a_stack_go_together():
    G = randn(5, 4, 6)
    labels = [0, 1, None, 0, 1]
    params = [nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)) for _ in labels]
    optimizer = TEON([{"params": params, "stacks": [[i] for i in labels]}], **BARE)
    for W, each in zip(params, G, strict=True):
        W.grad = each.clone()
    optimizer.step()
    first, second, alone = stacked(G[[0, 3]]), stacked(G[[1, 4]]), polar(G[2], "svd")
    expected = torch.stack([first[0], second[0], alone, first[1], second[1]])
    exactly(torch.stack([-W.detach() for W in params]), expected)


def test_a_table_says_the_same_of_adamw_for_any_scale():
    for scale in ("spectral", "match-rms-adamw"):
        optimizer = Muon(nn.Linear(4, 3), lr=0.02, scale=scale, adamw_lr=0.01)
        [row] = [line for line in str(optimizer).splitlines() if "bias" in line]
        assert row.split("│")[-2].strip() == "0.002"


def test_what_a_table_says_is_what_a_stack_does():
    G, lr = randn(2, 8, 8), 0.5
    for settings in ({}, {"length": "muon"}, {"mode": 2}, {"scale": "match-rms-adamw"}):
        params = [nn.Parameter(torch.zeros(8, 8, dtype=torch.float64)) for _ in range(2)]
        group = {"params": params, "stacks": [[0], [0]]}
        optimizer = TEON([group], **{**BARE, "lr": lr, **settings})
        for W, each in zip(params, G, strict=True):
            W.grad = each.clone()
        optimizer.step()
        measured = float(torch.stack([W.detach() for W in params]).square().mean().sqrt())
        text = str(optimizer)
        assert "stacks of 2" in text
        assert f"{measured:.2g}" in text


# Its norms


@every_shape
@every_mode
@every_size
def test_norms_lie_between_those_of_the_layers(shape, mode, K):
    layers, stack = LayerwiseSpectral(Spectral("svd")), StackedSpectral(mode, Spectral("svd"))
    near = 1 + 1e-12
    for seed in range(10):
        X = randn(K, *shape, seed=seed)
        low, high = layers.norm(X), stack.norm(X)
        assert low <= high * near
        assert high <= K**0.5 * low * near
        whole, joint = layers.dual_norm(X), stack.dual_norm(X)
        assert whole / K**0.5 <= joint * near
        assert joint <= whole * near


@every_shape
@every_mode
@every_size
@pytest.mark.parametrize("geometry", [LayerwiseSpectral, StackedSpectral])
def test_the_direction_is_as_steep_as_the_dual_norm(geometry, shape, mode, K):
    exact = Spectral("svd")
    tested = geometry(mode, exact) if geometry is StackedSpectral else geometry(exact)
    G = randn(3, K, *shape)
    D = tested.direction(G)
    exactly((G * D).sum((-3, -2, -1)), tested.dual_norm(G), 1e-10)
    exactly(tested.norm(D), torch.ones(3, dtype=G.dtype))
    for seed in range(5):
        other = randn(3, K, *shape, seed=seed + 1)
        other = other / tested.norm(other)[:, None, None, None]
        assert ((G * other).sum((-3, -2, -1)) <= tested.dual_norm(G) + 1e-12).all()


@every_mode
def test_the_bounds_of_the_norms_are_met(mode):
    layers, stack = LayerwiseSpectral(Spectral("svd")), StackedSpectral(mode, Spectral("svd"))
    same = randn(6, 6).expand(3, 6, 6)
    exactly(stack.norm(same), 3**0.5 * layers.norm(same))
    exactly(stack.dual_norm(same), layers.dual_norm(same) / 3**0.5)
    U, v = orthogonal(6), orthogonal(6, seed=1)[0]
    apart = torch.stack([torch.outer(U[k], v) for k in range(3)])
    apart = apart if mode == 1 else apart.mT
    exactly(stack.norm(apart), layers.norm(apart))
    exactly(stack.dual_norm(apart), layers.dual_norm(apart))


@every_shape
@every_mode
def test_a_step_has_norm_one_and_the_dual_norm_as_its_slope(shape, mode):
    G = randn(2, *shape)
    D = stacked(G, mode=mode)
    geometry = StackedSpectral(mode, Spectral("svd"))
    exactly(geometry.norm(D), torch.tensor(1.0, dtype=G.dtype))
    exactly((G * D).sum(), geometry.dual_norm(G), 1e-11)


# What is found in a model


def gpt(depth=5, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(width=16, depth=depth, heads=2, context=8), vocabulary=11)


def set_gradients(model, t, dtype=None):
    for i, p in enumerate(model.parameters()):
        p.grad = randn(*p.shape, seed=1000 * t + i).to(p.dtype)


def test_one_layer_in_a_stack_is_muon_bit_for_bit():
    first, second = gpt(), gpt()
    one, muon = (
        TEON(first, lr=0.02, stack=1, weight_decay=0.1),
        Muon(second, lr=0.02, weight_decay=0.1),
    )
    assert one.stacks == []
    for t in range(10):
        for model, optimizer in ((first, one), (second, muon)):
            set_gradients(model, t)
            optimizer.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("K", [2, 3, 5])
def test_queries_keys_and_values_of_neighbours_are_stacked(K):
    optimizer = TEON(gpt(5), stack=K)
    expected = [
        tuple(f"blocks.{first + k}.attention.{kind}.weight" for k in range(K))
        for kind in ("query", "key", "value")
        for first in range(0, 5 - K + 1, K)
    ]
    assert sorted(optimizer.stacks) == sorted(expected)


def test_leftover_layers_and_all_other_matrices_take_muons_step():
    stacks, plain = gpt(5), gpt(5)
    teon, muon = (each(model, lr=0.1, **EXACT) for each, model in ((TEON, stacks), (Muon, plain)))
    for model, optimizer in ((stacks, teon), (plain, muon)):
        set_gradients(model, 0)
        optimizer.step()
    in_stacks = {name for names in teon.stacks for name in names}
    assert len(in_stacks) == 12
    plain = dict(plain.named_parameters())
    for name, p in stacks.named_parameters():
        same = torch.allclose(p, plain[name], rtol=0, atol=1e-6)
        assert same == (name not in in_stacks), name


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=5, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama(layers=4):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def test_the_parts_of_a_fused_projection_are_stacked_each_with_its_kind():
    model = gpt2()
    optimizer = TEON(model, lr=1.0, **{k: v for k, v in BARE.items() if k != "lr"})
    assert sorted(optimizer.stacks) == [
        tuple(f"transformer.h.{first + k}.attn.c_attn.weight[{part}]" for k in range(2))
        for first in (0, 2)
        for part in range(3)
    ]
    before = [layer.attn.c_attn.weight.detach().clone() for layer in model.transformer.h]
    set_gradients(model, 0)
    optimizer.step()
    moved = [
        (old - layer.attn.c_attn.weight.detach()).mT.double().chunk(3)
        for layer, old in zip(model.transformer.h, before, strict=True)
    ]
    G = [layer.attn.c_attn.weight.grad.mT.double().chunk(3) for layer in model.transformer.h]
    for first in (0, 2):
        for part in range(3):
            expected = stacked([G[first][part], G[first + 1][part]])
            found = torch.stack([moved[first][part], moved[first + 1][part]])
            exactly(found, expected, 1e-5)
    for part in range(3):  # left over
        exactly(moved[4][part], polar(G[4][part].contiguous(), "svd"), 1e-5)


def test_matrices_of_unequal_shape_are_never_in_one_stack():
    model = llama()
    optimizer = TEON(model, stack=2)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(optimizer.stacks) == 6
    for stack in optimizer.stacks:
        assert len({shapes[name] for name in stack}) == 1
        assert len({name.split(".")[-2] for name in stack}) == 1  # q_proj with q_proj
    sizes = {name.split(".")[-2]: shapes[name] for stack in optimizer.stacks for name in stack}
    assert sizes == {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16)}


def test_layers_of_unequal_width_are_stacked_with_their_equals():
    class Layer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.q_proj = nn.Linear(width, width, bias=False)

    model = nn.Module()
    model.layers = nn.ModuleList(Layer(width) for width in (8, 8, 6, 8, 6))
    names = [f"layers.{i}.q_proj.weight" for i in range(5)]
    assert sorted(TEON(model).stacks) == [(names[0], names[1]), (names[2], names[4])]


def test_ten_layers_are_in_the_order_of_their_numbers():
    stacks = TEON(gpt(12), stack=3).stacks
    queries = [[int(name.split(".")[1]) for name in s] for s in stacks if "query" in s[0]]
    assert queries == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_a_model_without_attention_warns_and_is_trained_as_by_muon():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))

    first, second = build(), build()
    with pytest.warns(UserWarning, match="nothing to stack"):
        teon = TEON(first, lr=0.1)
    muon = Muon(second, lr=0.1)
    for t in range(3):
        for model, optimizer in ((first, teon), (second, muon)):
            set_gradients(model, t)
            optimizer.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.warns(UserWarning, match="values of 6 layers"):
        TEON(gpt(5), stack=6)


def test_nothing_is_said_where_stacks_are_found_or_not_wanted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TEON(gpt(2))
        TEON(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), stack=1)


@pytest.mark.parametrize("mode", [1, 2])
def test_a_frozen_layer_leaves_its_stack_and_the_others_go_on(mode):
    model = gpt(6)
    frozen = model.blocks[1].attention.query.weight
    frozen.requires_grad_(False)
    settings = {key: value for key, value in BARE.items() if key != "lr"}
    optimizer = TEON(model, lr=1.0, stack=3, mode=mode, length="muon", **settings)
    queries = [block.attention.query.weight for block in model.blocks]
    before = [W.detach().double() for W in queries]
    set_gradients(model, 0)
    frozen.grad = None
    optimizer.step()
    moved = [old - W.detach().double() for old, W in zip(before, queries, strict=True)]
    G = [None if W is frozen else W.grad.double() for W in queries]
    assert not moved[1].any()
    pair = stacked([G[0], G[2]], mode=mode, length="muon")
    exactly(torch.stack([moved[0], moved[2]]), pair, 1e-5)
    three = stacked(G[3:], mode=mode, length="muon")
    exactly(torch.stack(moved[3:]), three, 1e-5)


def test_a_layer_without_a_gradient_for_a_step_returns_to_its_stack():
    params = [nn.Parameter(torch.zeros(4, 4, dtype=torch.float64)) for _ in range(2)]
    optimizer = TEON([{"params": params, "stacks": [[0], [0]]}], **BARE)
    for idle in (torch.zeros(4, 4, dtype=torch.float64), None):
        before = params[0].detach().clone()
        params[0].grad, params[1].grad = randn(4, 4), idle
        optimizer.step()
        exactly(before - params[0].detach(), polar(randn(4, 4), "svd"))
    before = torch.stack([W.detach().clone() for W in params])
    for W, G in zip(params, randn(2, 4, 4), strict=True):
        W.grad = G.clone()
    optimizer.step()
    moved = before - torch.stack([W.detach() for W in params])
    exactly(moved, stacked(randn(2, 4, 4)))


def test_roles_with_settings_of_their_own_keep_their_stacks():
    model = gpt2()
    optimizer = TEON(model, lr=0.1, roles={"qkv": {"lr": 0.5, "length": "muon"}})
    assert len(optimizer.stacks) == 6
    (own,) = (g for g in optimizer.param_groups if g["lr"] == 0.5)
    assert all("c_attn" in name for name in own["param_names"])
    assert TEON(gpt2(), stack=1, roles={"qkv": {"geometry": "adamw"}}).stacks == []


# Saved and loaded


def steps(model, optimizer, start, count):
    for t in range(start, start + count):
        set_gradients(model, t)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_bit_for_bit_from_a_state_dict(dtype):
    model = gpt().to(dtype)
    optimizer = TEON(model, lr=0.02, weight_decay=0.1, stack=2, rounding="stochastic")
    steps(model, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    other = gpt(seed=9).to(dtype)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed = TEON(other, lr=0.5, stack=2)
    resumed.load_state_dict(state)
    assert resumed.stacks == optimizer.stacks
    steps(model, optimizer, 3, 4)
    steps(other, resumed, 3, 4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_knows_its_stacks(how):
    model = gpt()
    optimizer = TEON(model)
    steps(model, optimizer, 0, 1)
    other, copied = how((model, optimizer))
    assert copied.stacks == optimizer.stacks
    steps(model, optimizer, 1, 2)
    steps(other, copied, 1, 2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_loading_keeps_the_stacks_of_the_optimizer():
    pairs, triples = TEON(gpt(6), stack=2), TEON(gpt(6), stack=3)
    triples.load_state_dict(pairs.state_dict())
    assert len(triples.stacks) == 6
    assert all(len(stack) == 3 for stack in triples.stacks)


@pytest.mark.parametrize(
    ("settings", "message"), [({"stack": 0}, "got stack=0"), ({"mode": 3}, "mode=3")]
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TEON(gpt(2), **settings)


def test_a_view_of_several_matrices_has_a_number_for_each():
    W = nn.Parameter(torch.zeros(3, 4, 4, dtype=torch.float64))
    group = {"params": [W], "views": [MatrixView(3, 4, 4)], "stacks": [[0, None, 0]]}
    optimizer = TEON([group], **BARE)
    W.grad = randn(3, 4, 4)
    optimizer.step()
    exactly(-W.detach()[[0, 2]], stacked(randn(3, 4, 4)[[0, 2]]))
    exactly(-W.detach()[1], polar(randn(3, 4, 4)[1], "svd"))
    assert optimizer.stacks == [("0[0]", "0[2]")]
