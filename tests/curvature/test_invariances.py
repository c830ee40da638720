"""What holds for every network, loss and batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from steepest.curvature import NTK, Batches, GaussNewton, Hessian

ACTIVATIONS = [nn.Tanh, nn.GELU, nn.ReLU, nn.Softplus]
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": lambda outputs, y: 0.5 * (outputs - y).square().sum(-1).mean(),
    "cross entropy": lambda outputs, y: F.cross_entropy(outputs, y.argmax(-1)),
    "logcosh": lambda outputs, y: (outputs - y).cosh().log().mean(),
    "huber": F.smooth_l1_loss,
}
Case = tuple[nn.Module, Callable[[Any, Any], Tensor], tuple[Tensor, Tensor]]


def _network(widths: list[int], activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1]).double()


def _loss(name: str) -> Callable[[Any, Any], Tensor]:
    return lambda model, batch: LOSSES[name](model(batch[0]), batch[1])


def _batch(examples: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(examples, inputs, dtype=torch.float64),
        torch.randn(examples, outputs, dtype=torch.float64),
    )


@st.composite
def cases(draw: st.DrawFn, activation: type[nn.Module] | None = None) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    model = _network(widths, activation or draw(st.sampled_from(ACTIVATIONS)))
    batch = _batch(draw(st.integers(1, 5)), widths[0], widths[-1])
    return model, _loss(draw(st.sampled_from(sorted(LOSSES)))), batch


few = settings(max_examples=25, deadline=None)


def _close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    scale = max(float(expected.abs().max()), 1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


# --------------------------------------------------------------------------------------- algebra


@few
@given(cases())
def test_symmetric_and_positive_where_they_have_to_be(case: Case) -> None:
    H, G, K = (operator(*case).to_dense() for operator in (Hessian, GaussNewton, NTK))
    for matrix in (H, G, K):
        _close(matrix, matrix.T)
    for matrix in (G, K):  # every loss here is convex
        values = torch.linalg.eigvalsh(matrix)
        assert float(values.min()) >= -1e-12 * max(float(values.max()), 1)


@pytest.mark.parametrize("operator", [Hessian, GaussNewton, NTK])
def test_linear(operator: type[Hessian]) -> None:
    A = operator(_network([3, 4, 2]), _loss("logcosh"), _batch(4, 3, 2))
    V = torch.randn(A.shape[1], 3, dtype=torch.float64)
    _close(A @ (2 * V[:, 0] - 3 * V[:, 1]), 2 * (A @ V[:, 0]) - 3 * (A @ V[:, 1]))
    _close(A @ V, torch.stack([A @ v for v in V.T], dim=1))  # the block goes as one
    assert torch.equal(A @ V[:, 0], A(V[:, 0]))
    _close(A.to_dense() @ V, A @ V)
    assert torch.equal(A @ A.vector(), A.vector())
    _close(A @ V.float(), A @ V.float().double())  # raised to its precision


@few
@given(cases(), st.data())
def test_blocks_make_the_whole(case: Case, data: st.DataObject) -> None:
    names = data.draw(st.permutations([name for name, _ in case[0].named_parameters()]))
    cuts = data.draw(st.integers(1, len(names)))
    parts = [part for part in (names[:cuts], names[cuts:]) if part]
    rows = [
        torch.cat([Hessian(*case, rows, columns=columns).to_dense() for columns in parts], dim=1)
        for rows in parts
    ]
    whole = Hessian(*case, names)
    assert list(whole.parameters) == names
    _close(torch.cat(rows), whole.to_dense())
    inside = GaussNewton(*case, names).to_dense()
    block = GaussNewton(*case, parts[0]).to_dense()
    _close(inside[: len(block), : len(block)], block)


def test_a_cross_block_of_overlapping_parameters() -> None:
    case = _network([3, 4, 2]), _loss("squares"), _batch(4, 3, 2)
    whole = Hessian(*case).to_dense()
    cross = Hessian(*case, ["0.*"], columns=["0.bias", "2.bias"])
    assert cross.shape == (16, 6)
    _close(cross.to_dense(), whole[:16][:, [12, 13, 14, 15, 24, 25]])
    _close(Hessian(*case, columns=["2.bias"]).to_dense(), whole[:, 24:])
    assert Hessian(*case, ["0.bias"], columns=["0.bias"]).is_symmetric


def test_names_and_patterns() -> None:
    case = _network([3, 4, 2]), _loss("squares"), _batch(4, 3, 2)
    assert list(Hessian(*case, ["2.*", "*.bias"]).parameters) == ["2.weight", "2.bias", "0.bias"]
    assert list(Hessian(*case, "0.weight").parameters) == ["0.weight"]


# --------------------------------------------------------------------------------------- batches


@few
@given(cases(), st.data())
def test_batches_average_to_the_one_batch(case: Case, data: st.DataObject) -> None:
    """Of uneven sizes, with their graphs kept or not."""
    model, loss, (x, y) = case
    cuts = sorted(data.draw(st.sets(st.integers(1, len(x)), max_size=3)) - {len(x)})
    pieces = [slice(a, b) for a, b in pairwise([0, *cuts, len(x)])]
    batches = Batches([(x[piece], y[piece]) for piece in pieces])
    keep = data.draw(st.booleans())
    for operator in (Hessian, GaussNewton, NTK):
        whole = operator(model, loss, (x, y))
        split = operator(model, loss, batches, keep_graphs=keep)
        _close(split.to_dense(), whole.to_dense())
    assert Hessian(model, loss, batches).loss() == pytest.approx(loss(model, (x, y)).item())
    _close(Hessian(model, loss, batches).gradient(), Hessian(model, loss, (x, y)).gradient())


@pytest.mark.parametrize("operator", [Hessian, GaussNewton, NTK])
def test_data_loader(operator: type[Hessian]) -> None:
    x, y = _batch(7, 3, 2)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    model, loss = _network([3, 4, 2]), _loss("squares")
    A = operator(model, loss, loader)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    assert torch.equal(A @ v, A @ v)  # the examples stay as they were shuffled
    whole = operator(model, loss, (x, y))
    if operator is NTK:
        values, expected = (torch.linalg.eigvalsh(each.to_dense()) for each in (A, whole))
        _close(values, expected)
    else:
        _close(A @ v, whole @ v)


def test_batches_with_weights_of_their_own() -> None:
    batches = Batches([{"x": "abc", "n": 3}, {"x": "d", "n": 1}], size=lambda batch: batch["n"])
    assert batches.weights == [0.75, 0.25]
    assert len(batches) == 2
    assert [batch["x"] for batch, _ in batches] == ["abc", "d"]
    assert Batches.of(batches) is batches
    assert Batches.of([1, 2]).batches == [[1, 2]]


def test_sizes_are_those_of_the_first_tensor() -> None:
    nested = [{"scale": torch.tensor(2.0), "x": torch.zeros(n, 2)} for n in (1, 3)]
    assert Batches(nested).weights == [0.25, 0.75]


def test_batches_of_a_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    batches = [transformers.BatchEncoding({"input_ids": torch.zeros(n, 2)}) for n in (1, 3)]
    assert Batches(batches).weights == [0.25, 0.75]


# ------------------------------------------------------------------------- symmetries of networks


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
def test_permuted_hidden_units_conjugate(
    operator: type[Hessian], activation: type[nn.Module]
) -> None:
    model, loss, batch = _network([3, 5, 2], activation), _loss("squares"), _batch(6, 3, 2)
    before = operator(model, loss, batch).to_dense()
    order = torch.randperm(5)
    positions = torch.arange(15).view(5, 3)[order].flatten(), 15 + order, 20 + 5 * torch.arange(2)
    index = torch.cat(
        [
            positions[0],
            positions[1],
            (positions[2][:, None] + order).flatten(),
            torch.tensor([30, 31]),
        ]
    )
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[order])
        model[0].bias.copy_(model[0].bias[order])
        model[2].weight.copy_(model[2].weight[:, order])
    _close(operator(model, loss, batch).to_dense(), before[index][:, index])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_permuted_examples_permute_the_kernel(activation: type[nn.Module]) -> None:
    model, loss, (x, y) = _network([3, 5, 2], activation), _loss("squares"), _batch(6, 3, 2)
    order = torch.randperm(6)
    index = (2 * order[:, None] + torch.arange(2)).flatten()
    before = NTK(model, loss, (x, y)).to_dense()
    after = NTK(model, loss, (x[order], y[order])).to_dense()
    _close(after, before[index][:, index])


def test_scaling_of_relu_networks_is_flat() -> None:
    """Along W -> c W, V -> V / c the loss is constant: Hv = -(second order of the path)."""
    model, loss, batch = _network([3, 5, 2], nn.ReLU), _loss("squares"), _batch(6, 3, 2)
    H = Hessian(model, loss, batch)
    w, b, v, c = (p.detach() for p in model.parameters())
    first = torch.cat([w.flatten(), b, -v.flatten(), 0 * c])
    second = torch.cat([0 * w.flatten(), 0 * b, 2 * v.flatten(), 0 * c])
    curvature, slope = torch.dot(first, H @ first), torch.dot(second, H.gradient())
    assert abs(float(curvature + slope)) < 1e-12
    assert abs(float(torch.dot(first, H.gradient()))) < 1e-12
    assert float(curvature.abs()) > 1e-3


# ------------------------------------------------------------ Hessian, Gauss-Newton and the kernel


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("build", ["linear", "convolution", "deep, one layer"])
def test_hessian_is_gauss_newton_where_outputs_are_linear(build: str, name: str) -> None:
    batch, only = _batch(5, 6, 3), None
    model: nn.Module = nn.Linear(6, 3).double()
    if build == "convolution":
        model = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 3), nn.Flatten()).double()
    if build == "deep, one layer":
        model, only = _network([6, 4, 3]), ["2.weight"]
    H = Hessian(model, _loss(name), batch, only).to_dense()
    assert float(H.norm()) > 1e-3
    _close(GaussNewton(model, _loss(name), batch, only).to_dense(), H)


def test_hessian_is_gauss_newton_at_zero_residual() -> None:
    model, (x, _) = _network([3, 5, 2]), _batch(6, 3, 2)
    at_zero = x, model(x).detach()
    loss = _loss("squares")
    G = GaussNewton(model, loss, at_zero).to_dense()
    _close(Hessian(model, loss, at_zero).to_dense(), G)
    elsewhere = x, at_zero[1] + 1
    assert float((Hessian(model, loss, elsewhere).to_dense() - G).norm()) > 1e-2
    _close(GaussNewton(model, loss, elsewhere).to_dense(), G)  # squares: curvature 1 everywhere


@few
@given(cases())
def test_gauss_newton_of_squares_has_the_spectrum_of_the_kernel(case: Case) -> None:
    """G = Jᵀ J / examples of the mean of 0.5 |f - y|², and the kernel is J Jᵀ."""
    model, _, (x, y) = case
    loss = _loss("squares")
    G = torch.linalg.eigvalsh(GaussNewton(model, loss, (x, y)).to_dense()).flip(0)
    K = torch.linalg.eigvalsh(NTK(model, loss, (x, y)).to_dense()).flip(0) / len(x)
    common = min(len(G), len(K))
    _close(G[:common], K[:common])
    assert float(G[common:].abs().sum() + K[common:].abs().sum()) <= 1e-10 * max(1, float(G[0]))


def test_a_linear_loss_has_no_gauss_newton_matrix() -> None:
    model, batch = _network([3, 5, 2]), _batch(6, 3, 2)

    def loss(model: Any, batch: Any) -> Tensor:
        return model(batch[0]).mean()

    assert float(GaussNewton(model, loss, batch).to_dense().abs().max()) == 0
    assert float(Hessian(model, loss, batch).to_dense().abs().max()) > 1e-3
    assert float(Hessian(nn.Linear(3, 2).double(), loss, batch).to_dense().abs().max()) == 0


def test_tied_weights_are_one_parameter() -> None:
    """The Hessian of w -> loss(w, w) is the sum of the four blocks of the untied one."""

    class Net(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            if tied:
                self.b.weight = self.a.weight
            else:
                self.b.weight.data = self.a.weight.data.clone()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    torch.manual_seed(3)
    tied = Net(tied=True).double()
    torch.manual_seed(3)
    free = Net(tied=False).double()
    loss, batch = _loss("logcosh"), _batch(6, 4, 4)
    assert list(Hessian(tied, loss, batch).parameters) == ["a.weight"]
    for operator in (Hessian, GaussNewton):
        whole = operator(free, loss, batch).to_dense().view(2, 16, 2, 16)
        _close(operator(tied, loss, batch).to_dense(), whole.sum((0, 2)))


# ----------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("operator", [Hessian, GaussNewton, NTK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy(operator: type[Hessian], dtype: torch.dtype) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    A = operator(_network([3, 5, 2]), _loss("squares"), _batch(20, 3, 2), dtype=dtype)
    found = linalg.eigsh(A.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    assert torch.from_numpy(found).dtype == dtype
    expected = torch.linalg.eigvalsh(A.to_dense())[-3:]
    _close(torch.from_numpy(found).to(dtype), expected, 1e-5 if dtype == torch.float32 else 1e-10)
    v = torch.randn(A.shape[1], 2, dtype=dtype)
    assert torch.equal(torch.from_numpy(A.to_scipy() @ v.numpy()), A @ v)
    assert torch.equal(torch.from_numpy(A.to_scipy().rmatvec(v[:, 0].numpy())), A @ v[:, 0])


def test_scipy_of_a_cross_block() -> None:
    case = _network([3, 5, 2]), _loss("squares"), _batch(6, 3, 2)
    cross = Hessian(*case, ["0.bias"], columns=["2.weight"])
    v = torch.randn(10, dtype=torch.float64)
    found = cross.to_scipy()
    assert found.shape == (5, 10)
    assert torch.equal(torch.from_numpy(found.matvec(v.numpy())), cross @ v)
    with pytest.raises(NotImplementedError):
        found.rmatvec(torch.randn(5, dtype=torch.float64).numpy())


def test_products_are_counted() -> None:
    A = Hessian(_network([3, 2]), _loss("squares"), _batch(4, 3, 2))
    A @ torch.randn(8, 3, dtype=torch.float64)
    A(torch.randn(8, dtype=torch.float64))
    assert A.products == 4
    assert A.device == torch.device("cpu")
