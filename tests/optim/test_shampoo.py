"""Shampoo is an adapted Muon; grafting, and when roots are renewed, for all with factors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from steepest import SOAP, KLShampoo, MatrixView, Shampoo
from steepest.linalg import polar
from steepest.optim import kronecker, reference
from steepest.optim.kronecker import _slots

SHAPES = [(8, 8), (5, 12), (12, 5), (1, 6), (1, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_exponent = pytest.mark.parametrize("exponent", [1 / 4, 1 / 2], ids=["1/4", "1/2"])
# The formulas, and nothing else.
BARE = {"length": "own", "eps": 0.0, "interval": 1}
NO_MEMORY = {**BARE, "momentum": 0.0, "beta2": 0.0}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def zeros(*shape, dtype=torch.float64):
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def update(optimizer, W, G):
    """How far one step with this gradient and a rate of 1 moves the weights, downhill positive."""
    before = W.detach().clone()
    W.grad = G.clone()
    optimizer.step()
    return before - W.detach()


# Without memory


@every_shape
def test_without_memory_the_original_exponent_gives_the_polar_factor(shape):
    W, G = zeros(*shape), randn(*shape)
    D = update(Shampoo([W], 1.0, exponent=1 / 4, **NO_MEMORY), W, G)
    torch.testing.assert_close(D, polar(G, "svd"), rtol=0, atol=1e-12)


@every_shape
def test_without_memory_the_exponent_of_one_half_inverts_the_singular_values(shape):
    W, G = zeros(*shape), randn(*shape)
    D = update(Shampoo([W], 1.0, exponent=1 / 2, **NO_MEMORY), W, G)
    torch.testing.assert_close(D, torch.linalg.pinv(G).mT, rtol=1e-10, atol=1e-12)


@every_shape
@pytest.mark.parametrize("sides", ["left", "right"])
def test_without_memory_one_side_with_one_half_gives_the_polar_factor(shape, sides):
    W, G = zeros(*shape), randn(*shape)
    D = update(Shampoo([W], 1.0, exponent=1 / 2, sides=sides, **NO_MEMORY), W, G)
    torch.testing.assert_close(D, polar(G, "svd"), rtol=0, atol=1e-11)


@every_exponent
@pytest.mark.parametrize("rank", [1, 3])
def test_without_memory_the_null_space_of_a_gradient_is_left_alone(exponent, rank):
    W, G = zeros(9, 7), randn(9, rank) @ randn(rank, 7, seed=1)
    D = update(Shampoo([W], 1.0, exponent=exponent, **NO_MEMORY), W, G)
    expected = polar(G, "svd") if exponent == 1 / 4 else torch.linalg.pinv(G, rtol=1e-10).mT
    torch.testing.assert_close(D, expected, rtol=1e-9, atol=1e-11)


# With memory


@every_exponent
@every_shape
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "as it is"])
def test_it_is_the_formula_of_the_paper(shape, exponent, correct, path):
    options = {"momentum": 0.8, "beta2": 0.9, "eps": 1e-3, "relative_eps": False, "length": "own"}
    options |= {"exponent": exponent, "bias_correction": correct}
    W, gradients = zeros(*shape), [randn(*shape, seed=t) for t in range(1, 9)]
    weights = path(reference.shampoo, W.detach().clone(), gradients, 1.0, **options)
    optimizer = Shampoo([W], 1.0, interval=1, **options)
    updates = torch.stack([update(optimizer, W, G) for G in gradients])
    torch.testing.assert_close(updates, -weights.diff(dim=0), rtol=1e-9, atol=1e-9)


def test_a_relative_eps_is_in_units_of_the_mean_eigenvalue():
    W, V, G = zeros(6, 4), zeros(6, 4), randn(6, 4)
    settings = {**NO_MEMORY, "sides": "left", "eps": 0.25}
    D = update(Shampoo([W], 1.0, relative_eps=True, **settings), W, G)
    settings["eps"] = 0.25 * float((G @ G.mT).trace()) / 6
    E = update(Shampoo([V], 1.0, relative_eps=False, **settings), V, G)
    torch.testing.assert_close(D, E, rtol=1e-12, atol=1e-14)


def test_a_large_eps_gives_momentum_and_a_small_one_shampoo():
    G, far = randn(6, 4), []
    for eps in (1e-9, 1e-3, 1.0, 1e3, 1e9):
        W = zeros(6, 4)
        settings = {**NO_MEMORY, "eps": eps, "exponent": 1 / 4, "relative_eps": False}
        D = update(Shampoo([W], 1.0, **settings), W, G)
        far.append(float((D / D.norm() - G / G.norm()).norm()))
    assert far == sorted(far, reverse=True)
    assert far[-1] < 1e-8


# Taken apart


@every_exponent
@every_shape
@pytest.mark.parametrize("sides", ["both", "left", "right"])
@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["gradient", "momentum"])
def test_it_is_muon_adapted_from_both_sides(shape, exponent, sides, momentum):
    W = zeros(*shape)
    settings = {**BARE, "eps": 1e-4, "momentum": momentum, "beta2": 0.9, "sides": sides}
    optimizer = Shampoo([W], 1.0, exponent=exponent, **settings)
    for t in range(6):
        D = update(optimizer, W, randn(*shape, seed=t))
    left, muon, right = optimizer.adaptation(W)
    M = optimizer.state[W]["momentum_buffer"] if momentum else W.grad
    torch.testing.assert_close(muon, polar(M, "svd"), rtol=0, atol=1e-12)
    assert left.shape == (shape[0], shape[0])
    assert right.shape == (shape[1], shape[1])
    assert float((left @ muon @ right - D).norm() / D.norm()) < 1e-12


@every_exponent
def test_blocks_and_the_parts_of_a_fused_projection_are_taken_apart_one_by_one(exponent):
    views = [MatrixView(1, 4, 18, True, (8, 5, 5)), MatrixView(2, 9, 7)]
    fused, experts = zeros(4, 18), zeros(2, 9, 7)
    settings = {**BARE, "eps": 1e-4, "momentum": 0.9, "beta2": 0.9, "block": 5}
    optimizer = Shampoo(
        [{"params": [fused, experts], "views": views}], 1.0, exponent=exponent, **settings
    )
    for t in range(5):
        before = [W.detach().clone() for W in (fused, experts)]
        for W in (fused, experts):
            W.grad = randn(*W.shape, seed=t)
        optimizer.step()
    for W, old, view in zip((fused, experts), before, views, strict=True):
        parts = view.matrices((old - W.detach()).contiguous(), 5)
        assert len(parts) == {4: 4, 2: 8}[len(W)]
        for i, D in enumerate(parts):
            left, muon, right = optimizer.adaptation(W, i)
            assert float((left @ muon @ right - D).norm() / D.norm()) < 1e-12
            assert muon.shape == D.shape
        with pytest.raises(ValueError, match=f"got matrix={len(parts)} of a parameter with"):
            optimizer.adaptation(W, len(parts))


def test_grafting_changes_the_length_of_what_is_taken_apart():
    W = zeros(6, 4)
    optimizer = Shampoo([W], 1.0, interval=1, length="adam")
    for t in range(4):
        D = update(optimizer, W, randn(6, 4, seed=t))
    left, muon, right = optimizer.adaptation(W)
    whole = left @ muon @ right
    torch.testing.assert_close(D / D.norm(), whole / whole.norm(), rtol=0, atol=1e-12)


def test_only_matrices_that_have_taken_a_step_can_be_taken_apart():
    W, V, b = zeros(3, 3), zeros(3, 3), zeros(3)
    groups = [{"params": [W, V]}, {"params": [b], "geometry": "adamw"}]
    optimizer = Shampoo(groups, 1.0)
    with pytest.raises(ValueError, match="got matrix=0 of a parameter with 0"):
        optimizer.adaptation(W)
    W.grad, b.grad = randn(3, 3), randn(3)
    optimizer.step()
    assert optimizer.adaptation(W).muon.shape == (3, 3)
    for index in (1, -1):
        with pytest.raises(ValueError, match=f"got matrix={index} of a parameter with 1"):
            optimizer.adaptation(W, index)
    with pytest.raises(ValueError, match="got matrix=0 of a parameter with 0"):
        optimizer.adaptation(V)
    for other in (b, zeros(3, 3)):
        with pytest.raises(ValueError, match="takes no Shampoo step"):
            optimizer.adaptation(other)
    no_momentum = Shampoo([W], momentum=0.0)
    no_momentum.step()
    W.grad = None
    with pytest.raises(ValueError, match="without momentum or gradient"):
        no_momentum.adaptation(W)


# Grafting

GRAFTED = [(Shampoo, {"exponent": 1 / 4}), (Shampoo, {"sides": "left"}), (KLShampoo, {})]
every_grafted = pytest.mark.parametrize(("optimizer", "settings"), GRAFTED)


@every_grafted
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_grafted_updates_are_as_long_as_adams(optimizer, settings, interval, momentum):
    W, V = zeros(7, 5), zeros(7, 5)
    betas = {"momentum": momentum, "graft_beta2": 0.97, "graft_eps": 1e-3}
    tested = optimizer([W], 0.1, interval=interval, **betas, **settings)
    adam = torch.optim.AdamW([V], 0.1, betas=(momentum, 0.97), eps=1e-3, weight_decay=0.0)
    for t in range(12):
        G = randn(7, 5, seed=t) * 10.0 ** (t % 3)
        D, E = update(tested, W, G), update(adam, V, G)
        assert float(D.norm()) == pytest.approx(float(E.norm()), rel=1e-12), t


@pytest.mark.parametrize("graft", ["adam", "muon"])
@every_grafted
def test_grafting_keeps_the_direction(optimizer, settings, graft):
    W, V = zeros(7, 5), zeros(7, 5)
    grafted = optimizer([W], 1.0, interval=1, graft=graft, **settings)
    bare = optimizer([V], 1.0, interval=1, length="own", **settings)
    for t in range(8):
        G = randn(7, 5, seed=t)
        D, E = update(grafted, W, G), update(bare, V, G)
        assert float((D * E).sum() / D.norm() / E.norm()) == pytest.approx(1.0, abs=1e-13)


@every_grafted
@every_shape
@pytest.mark.parametrize("interval", [1, 4])
def test_updates_grafted_from_muon_have_the_length_of_semi_orthogonal_matrices(
    optimizer, settings, shape, interval
):
    W = zeros(*shape)
    tested = optimizer([W], 1.0, interval=interval, length="muon", **settings)
    for t in range(6):
        D = update(tested, W, randn(*shape, seed=t) * 100.0)
        # before the first renewals it is Muon's own direction, by a fast method
        tolerance = 1e-12 if interval == 1 or t >= interval else 0.2
        assert float(D.norm()) == pytest.approx(min(shape) ** 0.5, rel=tolerance)


@pytest.mark.parametrize(("graft", "factor"), [("adam", 1.0), ("muon", 0.15), ("none", 1.0)])
def test_what_is_no_matrix_gets_the_rate_that_goes_with_the_length(graft, factor):
    model = torch.nn.Linear(4, 3)
    for optimizer in (Shampoo, KLShampoo):
        groups = optimizer(model, 0.1, graft=graft).param_groups
        assert [g["lr"] for g in groups] == pytest.approx([0.1, 0.1 * factor])
        assert optimizer(model, 0.1, graft=graft, adamw_lr=0.3).param_groups[1]["lr"] == 0.3


@every_grafted
@pytest.mark.parametrize("shape", [(8, 8), (8, 2), (4, 16)], ids=str)
def test_blocks_together_have_the_length_of_the_whole(optimizer, settings, shape):
    W = zeros(*shape)
    tested = optimizer([W], 1.0, block=2, interval=1, length="muon", **settings)
    D = update(tested, W, randn(*shape))
    assert f"{float(D.square().mean().sqrt()):.2g}" in str(tested)
    assert float(D.norm()) == pytest.approx(min(shape) ** 0.5)


def test_blocks_together_have_the_length_of_adam():
    W, V = zeros(8, 6), zeros(8, 6)
    tested = Shampoo([W], 0.1, block=3, interval=1, graft_eps=1e-3)
    adam = torch.optim.AdamW([V], 0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    for t in range(6):
        G = randn(8, 6, seed=t)
        D, E = update(tested, W, G), update(adam, V, G)
        assert float(D.norm()) == pytest.approx(float(E.norm()), rel=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(Shampoo, {}), (KLShampoo, {}), (KLShampoo, {"length": "own"}), (SOAP, {})],
)
def test_with_a_sum_of_gradients_updates_are_as_long_as_with_their_average(optimizer, settings):
    # The table promises the length of Adam for all of these with grafting, and for SOAP.
    W, V = zeros(6, 6), zeros(6, 6)
    average, heavy = (
        optimizer([W], 1.0, **settings),
        optimizer([V], 1.0, heavy_ball=True, **settings),
    )
    for t in range(50):
        G = randn(6, 6, seed=t)
        D, E = update(average, W, G), update(heavy, V, G)
    assert float(E.norm()) == pytest.approx(float(D.norm()), rel=0.5)


def test_a_matrix_takes_the_direction_of_its_length_until_its_first_renewal():
    for graft in ("adam", "muon"):
        W = zeros(6, 6)
        tested = Shampoo([W], 1.0, interval=5, graft=graft, graft_eps=0.0)
        D = update(tested, W, randn(6, 6))
        expected = randn(6, 6).sign() if graft == "adam" else polar(randn(6, 6), "auto")
        cosine = float((D * expected).sum() / D.norm() / expected.norm())
        assert cosine == pytest.approx(1.0, abs=1e-12 if graft == "adam" else 1e-6)


# When roots are renewed

KRONECKER = [Shampoo, KLShampoo, SOAP]
every_optimizer = pytest.mark.parametrize("optimizer", KRONECKER)
NETWORK = [(48, 16), (16, 48), (16, 16), (16, 16), (16, 16), (24, 16), (8, 30)]


def renewed(optimizer):
    """The step in which each side was renewed last."""
    return {
        (i, key): int(value)
        for i, p in enumerate(optimizer.param_groups[0]["params"])
        for key, value in optimizer.state.get(p, {}).items()
        if "_renewed" in key
    }


@every_optimizer
@pytest.mark.parametrize("interval", [1, 2, 5, 12])
def test_every_side_is_renewed_exactly_once_in_an_interval(optimizer, interval):
    params = [zeros(*shape) for shape in NETWORK]
    tested = optimizer(params, lr=0.1, interval=interval)
    steps = {}
    for t in range(3 * interval):
        for i, W in enumerate(params):
            W.grad = randn(*W.shape, seed=100 * i + t)
        tested.step()
        for key, last in renewed(tested).items():
            if last == t:
                steps.setdefault(key, []).append(t)
    assert len(steps) == 2 * len(NETWORK)
    for first, *later in steps.values():
        assert first < interval
        assert later == [first + interval, first + 2 * interval]


@every_optimizer
def test_the_work_is_spread_over_the_interval(optimizer):
    params = [zeros(*shape) for shape in NETWORK]
    tested = optimizer(params, lr=0.1, interval=4)
    work = []
    for t in range(12):
        for i, W in enumerate(params):
            W.grad = randn(*W.shape, seed=100 * i + t)
        tested.step()
        done = [key for key, last in renewed(tested).items() if last == t]
        work.append(sum(NETWORK[i][0 if "left" in key else 1] ** 3 for i, key in done))
    assert work[:4] == work[4:8] == work[8:]
    total = sum(m**3 + n**3 for m, n in NETWORK)
    assert sum(work[:4]) == total
    assert max(work) <= max(48**3, 1.05 * total / 4)  # the dearest alone is more than a share


@pytest.mark.parametrize("interval", [1, 2, 7, 10, 50])
@pytest.mark.parametrize("layers", [1, 6, 24])
def test_no_step_of_a_transformer_is_much_dearer_than_the_mean(layers, interval):
    block = [(64, 64)] * 4 + [(256, 64), (64, 256)]
    shapes = block * layers
    views = tuple(MatrixView(1, *shape) for shape in shapes)
    for limits in (("both", None), ("left", None), ("both", 100)):
        slots = _slots(views, None, limits, interval)
        load = [0] * interval
        dearest = 0
        for (i, side), slot in slots.items():
            cost = shapes[i][0 if side == "left" else 1] ** 3
            dearest = max(dearest, cost)
            load[slot] += cost
        mean = sum(load) / interval
        assert max(load) <= max(4 / 3 * mean, mean + dearest * (1 - 1 / interval))
        if len(slots) >= 20 * interval:
            assert max(load) <= 1.1 * mean + 1e-9


@every_optimizer
def test_a_matrix_that_learns_in_every_other_step_is_renewed_too(optimizer):
    params = [zeros(4, 4) for _ in range(2)]
    tested = optimizer(params, lr=0.1, interval=4)
    for t in range(24):
        for i, W in enumerate(params):
            W.grad = randn(4, 4, seed=100 * i + t) * (i == 0 or t % 2)
        tested.step()
    assert min(renewed(tested).values()) >= 24 - 6


def test_blocks_have_slots_of_their_own():
    views = (MatrixView(1, 10, 10), MatrixView(3, 4, 6))
    slots = _slots(views, 5, ("both", None), 3)
    assert set(slots) == {(i, side) for i in range(4 + 3 * 2) for side in ("left", "right")}
    assert set(_slots(views, 5, ("right", None), 3)) == {(i, "right") for i in range(10)}
    assert set(_slots(views, None, ("both", 5), 3)) == {(i, "left") for i in range(1, 4)}


@pytest.mark.parametrize("at_a_time", [1, 2 * 25, 2**20], ids=["one", "two", "all"])
@every_optimizer
def test_blocks_that_are_renewed_together_have_the_roots_of_each_alone(
    optimizer, at_a_time, monkeypatch
):
    monkeypatch.setattr(kronecker, "_ENTRIES_RENEWED", at_a_time)
    blocks, whole = [zeros(5, 5) for _ in range(4)], zeros(10, 10)
    alone = [optimizer([block], lr=0.1, interval=1) for block in blocks]
    together = optimizer([whole], lr=0.1, block=5, interval=1)
    # Their gradients are 1e-12 to 1e2, one has none: its factors are zero, its roots the identity.
    scales = torch.tensor([1e2, 0.0, 1e-12, 1.0], dtype=torch.float64).view(2, 1, 2, 1)
    for t in range(6):
        whole.grad = (randn(2, 5, 2, 5, seed=t) * scales).reshape(10, 10)
        together.step()
        parts = whole.grad.view(2, 5, 2, 5).transpose(1, 2).reshape(4, 5, 5)
        for block, own, G in zip(blocks, alone, parts, strict=True):
            block.grad = G.clone()
            own.step()
    for i, block in enumerate(blocks):
        for side in ("left", "right"):
            mine = alone[i].state[block][f"{side}_root.0"]
            root = together.state[whole][f"{side}_root.{i}"]
            assert root.untyped_storage().nbytes() == root.numel() * root.element_size()
            if i == 1:
                assert torch.equal(root, torch.eye(5, dtype=torch.float64))
            else:
                torch.testing.assert_close(root, mine, rtol=1e-9, atol=0)


@every_optimizer
def test_a_side_that_is_not_due_keeps_its_root(optimizer):
    W = zeros(6, 6)
    tested = optimizer([W], lr=0.1, interval=4)
    before = None
    for t in range(12):
        W.grad = randn(6, 6, seed=t)
        tested.step()
        state = copy.deepcopy(tested.state[W])
        for side in ("left", "right"):
            if before is not None:
                due = int(state[f"{side}_renewed.0"]) == t
                same = torch.equal(state[f"{side}_root.0"], before[f"{side}_root.0"])
                assert due != same
            assert not before or not torch.equal(state[f"{side}.0"], before[f"{side}.0"])
        before = state


def resumed(tested, build, file):
    """Another optimizer on copies of the weights, with the saved state."""
    torch.save(tested.state_dict(), file)
    file.seek(0)
    params = [
        nn.Parameter(p.detach().clone()) for group in tested.param_groups for p in group["params"]
    ]
    other = build(params)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


VARIANTS = {
    "shampoo": (Shampoo, {}),
    "shampoo in blocks": (Shampoo, {"block": 10}),
    "shampoo, bare": (Shampoo, {"length": "own", "sides": "left"}),
    "kl": (KLShampoo, {}),
    "kl, one after the other": (KLShampoo, {"sequential": True, "length": "muon"}),
    "soap": (SOAP, {}),
    "soap, one side": (SOAP, {"max_side": 20}),
    "soap, norm 1": (SOAP, {"length": "spectral"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop", [3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_goes_on_bit_for_bit_from_the_middle_of_an_interval(variant, stop, dtype):
    optimizer, settings = VARIANTS[variant]

    def build(params):
        return optimizer(params, lr=0.1, interval=5, weight_decay=0.1, **settings)

    def step(each, t):
        for i, W in enumerate(each.param_groups[0]["params"]):
            W.grad = randn(*W.shape, seed=100 * i + t).to(dtype)
        each.step()

    tested = build([zeros(*shape, dtype=dtype) for shape in ((12, 20), (24, 16), (12, 20))])
    for t in range(stop):
        step(tested, t)
    other = resumed(tested, build, io.BytesIO())
    for t in range(stop, stop + 12):
        step(tested, t)
        step(other, t)
    for p, q in zip(tested.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        first, second = tested.state[p], other.state[q]
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), key
            assert first[key].dtype == second[key].dtype, key


@every_optimizer
def test_factors_are_never_in_half_precision(optimizer):
    W = zeros(6, 4, dtype=torch.bfloat16)
    tested = optimizer([W], lr=0.1)
    W.grad = randn(6, 4).bfloat16()
    tested.step()
    tested.load_state_dict(copy.deepcopy(tested.state_dict()))
    for side in ("left", "right"):
        assert tested.state[W][f"{side}.0"].dtype == torch.float32
        assert tested.state[W][f"{side}_root.0"].dtype == torch.float32


@every_optimizer
def test_gradients_whose_products_would_overflow_are_refused_untouched(optimizer):
    W = zeros(4, 4, dtype=torch.float32)
    tested = optimizer([W], lr=0.1)
    W.grad = torch.full((4, 4), 1e17)
    with pytest.raises(FloatingPointError, match="squares overflow"):
        tested.step()
    assert not tested.state
    assert not W.any()
