"""Hard gradients, for every optimizer and its options.

Whatever the gradients are: weights and memory stay finite, an update is about as long as
`print(optimizer)` says, and a step that is refused leaves everything as it was.
"""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn

from steepest import SOAP, TEON, KLShampoo, Muon, Shampoo, SignSGD, Signum, SpectralDescent
from steepest.model.parameter_roles import roles
from steepest.optim import matrices, reference
from steepest.optim.scales import update_scale

OPTIONS = {
    "sign-sgd": (SignSGD, {}),
    "signum": (Signum, {}),
    "signum, heavy ball": (Signum, {"heavy_ball": True}),
    "spectral": (SpectralDescent, {}),
    "spectral, as long as AdamW": (SpectralDescent, {"scale": "match-rms-adamw"}),
    "muon": (Muon, {}),
    "muon, heavy ball": (Muon, {"heavy_ball": True}),
    "teon": (TEON, {}),
    "teon, below each other": (TEON, {"mode": 2, "length": "muon"}),
    "shampoo": (Shampoo, {}),
    "shampoo, interval 1": (Shampoo, {"interval": 1}),
    "shampoo, heavy ball": (Shampoo, {"heavy_ball": True, "interval": 3}),
    "shampoo, 1/4, blocks": (Shampoo, {"exponent": 1 / 4, "interval": 3, "block": 5}),
    "shampoo, left": (Shampoo, {"sides": "left", "interval": 3}),
    "shampoo, right, as muon": (Shampoo, {"sides": "right", "length": "muon", "interval": 3}),
    "shampoo, as muon": (Shampoo, {"length": "muon"}),
    "shampoo, 1/4, not grafted": (Shampoo, {"length": "own", "exponent": 1 / 4, "interval": 3}),
    "kl-shampoo": (KLShampoo, {}),
    "kl-shampoo, interval 1": (KLShampoo, {"interval": 1}),
    "kl-shampoo, sequential, blocks": (KLShampoo, {"sequential": True, "interval": 3, "block": 5}),
    "kl-shampoo, as muon": (KLShampoo, {"length": "muon", "interval": 3}),
    "kl-shampoo, not grafted": (KLShampoo, {"length": "own", "interval": 3}),
    "soap": (SOAP, {}),
    "soap, interval 1": (SOAP, {"interval": 1}),
    "soap, heavy ball": (SOAP, {"heavy_ball": True, "interval": 3}),
    "soap, left": (SOAP, {"sides": "left", "interval": 3}),
    "soap, norm 1": (SOAP, {"length": "spectral", "scale": "spectral", "interval": 3}),
    "soap, short sides": (SOAP, {"max_side": 10, "interval": 3}),
}
KRONECKER = (Shampoo, KLShampoo, SOAP)
OPTIMIZERS = [SignSGD, Signum, SpectralDescent, Muon, TEON, *KRONECKER]
every_option = pytest.mark.parametrize("name", OPTIONS)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def made(name, params, lr=1.0, **more):
    """The optimizer of that name; of two matrices TEON makes a stack."""
    optimizer, settings = OPTIONS[name]
    group = {"params": params}
    if optimizer is TEON:
        group["stacks"] = [[0] for _ in params]
    return optimizer([group], lr=lr, **{**settings, **more})


def promised(optimizer):
    """The longest update that the optimizer can announce, as a root-mean-square entry.

    Three times what the table says. Adam's updates are 0.2 in training, but 1 for the first
    gradient, and for one that never changes; with its two factors of decay up to 1.5 in between.
    """
    group = optimizer.param_groups[0]
    if group["length"] == "spectral":
        shape = group["params"][0].shape  # all singular values 1, at most
        return 1.01 * group["lr"] * update_scale(group["scale"], *shape) / max(shape) ** 0.5
    said = str(optimizer).splitlines()[-2].split("│")[-2].strip()
    if said == "?":
        return math.inf
    adam = group["geometry"] == "soap" or group["length"] == "adam"
    return float(said) * (8.0 if adam else 3.0)


def snapshot(optimizer):
    """Everything that a step can change."""
    groups = copy.deepcopy([dict(group) for group in optimizer.param_groups])
    for group in groups:
        group["params"] = [p.detach() for p in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return groups, [copy.deepcopy(optimizer.state.get(p, {})) for p in params]


def same(first, second):
    """Whether two snapshots are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def finite(optimizer):
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [t for p in tensors for t in optimizer.state.get(p, {}).values()]
    return all(bool(t.isfinite().all()) for t in tensors)


def updates(optimizer, gradients):
    """Take a step for each gradient of the first matrix; return the lengths of the updates.

    The second matrix has the gradients of the first, upside down and doubled.
    """
    (group,) = optimizer.param_groups
    lengths = []
    for G in gradients:
        before = [W.detach().double().clone() for W in group["params"]]
        for i, W in enumerate(group["params"]):
            W.grad = (2 * G.flip(0) if i else G).to(W.dtype)
        optimizer.step()
        lengths.append(
            max(
                float((W.detach() - old).square().mean().sqrt())
                for W, old in zip(group["params"], before, strict=True)
            )
        )
        assert math.isfinite(lengths[-1]), f"in step {len(lengths)}"
    assert finite(optimizer)
    return lengths


def zeros(*shape, dtype=torch.float32):
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for _ in range(2)]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


# Sequences of gradients. From the second number on, every update must be of a reasonable length.

ROWS, COLUMNS = 12, 8


def gaussian(steps, size=1.0, shape=(ROWS, COLUMNS)):
    return [size * randn(*shape) for _ in range(steps)]


def of_rank(rank, steps):
    """In the same column and row space all the time."""
    left, right = randn(ROWS, rank), randn(rank, COLUMNS)
    return [left @ (torch.eye(rank) + randn(rank, rank) / 2) @ right for _ in range(steps)]


def ill_conditioned(steps):
    values = torch.logspace(0, -8, COLUMNS, dtype=torch.float64)
    U, V = torch.linalg.qr(randn(ROWS, COLUMNS)).Q, torch.linalg.qr(randn(COLUMNS, COLUMNS)).Q
    return [(U * (values * (1 + randn(COLUMNS) / 2))) @ V for _ in range(steps)]


def sparse(steps, rows=0.1, columns=0.3):
    """Of units that rarely fire."""
    return [
        G * (torch.rand(ROWS, 1) < rows) * (torch.rand(1, COLUMNS) < columns)
        for G in gaussian(steps)
    ]


def awake_one_by_one(steps):
    """In one entry first, then in other rows and columns."""
    gradients = []
    for t in range(steps):
        G = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
        row = 0 if t < steps // 3 else 1 + t % (ROWS - 1)
        G[row, row % COLUMNS] = 1.0
        gradients.append(G)
    return gradients


def none(steps):
    return [torch.zeros(ROWS, COLUMNS, dtype=torch.float64)] * steps


SEQUENCES = {
    "gaussian": lambda: (gaussian(25), 0),
    "constant": lambda: (gaussian(1) * 200, 0),
    "rank 1": lambda: (of_rank(1, 35), 0),
    "rank 2": lambda: (of_rank(2, 35), 0),
    "another rank 1 each time": lambda: (
        [randn(ROWS, 1) @ randn(1, COLUMNS) for _ in range(30)],
        0,
    ),
    "another rank 1 in the end": lambda: (of_rank(1, 20) + of_rank(1, 12), 0),
    "condition 1e8": lambda: (ill_conditioned(25), 0),
    "one entry": lambda: (awake_one_by_one(36), 36),
    "sparse": lambda: (sparse(50), 50),
    "first zero, then not": lambda: (none(1) + gaussian(12), 1),
    "long zero, then not": lambda: (none(13) + gaussian(12), 13),
    "first denormal, then not": lambda: (gaussian(12, 1e-42) + gaussian(12), 12),
    "first tiny, then not": lambda: (gaussian(12, 1e-10) + gaussian(12, 1e4), 12),
    "a million times larger": lambda: (gaussian(12) + gaussian(14, 1e6), 0),
    "a million times smaller": lambda: (gaussian(12) + gaussian(14, 1e-6), 26),
    "1e30 times larger": lambda: (gaussian(12, 1e-15) + gaussian(12, 1e15), 24),
    "huge and tiny in turn": lambda: (
        [G * (1e4 if t % 2 else 1e-4) for t, G in enumerate(gaussian(25))],
        25,
    ),
    "one is huge": lambda: (gaussian(4) + gaussian(1, 1e15) + gaussian(16), 21),
}


@functools.cache
def sequence(name):
    torch.manual_seed(0)
    return SEQUENCES[name]()


# An optimizer whose update is a function of one gradient, or of their average, has no surprises.
CASES = [
    (name, gradients)
    for name, (optimizer, _) in OPTIONS.items()
    for gradients in SEQUENCES
    if optimizer in KRONECKER or gradients in ("first denormal, then not", "sparse", "rank 1")
]


@pytest.mark.parametrize(("name", "gradients"), [*CASES, ("muon", "constant")])
def test_updates_are_as_long_as_promised(name, gradients):
    optimizer = made(name, zeros(ROWS, COLUMNS))
    steps, awake = sequence(gradients)
    lengths = updates(optimizer, steps)
    longest = promised(optimizer)
    assert max(lengths) <= longest
    if longest < math.inf:
        assert min(lengths[awake:], default=1.0) > longest / 1000


@every_option
@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (1, 1), (2, 3)], ids=str)
def test_rows_and_columns_are_matrices_too(name, shape):
    optimizer = made(name, zeros(*shape))
    lengths = updates(optimizer, [randn(*shape) for _ in range(12)])
    assert min(lengths) > 0
    assert max(lengths) <= promised(optimizer)


SIZES = [1e-44, 1e-30, 1e-19, 1e15, 1e18, 1e30, 3e38]


@every_option
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_any_size_are_taken_or_refused(name, size):
    optimizer = made(name, zeros(6, 5))
    longest = promised(optimizer)
    updates(optimizer, gaussian(2, shape=(6, 5)))
    for G in gaussian(8, shape=(6, 5)):
        before = snapshot(optimizer) if size > 1e15 else None
        try:
            (length,) = updates(optimizer, [size / 2 * G.sign()])  # the second gets it whole
        except FloatingPointError:
            assert size > 1e15
            assert same(snapshot(optimizer), before)
        else:
            assert length <= longest
    assert max(updates(optimizer, gaussian(8, shape=(6, 5)))) <= longest


WITHOUT_UNITS = [
    name
    for name, (optimizer, settings) in OPTIONS.items()
    if optimizer not in KRONECKER
    or "muon" in settings.values()
    or settings.get("length") == "spectral"
]


@pytest.mark.parametrize("name", WITHOUT_UNITS)
@pytest.mark.parametrize("size", [1e-38, 1e-22, 1e-5, 1e5, 1e14])
def test_updates_without_units_do_not_depend_on_the_scale(name, size):
    optimizer = made(name, zeros(ROWS, COLUMNS))
    least = (ROWS * COLUMNS) ** -0.5 / 2  # of a direction of spectral norm 1
    if optimizer.param_groups[0]["length"] != "spectral":
        least = promised(optimizer) / 50
    lengths = updates(optimizer, gaussian(15, size))
    assert min(lengths) > least
    assert max(lengths) <= promised(optimizer)


@every_option
@pytest.mark.parametrize(
    ("value", "where"),
    [
        (torch.nan, "first"),
        (-torch.inf, "second"),
        (torch.inf, "both"),
        (torch.nan, "adamw"),
        (1e20, "second"),
        (3e19, "adamw"),
        (3.3e38, "both"),
    ],
)
def test_a_refused_step_leaves_everything_as_it_was(name, value, where):
    def run(nonfinite, bad_steps):
        torch.manual_seed(0)
        params = zeros(6, 5)
        optimizer = made(name, params, nonfinite=nonfinite)
        vector = nn.Parameter(torch.zeros(3))
        optimizer.add_param_group({"params": [vector], "geometry": "adamw"})
        refused = 0
        for step in range(8):
            for p in (*params, vector):
                p.grad = torch.randn_like(p)
            if step in bad_steps:
                gone = {"first": params[:1], "second": params[1:], "both": params}
                for p in gone.get(where, [vector]):
                    p.grad.view(-1)[-1] = value
                before = snapshot(optimizer)
                try:
                    optimizer.step()
                except FloatingPointError:
                    assert nonfinite == "raise"
                    refused += 1
                    assert same(snapshot(optimizer), before)
                    continue
                if optimizer.skipped_steps > refused:
                    refused += 1
                    assert same(snapshot(optimizer), before)
                    continue
                assert math.isfinite(value)
            optimizer.step() if step not in bad_steps else None
            assert finite(optimizer)
        return refused, snapshot(optimizer)

    raised, after_raising = run("raise", (0, 3, 4))
    skipped, after_skipping = run("skip", (0, 3, 4))
    assert raised == skipped
    assert raised in (0, 3)
    assert same(after_raising, after_skipping)


@pytest.mark.parametrize("optimizer", KRONECKER)
@pytest.mark.parametrize("how", ["zero", "none"])
def test_matrices_that_learn_in_every_other_step_renew_their_factors(optimizer, how):
    params = [nn.Parameter(torch.zeros(6, 6)) for _ in range(4)]
    tested = optimizer(params, lr=0.1, interval=4)
    for step in range(24):
        for i, W in enumerate(params):
            idle = (step + i) % 2
            W.grad = torch.zeros(6, 6) if idle else torch.randn(6, 6)
            if idle and how == "none":
                W.grad = None
        tested.step()
    for W in params:
        for side in ("left", "right"):
            assert tested.state[W][f"{side}_renewed.0"] >= 24 - 6


@every_option
def test_one_idle_matrix_does_not_disturb_the_others(name):
    params, alone = zeros(6, 5), zeros(6, 5)
    more = {"interval": 1} if OPTIONS[name][0] in KRONECKER else {}
    optimizer = made(name, params, **more)
    busy = OPTIONS[name][0]([alone[0]], **({"stack": 1} if OPTIONS[name][0] is TEON else {}),
                            **{"lr": 1.0, **OPTIONS[name][1], **more})  # fmt: skip
    for _ in range(12):
        params[0].grad, params[1].grad = torch.randn(6, 5), torch.zeros(6, 5)
        alone[0].grad = params[0].grad.clone()
        optimizer.step()
        busy.step()
    assert torch.equal(params[1], torch.zeros(6, 5))
    torch.testing.assert_close(params[0].data, alone[0].data, rtol=1e-4, atol=1e-4)


# Rounding


@pytest.mark.parametrize("kind", ["fixed", "changing"])
@pytest.mark.parametrize("rank", [1, 6, 20])
@pytest.mark.parametrize(
    "name",
    ["muon", "shampoo", "shampoo, 1/4, blocks", "shampoo, as muon", "kl-shampoo", "soap"],
)
def test_low_rank_gradients_in_float32_move_as_in_float64(name, rank, kind):
    fixed = randn(20, rank), randn(rank, 20)
    gradients = []
    for _ in range(50):
        left, right = fixed if kind == "fixed" else (randn(20, rank), randn(rank, 20))
        gradients.append(left @ (torch.eye(rank) + randn(rank, rank) / 2) @ right)
    ways = []
    for dtype in (torch.float64, torch.float32):
        params = zeros(20, 20, dtype=dtype)[:1]
        optimizer = made(name, params, lr=0.01)
        lengths = updates(optimizer, gradients)
        assert max(lengths) <= promised(optimizer)
        ways.append((params[0].detach().double(), lengths))
    (exact, true), (rounded, measured) = ways
    assert max(measured) == pytest.approx(max(true), rel=0.1)
    assert sum(measured) == pytest.approx(sum(true), rel=0.1)
    if name != "soap":  # whose basis of a null space is arbitrary
        assert (rounded - exact).norm() < 0.2 * exact.norm()


HALF = [
    (torch.bfloat16, None, 1.0),
    (torch.bfloat16, torch.float32, 1e-4),
    (torch.float16, None, 1e-4),
    (torch.float16, None, 300.0),
    (torch.float16, torch.float32, 300.0),
]


@every_option
@pytest.mark.parametrize(("dtype", "state_dtype", "size"), HALF, ids=str)
def test_half_precision_parameters_take_updates_of_the_same_length(name, dtype, state_dtype, size):
    optimizer = made(name, zeros(ROWS, COLUMNS, dtype=dtype), lr=0.01, state_dtype=state_dtype)
    lengths = updates(optimizer, gaussian(12, size))
    longest = promised(optimizer)
    assert max(lengths) <= longest
    if longest < math.inf:
        assert min(lengths) > longest / 50


@every_optimizer
@pytest.mark.filterwarnings("ignore:TEON found nothing to stack")
def test_stochastic_rounding_is_right_on_average(optimizer):
    G = torch.randn(24, 24)

    def moved(dtype, rounding, lr, steps):
        W = nn.Parameter(torch.ones(24, 24, dtype=dtype))
        tested = optimizer([W], lr=lr, rounding=rounding, state_dtype=torch.float32)
        for _ in range(steps):
            W.grad = G.to(dtype)
            tested.step()
        return (W.detach().float() - 1.0) * -G.sign()

    # Five spacings of bfloat16 below 1, in a hundred steps.
    lr = 0.02 / float(moved(torch.float32, "nearest", 1.0, 100).square().mean().sqrt())
    expected = moved(torch.float32, "nearest", lr, 100)
    found = moved(torch.bfloat16, "stochastic", lr, 100)
    assert found.mean() == pytest.approx(float(expected.mean()), rel=0.1)
    # Not the same few entries in all the steps.
    assert found.max() < expected.max() + 0.1
    assert (found != 0)[expected > 0.015].float().mean() > 0.9


# Options that all optimizers have


@every_option
def test_ascending_is_descending_along_the_opposite_gradient(name):
    up, down = zeros(6, 5), zeros(6, 5)
    ascent, descent = made(name, up, maximize=True), made(name, down)
    for _ in range(5):
        for p, q in zip(up, down, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = -p.grad
        ascent.step()
        descent.step()
    assert same([p.detach() for p in up], [q.detach() for q in down])


@every_option
@pytest.mark.parametrize("decay", ["decoupled", "independent", "cautious"])
def test_decay_shrinks_the_weights_beside_the_update(name, decay):
    def run(weight_decay):
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(6, 5, dtype=torch.float64)) for _ in range(2)]
        optimizer = made(name, params, lr=0.5, weight_decay=weight_decay, decay=decay)
        optimizer.param_groups[0]["lr"] = 0.125  # scheduled
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        return before, [p.detach() for p in params]

    before, plain = run(0.0)
    _, decayed = run(0.1)
    for old, new, shrunk in zip(before, plain, decayed, strict=True):
        rate = 0.125 / 0.5 if decay == "independent" else 1.0  # of the schedule
        left = reference.decayed(old, old - new, 0.125, weight_decay=0.1 * rate, decay=decay)
        torch.testing.assert_close(shrunk, new - old + left, rtol=1e-9, atol=1e-9)


@every_optimizer
@pytest.mark.filterwarnings("ignore:TEON found nothing to stack")
def test_roles_have_settings_of_their_own(optimizer, network, set_gradients):
    own = {
        "qkv": {"lr": 0.0},
        "conv": {"geometry": "adamw", "lr": 0.25, "betas": (0.0, 0.0), "eps": 0.0},
        "embedding": {"lr": 0.5, "weight_decay": 0.5},
    }
    model = network()
    own = {role: own[role] for role in own if any(row.role == role for row in roles(model))}
    assert len(own) >= 2
    before = copy.deepcopy(model.state_dict())
    tested = optimizer(model, lr=0.125, roles=own)
    set_gradients(model.parameters(), 0)
    tested.step()
    for row in roles(model):
        moved = (row.parameter.detach() - before[row.name]).abs()
        if row.role == "qkv":
            assert moved.max() == 0
        elif row.role == "conv":
            torch.testing.assert_close(moved, torch.full_like(moved, 0.25))
        else:
            assert moved.max() > 0


# The same again, and how much memory it takes


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_run_twice_is_the_same_bit_for_bit(name, dtype):
    def run():
        torch.manual_seed(0)
        params = zeros(16, 12, dtype=dtype)
        optimizer = made(name, params, rounding="stochastic", weight_decay=0.1)
        updates(optimizer, [randn(16, 12) for _ in range(12)])
        return snapshot(optimizer)

    assert same(run(), run())


@every_optimizer
@pytest.mark.filterwarnings("ignore:TEON found nothing to stack")
def test_a_step_needs_memory_for_a_batch_and_not_for_the_model(optimizer, monkeypatch):
    size, per_batch = 64, 4
    monkeypatch.setitem(matrices._ENTRIES_PER_BATCH, "cpu", per_batch * size**2)

    def peak(count):
        params = [nn.Parameter(torch.randn(size, size)) for _ in range(count)]
        tested = optimizer(params, lr=0.1)
        for p in params:
            p.grad = torch.randn_like(p)
        tested.step()
        with torch.profiler.profile(profile_memory=True) as profile:
            tested.step()
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most / (4 * size**2)

    few, many = peak(4 * per_batch), peak(12 * per_batch)
    assert many <= few + 2 * per_batch
    assert few <= 14 * per_batch if optimizer in KRONECKER else 8 * per_batch
