"""The spectral optimizers against the algorithm written out in `reference`, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from steepest import MatrixView, Muon, SpectralDescent
from steepest.optim import reference, update_scale

EXACT = {"method": "svd", "dtype": None}

# name: shape, view, and how a tensor is cut into its matrices (out, in)
PARAMETERS = {
    "linear": ((8, 12), None, lambda W: [W]),
    "equal": ((8, 12), None, lambda W: [W]),
    "tall": ((20, 5), None, lambda W: [W]),
    "conv": ((8, 4, 3, 3), None, lambda W: [W.reshape(8, 36)]),
    "grouped": (
        (8, 2, 3, 3),
        MatrixView.of((8, 2, 3, 3), batch=2),
        lambda W: [W[:4].reshape(4, 18), W[4:].reshape(4, 18)],
    ),
    "conv1d": ((8, 4, 3), MatrixView(1, 8, 12), lambda W: [W.reshape(8, 12)]),
    "transposed conv": (
        (6, 2, 2, 2),
        MatrixView.of((6, 2, 2, 2), transposed=True),
        lambda W: [W.reshape(6, 8).T],
    ),
    "qkv": (
        (12, 6),
        MatrixView.of((12, 6), splits=(6, 3, 3)),
        lambda W: [W[:6], W[6:9], W[9:]],
    ),
    "qkv as (in, out)": (
        (6, 18),
        MatrixView.of((6, 18), transposed=True, splits=(6, 6, 6)),
        lambda W: [W[:, :6].T, W[:, 6:12].T, W[:, 12:].T],
    ),
    "experts": (
        (3, 5, 7),
        MatrixView.of((3, 5, 7), batch=3),
        lambda W: [W[0], W[1], W[2]],
    ),
}


@pytest.mark.parametrize(
    ("optimizer", "algorithm", "settings"),
    [
        (SpectralDescent, reference.spectral_descent, {}),
        (Muon, reference.muon, {"momentum": 0.9, "nesterov": False}),
        (Muon, reference.muon, {"momentum": 0.9, "nesterov": True}),
    ],
    ids=["SpectralDescent", "Muon", "Muon with Nesterov"],
)
@pytest.mark.parametrize("scale", ["spectral", "original", "match-rms-adamw", "none"])
def test_twenty_steps_are_those_of_the_paper(optimizer, algorithm, settings, scale, path, average):
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    settings = {"weight_decay": 0.3, "scale": scale, **settings}
    start = {name: randn(*shape) for name, (shape, *_) in PARAMETERS.items()}
    gradients = {name: randn(20, *shape) for name, (shape, *_) in PARAMETERS.items()}
    parameters = {name: nn.Parameter(W.clone()) for name, W in start.items()}
    views = [MatrixView.of(s) if v is None else v for s, v, _ in PARAMETERS.values()]
    tested = optimizer(
        [{"params": list(parameters.items()), "views": views}], lr=0.1, **EXACT, **settings
    )
    for t in range(20):
        for name, p in parameters.items():
            p.grad = gradients[name][t].clone()
        tested.step()
    for name, (_, _, cut) in PARAMETERS.items():
        parts = [cut(G) for G in gradients[name]]
        for i, (W, first) in enumerate(
            zip(cut(parameters[name].detach()), cut(start[name]), strict=True)
        ):
            weights = path(algorithm, first, [matrices[i] for matrices in parts], 0.1, **settings)
            torch.testing.assert_close(W, weights[-1], rtol=0, atol=1e-11, msg=name)
        if "momentum" in settings:
            M = tested.state[parameters[name]]["momentum_buffer"]
            torch.testing.assert_close(M, average(gradients[name], 0.9), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("out", "in_"), [(24, 24), (40, 10), (10, 40)])
@pytest.mark.parametrize("scale", ["spectral", "original", "match-rms-adamw", "none"])
def test_an_update_has_the_norm_and_the_entries_of_the_table(scale, out, in_):
    norm, entry = {
        "spectral": (math.sqrt(out / in_), min(math.sqrt(in_), math.sqrt(out)) / in_),
        "original": (math.sqrt(max(1, out / in_)), 1 / math.sqrt(in_)),
        "match-rms-adamw": (0.2 * math.sqrt(max(out, in_)), 0.2),
        "none": (1.0, 1 / math.sqrt(max(out, in_))),
    }[scale]
    W = nn.Parameter(torch.zeros(out, in_, dtype=torch.float64))
    W.grad = torch.randn_like(W)
    SpectralDescent([W], lr=1.0, scale=scale, **EXACT).step()
    assert torch.linalg.matrix_norm(W, 2).item() == pytest.approx(norm, rel=1e-10)
    assert W.square().mean().sqrt().item() == pytest.approx(entry, rel=1e-10)
    assert update_scale(scale, out, in_) == pytest.approx(norm, rel=1e-12)


def test_the_factor_is_that_of_the_matrix_and_not_of_the_tensor():
    # Of a fused projection stored as (in, out), each of the three blocks is (out 4, in 16).
    W = nn.Parameter(torch.zeros(16, 12, dtype=torch.float64))
    W.grad = torch.randn_like(W)
    view = MatrixView.of((16, 12), transposed=True, splits=(4, 4, 4))
    SpectralDescent([{"params": [W], "views": [view]}], lr=1.0, scale="spectral", **EXACT).step()
    for block in W.detach().split(4, dim=1):
        assert torch.linalg.svdvals(block).numpy() == pytest.approx(np.full(4, 0.5), rel=1e-10)


def test_muon_without_momentum_is_spectral_descent():
    A = nn.Parameter(torch.randn(6, 5))
    B = nn.Parameter(A.detach().clone())
    first, second = Muon([A], momentum=0.0), SpectralDescent([B])
    for _ in range(4):
        A.grad = torch.randn_like(A)
        B.grad = A.grad.clone()
        first.step()
        second.step()
    assert torch.equal(A, B)
    assert not first.state
    assert not second.state


@pytest.mark.parametrize("scale", [1e-300, 1e-45, 1e45, 1e300])
def test_float64_gradients_beyond_the_range_of_float32_are_followed(scale):
    W = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    optimizer = Muon([W], lr=1.0, **EXACT)
    G = torch.randn_like(W)
    for _ in range(2):
        W.grad = G * scale
        optimizer.step()
    U, _, Vh = torch.linalg.svd(G)
    torch.testing.assert_close(W.data, -2 * U @ Vh, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["polar-express", "jordan", "you"])
def test_the_fast_methods_take_nearly_the_exact_step(method):
    error = {"polar-express": 0.15, "jordan": 0.35, "you": 0.15}[method]
    G = torch.randn(4, 24, 8, dtype=torch.float64)  # well conditioned
    steps = []
    for settings in (EXACT, {"method": method}):
        W = nn.Parameter(torch.zeros_like(G))
        W.grad = G.clone()
        view = MatrixView.of(G.shape, batch=4)
        SpectralDescent([{"params": [W], "views": [view]}], lr=1.0, scale="none", **settings).step()
        steps.append(W.detach())
    exact, fast = steps
    difference = torch.linalg.matrix_norm(fast - exact, 2)
    assert (difference < error).all()
    assert (difference > 0).all()  # the method was used


def test_no_scheduler_can_give_it_a_memory():
    W = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = SpectralDescent([W])
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, cycle_momentum=False)


@pytest.mark.parametrize("scale", ["spectral", "match-rms-adamw"])
def test_groups_do_not_share_a_tensor_learning_rate(scale):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = SpectralDescent(model, torch.tensor(0.1), scale=scale)
    first, second = (group["lr"] for group in optimizer.param_groups)
    before = float(second)
    first.mul_(3)
    assert float(second) == before
