"""The problems of Muon's theory, held against automatic differentiation and the library's Muon."""

from __future__ import annotations

import pytest
import torch

from steepest import Muon, SpectralDescent
from steepest.lab.papers.muon_convergence.known_constants import (
    RESIDUALS,
    adaptive_rate,
    gaussian_weight,
    muon_trajectory,
    random_problem,
)
from steepest.lab.papers.muon_convergence.nonconvex_rates import rate_bound
from steepest.linalg import polar


def problem_and_start(name="square"):
    torch.manual_seed(0)
    problem = random_problem(RESIDUALS[name], (4, 6), 0.7)
    return problem, problem.optimum + gaussian_weight(4, 6)


@pytest.mark.parametrize("name", RESIDUALS)
def test_gradient_and_curvature_are_those_of_the_loss(name):
    problem, W = problem_and_start(name)
    U = polar(problem.gradient(W), "svd")
    gradient = torch.autograd.functional.jacobian(problem.loss, W)
    torch.testing.assert_close(problem.gradient(W), gradient)
    H = torch.autograd.functional.hessian(problem.loss, W).reshape(24, 24)
    torch.testing.assert_close(problem.curvature(W, U), U.flatten() @ H @ U.flatten())
    assert torch.linalg.eigvalsh(H).abs().max() <= problem.frobenius_smoothness * (1 + 1e-9)


@pytest.mark.parametrize("name", RESIDUALS)
def test_the_third_derivative_is_below_its_bound(name):
    problem, W = problem_and_start(name)
    for _ in range(20):
        V, U = gaussian_weight(4, 6), gaussian_weight(4, 6)
        V, U = V / V.norm(), U / U.norm()
        along = torch.autograd.functional.jvp(lambda X, U=U: problem.curvature(X, U), W, V)[1]
        assert abs(along) <= problem.third_derivative + 1e-12


def test_the_algorithm_is_the_library_s_spectral_descent():
    problem, W = problem_and_start()
    for rate, settings in (
        (torch.tensor(0.05, dtype=W.dtype), {"lr": 0.05}),
        (
            adaptive_rate(problem.spectral_smoothness),
            {"lr": 1 / problem.spectral_smoothness, "length": "dual"},
        ),
    ):
        run = muon_trajectory(problem, W, 20, rate)
        p = torch.nn.Parameter(W.clone())
        optimizer = SpectralDescent([p], scale="none", method="svd", **settings)
        for _ in range(20):
            p.grad = problem.gradient(p.data)
            optimizer.step()
        torch.testing.assert_close(run.losses[-1], problem.loss(p.data))


def test_with_momentum_it_is_the_library_s_muon_that_begins_with_the_first_gradient():
    problem, W = problem_and_start()
    rate, beta = torch.tensor(0.05, dtype=W.dtype), torch.tensor(0.9, dtype=W.dtype)
    run = muon_trajectory(problem, W, 20, rate, beta)
    p = torch.nn.Parameter(W.clone())
    optimizer = Muon([p], 0.05, momentum=0.9, nesterov=False, scale="none", method="svd")
    for step in range(20):
        p.grad = problem.gradient(p.data)
        if step == 0:
            p.grad *= 10  # (1 - β) of it is the paper's M_0 = G_0
        optimizer.step()
    torch.testing.assert_close(run.losses[-1], problem.loss(p.data))


def test_runs_in_a_batch_are_those_apart():
    problem, W = problem_and_start("cosine")
    rates = torch.tensor([0.01, 0.1], dtype=W.dtype)
    momenta = torch.tensor([0.0, 0.9], dtype=W.dtype)
    both = muon_trajectory(problem, W.expand(2, 4, 6), 15, rates, momenta)
    for i in range(2):
        alone = muon_trajectory(problem, W, 15, rates[i], momenta[i])
        torch.testing.assert_close(both.losses[:, i], alone.losses)
        torch.testing.assert_close(both.curvatures[:, i], alone.curvatures)


def test_the_bound_is_least_at_the_paper_s_rate():
    gap, beta = torch.tensor(2.0), torch.tensor(0.0)
    best = (2 * gap / (100 * 3.0)).sqrt()
    at_best = rate_bound(3.0, gap, 100, best, beta)
    assert at_best.item() == pytest.approx((2 * 3.0 * 2.0 / 100) ** 0.5)
    assert at_best < rate_bound(3.0, gap, 100, 1.1 * best, beta)
    assert at_best < rate_bound(3.0, gap, 100, 0.9 * best, beta)
