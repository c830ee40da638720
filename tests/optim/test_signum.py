"""SignSGD and Signum move every entry by the learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steepest import MatrixView, SignSGD, Signum
from steepest.optim import reference


def _step_alike(first, A, second, B):
    """Give both the same gradients, and expect the same weights, bit for bit."""
    for _ in range(5):
        A.grad = torch.randn_like(A)
        B.grad = A.grad.clone()
        first.step()
        second.step()
    assert torch.equal(A, B)


def test_sign_sgd_is_the_sign_of_the_gradient(path):
    W, gradients = nn.Parameter(torch.randn(6, 4).double()), torch.randn(20, 6, 4).double()
    weights = path(reference.sign_sgd, W.detach().clone(), gradients, 0.1, weight_decay=0.5)
    optimizer = SignSGD([W], lr=0.1, weight_decay=0.5)
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
    torch.testing.assert_close(W.detach(), weights[-1], rtol=0, atol=1e-14)
    assert not optimizer.state  # it has no memory


def test_signum_is_the_sign_of_the_average_gradient(path, average):
    W, gradients = nn.Parameter(torch.randn(6, 4).double()), torch.randn(20, 6, 4).double()
    settings = {"momentum": 0.7, "weight_decay": 0.5}
    weights = path(reference.signum, W.detach().clone(), gradients, 0.1, **settings)
    optimizer = Signum([W], lr=0.1, **settings)
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
    torch.testing.assert_close(W.detach(), weights[-1], rtol=0, atol=1e-14)
    M = optimizer.state[W]["momentum_buffer"]
    torch.testing.assert_close(M, average(gradients, 0.7), rtol=1e-7, atol=1e-15)


def test_signum_without_momentum_is_sign_sgd():
    A = nn.Parameter(torch.randn(3, 5))
    B = nn.Parameter(A.detach().clone())
    first, second = Signum([A], lr=0.01, momentum=0.0), SignSGD([B], lr=0.01)
    _step_alike(first, A, second, B)


@pytest.mark.parametrize("optimizer", [SignSGD, Signum])
@pytest.mark.parametrize(
    "shape", [(), (7,), (3, 4), (2, 3, 4), (2, 3, 3, 3), (2, 2, 2, 2, 2)], ids=str
)
def test_parameters_of_every_shape_move_by_the_learning_rate(optimizer, shape):
    W = nn.Parameter(torch.zeros(shape))
    W.grad = torch.randn(shape)
    optimizer([W], lr=0.25).step()
    assert torch.equal(W.data, -0.25 * W.grad.sign())


@pytest.mark.parametrize("optimizer", [SignSGD, Signum])
def test_entries_without_a_gradient_stay(optimizer):
    W = nn.Parameter(torch.ones(2, 2))
    W.grad = torch.tensor([[0.0, 1.0], [-1.0, -0.0]])
    optimizer([W], lr=0.5).step()
    assert W.tolist() == [[1.0, 0.5], [1.5, 1.0]]


@pytest.mark.parametrize("optimizer", [SignSGD, Signum])
def test_the_view_decides_nothing_but_what_is_idle(optimizer):
    plain = nn.Parameter(torch.randn(2, 3, 4))
    viewed = nn.Parameter(plain.detach().clone())
    first = optimizer([plain], lr=0.1)
    second = optimizer([{"params": [viewed], "views": [MatrixView.of((2, 3, 4), batch=2)]}], lr=0.1)
    _step_alike(first, plain, second, viewed)


@pytest.mark.parametrize("optimizer", [SignSGD, Signum])
def test_its_adamw_rate_is_its_own_unless_given(optimizer):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert [g["lr"] for g in optimizer(model, lr=0.02).param_groups] == [0.02, 0.02]
    assert [g["lr"] for g in optimizer(model, lr=0.02, adamw_lr=0.1).param_groups] == [0.02, 0.1]
