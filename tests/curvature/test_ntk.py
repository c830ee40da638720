"""Spectrum and drift of the NTK, against Jacobians made without our code and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from steepest.curvature import NTK, Batches, GaussNewton, jacobian, ntk
from steepest.curvature.ntk import label_alignment, ntk_drift, ntk_spectrum


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _half_mse(model: Any, batch: Any) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(-1).mean()


def _mlp(*, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, outputs)
    )


def _batch(examples: int = 7, outputs: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(examples, 4), torch.randn(examples, outputs)


def _kernel(model: nn.Module, x: Tensor) -> Tensor:
    given = {name: p.detach() for name, p in model.named_parameters()}
    found = jacrev(lambda own: functional_call(model, own, (x,)).flatten())(given)
    J = torch.cat([each.flatten(1) for each in found.values()], 1)
    return J @ J.T


# -------------------------------------------------------------------------------------- spectrum


@pytest.mark.parametrize("rows", [90, 89])
def test_spectrum_is_that_of_the_kernel(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ntk, "_DENSE_ROWS", rows)  # of 90: by products alone from 89
    model, batch = _mlp(), _batch(30)
    found = ntk_spectrum(
        model, _half_mse, batch, count=4, tolerance=1e-6, generator=torch.manual_seed(0)
    )
    K = _kernel(model, batch[0])
    expected, vectors = torch.linalg.eigh(K)
    largest = found.largest
    assert found.size == 90
    assert largest.converged
    assert largest.vectors.shape == (90, 4)
    assert ((largest.values - expected.flip(0)[:4]).abs() <= largest.errors + 1e-12).all()
    assert float(largest.errors[0]) <= 1e-6 * float(expected[-1])
    cosines = (largest.vectors * vectors.flip(1)[:, :4]).sum(0).abs()
    assert cosines.min() > 1 - 1e-5
    assert abs(found.trace.value - K.trace()) <= max(4 * found.trace.error, 1e-9)
    assert found.trace.error <= 0.05 * found.trace.value
    assert (found.trace.error == 0) == (rows == 90)
    assert found.effective_rank == pytest.approx(found.trace.value / float(expected[-1]), rel=1e-5)
    assert (largest.products < 90) == (rows == 89)


def test_count_is_at_most_the_size() -> None:
    model, batch = _mlp(), _batch(2)
    found = ntk_spectrum(model, _half_mse, batch, count=50)
    assert len(found.largest.values) == 6
    assert found.largest.values.sum() == pytest.approx(found.trace.value)
    some = ntk_spectrum(model, _half_mse, batch, ["0.*"], count=50)
    assert some.trace.value < found.trace.value


def test_gauss_newton_of_squares_is_the_kernel_over_the_number_of_examples() -> None:
    model, batch = _mlp(), _batch(11)
    G = torch.linalg.eigvalsh(GaussNewton(model, _half_mse, batch).to_dense()).flip(0)
    found = ntk_spectrum(model, _half_mse, batch, count=33).largest.values / 11
    torch.testing.assert_close(G[:33], found, rtol=1e-10, atol=1e-10)

    def mean(model: Any, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()  # over outputs too, without the half

    G = torch.linalg.eigvalsh(GaussNewton(model, mean, batch).to_dense()).flip(0)
    torch.testing.assert_close(G[:33], 2 * found / 3, rtol=1e-10, atol=1e-10)


class TwoLayer(nn.Module):
    """f = E V x / (γ sqrt(N D)), of standard normal weights."""

    def __init__(self, D: int, N: int, gamma: float) -> None:
        super().__init__()
        self.V, self.E = nn.Parameter(torch.randn(N, D)), nn.Parameter(torch.randn(1, N))
        self.scale = 1 / (gamma * math.sqrt(N * D))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.V.T @ self.E.T)


@pytest.mark.parametrize("gamma", [1.0, math.sqrt(32)])
def test_two_layer_linear_network(gamma: float) -> None:
    """γ² Θ(x, x') = [xᵀ (VᵀV / N) x' + (‖E‖² / N) xᵀx'] / D."""
    D, N = 5, 32
    model = TwoLayer(D, N, gamma)
    x, y = torch.randn(8, D), torch.randn(8, 1)
    E, V = model.E.detach(), model.V.detach()
    middle = V.T @ V / N + E.square().sum() / N * torch.eye(D)
    K = x @ middle @ x.T / (D * gamma**2)
    torch.testing.assert_close(NTK(model, _half_mse, (x, y)).to_dense(), K, rtol=1e-11, atol=1e-11)
    found = ntk_spectrum(model, _half_mse, (x, y), count=5)
    torch.testing.assert_close(
        found.largest.values, torch.linalg.eigvalsh(K).flip(0)[:5], rtol=1e-10, atol=1e-11
    )


def test_refuses_what_cannot_be() -> None:
    model, batch = _mlp(), _batch()
    with pytest.raises(ValueError, match="count=0"):
        ntk_spectrum(model, _half_mse, batch, count=0)
    with pytest.raises(ValueError, match="no parameter is called"):
        ntk_spectrum(model, _half_mse, batch, ["9.weight"])
    dead = TwoLayer(4, 3, 1.0)
    nn.init.zeros_(dead.E)
    found = ntk_spectrum(dead, _half_mse, (batch[0], batch[1][:, :1]), ["V"])
    with pytest.raises(ValueError, match="kernel of zero"):
        _ = found.effective_rank


# ----------------------------------------------------------------------------------------- drift


def _drift(model: nn.Module, change: Any, batch: Any) -> ntk.NTKDrift:
    before = NTK(model, _half_mse, batch)
    with torch.no_grad():
        change(model)
    return ntk_drift(before, NTK(model, _half_mse, batch))


def test_no_drift_without_a_change_or_along_a_symmetry() -> None:
    batch = _batch()
    drift = _drift(_mlp(), lambda model: None, batch)
    assert (drift.distance, drift.size) == (0.0, 21)
    assert drift.alignment == pytest.approx(1, abs=1e-12)

    def swap_and_flip(model: Any) -> None:  # hidden units in another order, and of other sign
        order, sign = torch.randperm(9), torch.randint(2, (9, 1)) * 2.0 - 1
        model[0].weight.copy_(sign * model[0].weight[order])
        model[0].bias.copy_(sign[:, 0] * model[0].bias[order])
        model[2].weight.copy_(sign.T * model[2].weight[:, order])

    drift = _drift(_mlp(), swap_and_flip, batch)
    assert drift.distance < 1e-13

    def shift(model: Any) -> None:  # of weights that outputs are linear in
        model[4].bias.add_(1)

    assert _drift(_mlp(), shift, batch).distance < 1e-13


def test_drift_is_that_of_the_matrices() -> None:
    model, batch = _mlp(), _batch()
    first = _kernel(model, batch[0])
    drift = _drift(model, lambda model: [p.mul_(1.5) for p in model.parameters()], batch)
    now = _kernel(model, batch[0])
    norms = first.norm(), now.norm()
    assert drift.distance == pytest.approx(float((now - first).norm() / norms[0]), rel=1e-10)
    cosine = float((now * first).sum() / (norms[0] * norms[1]))
    assert drift.alignment == pytest.approx(cosine, rel=1e-10)
    assert drift.scale == pytest.approx(float(norms[1] / norms[0]), rel=1e-10)
    assert drift.distance > 0.2  # something to find
    order = torch.randperm(21)  # of the examples, say
    again = ntk_drift(first[order][:, order], now[order][:, order])
    assert again.distance == pytest.approx(drift.distance, rel=1e-12)
    assert again.alignment == pytest.approx(drift.alignment, rel=1e-12)
    assert ntk_drift(first, first.float()).distance < 1e-6


def test_drift_of_scaled_outputs_is_their_scale_alone() -> None:
    model, batch = TwoLayer(4, 6, 1.0), _batch(outputs=1)

    def triple(model: Any) -> None:
        model.scale *= 3

    drift = _drift(model, triple, batch)
    assert drift.scale == pytest.approx(9)
    assert drift.distance == pytest.approx(8)
    assert drift.alignment == pytest.approx(1)


def test_kernels_of_wide_networks_hardly_move_unless_they_are_parametrized_to() -> None:
    """The slopes of lazy (-1/2 or below) and of feature learning (0) over two widths."""
    x, y = torch.randn(20, 10), torch.randn(20, 1)
    moved: dict[bool, list[float]] = {False: [], True: []}
    for features, found in moved.items():
        for N in (32, 512):
            model = TwoLayer(10, N, math.sqrt(N) if features else 1.0)
            rate = 0.5 * N if features else 0.5
            before = NTK(model, _half_mse, (x, y))
            for _ in range(15):
                gradients = torch.autograd.grad(_half_mse(model, (x, y)), list(model.parameters()))
                with torch.no_grad():
                    for p, g in zip(model.parameters(), gradients, strict=True):
                        p -= rate * g
            found.append(ntk_drift(before, NTK(model, _half_mse, (x, y))).distance)
    assert moved[False][1] < 0.5 * moved[False][0]
    assert moved[True][1] > 0.6 * moved[True][0]
    assert moved[True][1] > 0.3


def test_label_alignment() -> None:
    model, (x, y) = _mlp(), _batch()
    K = _kernel(model, x)
    yy = torch.outer(y.flatten(), y.flatten())
    expected = float((K * yy).sum() / (K.norm() * yy.norm()))
    assert label_alignment(NTK(model, _half_mse, (x, y)), y) == pytest.approx(expected, rel=1e-10)
    assert label_alignment(K, -3 * y) == pytest.approx(expected, rel=1e-10)
    assert label_alignment(yy, y) == pytest.approx(1)
    assert label_alignment(torch.eye(21), y) == pytest.approx(21**-0.5)
    top = torch.linalg.eigh(K).eigenvectors[:, -1]
    assert label_alignment(K, top) > label_alignment(K, y)
    classes = nn.functional.one_hot(torch.randint(3, (7,)), 3)
    assert 0 <= label_alignment(K, classes) <= 1
    with pytest.raises(ValueError, match=r"targets .*\(7,\) .* 21"):
        label_alignment(K, classes.argmax(-1))
    with pytest.raises(ValueError, match="targets of zero"):
        label_alignment(K, torch.zeros(7, 3))


def test_refuses_kernels_that_do_not_fit() -> None:
    K = _kernel(_mlp(), _batch()[0])
    with pytest.raises(ValueError, match=r"\(21, 21\) and \(20, 20\)"):
        ntk_drift(K, K[:20, :20])
    with pytest.raises(ValueError, match="expected a square matrix"):
        ntk_drift(K, K[:20])
    with pytest.raises(ValueError, match="kernel of zero"):
        ntk_drift(torch.zeros(3, 3), torch.eye(3))
    with pytest.raises(FloatingPointError, match="NaN"):
        ntk_drift(torch.eye(3), torch.full((3, 3), math.nan))


# ------------------------------------------------------------------------------------ the matrix


def test_some_rows_of_the_kernel() -> None:
    model, (x, y) = _mlp(), _batch(9)
    K = _kernel(model, x)
    batches = Batches([(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])])
    for rows in (torch.tensor([0]), torch.tensor([3, 11, 16, 26]), torch.arange(27)):
        for batch in ((x, y), batches):
            found = NTK(model, _half_mse, batch).to_dense(rows)
            torch.testing.assert_close(found, K[rows][:, rows], rtol=1e-11, atol=1e-12)
    kernel = NTK(model, _half_mse, batches)
    torch.testing.assert_close(kernel.to_dense(), K, rtol=1e-11, atol=1e-12)
    assert kernel.products == 27
    drift = ntk_drift(kernel.to_dense(torch.tensor([3, 7])), K[[3, 7]][:, [3, 7]])
    assert drift.distance < 1e-12


@pytest.mark.parametrize(
    "rows", [[3, 3], [4, 2], [-1, 2], [5, 27], []], ids=["twice", "down", "below", "above", "none"]
)
def test_refuses_rows_that_are_none(rows: list[int]) -> None:
    kernel = NTK(_mlp(), _half_mse, _batch(9))
    with pytest.raises(ValueError, match="got rows"):
        kernel.to_dense(torch.tensor(rows, dtype=torch.long))
    with pytest.raises(ValueError, match="expected"):
        kernel.to_dense(torch.tensor([0.0, 1.0]))


class _Choosy(torch.autograd.Function):
    """x², whose backward pass asks for a number, which no batch of gradients can give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g if g.detach().sum().item() > -math.inf else g


class Choosy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Choosy.apply(x)


def test_several_rows_at_a_time_or_one_where_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: Any, **how: Any) -> Any:
        calls.append(how.get("is_grads_batched", False))
        return torch.autograd.grad(*given, **how)

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    layers = nn.Linear(4, 6), nn.Linear(6, 3)
    batch = _batch(9)
    for activation, batched, single in ((Square(), 4, 0), (Choosy(), 4, 27)):
        model = nn.Sequential(layers[0], activation, layers[1])
        kernel = NTK(model, _half_mse, batch)
        monkeypatch.setattr(jacobian, "grad", counted)
        calls.clear()
        found = kernel.to_dense()
        assert (sum(calls), len(calls) - sum(calls)) == (batched, single)
        monkeypatch.undo()
        reference = nn.Sequential(layers[0], Square(), layers[1])
        torch.testing.assert_close(found, _kernel(reference, batch[0]), rtol=1e-11, atol=1e-12)
