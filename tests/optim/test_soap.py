"""SOAP is Adam in an eigenbasis: the paper's algorithm, and the numbers of another implementation.

`NUMBERS` are final weights by `SOAP` of the package pytorch_optimizer 4.1.0, a port of the authors'
code, in float64, for the 13 gradients `closed_form(0), ..., closed_form(12)` with lr=0.1,
betas=(0.9, 0.95), eps=1e-8, weight_decay=0 and three values of `precondition_frequency`. Its
conventions differ from ours in these points, all of them about the beginning or the order:

- The first gradient only starts the factors: the first basis is its eigenvectors, and neither the
  weights nor the averages of Adam move. Ours takes the step of Adam, and the first basis, at the
  step of its slot, takes V along.
- Both sides are renewed in the same steps, those of a number (without the first) that the frequency
  divides. Ours have slots of their own.
- Weight decay comes after the step. Ours before; here it is 0.
- A renewal only reorders V there. Ours turns it with the squares of the turn. So the algorithm is
  run both ways: as published it has these numbers, and turned it is ours.
- Its QR decomposition is in float32, so that without renewals the numbers agree to all digits that
  are written here, and with them to 1e-6.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steepest import SOAP, Signum
from steepest.optim import kronecker, reference

NUMBERS = {
    1: [
        [-0.52764917, -0.06679127, -0.05118123, -0.17770903],
        [-0.01467386, 0.02892962, 0.11162937, -0.05495866],
        [-0.119866, 0.24921802, 0.0327877, 0.11108266],
        [-0.29677252, -0.32490037, 0.20412268, 0.39214121],
        [0.14578668, 0.12979661, 0.10900199, -0.46559945],
    ],
    3: [
        [-0.37717029, -0.02826037, -0.07576086, -0.25949081],
        [0.03997788, 0.03844679, 0.08639785, -0.13707276],
        [-0.15208613, 0.25200813, 0.02961417, 0.0189353],
        [-0.31565303, -0.3416911, 0.15319355, 0.31670167],
        [0.19286796, 0.12392103, 0.18024538, -0.44137084],
    ],
    1000: [
        [-0.34773823, -0.01423626, -0.08078763, -0.26988232],
        [0.0111366, 0.01916776, 0.07150084, -0.18742537],
        [-0.16820561, 0.25186557, 0.0275252, 0.05181361],
        [-0.31424076, -0.31712993, 0.13195456, 0.28210443],
        [0.24243934, 0.14367389, 0.19073486, -0.38046302],
    ],
}


EVERY_SLOT = [(i, side) for i in range(4) for side in ("left", "right")]


def closed_form(t):
    """A gradient that depends on no random generator."""
    i = torch.arange(5, dtype=torch.float64)[:, None]
    j = torch.arange(4, dtype=torch.float64)
    return torch.sin(1.3 * i**2 + 0.7 * j**2 * (t + 1) + 1.9 * i * j + t)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def zeros(*shape, dtype=torch.float64):
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def step(optimizer, W, G):
    W.grad = G.clone()
    optimizer.step()


def reordered(A, Q):
    """The renewal of the authors' code, in place of `reference.next_basis`: V is only reordered."""
    order = (Q.mT @ A @ Q).diagonal().argsort(descending=True)
    return torch.linalg.qr(A @ Q[:, order]).Q, torch.eye(len(A), dtype=A.dtype)[:, order]


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (6, 6)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_is_the_algorithm_of_the_paper(shape, interval, decay, path):
    W = zeros(*shape)
    settings = {"momentum": 0.9, "beta2": 0.95, "eps": 1e-8, "interval": interval}
    settings["weight_decay"] = decay
    # with no more than one null vector, no basis is arbitrary
    gradients = [randn(*shape, seed=t) for t in range(25)]
    # the side that costs more, the longer one, comes first
    slots = (0, 0) if interval == 1 else (0, 1) if shape[0] >= shape[1] else (1, 0)
    weights = path(reference.soap, W.detach().clone(), gradients, 0.1, slots=slots, **settings)
    optimizer = SOAP([W], lr=0.1, **settings)
    for t, G in enumerate(gradients, start=1):
        step(optimizer, W, G)
        torch.testing.assert_close(W.detach(), weights[t], rtol=0, atol=1e-10)


@pytest.mark.parametrize("frequency", NUMBERS)
def test_it_has_the_numbers_of_another_implementation(frequency, monkeypatch):
    W, G = zeros(5, 4), closed_form(0)
    settings = {"momentum": 0.9, "beta2": 0.95, "interval": frequency}
    settings["slots"] = (frequency - 1, frequency - 1)
    settings["factors"] = ((1 - 0.95) * G @ G.mT, (1 - 0.95) * G.mT @ G)

    def run():
        return reference.soap(
            zeros(5, 4).detach(), lambda W, t: closed_form(t), 12, 0.1, **settings
        )

    turned = run()
    monkeypatch.setattr(reference, "next_basis", reordered)
    published = run()
    optimizer = SOAP([W], lr=0.0, momentum=0.9, beta2=0.95, interval=1)
    # The factors and the first basis, and nothing else.
    step(optimizer, W, closed_form(0))
    state = optimizer.state[W]
    for key in ("momentum_buffer", "exp_avg_sq", "steps.0"):
        state[key].zero_()
    (group,) = optimizer.param_groups
    group["lr"] = 0.1
    for t in range(1, 13):
        group["interval"] = 1 if t % frequency == 0 else 1000
        group["step_count"] = 500  # in nobody's slot
        step(optimizer, W, closed_form(t))
    expected = torch.tensor(NUMBERS[frequency], dtype=torch.float64)
    tolerance = 1e-8 if frequency == 1000 else 2e-6
    torch.testing.assert_close(published, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(W.detach(), turned, rtol=0, atol=1e-12)
    if frequency == 1000:
        torch.testing.assert_close(W.detach(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_in_the_basis_of_the_weights_it_is_torchs_adamw(momentum, dtype):
    W, V = zeros(6, 9, dtype=dtype), zeros(6, 9, dtype=dtype)
    settings = {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-8}
    tested = SOAP([W], momentum=momentum, beta2=0.97, max_side=5, **settings)
    adam = torch.optim.AdamW([V], betas=(momentum, 0.97), **settings)
    for t in range(30):
        G = randn(6, 9, seed=t).to(dtype)
        step(tested, W, G)
        step(adam, V, G)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5  # ε before or after the correction
    torch.testing.assert_close(W, V, rtol=0, atol=tolerance)
    assert not any("root" in key for key in tested.state[W])


def test_in_the_basis_of_the_weights_and_without_eps_it_is_adamw_to_the_last_digits():
    W, V = zeros(6, 9), zeros(6, 9)
    tested = SOAP([W], lr=0.1, momentum=0.9, beta2=0.97, eps=0.0, weight_decay=0.2, max_side=5)
    adam = torch.optim.AdamW([V], lr=0.1, betas=(0.9, 0.97), eps=0.0, weight_decay=0.2)
    for t in range(30):
        step(tested, W, randn(6, 9, seed=t))
        step(adam, V, randn(6, 9, seed=t))
    torch.testing.assert_close(W, V, rtol=0, atol=1e-13)


def test_it_begins_as_adam_until_each_side_has_its_first_basis():
    W, V = zeros(6, 4), zeros(6, 4)
    tested = SOAP([W], lr=0.1, eps=0.0, interval=10)
    adam = torch.optim.AdamW([V], lr=0.1, betas=(0.95, 0.95), eps=0.0, weight_decay=0.0)
    step(tested, W, randn(6, 4))
    step(adam, V, randn(6, 4))
    torch.testing.assert_close(W, V, rtol=0, atol=1e-15)
    assert [int(tested.state[W][f"{side}_renewed.0"]) for side in ("left", "right")] == [0, -1]
    step(tested, W, randn(6, 4, seed=1))
    step(adam, V, randn(6, 4, seed=1))
    assert float((W - V).detach().norm()) > 1e-3
    assert [int(tested.state[W][f"{side}_renewed.0"]) for side in ("left", "right")] == [0, 1]


@pytest.mark.parametrize("sides", ["left", "right"])
def test_a_side_without_a_basis_is_that_of_the_weights(sides):
    """Rotated from one side only, it is the two-sided one whose other basis stays the identity."""
    shape = (6, 4)
    ways = []
    for settings in ({"sides": sides}, {"max_side": 5, "sides": "both"}):
        W = zeros(*(shape if sides == "right" else shape[::-1]))
        optimizer = SOAP([W], lr=0.1, interval=2, **settings)
        for t in range(9):
            step(optimizer, W, randn(*W.shape, seed=t))
        assert sum("_root" in key for key in optimizer.state[W]) == 1
        ways.append(W.detach())
    assert torch.equal(*ways)


def test_the_basis_it_keeps_is_that_of_the_factors():
    W = zeros(8, 5)
    optimizer = SOAP([W], lr=0.1, interval=3, beta2=0.99)
    G = randn(8, 5)
    for t in range(120):
        step(optimizer, W, G + 0.01 * randn(8, 5, seed=t))
    state = optimizer.state[W]
    for side in ("left", "right"):
        A, Q = state[f"{side}.0"], state[f"{side}_root.0"]
        n = len(Q)
        torch.testing.assert_close(Q.mT @ Q, torch.eye(n, dtype=Q.dtype), rtol=0, atol=1e-12)
        B = Q.mT @ A @ Q
        assert float((B - torch.diag(B.diagonal())).norm() / B.norm()) < 1e-3
        assert B.diagonal()[:5].tolist() == sorted(B.diagonal()[:5].tolist(), reverse=True)


@pytest.mark.parametrize("shape", [(8, 8), (9, 4), (4, 9), (7, 1)], ids=str)
@pytest.mark.parametrize("own", [{}, {"sides": "right"}, {"max_side": 6}, {"interval": 1}], ids=str)
def test_with_normalization_steps_have_the_spectral_norm_of_the_scale(shape, own):
    W, V = zeros(*shape), zeros(*shape)
    tested = SOAP([W], 0.1, length="spectral", scale="spectral", **own)
    bare = SOAP([V], 1.0, **own)
    for t in range(25):
        G = randn(*shape, seed=t) * 10.0 ** (t % 3)
        before = W.detach().clone(), V.detach().clone()
        step(tested, W, G)
        step(bare, V, G)
        D, E = W.detach() - before[0], V.detach() - before[1]
        norm = float(torch.linalg.matrix_norm(D, 2))
        assert norm == pytest.approx(0.1 * (shape[0] / shape[1]) ** 0.5, rel=1e-3), t
        assert float((D * E).sum() / D.norm() / E.norm()) == pytest.approx(1.0, abs=1e-12)


def test_noise_as_large_as_a_layer_is_normalized_to_three_percent():
    """The slowest case: no singular value stands out."""
    W = zeros(256, 1024, dtype=torch.float32)
    step(SOAP([W], 1.0, length="spectral"), W, randn(256, 1024).float())
    assert 1 - 1e-5 <= float(torch.linalg.matrix_norm(W.detach(), 2)) <= 1.03


@pytest.mark.parametrize("normalize", ["spectral", "none"])
def test_without_eps_entries_that_have_no_gradient_stay(normalize):
    V, W = zeros(3, 3), zeros(4, 4)
    optimizer = SOAP([V, W], 0.1, normalize=normalize, eps=0.0, interval=1)
    V.grad, W.grad = randn(3, 3), randn(4, 4) * torch.tensor([[1.0], [0], [0], [0]])
    optimizer.step()
    assert W[0].detach().abs().min() > 0
    assert torch.equal(W[1:].detach(), torch.zeros(3, 4, dtype=W.dtype))


def test_of_several_matrices_each_is_normalized_and_an_idle_one_stays():
    params = [zeros(9, 6) for _ in range(5)]
    tested = SOAP(params, 1.0, interval=2, length="spectral")
    for t in range(6):
        before = [W.detach().clone() for W in params]
        for i, W in enumerate(params):
            W.grad = randn(9, 6, seed=10 * t + i) * 100.0**i if i != t % 5 else torch.zeros_like(W)
        tested.step()
        moved = [
            float(torch.linalg.matrix_norm(W.detach() - old, 2))
            for W, old in zip(params, before, strict=True)
        ]
        assert moved.pop(t % 5) == 0.0
        assert moved == pytest.approx([1.0] * 4, rel=1e-3)


def test_with_normalization_what_is_no_matrix_gets_the_rate_that_muon_gives_it():
    model = nn.Linear(4, 3)
    for own, lr in (({}, 0.1), ({"length": "spectral"}, 0.015)):
        assert [group["lr"] for group in SOAP(model, 0.1, **own).param_groups] == [0.1, lr]
    given = SOAP(model, 0.1, length="spectral", adamw_lr=0.3)
    assert given.param_groups[1]["lr"] == 0.3


def test_the_momentum_is_turned_with_the_basis():
    """In the basis of the weights the momentum is the average of gradients, whatever the bases."""
    W, M = zeros(6, 4), torch.zeros(6, 4, dtype=torch.float64)
    optimizer = SOAP([W], lr=0.1, momentum=0.8, interval=2)
    for t in range(15):
        G = randn(6, 4, seed=t)
        M = 0.8 * M + 0.2 * G
        step(optimizer, W, G)
        state = optimizer.state[W]
        kept = state["left_root.0"] @ state["momentum_buffer"] @ state["right_root.0"].mT
        torch.testing.assert_close(kept, M, rtol=0, atol=1e-13)


def test_the_second_moment_is_turned_by_squares_and_keeps_its_sum():
    W = zeros(6, 4)
    optimizer = SOAP([W], lr=0.1, interval=4)
    for t in range(12):
        state = optimizer.state[W]
        eyes = [torch.eye(n, dtype=torch.float64) for n in W.shape]
        names = ("left_root.0", "right_root.0")
        old = [state.get(name, eye) for name, eye in zip(names, eyes, strict=True)]
        V = state.get("exp_avg_sq", torch.zeros(6, 4, dtype=torch.float64)).clone()
        G = randn(6, 4, seed=t)
        step(optimizer, W, G)
        V = 0.95 * V + 0.05 * (old[0].mT @ G @ old[1]) ** 2
        left, right = ((Q.mT @ state[name]) ** 2 for Q, name in zip(old, names, strict=True))
        torch.testing.assert_close(state["exp_avg_sq"], left.mT @ V @ right, rtol=0, atol=1e-13)
        torch.testing.assert_close(state["exp_avg_sq"].sum(), V.sum())
        assert (state["exp_avg_sq"] >= 0).all()


def test_its_first_step_is_signs_as_adams_is():
    W, V = zeros(4, 3), zeros(4, 3)
    soap, signum = SOAP([W], lr=0.1, eps=0.0), Signum([V], lr=0.1)
    step(soap, W, randn(4, 3))
    step(signum, V, randn(4, 3))
    torch.testing.assert_close(W, V, rtol=0, atol=1e-15)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("at_a_time", [1, 2 * 25, 2**20], ids=["one", "two", "all"])
def test_blocks_that_are_renewed_together_step_as_each_alone(at_a_time, interval, monkeypatch):
    monkeypatch.setattr(kronecker, "_ENTRIES_RENEWED", at_a_time)
    # with one slot in the interval, so that blocks of a matrix and matrices alone have the same
    monkeypatch.setattr(kronecker, "_slots", lambda *_: dict.fromkeys(EVERY_SLOT, 0))
    blocks, whole = [zeros(5, 5) for _ in range(4)], zeros(10, 10)
    alone = [SOAP([block], lr=0.1, interval=interval) for block in blocks]
    together = SOAP([whole], lr=0.1, block=5, interval=interval)
    scales = torch.tensor([1e2, 0.0, 1e-3, 1.0], dtype=torch.float64).view(2, 1, 2, 1)
    for t in range(9):
        whole.grad = (randn(2, 5, 2, 5, seed=t) * scales).reshape(10, 10)
        together.step()
        parts = whole.grad.view(2, 5, 2, 5).transpose(1, 2).reshape(4, 5, 5)
        for block, own, G in zip(blocks, alone, parts, strict=True):
            step(own, block, G)
    stepped = whole.detach().view(2, 5, 2, 5).transpose(1, 2).reshape(4, 5, 5)
    for i, block in enumerate(blocks):
        torch.testing.assert_close(stepped[i], block.detach(), rtol=0, atol=1e-9)
        for side in ("left", "right"):
            root = together.state[whole][f"{side}_root.{i}"]
            assert root.untyped_storage().nbytes() == root.numel() * root.element_size()
    assert float(whole.detach().abs().max()) > 0.1
