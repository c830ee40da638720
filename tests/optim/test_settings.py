"""The step of the theory, and memory in full precision, from end to end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steepest import Muon, SpectralDescent

EXACT = {"method": "svd", "scale": "none"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def distance(A: Tensor, B: Tensor) -> float:
    return float((A - B).norm() / B.norm())


def test_the_step_of_the_theory_falls_as_far_as_its_bound():
    """Davis and Drusvyatskiy, p. 6: by ‖G‖_*² / (2 L) on least squares, L = ‖A‖_F² / n."""
    A, Y = randn(6, 40, seed=1), randn(5, 40, seed=2)
    W = nn.Parameter(randn(5, 6, seed=3))
    L = float(A.square().sum()) / 40

    def loss() -> Tensor:
        return (W @ A - Y).square().sum() / 80

    optimizer = SpectralDescent([W], 1 / L, length="dual", **EXACT)
    for _ in range(5):
        before = loss()
        optimizer.zero_grad()
        before.backward()
        start = before.item()
        bound = float(torch.linalg.svdvals(W.grad).sum()) ** 2 / (2 * L)
        optimizer.step()
        assert start - loss().item() >= bound * (1 - 1e-12)


def test_bfloat16_weights_with_float32_memory_follow_float32_weights():
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        W = nn.Parameter(randn(8, 8, seed=5).bfloat16().to(dtype))
        optimizer = Muon([W], 0.01, state_dtype=torch.float32, rounding="stochastic")
        for seed in range(20):
            W.grad = randn(8, 8, seed=seed).bfloat16().to(dtype)
            optimizer.step()
        state = optimizer.state_dict()
        assert state["state"][0]["momentum_buffer"].dtype == torch.float32
        optimizer.load_state_dict(state)
        assert optimizer.state[W]["momentum_buffer"].dtype == torch.float32
        runs[dtype] = W.detach().float()
    # Rounding at random: errors of at most a step of 2^-7, of variance 1/4, in twenty steps.
    assert distance(runs[torch.bfloat16], runs[torch.float32]) < 20**0.5 / 2 * 2**-7
