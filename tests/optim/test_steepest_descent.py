"""What all optimizers of this package promise, whatever their geometry and memory."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import steepest
from steepest import (
    SOAP,
    TEON,
    KLShampoo,
    MatrixView,
    Muon,
    Shampoo,
    SignSGD,
    Signum,
    SpectralDescent,
)
from steepest.optim import matrices, update_scale

# Nothing here is a layer with queries, keys and values; tests/optim/test_teon.py has those.
pytestmark = pytest.mark.filterwarnings("ignore:TEON found nothing to stack")

OPTIMIZERS = [SignSGD, Signum, SpectralDescent, Muon, TEON, Shampoo, KLShampoo, SOAP]
SPECTRAL = (SpectralDescent, Muon, TEON)
KRONECKER = (Shampoo, KLShampoo, SOAP)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
spectral = pytest.mark.parametrize("optimizer", SPECTRAL)
of_matrices = pytest.mark.parametrize("optimizer", SPECTRAL + KRONECKER)


def exact(optimizer):
    """The optimizer without approximation, so that float64 results can be compared."""
    if optimizer in SPECTRAL:
        return functools.partial(optimizer, method="svd", dtype=None)
    if optimizer in (Shampoo, KLShampoo):
        return functools.partial(optimizer, length="muon", interval=1)
    return optimizer


def parameter(*shape, **kwargs):
    return nn.Parameter(torch.randn(shape, **kwargs))


def equal(first, second):
    assert len(first) == len(second) > 0
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def weights(optimizer):
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


# What `params` can be


@every_optimizer
def test_a_model_its_table_and_groups_written_by_hand_take_the_same_steps(
    optimizer, network, set_gradients, snapshot
):
    by_hand = {
        "stem.weight": MatrixView(2, 4, 18),
        "conv.weight": MatrixView(1, 8, 72),
        "qkv.weight": MatrixView(1, 24, 8, False, (8, 8, 8)),
        "up.weight": MatrixView(1, 12, 8),
        "down.weight": MatrixView(1, 8, 12),
        "experts": MatrixView(3, 8, 8),
    }

    def groups(model):
        named = dict(model.named_parameters())
        others = [(name, p) for name, p in named.items() if name not in by_hand]
        return [
            {"params": [(n, named[n]) for n in by_hand], "views": list(by_hand.values())},
            {"params": others, "geometry": "adamw"},
        ]

    results = []
    for make in (lambda model: model, steepest.roles, groups):
        model = network()
        tested = optimizer(make(model), lr=0.02, weight_decay=0.1, adamw_lr=0.01)
        names = [name for group in tested.param_groups for name in group["param_names"]]
        for step in range(3):
            set_gradients((p for _, p in sorted(model.named_parameters())), step)
            tested.step()
        results.append({name: model.get_parameter(name) for name in sorted(names)})
    model, table, hand = (list(result.values()) for result in results)
    assert len(model) == len(list(network().parameters()))
    assert equal(model, table)
    assert equal(model, hand)


@every_optimizer
def test_parameters_come_as_lists_generators_names_or_groups(optimizer):
    W = parameter(3, 4)
    for params in ([W], (p for p in [W]), [("W", W)], iter([("W", W)]), [{"params": W}]):
        assert optimizer(params).param_groups[0]["params"] == [W]
    assert optimizer([("W", W)]).param_groups[0]["param_names"] == ["W"]
    assert optimizer(nn.ParameterDict({"W": W})).param_groups[0]["param_names"] == ["W"]


@every_optimizer
def test_groups_of_the_caller_can_be_used_again(optimizer):
    groups = [{"params": [parameter(2, 3)]}, {"params": [parameter(3)], "geometry": "adamw"}]
    keys = [set(group) for group in groups]
    Muon(groups, lr=0.7)
    assert [set(group) for group in groups] == keys
    assert optimizer(groups, lr=0.3).param_groups[0]["lr"] == 0.3


@every_optimizer
def test_groups_have_their_own_settings(optimizer):
    A, B, C, D = (nn.Parameter(torch.ones(4, 4, dtype=torch.float64)) for _ in range(4))
    tested = exact(optimizer)(
        [
            {"params": [A]},
            {"params": [B], "lr": 0.3},
            {"params": [C], "lr": 0.3, "weight_decay": 0.5},
            {"params": [D], "geometry": "adamw", "lr": 0.3, "betas": (0.0, 0.0), "eps": 0.0},
        ],
        lr=0.1,
    )
    for W in (A, B, C, D):
        W.grad = torch.eye(4, dtype=torch.float64)  # its own polar factor, and its own sign
    tested.step()
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(A.data, 1 - 0.1 * eye)
    torch.testing.assert_close(B.data, 1 - 0.3 * eye)
    torch.testing.assert_close(C.data, 0.85 - 0.3 * eye)
    expected = torch.ones(4, 4, dtype=torch.float64).fill_diagonal_(0.7)
    torch.testing.assert_close(D.data[eye.bool()], expected[eye.bool()])


@every_optimizer
def test_adamw_groups_take_the_adamw_settings_of_the_optimizer(optimizer):
    settings = {"adamw_lr": 0.5, "adamw_betas": (0.1, 0.2), "adamw_eps": 1e-3}
    tested = optimizer([parameter(2, 2)], lr=0.1, adamw_weight_decay=0.25, **settings)
    tested.add_param_group({"params": [parameter(3)], "geometry": "adamw"})
    tested.add_param_group({"params": [parameter(3)], "geometry": "adamw", "lr": 0.75})
    _, first, second = tested.param_groups
    assert (first["lr"], first["betas"], first["eps"]) == (0.5, (0.1, 0.2), 1e-3)
    assert (first["weight_decay"], second["lr"]) == (0.25, 0.75)


@every_optimizer
def test_a_group_added_later_is_trained(optimizer):
    A, B = parameter(3, 3), parameter(3, 3)
    tested = optimizer([A])
    A.grad = torch.randn(3, 3)
    tested.step()
    tested.add_param_group({"params": [B], "lr": 0.5})
    before = B.detach().clone()
    B.grad = torch.randn(3, 3)
    tested.step()
    assert not torch.equal(B, before)


@every_optimizer
def test_views_in_an_adamw_group_are_of_no_effect(optimizer):
    A, B = parameter(2, 3, 3), parameter(2, 3, 3)
    B.data.copy_(A.data)
    views = [MatrixView(2, 3, 3)]
    first = optimizer([{"params": [A], "geometry": "adamw", "views": views}])
    second = optimizer([{"params": [B], "geometry": "adamw"}])
    A.grad = torch.randn_like(A)
    B.grad = A.grad.clone()
    first.step()
    second.step()
    assert torch.equal(A, B)


@every_optimizer
def test_tied_weights_are_updated_once(optimizer, set_gradients):
    def model(tied):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
        if tied:
            layers[2].weight = layers[0].weight
        layers.append(nn.Linear(4, 2))
        return layers

    tied, plain = model(True), model(False)
    for layers in (tied, plain):
        tested = optimizer(layers, lr=0.1)
        set_gradients([layers[0].weight], 0)
        tested.step()
    assert sum(len(g["params"]) for g in optimizer(tied).param_groups) == 3
    assert torch.equal(tied[0].weight, plain[0].weight)


@every_optimizer
def test_frozen_parameters_stay(optimizer, network, train):
    model = network()
    model.conv.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    tested = optimizer(model, lr=0.02, weight_decay=0.1)
    train(model, tested, 2, seed=0)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {"conv.weight", "conv.bias"}
    assert moved == {name for name, _ in model.named_parameters()} - frozen
    assert model.conv.weight not in tested.state


# The step


@every_optimizer
def test_a_closure_is_evaluated_once_with_gradients_and_its_loss_returned(optimizer):
    W = parameter(3, 3)
    tested = optimizer([W], lr=0.1)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        tested.zero_grad()
        loss = W.square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    before = W.detach().clone()
    assert tested.step(closure) is calls[0]
    assert len(calls) == 1
    assert not torch.equal(W, before)
    assert tested.step() is None


@every_optimizer
def test_parameters_without_a_gradient_are_left_alone(optimizer, network, set_gradients):
    model = network()
    tested = optimizer(model, weight_decay=0.5, adamw_weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    assert tested.step() is None
    set_gradients([model.up.weight, model.up.bias], 0)
    tested.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"up.weight", "up.bias"}
    assert {id(p) for p in tested.state} <= {id(model.up.weight), id(model.up.bias)}


@every_optimizer
def test_gradients_are_never_modified(optimizer, network, set_gradients):
    model = network()
    tested = optimizer(model, weight_decay=0.1)
    for step in range(2):
        set_gradients(model.parameters(), step)
        gradients = [p.grad for p in model.parameters()]
        copies = [G.clone() for G in gradients]
        tested.step()
        assert all(p.grad is G for p, G in zip(model.parameters(), gradients, strict=True))
        assert equal(gradients, copies)


@every_optimizer
def test_a_zero_gradient_moves_neither_weights_nor_memory(
    optimizer, network, set_gradients, snapshot
):
    model = network()
    tested = optimizer(model, weight_decay=0.5, adamw_weight_decay=0.5)
    set_gradients(model.parameters(), 0)
    tested.step()
    before = snapshot(tested)
    for p in model.parameters():
        p.grad.zero_()
    tested.step()
    assert equal(snapshot(tested), before)


@every_optimizer
def test_an_idle_expert_rests_while_the_others_learn(optimizer):
    view = MatrixView(3, 4, 5)
    W, alone = parameter(3, 4, 5), parameter(3, 4, 5)
    alone.data.copy_(W.data)
    settings = {"lr": 0.1, "weight_decay": 0.5}
    if optimizer in KRONECKER:  # or the two would renew their factors after other steps
        settings["interval"] = 1
    tested = optimizer([{"params": [W], "views": [view]}], **settings)
    busy = optimizer([{"params": [alone], "views": [view]}], **settings)
    for step in range(3):
        W.grad, alone.grad = torch.randn(3, 4, 5), torch.zeros(3, 4, 5)
        W.grad[1] *= step != 1
        alone.grad.copy_(W.grad)
        before = W.detach().clone(), copy.deepcopy(tested.state[W])
        tested.step()
        if step == 1:
            assert torch.equal(W[1], before[0][1])
            assert not torch.equal(W[0], before[0][0])
            for key, M in before[1].items():
                now = tested.state[W][key]
                if "." not in key:  # of entries
                    now, M = now[1], M[1]
                elif not key.endswith(".1"):  # of another expert as a whole
                    continue
                assert torch.equal(now, M)
        else:
            busy.step()  # sees the steps in which the second expert is busy
    assert torch.equal(W[1], alone[1])


@every_optimizer
def test_a_step_of_zero_gradients_and_rate_makes_the_memory(optimizer, network):
    # So do torch.distributed.checkpoint and torchtitan, to have tensors to load into.
    model, other = network(), network()
    tested, trained = optimizer(model), optimizer(other)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in tested.param_groups:
        group["lr"] = torch.tensor(0.0)
    before = copy.deepcopy(model.state_dict())
    tested.step()
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    trained.step()
    made, expected = tested.state_dict()["state"], trained.state_dict()["state"]
    assert {i: set(s) for i, s in made.items()} == {i: set(s) for i, s in expected.items()}
    for state in made.values():
        for key, t in state.items():  # the factors are zero, and what is made of them the identity
            if "_renewed" in key:
                assert t == -1
                continue
            assert torch.equal(t, torch.eye(len(t)) if "_root" in key else torch.zeros_like(t))
    assert equal(list(model.state_dict().values()), list(before.values()))


@every_optimizer
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
def test_the_rate_can_be_a_tensor_that_changes(optimizer, shape, network, set_gradients):
    results = []
    for tensor in (False, True):
        model = network()
        # values that float32 holds exactly
        rates = [0.03125, 0.0078125]
        lr = torch.full(shape, rates[0]) if tensor else rates[0]
        adamw_lr = torch.full(shape, rates[1]) if tensor else rates[1]
        tested = optimizer(model, lr=lr, adamw_lr=adamw_lr, weight_decay=0.25)
        for step in range(4):
            if step == 2:
                for group in tested.param_groups:
                    if tensor:
                        group["lr"].mul_(0.5)
                    else:
                        group["lr"] *= 0.5
            set_gradients(model.parameters(), step)
            tested.step()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@every_optimizer
def test_a_tensor_rate_survives_a_state_dict(optimizer):
    W = parameter(3, 3)
    tested = optimizer([W], lr=torch.tensor(0.25))
    other = optimizer([parameter(3, 3)], lr=torch.tensor(0.5))
    other.load_state_dict(tested.state_dict())
    assert other.param_groups[0]["lr"] == torch.tensor(0.25)


@every_optimizer
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 2)),
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=10),
        lambda optimizer: OneCycleLR(optimizer, [0.2, 0.1], total_steps=10, cycle_momentum=False),
    ],
    ids=["LambdaLR", "CosineAnnealingLR", "OneCycleLR"],
)
def test_schedulers_set_the_rate_of_every_group(
    optimizer, scheduler, tensor, network, set_gradients
):
    def make(model):
        rates = {"lr": 0.2, "adamw_lr": 0.1}
        rates = (
            {k: torch.tensor(v, dtype=torch.float64) for k, v in rates.items()} if tensor else rates
        )
        return optimizer(model, **rates)

    scheduled, by_hand = network(), network()
    tested, plain = make(scheduled), optimizer(by_hand)
    sgd = torch.optim.SGD(
        [{"params": [parameter(1)], "lr": 0.2}, {"params": [parameter(1)], "lr": 0.1}]
    )
    schedule, expected = scheduler(tested), scheduler(sgd)
    seen = set()
    for step in range(6):
        rates = [group["lr"] for group in sgd.param_groups]
        assert [float(g["lr"]) for g in tested.param_groups] == pytest.approx(rates, rel=1e-6)
        seen.add(tuple(rates))
        for group, lr in zip(plain.param_groups, rates, strict=True):
            group["lr"] = lr
        for model, each in ((scheduled, tested), (by_hand, plain)):
            set_gradients(model.parameters(), step)
            each.step()
        sgd.step()
        schedule.step()
        expected.step()
    assert len(seen) == 6
    for p, q in zip(scheduled.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# AdamW for everything else


@every_optimizer
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_adamw_group_is_torchs_adamw_bit_for_bit(optimizer, fused, dtype, tensor):
    shapes = [(7,), (5, 3), (2, 3, 4)]
    ours = [parameter(*shape, dtype=dtype) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    lr = torch.tensor(0.01) if tensor else 0.01
    settings = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3, "fused": fused}
    tested = optimizer([{"params": ours, "geometry": "adamw", "lr": lr, **settings}])
    reference = torch.optim.AdamW(theirs, lr=lr, **settings)
    for _ in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        tested.step()
        reference.step()
    assert equal(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(tested.state[p][key], reference.state[q][key])


# Memory layouts and precisions

LAYOUTS = {
    "channels last": lambda: torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(5, 6).t(),
    "every other column": lambda: torch.randn(6, 10)[:, ::2],
    "permuted": lambda: torch.randn(4, 5, 3, 2).permute(3, 1, 0, 2),
}


@every_optimizer
@pytest.mark.parametrize("geometry", ["matrix", "adamw"])
@pytest.mark.parametrize("gradient", ["as the weights", "contiguous"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_memory_layout_of_weights_and_gradients_does_not_matter(
    optimizer, layout, gradient, geometry
):
    W = nn.Parameter(layout())
    plain = nn.Parameter(W.detach().clone(memory_format=torch.contiguous_format))
    assert not W.is_contiguous()
    assert plain.is_contiguous()
    strides, address = W.stride(), W.data_ptr()
    group = {"geometry": "adamw"} if geometry == "adamw" else {}
    settings = {"lr": 0.1, "weight_decay": 0.1}
    tested = optimizer([{"params": [W], **group}], **settings)
    reference = optimizer([{"params": [plain], **group}], **settings)
    for _ in range(3):
        plain.grad = torch.randn_like(plain)
        W.grad = plain.grad.clone()
        if gradient == "as the weights":
            W.grad = W.detach().clone().copy_(plain.grad)
        tested.step()
        reference.step()
    assert (W.stride(), W.data_ptr()) == (strides, address)
    torch.testing.assert_close(W.data, plain.data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", KRONECKER)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_blocks_of_any_layout_are_the_same_matrices(optimizer, layout):
    W = nn.Parameter(layout())
    plain = nn.Parameter(W.detach().clone(memory_format=torch.contiguous_format))
    options = {"max_side": 5} if optimizer is SOAP else {"block": 4, "length": "muon"}
    tested, reference = (optimizer([p], lr=0.1, interval=2, **options) for p in (W, plain))
    for _ in range(5):
        plain.grad = torch.randn_like(plain)
        W.grad = W.detach().clone().copy_(plain.grad)
        tested.step()
        reference.step()
    assert torch.equal(W, plain)


@every_optimizer
def test_memory_saved_in_one_layout_continues_in_another(optimizer):
    runs = []
    for convert in (False, True):
        torch.manual_seed(0)
        W, V = parameter(6, 3, 4, 4), parameter(6, 3, 4, 4)
        make = functools.partial(optimizer, lr=0.1)
        tested = make([{"params": [W]}, {"params": [V], "geometry": "adamw"}])
        for step in range(4):
            if step == 2 and convert:
                state = copy.deepcopy(tested.state_dict())
                W, V = (
                    nn.Parameter(p.detach().to(memory_format=torch.channels_last)) for p in (W, V)
                )
                tested = make([{"params": [W]}, {"params": [V], "geometry": "adamw"}])
                for saved in state["state"].values():
                    for key, M in saved.items():
                        if M.ndim == 4:
                            saved[key] = M.to(memory_format=torch.channels_last)
                tested.load_state_dict(state)
            W.grad, V.grad = (torch.empty_like(p).copy_(torch.randn(p.shape)) for p in (W, V))
            tested.step()
        runs += [W.detach(), V.detach()]
    torch.testing.assert_close(runs[0], runs[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(runs[1], runs[3], rtol=1e-6, atol=1e-6)


@spectral
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["polar-express", "jordan", "svd"])
def test_matrices_in_a_batch_take_the_steps_they_take_alone(
    optimizer, method, dtype, monkeypatch, set_gradients
):
    shapes = [(8, 8)] * 5 + [(24, 6)] * 4 + [(6, 24)] * 3
    results = []
    for entries in (0, 100, 2**18):  # one by one, a few at once, all at once
        monkeypatch.setitem(matrices._ENTRIES_PER_BATCH, "cpu", entries)
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        precision = None if method == "svd" else torch.float32
        tested = optimizer(params, lr=0.1, method=method, dtype=precision)
        for step in range(3):
            set_gradients(params, step)
            tested.step()
        results.append(params)
    rounding = 4 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    for alone, few, many in zip(*results, strict=True):
        torch.testing.assert_close(few, alone, rtol=rounding, atol=rounding)
        torch.testing.assert_close(many, alone, rtol=rounding, atol=rounding)


def test_matrices_of_equal_shape_are_handled_together(monkeypatch):
    batches = []
    direction = steepest.geometry.Spectral.direction

    def spy(self, G, overwrite=False):
        batches.append(tuple(G.shape))
        return direction(self, G, overwrite)

    params = [parameter(4, 4) for _ in range(5)] + [parameter(4, 6), parameter(6, 4)]
    tested = Muon(params)
    for p in params:
        p.grad = torch.randn_like(p)
    monkeypatch.setattr(steepest.geometry.Spectral, "direction", spy)
    tested.step()
    assert sorted(batches) == [(1, 4, 6), (1, 6, 4), (5, 4, 4)]
    monkeypatch.setitem(matrices._ENTRIES_PER_BATCH, "cpu", 2 * 16 + 5)
    again = Muon(params)  # which works out its batches anew
    batches.clear()
    again.step()
    assert sorted(batches) == [(1, 4, 4), (1, 4, 6), (1, 6, 4), (2, 4, 4), (2, 4, 4)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (SignSGD, {}),
        (Signum, {"momentum": 0.5}),
        (SpectralDescent, {}),
        (SpectralDescent, {"length": "dual"}),
        (Muon, {"momentum": 0.5, "nesterov": False}),
        (Muon, {"momentum": 0.5}),
    ],
)
def test_directions_never_take_the_place_of_gradients_or_memory(
    optimizer, settings, count, set_gradients
):
    """Those of wide matrices take the place of what they are of, which must be a copy."""
    params = [parameter(20, 300) for _ in range(count)]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    set_gradients(params, seed=0)
    gradients = [p.grad.clone() for p in params]
    tested = optimizer(params, lr=0.1, **settings)
    tested.step()
    assert equal([p.grad for p in params], gradients)
    for p, q, G in zip(params, alone, gradients, strict=True):
        q.grad = G.clone()
        optimizer([q], lr=0.1, **settings).step()
        assert torch.allclose(p, q, rtol=0, atol=1e-5)
        if "momentum" in settings:
            assert torch.equal(tested.state[p]["momentum_buffer"], 0.5 * G)


@every_optimizer
def test_a_group_may_mix_precisions(optimizer, set_gradients):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.bfloat16]

    def params():
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(6, 6).to(dtype)) for dtype in dtypes]

    for geometry in ({}, {"geometry": "adamw"}):
        together, apart = params(), params()
        settings = {"lr": 0.1, "weight_decay": 0.1}
        if optimizer in KRONECKER:  # or their turns would not be those that they have alone
            settings["interval"] = 1
        many = [optimizer([{"params": together, **geometry}], **settings)]
        single = [optimizer([{"params": [p], **geometry}], **settings) for p in apart]
        for step in range(3):
            set_gradients(together, step)
            set_gradients(apart, step)
            for each in many + single:
                each.step()
        for p, q in zip(together, apart, strict=True):
            assert p.dtype == q.dtype
            tolerance = 4 * torch.finfo(p.dtype).eps
            rounding = 1e-3 if optimizer in KRONECKER else 1e-6  # of the small eigenvalues
            torch.testing.assert_close(p, q, rtol=tolerance, atol=max(tolerance, rounding))


@every_optimizer
def test_bfloat16_weights_follow_float32_weights(optimizer, set_gradients):
    half, single = parameter(16, 8, dtype=torch.bfloat16), parameter(16, 8)
    single.data.copy_(half.data)
    start = single.detach().clone()
    tested, reference = optimizer([half], lr=0.25), optimizer([single], lr=0.25)
    for step in range(4):
        set_gradients([half], step)
        single.grad = half.grad.float()
        tested.step()
        reference.step()
    for key, t in tested.state[half].items():
        whole = torch.int64 if "steps" in key or "renewed" in key else torch.float32
        assert t.dtype == (whole if "." in key else torch.bfloat16)
    moved, difference = (single - start).norm(), (single - half.float()).norm()
    assert difference < 0.05 * moved


@every_optimizer
@pytest.mark.parametrize("geometry", ["matrix", "adamw"])
def test_empty_parameters_are_no_obstacle(optimizer, geometry):
    W, empty = parameter(3, 3), parameter(0, 3)
    if geometry == "matrix" and optimizer in SPECTRAL + KRONECKER:
        with pytest.raises(ValueError, match="shape"):
            optimizer([empty])
        return
    group = {"geometry": "adamw"} if geometry == "adamw" else {}
    tested = optimizer([{"params": [empty, W], "lr": 0.1, **group}])
    W.grad, empty.grad = torch.ones_like(W), torch.ones_like(empty)
    before = W.detach().clone()
    tested.step()
    torch.testing.assert_close(W.data, before - 0.1)


# Mixed precision and clipping


@every_optimizer
def test_it_works_with_clipped_and_scaled_gradients(optimizer, network):
    def loss(model):
        images = torch.ones(2, 4, 5, 5)
        return model(images, torch.tensor([0, 1])).square().mean()

    plain, scaled = network(), network()
    reference, tested = optimizer(plain, lr=0.01), optimizer(scaled, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for _ in range(4):
        reference.zero_grad()
        loss(plain).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        reference.step()

        tested.zero_grad()
        scaler.scale(loss(scaled)).backward()
        scaler.unscale_(tested)
        nn.utils.clip_grad_norm_(scaled.parameters(), 0.1)
        scaler.step(tested)
        scaler.update()
    assert equal(list(plain.parameters()), list(scaled.parameters()))


@every_optimizer
def test_an_overflow_under_a_scaler_is_left_out_by_the_scaler(optimizer):
    W = parameter(3, 3)
    before = W.detach().clone()
    tested = optimizer([W])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((W * torch.inf).sum()).backward()
    scaler.step(tested)
    scaler.update()
    assert torch.equal(W, before)
    assert scaler.get_scale() == 2.0


# Gradients that are not finite


@every_optimizer
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["stem.weight", "qkv.weight", "experts", "head.bias"])
def test_a_gradient_that_is_not_finite_raises_before_anything_changes(
    optimizer, where, value, network, set_gradients, snapshot
):
    model = network()
    tested = optimizer(model, weight_decay=0.1)
    set_gradients(model.parameters(), 0)
    tested.step()
    before, keys = snapshot(tested), len(tested.state)
    set_gradients(model.parameters(), 1)
    model.get_parameter(where).grad.view(-1)[-1] = value
    with pytest.raises(FloatingPointError, match=rf"parameter {where}; noth"):
        tested.step()
    assert equal(snapshot(tested), before)
    assert len(tested.state) == keys
    set_gradients(model.parameters(), 1)
    tested.step()  # and training can go on
    assert not equal(snapshot(tested), before)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_single_broken_entry_is_found_wherever_it_is(optimizer, value, dtype):
    W = parameter(33, 65, dtype=dtype)
    tested = optimizer([{"params": [W], "views": [MatrixView.of((33, 65), transposed=True)]}])
    for row, column in ((0, 0), (32, 64), (17, 40), (0, 64)):
        W.grad = torch.randn_like(W)
        W.grad[row, column] = value
        with pytest.raises(FloatingPointError):
            tested.step()
    assert not tested.state


@every_optimizer
def test_the_first_step_can_be_refused_too(optimizer):
    first, last = parameter(3, 3), parameter(2, 2)
    tested = optimizer([{"params": [first]}, {"params": [last], "geometry": "adamw"}])
    before = first.detach().clone()
    first.grad, last.grad = torch.randn(3, 3), torch.full((2, 2), torch.nan)
    with pytest.raises(FloatingPointError, match=r"1 of 2 grad.*\(2, 2\)"):
        tested.step()
    assert torch.equal(first, before)
    assert not tested.state


@every_optimizer
def test_steps_that_are_not_finite_can_be_skipped_and_are_counted(
    optimizer, network, set_gradients, snapshot
):
    models = network(), network()
    skipping, clean = optimizer(models[0], nonfinite="skip"), optimizer(models[1])
    for step in range(5):
        set_gradients(models[0].parameters(), step)
        if step in (0, 3):
            models[0].head.bias.grad[0] = torch.nan
            before = snapshot(skipping)
            assert skipping.step(lambda: 1.5) == 1.5
            assert equal(snapshot(skipping), before)
            continue
        set_gradients(models[1].parameters(), step)
        skipping.step()
        clean.step()
    assert skipping.skipped_steps == 2
    assert clean.skipped_steps == 0
    assert equal(snapshot(skipping), snapshot(clean))


@pytest.mark.parametrize("optimizer", [SignSGD, Signum, *SPECTRAL])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30, 1e37])
def test_large_and_small_gradients_are_finite(optimizer, size):
    W = parameter(4, 4)
    tested = optimizer([W], lr=0.1)
    for _ in range(3):
        before = W.detach().clone()
        W.grad = torch.randn(4, 4) * size
        tested.step()
        assert W.isfinite().all()
        assert (W - before).norm() > 0.1


# Saving and continuing


def _torch_save(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_optimizer
@pytest.mark.parametrize("before", [0, 3], ids=["empty", "trained"])
@pytest.mark.parametrize("through", [copy.deepcopy, _torch_save], ids=["memory", "torch.save"])
def test_training_continues_bit_for_bit_from_a_state_dict(
    optimizer, through, before, network, train, snapshot
):
    model, other = network(), network()
    tested = optimizer(model, lr=0.02, weight_decay=0.1)
    train(model, tested, before, seed=1)
    state = through({"model": model.state_dict(), "optimizer": tested.state_dict()})
    other.load_state_dict(state["model"])
    resumed = optimizer(other, lr=0.5, weight_decay=0.3)
    resumed.load_state_dict(state["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.02
    for group, own in zip(resumed.param_groups, tested.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in own.items() if k != "params"
        }
    train(model, tested, 3, seed=2)
    train(other, resumed, 3, seed=2)
    assert equal(snapshot(tested), snapshot(resumed))


@every_optimizer
@pytest.mark.parametrize("before", [0, 3], ids=["empty", "trained"])
@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_training_continues_bit_for_bit_in_a_copy(
    optimizer, through, before, network, set_gradients, snapshot
):
    model = network()
    tested = optimizer(model, lr=0.02, weight_decay=0.1, nonfinite="skip")
    for step in range(before):
        set_gradients(model.parameters(), step)
        tested.step()
    tested.skipped_steps = 4
    params, twin = through((list(model.parameters()), tested))
    assert (twin.nonfinite, twin.skipped_steps) == ("skip", 4)
    for step in range(3):
        set_gradients(model.parameters(), 10 + step)
        set_gradients(params, 10 + step)
        tested.step()
        twin.step()
    assert equal(snapshot(tested), snapshot(twin))
    twin.add_param_group({"params": [("new", parameter(3))], "geometry": "adamw"})
    assert twin.param_groups[-1]["betas"] == tested.param_groups[-1]["betas"]


@every_optimizer
@pytest.mark.parametrize("flat", [False, True])
def test_training_continues_bit_for_bit_from_a_distributed_checkpoint(
    optimizer, flat, network, train, snapshot, tmp_path
):
    model, other = network(), network()
    tested, resumed = optimizer(model, lr=0.02), optimizer(other, lr=0.02)
    train(model, tested, 3, seed=1)
    # By default the library insists on a state for every parameter; these two have none to save.
    memoryless = optimizer in (SignSGD, SpectralDescent)
    options = StateDictOptions(flatten_optimizer_state_dict=flat, strict=not memoryless)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group, which is meant
        saved = dict(zip("mo", get_state_dict(model, tested, options=options), strict=True))
        dcp.save(saved, checkpoint_id=tmp_path)
        loaded = dict(zip("mo", get_state_dict(other, resumed, options=options), strict=True))
        dcp.load(loaded, checkpoint_id=tmp_path)
        set_state_dict(
            other,
            resumed,
            model_state_dict=loaded["m"],
            optim_state_dict=loaded["o"],
            options=options,
        )
    train(model, tested, 3, seed=2)
    train(other, resumed, 3, seed=2)
    assert equal(snapshot(tested), snapshot(resumed))


OPTIONS = {
    SignSGD: [{}],
    Signum: [{}],
    SpectralDescent: [{}],
    Muon: [{}],
    TEON: [{}],
    Shampoo: [{"block": 8, "interval": 3}, {"sides": "left", "length": "muon"}],
    KLShampoo: [{"block": 8, "interval": 3}, {"sequential": True, "length": "own"}],
    SOAP: [{"max_side": 20, "interval": 3}, {"sides": "right", "length": "spectral"}],
}
every_option = pytest.mark.parametrize(
    ("optimizer", "options"),
    [(optimizer, options) for optimizer, those in OPTIONS.items() for options in those],
    ids=lambda value: getattr(value, "__name__", str(value)),
)


def _distributed(model, tested, other, resumed, folder):
    """Save and load as torch.distributed.checkpoint does, into a fresh optimizer."""
    options = StateDictOptions(strict=not isinstance(tested, SignSGD | SpectralDescent))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group, which is meant
        saved = dict(zip("mo", get_state_dict(model, tested, options=options), strict=True))
        dcp.save(saved, checkpoint_id=folder)
        loaded = dict(zip("mo", get_state_dict(other, resumed, options=options), strict=True))
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(
            other,
            resumed,
            model_state_dict=loaded["m"],
            optim_state_dict=loaded["o"],
            options=options,
        )


@every_option
@pytest.mark.parametrize("through", ["torch.save", "distributed"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_every_option_and_precision_continues_bit_for_bit(
    optimizer, options, dtype, state_dtype, through, network, set_gradients, snapshot, tmp_path
):
    settings = {"state_dtype": state_dtype, "rounding": "stochastic", **options}
    model, other = network().to(dtype), network().to(dtype)
    tested = optimizer(model, lr=0.02, weight_decay=0.1, **settings)
    for step in range(5):  # not a multiple of the interval
        set_gradients(model.parameters(), step)
        tested.step()
    resumed = optimizer(other, lr=0.5, **settings)
    if through == "distributed":
        _distributed(model, tested, other, resumed, tmp_path)
    else:
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(_torch_save(tested.state_dict()))
    assert equal(snapshot(tested), snapshot(resumed))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in tested.state.get(p, {}).items():
            assert resumed.state[q][key].dtype == value.dtype
    for step in range(10, 17):
        for each, params in ((tested, model.parameters()), (resumed, other.parameters())):
            set_gradients(params, step)
            each.step()
    assert equal(snapshot(tested), snapshot(resumed))


@pytest.mark.parametrize("optimizer", [SignSGD, Signum, *SPECTRAL])
def test_a_state_of_the_first_version_can_be_loaded(optimizer, network, set_gradients, snapshot):
    """With the momentum alone for a matrix, and a group of the settings that there were."""
    old_keys = {
        *("params", "param_names", "lr", "geometry", "momentum", "nesterov", "weight_decay"),
        *("scale", "method", "steps", "dtype", "views", "betas", "eps", "fused"),
    }
    model, other = network(), network()
    tested = optimizer(model, lr=0.02)
    for step in range(3):
        set_gradients(model.parameters(), step)
        tested.step()
    state = copy.deepcopy(tested.state_dict())
    for group in state["param_groups"]:
        for key in group.keys() - old_keys:
            del group[key]
    matrices_of = {i for g in state["param_groups"] if "views" in g for i in g["params"]}
    for i, kept in state["state"].items():
        for key in set(kept) - {"momentum_buffer"} if i in matrices_of else ():
            del kept[key]
    other.load_state_dict(model.state_dict())
    resumed = optimizer(other, lr=0.5)
    resumed.load_state_dict(_torch_save(state))
    assert resumed.param_groups[0]["lr"] == 0.02
    for group, fresh in zip(resumed.param_groups, optimizer(network()).param_groups, strict=True):
        assert group.keys() == fresh.keys()
    for step in range(3, 6):
        for each, params in ((tested, model.parameters()), (resumed, other.parameters())):
            set_gradients(params, step)
            each.step()
    assert equal(snapshot(tested), snapshot(resumed))


# In the middle of a run


@pytest.mark.parametrize("optimizer", [Signum, Muon, TEON, *KRONECKER])
def test_a_schedule_can_change_the_momentum_too(optimizer, network, set_gradients):
    model = network()
    tested = optimizer(model, lr=0.02)
    schedule = OneCycleLR(tested, [0.02, 0.01], total_steps=30, base_momentum=0.8, max_momentum=0.9)
    seen = set()
    for step in range(28):
        before = copy.deepcopy(model.state_dict())
        seen.add(tested.param_groups[0]["momentum"])
        set_gradients(model.parameters(), step)
        tested.step()
        schedule.step()
        for name, p in model.named_parameters():
            assert (p - before[name]).square().mean().sqrt() < 0.05
    assert len(seen) > 10
    assert (min(seen), max(seen)) == pytest.approx((0.8, 0.9), abs=0.01)


@every_option
def test_parameters_can_be_frozen_for_a_while(optimizer, options, network, set_gradients):
    model, reference = network(), network()
    tested, plain = optimizer(model, lr=0.02, **options), optimizer(reference, lr=0.02, **options)
    frozen = "qkv.weight"
    for step in range(12):
        rests = 4 <= step < 9
        for each in (model, reference):
            set_gradients(each.parameters(), step)
        model.get_parameter(frozen).requires_grad_(not rests)
        if rests:
            model.get_parameter(frozen).grad = None
            before = model.get_parameter(frozen).detach().clone()
        tested.step()
        plain.step()
        if rests:
            assert torch.equal(model.get_parameter(frozen), before)
    # All others go their way, at the same turns, and the frozen one goes on.
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if name == frozen:
            assert not torch.equal(p, before)
            assert tested.state[p].keys() == plain.state[q].keys()
        else:
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@every_option
def test_a_group_added_later_starts_afresh(optimizer, options, set_gradients):
    first, later, alone = parameter(12, 12), parameter(12, 12), parameter(12, 12)
    alone.data.copy_(later.data)
    tested, fresh = optimizer([first], lr=0.1, **options), optimizer([alone], lr=0.1, **options)
    for step in range(12):
        if step == 5:
            tested.add_param_group({"params": [later]})
        set_gradients([first], step)
        if step >= 5:
            set_gradients([later], step)
            alone.grad = later.grad.clone()
            fresh.step()
        tested.step()
    torch.testing.assert_close(later, alone, rtol=0, atol=0)


@every_option
def test_a_compiled_step_is_the_step(optimizer, options, network, set_gradients):
    results = []
    for compiled in (False, True):
        model = network()
        tested = optimizer(model, lr=0.02, weight_decay=0.1, **options)
        step = torch.compile(tested.step, backend="eager") if compiled else tested.step
        for i in range(4):
            set_gradients(model.parameters(), i)
            for group in tested.param_groups:
                group["lr"] *= 0.9
            step()
        results.append([p.detach() for p in model.parameters()])
    torch._dynamo.reset()
    assert equal(*results)


@every_optimizer
def test_loading_keeps_the_views_of_the_optimizer(optimizer):
    shape = (6, 6)
    saved = optimizer([{"params": [parameter(*shape)], "views": [MatrixView(1, 6, 6)]}])
    own = [(1, 6, 6, False, (2, 2, 2))]
    tested = optimizer([{"params": [parameter(*shape)], "views": own}])
    tested.load_state_dict(saved.state_dict())
    assert tested.param_groups[0]["views"] == own


@every_optimizer
def test_loading_other_groups_raises_and_changes_nothing(
    optimizer, network, set_gradients, snapshot
):
    model = network()
    tested = optimizer(model)
    set_gradients(model.parameters(), 0)
    tested.step()
    before = snapshot(tested)
    groups = copy.deepcopy(tested.param_groups)
    good = copy.deepcopy(tested.state_dict())
    for state in good["state"].values():
        for value in state.values():
            value.fill_(9.0)
    one_group = {**good, "param_groups": good["param_groups"][:1]}
    too_short = copy.deepcopy(good)
    too_short["param_groups"][1]["params"].pop()
    other_geometry = copy.deepcopy(good)
    other_geometry["param_groups"][1]["geometry"] = "sign"
    foreign = torch.optim.AdamW(
        [{"params": weights(tested)[:6]}, {"params": weights(tested)[6:]}]
    ).state_dict()
    for state, message in (
        (one_group, "number of .* groups"),
        (too_short, "size"),
        (other_geometry, "group 1 .* 'sign'"),
        (foreign, "group 0 .* None"),
    ):
        with pytest.raises(ValueError, match=message):
            tested.load_state_dict(state)
        assert equal(snapshot(tested), before)
        for group, old in zip(tested.param_groups, groups, strict=True):
            assert {k: v for k, v in group.items() if k != "params"} == {
                k: v for k, v in old.items() if k != "params"
            }
    tested.load_state_dict(good)
    assert not equal(snapshot(tested), before)


# Errors, each a sentence

WRONG_SETTINGS = [
    ({"lr": -0.1}, "lr=-0.1"),
    ({"lr": float("nan")}, "got lr=nan"),
    ({"lr": float("inf")}, "got lr=inf"),
    ({"lr": torch.tensor([0.1, 0.2])}, r"learning rate of shape \(2,\), expected one number"),
    ({"weight_decay": -1.0}, "got weight_decay=-1.0"),
    ({"momentum": 1.0}, "momentum=1.0"),
    ({"momentum": -0.1}, "got momentum=-0.1"),
    ({"scale": "moonlight"}, "scale='moonlight'"),
    ({"geometry": "manhattan"}, "got geometry='manhattan'"),
    ({"decay": "l2"}, "got decay='l2'"),
    ({"rounding": "up"}, "got rounding='up'"),
    ({"state_dtype": torch.int32}, "got state_dtype=torch.int32"),
    ({"state_dtype": torch.bfloat16}, "got state_dtype=torch.bfloat16"),
    ({"geometry": "adamw", "betas": (0.9, 1.0)}, r"got betas=\(0.9, 1.0\)"),
    ({"geometry": "adamw", "betas": (-0.9, 0.9)}, r"got betas=\(-0.9, 0.9\)"),
    ({"geometry": "adamw", "eps": -1e-8}, "got eps=-1e-08"),
    ({"geometry": "adamw", "lr": -1.0}, "got lr=-1.0"),
    ({"views": []}, None),  # no views is as if not given
    ({"views": [MatrixView(1, 2, 2)] * 2}, "got 2 views for 1 parameters"),
    (
        {"views": [MatrixView(1, 3, 3)]},
        r"got the view 1 x \(3, 3\) for a parameter of shape \(2, 2\)",
    ),
    ({"views": [MatrixView(1, 2, 2, False, (1, 2))]}, r"got splits \(1, 2\)"),
]


@every_optimizer
@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS, ids=lambda value: str(value)[:40])
def test_wrong_settings_are_refused_and_leave_the_optimizer_as_it_was(optimizer, settings, message):
    tested = optimizer([parameter(3, 3)])
    before = [dict(group) for group in tested.param_groups]
    group = {"params": [parameter(2, 2)], **settings}
    if message is None:
        tested.add_param_group(group)
        assert len(tested.param_groups) == 2
        return
    with pytest.raises(ValueError, match=message):
        tested.add_param_group(group)
    assert [dict(group) for group in tested.param_groups] == before
    with pytest.raises(ValueError, match=message):
        optimizer([group])
    tested.add_param_group({"params": group["params"]})  # it is not half inside


OWN_SETTINGS = {
    (SpectralDescent, Muon, TEON): [
        ({"method": "newton"}, "got method='newton'"),
        ({"steps": 0}, "steps=0"),
        ({"method": "you", "steps": 6}, "got steps=6"),
        ({"method": "svd", "steps": 3}, "got steps=3"),
    ],
    (SOAP,): [
        ({"max_side": 0}, "max_side=0"),
        ({"normalize": "rms"}, "normalize='rms'"),
        (
            {"block": 1, "length": "spectral"},
            'length="spectral" .*=1 ',
        ),
    ],
    (Shampoo, KLShampoo): [
        ({"block": 0}, "block=0"),
        ({"graft": "sgd"}, "got graft='sgd'"),
        ({"graft_beta2": 1.0}, "got graft_beta2=1.0"),
        ({"graft_eps": -1.0}, "got graft_eps=-1.0"),
    ],
    (Shampoo, SOAP): [({"sides": "top"}, "got sides='top'")],
    (Shampoo,): [
        ({"exponent": 0.0}, "got exponent=0.0"),
        ({"exponent": -0.5}, "got exponent=-0.5"),
        ({"exponent": float("nan")}, "got exponent=nan"),
    ],
    KRONECKER: [
        ({"beta2": 1.0}, "beta2=1.0"),
        ({"eps": -1e-8}, "got eps=-1e-08"),
        ({"interval": 0}, "interval=0"),
        ({"interval": 2.5}, "got interval=2.5"),
    ],
}


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [(each, *case) for those, cases in OWN_SETTINGS.items() for each in those for case in cases],
    ids=lambda value: getattr(value, "__name__", str(value)[:40]),
)
def test_wrong_settings_of_its_own_are_refused(optimizer, settings, message):
    tested = optimizer([parameter(3, 3)])
    with pytest.raises(ValueError, match=message):
        optimizer([parameter(2, 2)], **settings)
    with pytest.raises(ValueError, match=message):
        tested.add_param_group({"params": [parameter(2, 2)], **settings})
    assert len(tested.param_groups) == 1


@of_matrices
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), "0-dimensional parameter"),
        ((5,), r"1-dim.*\(5,\).* model"),
        ((2, 3, 4), "convolution or .* experts"),
    ],
    ids=str,
)
def test_parameters_that_are_no_matrices_are_refused(optimizer, shape, message):
    tested = optimizer([parameter(3, 3)])
    with pytest.raises(ValueError, match=message):
        optimizer([parameter(3, 3), parameter(*shape)])
    with pytest.raises(ValueError, match=message):
        tested.add_param_group({"params": [parameter(*shape)]})
    assert len(tested.param_groups) == 1


@every_optimizer
def test_complex_parameters_are_refused_with_the_remedy(optimizer):
    W = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="view_as_real"):
        optimizer([W])
    with pytest.raises(ValueError, match="view_as_real"):
        optimizer([{"params": [W], "geometry": "adamw"}])


@every_optimizer
def test_sparse_gradients_are_refused_before_anything_changes(optimizer):
    embedding = nn.Embedding(4, 3, sparse=True)
    W = parameter(3, 3)
    tested = optimizer([{"params": [W]}, {"params": embedding.weight, "geometry": "adamw"}])
    before = W.detach().clone()
    (embedding(torch.tensor([1, 2])) @ W).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        tested.step()
    assert torch.equal(W, before)
    assert not tested.state


@every_optimizer
def test_unknown_names_and_empty_lists_are_refused(optimizer):
    with pytest.raises(ValueError, match="nonfinite='ignore'"):
        optimizer([parameter(2, 2)], nonfinite="ignore")
    with pytest.raises(ValueError, match="empty"):
        optimizer([])
    with pytest.raises(TypeError, match="iterable"):
        optimizer(parameter(2, 2))
    with pytest.raises(ValueError, match="without parameters"):
        optimizer(nn.ReLU())
    with pytest.raises(ValueError, match="scale='rms'"):
        update_scale("rms", 1, 1)


@every_optimizer
def test_a_parameter_cannot_be_in_two_groups(optimizer):
    W = parameter(2, 2)
    tested = optimizer([W])
    with pytest.raises(ValueError, match="one parameter group"):
        tested.add_param_group({"params": [W], "geometry": "adamw"})
    assert len(tested.param_groups) == 1


@pytest.mark.parametrize("make", [SignSGD, Muon, SOAP])
def test_a_step_keeps_no_gradient_alive(make):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6, bias=False))
    tested = make(model)
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        gradients = [weakref.ref(p.grad) for p in model.parameters()]
        tested.step()
        tested.zero_grad()
        assert not any(gradient() is not None for gradient in gradients)


def test_a_parameter_whose_gradient_comes_and_goes_moves_when_it_has_one():
    params = [parameter(4, 4) for _ in range(3)]
    tested = Muon(params)
    for step in range(6):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p) if (step + i) % 3 else None
        tested.step()
        moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
        assert moved == [p.grad is not None for p in params]
