"""Muon is torch's Muon where that is right, and the algorithm of its paper everywhere."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from steepest import Muon

SHAPES = {
    "square": [(32, 32)],
    "tall": [(64, 16)],
    "wide": [(16, 64)],
    "many equal": [(24, 24)] * 7,
    "many equal and tall": [(48, 12)] * 5,
    "mixed": [(32, 32), (64, 16), (16, 64), (32, 32), (200, 150), (1, 9), (9, 1), (64, 16)],
}
# Batched products may be summed in another order on another machine: one unit of bfloat16 in an
# update of length lr. Here all runs are equal bit for bit.
TOLERANCE = 2e-4


def _pair(shapes, dtype=torch.float32):
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    return ours, [nn.Parameter(p.detach().clone()) for p in ours]


def _same_gradients(ours, theirs, scale=1.0):
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn(p.shape).to(p.dtype) * scale
        q.grad = p.grad.clone()


def _theirs(params, **settings):
    return torch.optim.Muon(params, **settings)


@pytest.mark.parametrize(
    ("dtype", "nesterov"),  # in bfloat16 without Nesterov torch overwrites its momentum, see below
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize("scale", ["original", "match-rms-adamw"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_torchs_muon_step_for_step(shapes, scale, nesterov, dtype):
    ours, theirs = _pair(shapes, dtype)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    mine = Muon(ours, scale=scale, method="jordan", dtype=torch.bfloat16, **settings)
    reference = _theirs(theirs, adjust_lr_fn=scale.replace("-", "_"), **settings)
    for _ in range(12):
        _same_gradients(ours, theirs)
        mine.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            ulp = torch.finfo(dtype).eps * q.abs()
            assert ((p - q).abs() <= ulp + TOLERANCE).all()
            M, N = mine.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"]
            assert torch.equal(M, N)


@pytest.mark.parametrize("nesterov", [True, False])
def test_without_batches_it_is_torchs_muon_bit_for_bit(nesterov):
    ours, theirs = _pair([(32, 32), (64, 16), (16, 64), (200, 150)])
    settings = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    mine = Muon(ours, scale="original", method="jordan", dtype=torch.bfloat16, **settings)
    reference = _theirs(theirs, **settings)
    for _ in range(12):
        _same_gradients(ours, theirs)
        mine.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_in_bfloat16_without_nesterov_the_momentum_is_the_average_of_gradients():
    ours, theirs = _pair([(32, 16)], torch.bfloat16)
    mine = Muon(
        ours, lr=0.01, method="jordan", dtype=torch.bfloat16, scale="original", nesterov=False
    )
    reference = _theirs(theirs, lr=0.01, weight_decay=0.0, nesterov=False)
    average = torch.zeros(32, 16)
    for _ in range(5):
        _same_gradients(ours, theirs)
        mine.step()
        reference.step()
        average = 0.95 * average + 0.05 * ours[0].grad.float()
    M = mine.state[ours[0]]["momentum_buffer"].float()
    N = reference.state[theirs[0]]["momentum_buffer"].float()
    torch.testing.assert_close(M, average, rtol=0.02, atol=0.01)
    if torch.allclose(N, average, rtol=0.02, atol=0.01):
        warnings.warn("torch.optim.Muon no longer overwrites its momentum", stacklevel=1)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**83], ids=["1e-12", "1e25"])
def test_the_scale_of_the_gradients_does_not_matter(scale):
    ours, theirs = _pair([(32, 16), (16, 16)])
    plain = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    settings = {"lr": 0.02, "scale": "original", "method": "jordan", "dtype": torch.bfloat16}
    mine, same = Muon(ours, **settings), Muon(plain, **settings)
    reference = _theirs(theirs, lr=0.02, weight_decay=0.0)
    for _ in range(5):
        _same_gradients(ours, theirs)
        for p, q, r in zip(ours, theirs, plain, strict=True):
            r.grad = p.grad.clone()
            p.grad *= scale
            q.grad *= scale
        mine.step()
        reference.step()
        same.step()
    for p, q, r, W in zip(ours, theirs, plain, start, strict=True):
        assert torch.equal(p, r)  # a power of two changes no digit
        moved, expected = (q - W).norm(), (r - W).norm()
        if moved > 0.5 * expected:
            warnings.warn("torch.optim.Muon no longer depends on the scale", stacklevel=1)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e25, 1e37])
def test_float32_gradients_of_any_size_move_the_weights_as_far(scale):
    W = nn.Parameter(torch.zeros(16, 16))
    optimizer = Muon([W], lr=1.0, method="svd", dtype=None, momentum=0.5)
    for i in range(3):
        before = W.detach().clone()
        W.grad = torch.randn(16, 16) * scale
        optimizer.step()
        assert torch.linalg.matrix_norm(W - before, 2).item() == pytest.approx(1.0, abs=1e-4), i


def test_weight_decay_in_bfloat16_is_not_rounded_to_bfloat16():
    # 1 - 0.1 * 0.04 = 0.996 is 0.99609375 in bfloat16, where 1 - 0.1 * 0.01 = 0.999 is 1.
    weights = torch.linspace(0.5, 1.0, 257)[:-1].reshape(16, 16).bfloat16()
    for decay in (0.01, 0.04):
        W = nn.Parameter(weights.clone())
        W.grad = torch.ones_like(W)
        Muon([W], lr=0.1, weight_decay=decay, scale="none").step()
        only_step = nn.Parameter(weights.clone())
        only_step.data.mul_(1 - 0.1 * decay)
        only_step.grad = W.grad
        Muon([only_step], lr=0.1, scale="none").step()
        assert torch.equal(W, only_step)


def test_nesterov_looks_ahead_by_one_gradient():
    W = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = Muon([W], lr=1.0, momentum=0.5, nesterov=True, method="svd", dtype=None)
    W.grad = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    optimizer.step()
    # M = 0.5 G1; with -3 G1: M = 0.25 G1 - 1.5 G1, and so is the look-ahead; the sign turns
    W.grad = -3 * W.grad
    optimizer.step()
    torch.testing.assert_close(W.data, torch.zeros(2, 2, dtype=torch.float64))
    M = optimizer.state[W]["momentum_buffer"]
    torch.testing.assert_close(M.diagonal(), torch.tensor([-1.25, 1.25], dtype=torch.float64))


def test_nesterov_and_plain_momentum_differ_as_their_formulas():
    gradients = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    for nesterov, weights in ((False, (0.25, 0.5)), (True, (0.125, 0.75))):
        W = nn.Parameter(torch.zeros(1, 2))
        optimizer = Muon(
            [W], lr=1.0, momentum=0.5, nesterov=nesterov, scale="none", method="svd", dtype=None
        )
        for G in gradients:
            before = W.detach().clone()
            W.grad = G
            optimizer.step()
        N = torch.tensor([weights])
        torch.testing.assert_close(W.detach() - before, -N / N.norm())


def test_its_adamw_rate_follows_from_the_scale():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    rates = {
        scale: Muon(model, lr=0.02, scale=scale).param_groups[1]["lr"]
        for scale in ("spectral", "original", "match-rms-adamw", "none")
    }
    assert rates["match-rms-adamw"] == 0.02  # there, one rate serves both
    assert rates["spectral"] == rates["original"] == rates["none"] == pytest.approx(0.003)
    assert Muon(model, lr=0.02, adamw_lr=0.5).param_groups[1]["lr"] == 0.5


def test_svd_in_bfloat16_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="float32"):
        Muon([nn.Parameter(torch.zeros(2, 2))], method="svd", dtype=torch.bfloat16)
