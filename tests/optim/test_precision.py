"""One precision policy: types of parameters and memory, autocast, quantized bases."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

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
    roles,
)
from steepest.optim.precision import adam_eps, factor_dtype, memory_dtype

OPTIMIZERS = [SignSGD, Signum, SpectralDescent, Muon, TEON, Shampoo, KLShampoo, SOAP]
KRONECKER = (Shampoo, KLShampoo, SOAP)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
pytestmark = pytest.mark.filterwarnings("ignore:TEON found nothing to stack")


def made(optimizer, params, **settings):
    """An optimizer with a group of matrices and, for what is none, an AdamW group."""
    matrices = [p for p in params if p.ndim > 1]
    groups = [{"params": matrices}]
    if optimizer is TEON:
        groups[0]["stacks"] = [[0] for _ in matrices]
    if vectors := [p for p in params if p.ndim == 1]:
        groups.append({"params": vectors, "geometry": "adamw"})
    return optimizer(groups, **settings)


def params_of(dtype, seed=0):
    torch.manual_seed(seed)
    shapes = [(6, 4), (6, 4), (5,)]
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def train(optimizer, params, steps, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            G = size * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = G.to(p.dtype)
        optimizer.step()
    return params


POLICY = [  # parameter, state_dtype, memory of entries, factors
    (torch.float64, None, torch.float64, torch.float64),
    (torch.float64, torch.float32, torch.float32, torch.float32),
    (torch.float32, None, torch.float32, torch.float32),
    (torch.float32, torch.float64, torch.float64, torch.float64),
    (torch.bfloat16, None, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float64, torch.float64, torch.float64),
    (torch.float16, None, torch.float32, torch.float32),
    (torch.float16, torch.float64, torch.float64, torch.float64),
]


@every_optimizer
@pytest.mark.parametrize(("dtype", "state_dtype", "entries", "factors"), POLICY, ids=str)
def test_the_types_of_memory_are_those_of_the_table(
    optimizer, dtype, state_dtype, entries, factors
):
    params = params_of(dtype)
    tested = made(optimizer, params, lr=0.01, state_dtype=state_dtype)
    train(tested, params, 12)
    for p in params:
        group = {"state_dtype": state_dtype}
        assert memory_dtype(group, p) == entries
        assert factor_dtype(group, p) == factors
        assert p.isfinite().all()
        for key, value in tested.state[p].items():
            if key == "step" or not value.is_floating_point():
                continue
            assert value.dtype == (factors if "." in key else entries), key


@every_optimizer
@pytest.mark.parametrize(("dtype", "state_dtype", "entries", "factors"), POLICY, ids=str)
def test_a_rate_of_zero_changes_no_bit(optimizer, dtype, state_dtype, entries, factors):
    params = params_of(dtype)
    before = [p.detach().clone() for p in params]
    train(made(optimizer, params, lr=0.0, state_dtype=state_dtype, weight_decay=0.1), params, 12)
    assert all(torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True))


@every_optimizer
def test_float64_weights_with_float32_memory_step_as_with_float64_memory(optimizer):
    ways = []
    for state_dtype in (None, torch.float32):
        params = params_of(torch.float64)
        train(made(optimizer, params, lr=0.01, state_dtype=state_dtype), params, 12)
        ways.append(torch.cat([p.detach().flatten() for p in params]))
    # The basis of a null space, which a first gradient of rank 4 has, is for rounding to decide.
    assert (ways[0] - ways[1]).abs().max() < (1e-2 if optimizer is SOAP else 1e-4)
    assert (ways[1] - ways[1].float().double()).abs().max() > 1e-10  # not rounded to float32


@every_optimizer
@pytest.mark.parametrize("where", [0, 2])
def test_float64_gradients_beyond_float32_memory_are_refused(optimizer, where):
    params = params_of(torch.float64)
    tested = made(optimizer, params, lr=0.01, state_dtype=torch.float32)
    train(tested, params, 2)
    before = [copy.deepcopy(tested.state[p]) for p in params], [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    params[where].grad[0] = 1e50
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        tested.step()
    for p, state, old in zip(params, *before, strict=True):
        assert torch.equal(p.detach(), old)
        assert all(torch.equal(value, state[key]) for key, value in tested.state[p].items())
    for p in params:
        p.grad = torch.full_like(p, 1e-60)  # 0 in float32, and no step
    tested.step()
    assert all(p.isfinite().all() for p in params)


# float16


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("size", [1e-4, 1e-6, 300.0])
def test_float16_parameters_of_adamw_move_as_float32_ones(dense, size):
    ways = []
    for dtype in (torch.float16, torch.float32):
        p = nn.Parameter(torch.zeros(8, 4, dtype=dtype))
        tested = Muon([{"params": [p], "geometry": "adamw", "lr": 0.01}])
        for t in range(30):
            G = torch.full((8, 4), size * (1 + t % 3)).half()
            p.grad = (G if dense else G.t().contiguous().t()).to(dtype)
            tested.step()
        ways.append(p.detach().float())
    assert ways[1].abs().min() > 0.2
    torch.testing.assert_close(*ways, rtol=2e-2, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_with_half_precision_memory_is_converted(optimizer):
    params = params_of(torch.float16)
    tested = made(optimizer, params, lr=0.01)
    train(tested, params, 5)
    old = copy.deepcopy(tested.state_dict())
    for state in old["state"].values():  # as AdamW kept it in earlier versions
        for key in state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
            state[key] = state[key].half()
    file = io.BytesIO()
    torch.save(old, file)
    file.seek(0)
    resumed = made(optimizer, params, lr=0.01)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for p in params:
        for key, value in resumed.state[p].items():
            if key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                assert value.dtype == torch.float32
                torch.testing.assert_close(value, tested.state[p][key], rtol=1e-3, atol=1e-6)
    train(resumed, params, 3)
    assert all(p.isfinite().all() for p in params)


# bfloat16 in the AdamW group


def test_rounding_at_random_is_for_the_adamw_group_too():
    p = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    settings = {"lr": 2.0**-12, "rounding": "stochastic"}  # a sixteenth of the spacing
    tested = Muon([{"params": [p], "geometry": "adamw", **settings}])
    for _ in range(64):
        p.grad = torch.ones_like(p)
        tested.step()
    assert float(p.detach().float().mean()) == pytest.approx(1 - 64 * 2.0**-12, abs=2e-3)
    assert {value.dtype for key, value in tested.state[p].items() if key != "step"} == {p.dtype}


def test_both_ways_of_adamw_agree_in_bfloat16():
    """Where layouts differ the kernel is not used, but the precision is the same."""
    ways = []
    for dense in (True, False):
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(16, 8, dtype=torch.bfloat16))
        tested = Muon([{"params": [p], "geometry": "adamw", "lr": 0.01, "weight_decay": 1e-2}])
        for _ in range(100):
            G = torch.randn(16, 8).bfloat16()
            p.grad = G if dense else G.t().contiguous().t()
            tested.step()
        ways.append([p.detach(), *(tested.state[p][key] for key in ("exp_avg", "exp_avg_sq"))])
    for first, second in zip(*ways, strict=True):
        assert second.dtype == torch.bfloat16
        torch.testing.assert_close(first.float(), second.float(), rtol=2**-6, atol=2**-8)


# Autocast


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in "ab")
        self.up, self.down = nn.Linear(8, 40), nn.Linear(40, 8)
        self.head = nn.Linear(8, 7)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.conv(x.mT).mT
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return self.head(x + self.down(self.up(x).relu()))


OPTIONS = [
    *((optimizer, {}) for optimizer in OPTIMIZERS),
    (SpectralDescent, {"length": "dual"}),
    (Muon, {"method": "svd"}),
    (Muon, {"momentum": 0.0, "decay": "cautious"}),
    (Shampoo, {"length": "muon", "interval": 3}),
    (Shampoo, {"length": "own", "exponent": 1 / 4, "interval": 3}),
    (KLShampoo, {"sequential": True, "interval": 3}),
    (SOAP, {"length": "spectral", "interval": 3}),
]


@pytest.mark.parametrize(("optimizer", "options"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_around_a_step_changes_no_bit(optimizer, options, dtype):
    def run(amp):
        torch.manual_seed(0)
        model = Network().to(dtype)
        tested = optimizer(model, lr=0.01, weight_decay=0.1, **options)
        for _ in range(6):
            ids = torch.randint(7, (2, 5))

            def closure(ids=ids):
                tested.zero_grad()
                logits = model(ids).flatten(0, 1)
                seen.append(torch.is_autocast_enabled("cpu"))
                loss = nn.functional.cross_entropy(logits.float(), ids.flatten())
                loss.backward()
                return loss

            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                closure()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                tested.step()
        kept = [t for p in model.parameters() for t in tested.state[p].values()]
        return [p.detach() for p in model.parameters()] + kept

    seen = []
    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_a_closure_runs_with_the_autocast_of_the_caller():
    W = nn.Parameter(torch.eye(3))
    tested = Muon([W], lr=0.1)
    seen = []

    def closure():
        tested.zero_grad()
        product = W @ W
        seen.append(product.dtype)
        loss = product.float().sum()
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        tested.step(closure)
        assert (W @ W).dtype == torch.bfloat16
    assert seen == [torch.bfloat16]


# Types that cannot be trained

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@every_optimizer
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_parameters_are_refused_by_name(optimizer, dtype):
    weight = nn.Parameter(torch.zeros(4, 4).to(dtype))
    with pytest.raises(ValueError, match=r"up\.weight .*\.float8"):
        optimizer([("up.weight", weight)])
    with pytest.raises(ValueError, match=r"\(4, 4\) of torch\.float8"):
        optimizer([{"params": [weight], "geometry": "adamw"}])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = weight
    with pytest.raises(ValueError, match=r"1\.weight .*\.float8"):
        optimizer(model)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    tested = Muon([nn.Parameter(torch.zeros(4, 4))])
    with pytest.raises(ValueError, match=r"complex64.*view_as_real"):
        tested.add_param_group({"params": [nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))]})
    assert len(tested.param_groups) == 1


FROZEN = [torch.uint8, torch.int8, torch.int32, torch.bool, torch.complex64, *FLOAT8]


class Adapted(nn.Module):
    """A quantized base with an adapter of rank 2 in each of two layers."""

    def __init__(self, dtype):
        super().__init__()
        for name in ("q_proj", "k_proj"):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.ones(8, 8).to(dtype), requires_grad=False)
            layer.lora_A = nn.Parameter(torch.randn(2, 8))
            layer.lora_B = nn.Parameter(torch.zeros(8, 2))
            self.add_module(name, layer)

    def forward(self, x):
        for layer in (self.q_proj, self.k_proj):
            x = x @ layer.weight.float() + x @ layer.lora_A.T @ layer.lora_B.T
        return x


@every_optimizer
@pytest.mark.parametrize("dtype", FROZEN, ids=str)
@pytest.mark.filterwarnings("ignore:.*discards the imaginary part")
def test_a_frozen_quantized_base_is_left_out_and_adapters_train(optimizer, dtype):
    torch.manual_seed(0)
    model = Adapted(dtype)
    before = copy.deepcopy(model.state_dict())
    for params in (model, roles(model), model.parameters(), model.named_parameters()):
        tested = optimizer(params, lr=0.01)
        kept = [p for group in tested.param_groups for p in group["params"]]
        assert len(kept) == 4
        assert all(p.requires_grad for p in kept)
        assert "lora" in str(tested) or params is not model
        model(torch.randn(3, 8)).square().mean().backward()
        tested.step()
        tested.zero_grad()
        tested.load_state_dict(tested.state_dict())
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), before[name]) == name.endswith("weight")


def test_what_a_group_says_of_a_frozen_base_is_left_out_with_it():
    base = nn.Parameter(torch.zeros(6, dtype=torch.int8), requires_grad=False)
    first, second = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 3, 4))
    views = [MatrixView(1, 3, 4), None, MatrixView(2, 3, 4)]
    group = {"params": [first, base, second], "views": views, "stacks": [[0], None, [0, 1]]}
    tested = TEON([group], lr=0.01)
    assert len(tested.param_groups[0]["views"]) == len(tested.param_groups[0]["stacks"]) == 2
    assert len(group["params"]) == 3  # the caller's own is as it was
    first.grad, second.grad = torch.randn(3, 4), torch.randn(2, 3, 4)
    tested.step()


def test_a_group_of_a_frozen_base_alone_is_empty():
    base = nn.Parameter(torch.zeros(6, 6, dtype=torch.uint8), requires_grad=False)
    W = nn.Parameter(torch.randn(4, 4))
    tested = Muon([{"params": [base]}, {"params": [W]}], lr=0.01)
    W.grad = torch.randn(4, 4)
    tested.step()
    assert [len(group["params"]) for group in tested.param_groups] == [0, 1]
    assert "4 x 4" in str(tested) or "(4, 4)" in str(tested)


def test_the_floor_of_eps():
    assert adam_eps(1e-8, torch.float32) == 1e-8
    assert adam_eps(0.0, torch.bfloat16) == adam_eps(0.0, torch.float32) > 1e-20
    assert 0 < adam_eps(0.0, torch.float64) < 1e-150
