"""Identities between the optimizers, and the symmetries that each has or has not.

All through the optimizers themselves, in float64; D is the update of a step with a rate of 1.
"""

from __future__ import annotations

import copy
import io
import math

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
)
from steepest.geometry import Sign, Spectral
from steepest.linalg import polar
from steepest.optim import reference
from steepest.optim.rounding import rounded_at_random

EXACT = {"method": "svd", "dtype": None}
SPECTRAL = {**EXACT, "scale": "none"}
KRONECKER = {"interval": 1}
NO_MEMORY = {"momentum": 0.0, "beta2": 0.0, "eps": 0.0, "interval": 1, "length": "own"}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n, seed=0):
    return torch.linalg.qr(randn(n, n, seed=seed)).Q


def parameter(W, dtype=torch.float64):
    return nn.Parameter(W.detach().clone().to(dtype))


def way(make, gradients):
    """The weights after each step from zero under these gradients, `(steps, out, in)`."""
    W = parameter(torch.zeros_like(gradients[0]))
    optimizer = make([W])
    seen = []
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
        seen.append(W.detach().clone())
    return torch.stack(seen)


# Spectral descent, in three ways


def trajectory(make, steps=50):
    """Least squares with a batch for each step: the weights after each step."""
    W = parameter(randn(6, 8))
    target = randn(6, 8, seed=1)
    optimizer = make([W])
    seen = []
    for t in range(steps):
        X = randn(8, 12, seed=100 + t)
        optimizer.zero_grad()
        ((W - target) @ X + randn(6, 12, seed=200 + t)).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - t / steps)
        optimizer.step()
        seen.append(W.detach().clone())
    return torch.stack(seen)


def test_without_memory_spectral_descent_muon_and_shampoo_go_the_same_way():
    spectral = trajectory(lambda params: SpectralDescent(params, 0.2, **SPECTRAL))
    muon = trajectory(lambda params: Muon(params, 0.2, momentum=0.0, **SPECTRAL))
    shampoo = trajectory(lambda params: Shampoo(params, 0.2, exponent=1 / 4, **NO_MEMORY))
    one_sided = trajectory(
        lambda params: Shampoo(params, 0.2, exponent=1 / 2, sides="left", **NO_MEMORY)
    )
    assert torch.equal(muon, spectral)
    torch.testing.assert_close(shampoo, spectral, rtol=0, atol=1e-10)
    torch.testing.assert_close(one_sided, spectral, rtol=0, atol=1e-10)
    assert float((spectral[-1] - spectral[0]).norm()) > 1.0  # they go somewhere


def test_with_momentum_muon_is_another_than_shampoo_whose_factors_are_of_gradients():
    gradients = [randn(6, 8, seed=t) for t in range(5)]
    muon = way(lambda p: Muon(p, 1.0, momentum=0.9, nesterov=False, **SPECTRAL), gradients)
    settings = {**NO_MEMORY, "momentum": 0.9, "exponent": 1 / 4}
    shampoo = way(lambda p: Shampoo(p, 1.0, **settings), gradients)
    torch.testing.assert_close(shampoo[0], muon[0], rtol=0, atol=1e-12)  # M is G so far
    assert float((muon[-1] - muon[-2] - shampoo[-1] + shampoo[-2]).norm()) > 0.1


def test_a_matrix_with_a_single_row_takes_a_normalized_step():
    g = randn(1, 7)
    for make in (
        lambda p: Muon(p, 1.0, momentum=0.0, **SPECTRAL),
        lambda p: Shampoo(p, 1.0, exponent=1 / 4, **NO_MEMORY),
        lambda p: KLShampoo(p, 1 / 7**0.5, sequential=True, **NO_MEMORY),
    ):
        torch.testing.assert_close(way(make, [g])[0], -g / g.norm(), rtol=0, atol=1e-12)


# Rotations

EQUIVARIANT = {
    "spectral": lambda p: SpectralDescent(p, 1.0, **SPECTRAL),
    "muon": lambda p: Muon(p, 1.0, **SPECTRAL),
    "shampoo 1/4": lambda p: Shampoo(p, 1.0, exponent=1 / 4, length="own", **KRONECKER),
    "shampoo 1/2": lambda p: Shampoo(p, 1.0, length="own", **KRONECKER),
    "shampoo, left": lambda p: Shampoo(p, 1.0, sides="left", length="own", **KRONECKER),
    "shampoo, as muon": lambda p: Shampoo(p, 1.0, length="muon", **KRONECKER),
    "shampoo, seldom": lambda p: Shampoo(p, 1.0, length="own", interval=3),
    "kl": lambda p: KLShampoo(p, 1.0, length="own", **KRONECKER),
    "kl, as muon": lambda p: KLShampoo(p, 1.0, length="muon", **KRONECKER),
    "kl, in turn": lambda p: KLShampoo(p, 1.0, sequential=True, length="own", **KRONECKER),
}
NOT_EQUIVARIANT = {
    "signum": lambda p: Signum(p, 1.0),
    "soap, which begins as adam": lambda p: SOAP(p, 1.0, interval=1),
    "soap in a fixed basis": lambda p: SOAP(p, 1.0, max_side=1),
    "shampoo, as long as adam": lambda p: Shampoo(p, 1.0, **KRONECKER),
    "shampoo in blocks": lambda p: Shampoo(p, 1.0, block=4, length="own", **KRONECKER),
}


def turned(make, shape):
    """The updates of six steps for rotated gradients, and the rotated updates."""
    Q, P = orthogonal(shape[0], 7), orthogonal(shape[1], 8)
    gradients = [randn(*shape, seed=t) for t in range(6)]
    return way(make, [Q @ G @ P for G in gradients]), Q @ way(make, gradients) @ P


@pytest.mark.parametrize("name", EQUIVARIANT)
@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)], ids=str)
def test_steps_rotate_with_the_gradients(name, shape):
    there, back = turned(EQUIVARIANT[name], shape)
    torch.testing.assert_close(there, back, rtol=0, atol=1e-8 * float(back.abs().max()))


@pytest.mark.parametrize("name", NOT_EQUIVARIANT)
def test_other_steps_do_not(name):
    there, back = turned(NOT_EQUIVARIANT[name], (6, 6))
    assert float((there - back)[-1].norm() / back[-1].norm()) > 0.01


def test_stacked_steps_rotate_layer_by_layer_from_the_right_and_together_from_the_left():
    Q, P = orthogonal(5, 7), torch.stack([orthogonal(7, 8 + k) for k in range(3)])

    def run(rotate):
        params = [parameter(torch.zeros(5, 7)) for _ in range(3)]
        teon = TEON([{"params": params, "stacks": [[0]] * 3}], 1.0, **SPECTRAL)
        for t in range(6):
            for k, W in enumerate(params):
                W.grad = rotate(randn(5, 7, seed=10 * t + k), k)
            teon.step()
        return [W.detach() for W in params]

    for k, (plain, there) in enumerate(
        zip(run(lambda G, k: G), run(lambda G, k: Q @ G @ P[k]), strict=True)
    ):
        torch.testing.assert_close(there, Q @ plain @ P[k], rtol=0, atol=1e-10)


# Scales

SCALE_FREE = {
    "signum": lambda p: Signum(p, 1.0),
    "muon": lambda p: Muon(p, 1.0, **SPECTRAL),
    "shampoo, as muon": lambda p: Shampoo(p, 1.0, length="muon", interval=2),
    "shampoo 1/4": lambda p: Shampoo(p, 1.0, exponent=1 / 4, length="own", interval=2),
    "shampoo, left": lambda p: Shampoo(p, 1.0, sides="left", length="own", interval=2),
    "shampoo, as long as adam": lambda p: Shampoo(p, 1.0, graft_eps=0.0, interval=2),
    "kl": lambda p: KLShampoo(p, 1.0, length="own", interval=2),
    "kl, in turn": lambda p: KLShampoo(p, 1.0, sequential=True, length="own", interval=2),
    "kl, as muon": lambda p: KLShampoo(p, 1.0, length="muon", interval=2),
    "soap": lambda p: SOAP(p, 1.0, eps=0.0, interval=2),
}


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60, 1e-9, 1e9])
def test_the_scale_of_the_gradients_does_not_matter(name, scale):
    gradients = [randn(6, 6, seed=t) for t in range(7)]
    make = SCALE_FREE[name]
    plain = way(make, gradients)
    scaled = way(make, [scale * G for G in gradients])
    if math.frexp(scale)[0] == 0.5:
        assert torch.equal(scaled, plain)
    # The first directions "as muon" are by a fast method, which begins at another mantissa.
    tolerance = 1e-5 if "as muon" in name else 1e-12
    torch.testing.assert_close(scaled, plain, rtol=0, atol=tolerance * float(plain.abs().max()))


def test_without_grafting_and_with_one_half_shampoo_goes_with_the_inverse_of_the_scale():
    def make(params):
        return Shampoo(params, 1.0, length="own", interval=2)

    gradients = [randn(6, 4, seed=t) for t in range(7)]
    plain, scaled = way(make, gradients), way(make, [1e3 * G for G in gradients])
    torch.testing.assert_close(1e3 * scaled, plain, rtol=1e-7, atol=1e-10)


def test_an_absolute_eps_makes_the_scale_matter():
    def make(params):
        return Shampoo(params, 1.0, length="muon", interval=1, relative_eps=False, eps=1e-6)

    gradients = [randn(6, 6, seed=t) for t in range(7)]
    plain, scaled = way(make, gradients), way(make, [1e-4 * G for G in gradients])
    assert float((plain - scaled).norm() / plain.norm()) > 0.01


# Kronecker factors


@pytest.mark.parametrize("optimizer", [Shampoo, KLShampoo])
@pytest.mark.parametrize("exponent", [1 / 4, 1 / 2], ids=["1/4", "1/2"])
def test_it_is_one_root_of_the_kronecker_product_of_the_factors(optimizer, exponent):
    own = {"exponent": exponent} if optimizer is Shampoo else {}
    exponent = own.get("exponent", 1 / 2)
    W = parameter(torch.zeros(4, 3))
    tested = optimizer([W], 1.0, length="own", interval=1, eps=0.0, bias_correction=False, **own)
    for t in range(9):
        before = W.detach().clone()
        W.grad = randn(4, 3, seed=t)
        tested.step()
    state = tested.state[W]
    values, Q = torch.linalg.eigh(torch.kron(state["right.0"], state["left.0"]))
    M = state["momentum_buffer"] / (1 - 0.9**9)
    M = M.mT.flatten()  # column after column
    expected = (Q * values**-exponent) @ Q.mT @ M
    torch.testing.assert_close((before - W.detach()).mT.flatten(), expected, rtol=1e-9, atol=1e-9)


# Adam, Signum and SOAP


def test_adams_squares_are_one_on_average():
    """Σ w g²/v = 1, entry by entry, for v the corrected average: the bound on Adam's updates."""
    W, b = parameter(torch.zeros(4, 3)), 0.9
    adam = SOAP([W], 1.0, momentum=0.0, beta2=b, eps=0.0, max_side=1)
    seen = []
    for t in range(1, 20):
        W.grad = randn(4, 3, seed=t)
        seen.append(W.grad.clone())
        adam.step()
        v = adam.state[W]["exp_avg_sq"] / (1 - b**t)
        w = (1 - b) * b ** torch.arange(t - 1, -1, -1, dtype=torch.float64) / (1 - b**t)
        mean = torch.einsum("s,sij->ij", w, torch.stack(seen) ** 2) / v
        torch.testing.assert_close(mean, torch.ones(4, 3, dtype=v.dtype), rtol=1e-12, atol=0)


# The step of the theory


def least_squares(seed):
    X, Y = randn(7, 30, seed=seed), randn(5, 30, seed=seed + 1)
    return lambda W: 0.5 * (W @ X - Y).square().sum(), float(torch.linalg.matrix_norm(X, 2) ** 2)


@pytest.mark.parametrize("scale", ["none", "spectral"])
def test_the_length_of_the_theory_decreases_the_loss_by_as_much_as_it_guarantees(scale):
    # ½‖D X‖_F² is at most ½ min(out, in) ‖X‖² ‖D‖², hence smooth with L = min(out, in) ‖X‖²; with
    # the factor s the norm is ‖D‖/s and L is s² times as large, so that lr s² is the same.
    f, sharp = least_squares(0)
    s = math.sqrt(5 / 7) if scale == "spectral" else 1.0
    L = 5 * sharp
    W = parameter(randn(5, 7))
    optimizer = SpectralDescent([W], 1 / (L * s**2), length="dual", scale=scale, **EXACT)
    losses, guaranteed = [], []
    for _ in range(30):
        optimizer.zero_grad()
        loss = f(W)
        loss.backward()
        losses.append(loss.item())
        guaranteed.append(float(Spectral("svd").dual_norm(W.grad)) ** 2 / (2 * L))
        before, G = W.detach().clone(), W.grad.clone()
        optimizer.step()
        expected = before - float(Spectral("svd").dual_norm(G)) / L * polar(G, "svd")
        torch.testing.assert_close(W.detach(), expected, rtol=0, atol=1e-12)
    for now, then, least in zip(losses, losses[1:], guaranteed, strict=False):
        assert now - then >= least * (1 - 1e-9)
    assert losses[-1] < losses[0]


def test_with_the_length_of_the_theory_a_step_is_as_long_as_the_gradient():
    G = randn(5, 7)
    for c in (1.0, 10.0):
        W = parameter(torch.zeros(5, 7))
        optimizer = SpectralDescent([W], 1.0, length="dual", **SPECTRAL)
        W.grad = c * G
        optimizer.step()
        expected = -c * float(Spectral("svd").dual_norm(G)) * polar(G, "svd")
        torch.testing.assert_close(W.detach(), expected, rtol=1e-12, atol=1e-12)


# Options of all


@pytest.mark.parametrize(
    "make",
    [
        lambda p, **s: Signum(p, 0.1, **s),
        lambda p, **s: Muon(p, 0.1, **SPECTRAL, **s),
        lambda p, **s: Muon(p, 0.1, nesterov=False, **SPECTRAL, **s),
        lambda p, **s: Shampoo(p, 0.1, length="muon", **KRONECKER, **s),
        lambda p, **s: KLShampoo(p, 0.1, length="muon", **KRONECKER, **s),
    ],
    ids=["signum", "muon", "muon without nesterov", "shampoo", "kl"],
)
def test_a_sum_of_gradients_gives_the_direction_of_their_average(make):
    # With Nesterov too: (1 - β) G + β M is (1 - β) times G + β (M of the sum).
    gradients = [randn(6, 5, seed=t) for t in range(12)]
    average = way(make, gradients)
    heavy = way(lambda p: make(p, heavy_ball=True), gradients)
    torch.testing.assert_close(heavy, average, rtol=0, atol=1e-10)


@pytest.mark.parametrize("optimizer", [SignSGD, Muon, Shampoo, SOAP])
@pytest.mark.parametrize("decay", ["decoupled", "independent", "cautious"])
def test_the_formulas_of_weight_decay(optimizer, decay):
    lr0, lr, strength = 0.5, 0.2, 0.3
    exact = SPECTRAL if optimizer is Muon else {}

    def run(**settings):
        W = parameter(randn(6, 5, seed=9))
        tested = optimizer([W], lr0, **exact, **settings)
        tested.param_groups[0]["lr"] = lr  # as a schedule would
        W.grad = randn(6, 5)
        tested.step()
        return W.detach()

    start, plain = randn(6, 5, seed=9), run()
    found = run(weight_decay=strength, decay=decay)
    rate = lr / lr0 if decay == "independent" else 1.0  # of the schedule
    D = (start - plain) / lr
    left = reference.decayed(start, D, lr, weight_decay=rate * strength, decay=decay)
    torch.testing.assert_close(found, left - lr * D, rtol=0, atol=1e-14)


def test_independent_decay_means_the_same_at_any_rate():
    ways = []
    for lr in (0.01, 1.0):
        W = parameter(randn(4, 4))
        optimizer = Muon([W], lr, weight_decay=0.1, decay="independent", **SPECTRAL)
        W.grad = randn(4, 4, seed=1)
        optimizer.step()
        ways.append(W.detach() + lr * polar(W.grad, "svd"))
        torch.testing.assert_close(ways[-1], 0.9 * randn(4, 4), rtol=0, atol=1e-13)


@pytest.mark.parametrize("decay", ["decoupled", "independent", "cautious"])
def test_maximizing_is_minimizing_the_negated_loss(decay):
    def run(sign, maximize):
        W = parameter(randn(6, 5))
        settings = {"weight_decay": 0.1, "decay": decay, "maximize": maximize, **SPECTRAL}
        optimizer = Muon([W], 0.1, **settings)
        for t in range(10):
            optimizer.zero_grad()
            (sign * (W * randn(6, 5, seed=t)).sum().tanh() + sign * W.sin().sum()).backward()
            optimizer.step()
        return W.detach()

    assert torch.equal(run(1.0, True), run(-1.0, False))


def test_roles_have_settings_of_their_own_also_in_the_adamw_group():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        ).double()

    own = {
        "hidden": {"lr": 0.3, "momentum": 0.0, "scale": "none"},
        "embedding": {"lr": 0.2, "betas": (0.0, 0.0), "eps": 0.0},
        "head": {"geometry": "spectral", "lr": 0.7, "momentum": 0.0, "scale": "none"},
    }
    net = model()
    before = copy.deepcopy(net.state_dict())
    optimizer = Muon(net, 0.1, roles=own, adamw_lr=0.01, **EXACT)
    for i, p in enumerate(net.parameters()):
        p.grad = randn(*p.shape, seed=i)
    optimizer.step()
    for name, rate in (("1.weight", 0.3), ("2.weight", 0.3), ("3.weight", 0.7)):
        p = net.get_parameter(name)
        torch.testing.assert_close(before[name] - p.detach(), rate * polar(p.grad, "svd"))
    moved = (before["0.weight"] - net[0].weight.detach()).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.2))
    moved = (before["1.bias"] - net[1].bias.detach()).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-6, atol=0)
    for wrong in ({"no such role": {}}, {"conv": {"lr": 0.1}}):
        with pytest.raises(ValueError, match="role"):
            Muon(model(), roles=wrong)
    with pytest.raises(ValueError, match="without a model"):
        Muon([parameter(randn(2, 2))], roles=own)


# Half precision


def test_stochastic_rounding_is_unbiased_and_to_a_neighbour():
    x = torch.cat([randn(50, seed=s).float() * 10.0 ** (s - 3) for s in range(7)])
    rounds = torch.stack(
        [rounded_at_random(x, torch.Generator().manual_seed(s)) for s in range(4000)]
    )
    assert torch.equal(rounds.bfloat16().float(), rounds)
    spread = rounds.double().std(0) / 4000**0.5
    error = (rounds.double().mean(0) - x.double()).abs()
    assert (error <= 5 * spread + 1e-12).all()
    assert (rounds - x).abs().div(x.abs()).max() < 2.0**-7
    exact = x.bfloat16().float()
    assert torch.equal(rounded_at_random(exact, torch.Generator().manual_seed(0)), exact)


def bfloat16_run(steps, resume_at=None, optimizer=Muon, **settings):
    """Weights after these steps from one, on the gradients of a fixed sequence."""

    def build():
        params = [parameter(torch.ones(12, 8), torch.bfloat16) for _ in range(3)]
        vector = parameter(torch.ones(8), torch.bfloat16)
        groups = [{"params": params}, {"params": [vector], "geometry": "adamw"}]
        return [*params, vector], optimizer(groups, lr=1e-3, **settings)

    params, tested = build()
    for t in range(steps):
        if t == resume_at:
            file = io.BytesIO()
            torch.save(tested.state_dict(), file)
            file.seek(0)
            others, tested = build()
            for p, q in zip(others, params, strict=True):
                p.data.copy_(q)
            params = others
            tested.load_state_dict(torch.load(file, weights_only=True))
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=10 * t + i).to(p.dtype)
        tested.step()
    return [p.detach() for p in params], tested


@pytest.mark.parametrize("optimizer", [Signum, Muon, Shampoo, SOAP])
def test_stochastic_rounding_repeats_and_goes_on_bit_for_bit(optimizer):
    settings = {"rounding": "stochastic", "optimizer": optimizer}
    first, _ = bfloat16_run(9, **settings)
    for resume_at in (None, 4):
        again, _ = bfloat16_run(9, resume_at, **settings)
        for p, q in zip(first, again, strict=True):
            assert torch.equal(p, q)
    assert not torch.equal(first[0], bfloat16_run(9, optimizer=optimizer)[0][0])


def test_matrices_and_steps_are_rounded_independently():
    W = [parameter(torch.ones(64, 64), torch.bfloat16) for _ in range(3)]
    optimizer = SignSGD(W, lr=2.0**-10, rounding="stochastic")
    ways = []
    for _ in range(3):
        for p in W:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        ways += [(p.detach() < 1).double().flatten() for p in W]
    ways = torch.stack(ways)
    assert ((ways.mean(1) - 0.25).abs() < 0.03).all()  # a quarter of the way to the neighbour below
    correlation = torch.corrcoef(ways)
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 0.07


def test_groups_are_rounded_independently():
    W = [parameter(torch.ones(64, 64), torch.bfloat16) for _ in range(2)]
    optimizer = SignSGD([{"params": [p]} for p in W], lr=2.0**-10, rounding="stochastic")
    for p in W:
        p.grad = torch.ones_like(p)
    optimizer.step()
    ways = torch.stack([(p.detach() < 1).double().flatten() for p in W])
    assert torch.corrcoef(ways)[0, 1].abs() < 0.1


@pytest.mark.parametrize("optimizer", [Signum, Muon, Shampoo, KLShampoo, SOAP])
def test_a_memory_in_float32_stays_so_and_follows_float32(optimizer):
    settings = {"state_dtype": torch.float32, "optimizer": optimizer}
    _, tested = bfloat16_run(6, 3, **settings)
    _, plain = bfloat16_run(6, optimizer=optimizer)
    kept = {k: v for s in tested.state.values() for k, v in s.items() if v.ndim == 2 or v.ndim == 1}
    assert {"momentum_buffer", "exp_avg", "exp_avg_sq"} <= set(kept) | {"exp_avg_sq"}
    assert {v.dtype for v in kept.values()} == {torch.float32}
    for p in list(tested.state):
        state = tested.state[p]
        assert all(v.dtype == torch.float32 for k, v in state.items() if v.is_floating_point())

    # the averages of the gradients alone, as the weights move by too little to differ in bfloat16
    def memory(optimizer, i):
        state = optimizer.state[optimizer.param_groups[0]["params"][i]]
        return state["momentum_buffer"].double()

    exact = []
    for i in range(3):
        b, M = tested.param_groups[0]["momentum"], torch.zeros(12, 8, dtype=torch.float64)
        for t in range(6):
            M = b * M + (1 - b) * randn(12, 8, seed=10 * t + i).bfloat16().double()
        exact.append(M)
    if optimizer is not SOAP:  # which keeps it in another basis
        for i, M in enumerate(exact):
            near, far = (float((memory(o, i) - M).norm() / M.norm()) for o in (tested, plain))
            assert near < 1e-6
            assert far > 1e-4


# What the table says


@pytest.mark.parametrize("shape", [(8, 8), (6, 15), (15, 6)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: SignSGD(p, 0.02),
        lambda p: Signum(p, 0.02),
        lambda p: SpectralDescent(p, 0.02, **EXACT),
        lambda p: Muon(p, 0.02, **EXACT),
        lambda p: Muon(p, 0.02, scale="match-rms-adamw", **EXACT),
        lambda p: Muon(p, 0.02, scale="original", **EXACT),
        lambda p: Shampoo(p, 0.02, length="muon", interval=1),
        lambda p: KLShampoo(p, 0.02, length="muon", interval=1),
    ],
)
def test_the_table_shows_each_parameter_and_how_far_it_moves(make, shape):
    named = [
        ("first.weight", parameter(torch.zeros(shape))),
        ("second", parameter(torch.zeros(shape))),
    ]
    optimizer = make(named)
    for i, (_, p) in enumerate(named):
        p.grad = randn(*shape, seed=i)
    optimizer.step()
    rows = {line.split("│")[1].strip(): line for line in str(optimizer).splitlines() if "│" in line}
    for name, p in named:
        measured = float(p.detach().square().mean().sqrt())
        assert f"{measured:.2g}" in rows[name].split("│")[-2]
        sign = optimizer.param_groups[0]["geometry"] == "sign"  # whose entries are of no matrix
        size = f"{shape[0]} x {shape[1]}" if sign else f"({shape[0]}, {shape[1]})"
        assert size in rows[name]


def test_where_the_length_depends_on_the_gradient_the_table_says_so():
    W = parameter(randn(4, 4))
    for optimizer in (
        SpectralDescent([W], length="dual"),
        Shampoo([W], length="own"),
        KLShampoo([W], length="own"),
    ):
        assert str(optimizer).splitlines()[-2].split("│")[-2].strip() == "?"


def test_blocks_of_a_batch_of_matrices_move_as_they_would_alone():
    together = parameter(torch.zeros(2, 6, 10))
    apart = [parameter(torch.zeros(3, 5)) for _ in range(8)]
    settings = {"interval": 1, "length": "own", "eps": 1e-6}
    view = MatrixView(2, 6, 10)
    one = Shampoo([{"params": [together], "views": [view]}], 1.0, block=5, **settings)
    many = Shampoo(apart, 1.0, **settings)
    for t in range(4):
        together.grad = randn(2, 6, 10, seed=t)
        for W, G in zip(apart, view.matrices(together.grad, 5), strict=True):
            W.grad = G.clone()
        one.step()
        many.step()
    for W, part in zip(apart, view.matrices(together.detach(), 5), strict=True):
        torch.testing.assert_close(W.detach(), part, rtol=1e-10, atol=1e-10)


def test_the_direction_of_each_geometry_is_that_of_its_optimizer():
    G = randn(5, 7)
    assert torch.equal(way(lambda p: SignSGD(p, 1.0), [G])[0], -Sign().direction(G))
    spectral = way(lambda p: SpectralDescent(p, 1.0, **SPECTRAL), [G])[0]
    torch.testing.assert_close(spectral, -Spectral("svd").direction(G), rtol=0, atol=1e-14)
