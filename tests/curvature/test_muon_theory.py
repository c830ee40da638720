"""Muon's and TEON's constants and diagonal shares, against dense Hessians made without our code."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from steepest import TEON
from steepest.curvature import Batches
from steepest.curvature.block_diagonal import blockwise_diagonal
from steepest.curvature.muon_theory import MuonCondition, muon_conditions
from steepest.curvature.teon_theory import stack_conditions
from steepest.lab.models import GPT, GPTConfig
from steepest.optim.reference import polar

Loss = Callable[[Any, Any], Tensor]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -------------------------------------------------------------------------------------- references


def _dense(model: nn.Module, loss: Loss, batch: Any, names: list[str]) -> Tensor:
    """The Hessian over these parameters, (n, n)."""
    given = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [given[name].shape for name in names]

    def value(v: Tensor) -> Tensor:
        pieces = v.split([shape.numel() for shape in shapes])
        own = {n: x.view(s) for n, x, s in zip(names, pieces, shapes, strict=True)}
        return functional_call(_Called(model, loss), {**_named(given), **_named(own)}, (batch,))

    v = torch.cat([given[name].flatten() for name in names])
    with sdpa_kernel([SDPBackend.MATH]):
        return hessian(value)(v)


class _Called(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def _named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": t for name, t in tensors.items()}


def _gradient(model: nn.Module, loss: Loss, batch: Any, name: str) -> Tensor:
    return torch.autograd.grad(loss(model, batch), dict(model.named_parameters())[name])[0]


def _nuclear(G: Tensor) -> float:
    return torch.linalg.svdvals(G).sum().item()


def _mse(model: Any, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(-1).mean()


def _cross_entropy(model: Any, batch: Any) -> Tensor:
    """Of a GPT, without the rounding to float32 of its own."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def _mlp(*widths: int) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(*[each for layer in layers for each in (layer, nn.Tanh())][:-1])


class Attention(nn.Module):
    """A fused projection, a grouped and a transposed convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 2, groups=2)
        self.up = nn.ConvTranspose1d(6, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x).tanh()).tanh().mT
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head(y.mean(1))


def _entries_of_attention(model: Attention) -> dict[str, Tensor]:
    """Where the entries of each matrix (out, in) are in their parameter, by hand."""
    qkv = torch.arange(12 * 4).view(12, 4)
    conv = torch.arange(6 * 2 * 2).view(6, 4)
    return {
        "conv.weight[0]": conv[:3],
        "conv.weight[1]": conv[3:],
        "up.weight": torch.arange(6 * 4 * 2).view(6, 8).T,
        "attention.in_proj_weight[0]": qkv[:4],
        "attention.in_proj_weight[1]": qkv[4:8],
        "attention.in_proj_weight[2]": qkv[8:],
        "attention.out_proj.weight": torch.arange(16).view(4, 4),
    }


# ----------------------------------------------------------------------------------- one matrix


def test_every_kind_of_matrix_against_its_dense_block() -> None:
    model = Attention()
    batch = torch.randn(5, 4, 4), torch.randn(5, 2)
    rows = {row.matrix: row for row in muon_conditions(model, _mse, batch, tolerance=1e-8)}
    entries = _entries_of_attention(model)
    assert list(rows) == list(entries)
    for label, where in entries.items():
        row, name = rows[label], label.partition("[")[0]
        H = _dense(model, _mse, batch, [name])[where.flatten()[:, None], where.flatten()]
        G = _gradient(model, _mse, batch, name).flatten()[where]
        E = polar(G).flatten()
        assert row.shape == tuple(where.shape)
        assert row.polar_curvature == pytest.approx(float(E @ H @ E), rel=1e-9)
        g = G.flatten()
        assert row.gradient_curvature == pytest.approx(float(g @ H @ g / (g @ g)), rel=1e-9)
        assert row.nuclear_norm == pytest.approx(_nuclear(G), rel=1e-10)
        assert row.nuclear_rank == pytest.approx(_nuclear(G) ** 2 / float(g @ g), rel=1e-9)
        largest = float(torch.linalg.eigvalsh(H).abs().max())
        assert abs(row.smoothness - largest) <= row.smoothness_error + 1e-9 * largest
        assert row.converged
        at_least = row.spectral_smoothness_at_least
        assert max(largest, abs(row.polar_curvature)) * (1 - 1e-6) <= at_least
        assert at_least <= min(where.shape) * largest * (1 + 1e-9)  # L_* <= r L


def test_spectral_smoothness_against_all_orthogonal_matrices_of_size_two() -> None:
    # ‖H[E]‖_* is convex in E, so it is largest at an extreme point of the ball: E in O(2).
    angle = torch.linspace(0, math.pi, 4001)
    c, s = angle.cos(), angle.sin()
    turns = torch.stack([torch.stack([c, -s, s, c], 1), torch.stack([c, s, s, -c], 1)])
    found = []
    for _ in range(12):
        model = _mlp(3, 2, 2, 3)
        batch = torch.randn(4, 3), torch.randn(4, 3)
        [row] = muon_conditions(model, _mse, batch, "2.weight", tolerance=1e-6)
        images = (turns @ _dense(model, _mse, batch, ["2.weight"])).view(2, -1, 2, 2)
        largest = float(torch.linalg.svdvals(images).sum(-1).max())
        found.append(row.spectral_smoothness_at_least / largest)
    assert max(found) <= 1 + 1e-6  # a lower bound
    assert min(found) >= 0.8  # also in local maxima
    assert sum(each > 0.999 for each in found) >= 8


def test_least_squares_turns_the_condition_into_nuclear_rank_over_stable_rank() -> None:
    model = nn.Linear(6, 6, bias=False)
    A = torch.randn(9, 6) @ torch.diag(torch.tensor([4.0, 2, 1, 1, 0.5, 0.2]))  # rows are examples
    batch = A, torch.randn(9, 6)

    def half(model: Any, batch: Any) -> Tensor:
        return 0.5 * _mse(model, batch)

    [row] = muon_conditions(model, half, batch, "weight", tolerance=1e-10)
    op, frobenius = float(torch.linalg.matrix_norm(A, 2)), float(torch.linalg.matrix_norm(A))
    assert row.smoothness == pytest.approx(op**2 / 9, rel=1e-8)
    assert row.spectral_smoothness_at_least == pytest.approx(frobenius**2 / 9, rel=1e-8)
    assert row.polar_curvature == pytest.approx(frobenius**2 / 9, rel=1e-8)
    assert row.ratio == pytest.approx(frobenius**2 / op**2, rel=1e-8)
    assert row.holds == (row.nuclear_rank >= frobenius**2 / op**2)


def _kronecker(P: Tensor, Q: Tensor) -> tuple[nn.Module, Loss]:
    """½ ⟨W, P W Q⟩ - ⟨W, C⟩."""
    model = nn.Linear(len(Q), len(P), bias=False)
    C = torch.randn(len(P), len(Q))
    return model, lambda model, _: (model.weight * (0.5 * P @ model.weight @ Q - C)).sum()


@pytest.mark.parametrize("seed", range(5))
def test_kronecker_hessian(seed: int) -> None:
    torch.manual_seed(seed)
    m, n = 5, 7
    P, Q = (X @ X.T for X in (torch.randn(m, m), torch.randn(n, 2)))
    model, loss = _kronecker(P, Q)
    [row] = muon_conditions(model, loss, torch.zeros(1), "weight", tolerance=1e-9)
    op_P, op_Q = (float(torch.linalg.matrix_norm(X, 2)) for X in (P, Q))
    assert row.polar_curvature <= op_P * _nuclear(Q) * (1 + 1e-9)
    assert row.smoothness == pytest.approx(op_P * op_Q, rel=1e-7)
    assert row.spectral_smoothness_at_least <= min(op_P * _nuclear(Q), op_Q * _nuclear(P)) + 1e-9
    E = polar(_gradient(model, loss, torch.zeros(1), "weight"))
    assert row.polar_curvature == pytest.approx(float((E * (P @ E @ Q)).sum()), rel=1e-9)


def test_decreases_are_those_of_the_steps() -> None:
    P, Q = (X @ X.T for X in (torch.randn(4, 4), torch.randn(6, 6)))
    model, loss = _kronecker(P, Q)
    [row] = muon_conditions(model, loss, torch.zeros(1), "weight", tolerance=1e-9)
    G = _gradient(model, loss, torch.zeros(1), "weight")
    W = model.weight.detach().clone()

    def fall(step: Tensor) -> float:
        before = loss(model, None).item()
        with torch.no_grad():
            model.weight.copy_(W - step)
        after = loss(model, None).item()
        with torch.no_grad():
            model.weight.copy_(W)
        return before - after

    best = row.nuclear_norm / row.polar_curvature
    assert fall(best * polar(G)) == pytest.approx(row.muon_decrease, rel=1e-9)
    assert fall(G / row.gradient_curvature) == pytest.approx(row.gradient_decrease, rel=1e-9)
    assert fall(G / row.smoothness) >= row.gradient_guarantee
    assert row.gradient_decrease >= row.gradient_guarantee
    assert row.holds == (row.muon_decrease >= row.gradient_guarantee)


def test_condition_and_decreases_agree_whatever_the_numbers() -> None:
    for _ in range(200):
        nuclear, frobenius, J, L = torch.rand(4).tolist()
        row = MuonCondition("W", (3, 3), nuclear, frobenius, J, J, L, 0.0, 1.0, 1, True)
        assert row.holds == (row.muon_decrease >= row.gradient_guarantee)


def test_downward_curvature_has_no_best_step() -> None:
    model = nn.Linear(3, 3, bias=False)
    C = torch.randn(3, 3)

    def loss(model: Any, _: Any) -> Tensor:
        return (model.weight * (C - 0.5 * model.weight)).sum()

    [row] = muon_conditions(model, loss, torch.zeros(1), "weight")
    assert row.polar_curvature == pytest.approx(-3)  # H = -I
    assert row.smoothness == pytest.approx(1)
    assert row.spectral_smoothness_at_least == pytest.approx(3)  # E = I
    assert row.holds
    assert row.muon_decrease == row.gradient_decrease == math.inf


def test_low_rank_gradient_has_no_noise_in_its_polar_factor() -> None:
    model = _mlp(8, 8, 8).float()
    batch = torch.randn(2, 8).float(), torch.randn(2, 8).float()  # two examples: rank two
    [row] = muon_conditions(model, _mse, batch, "0.weight")
    assert row.nuclear_rank <= 2
    H = _dense(model, _mse, batch, ["0.weight"]).double()
    U, _, Vh = torch.linalg.svd(_gradient(model, _mse, batch, "0.weight").double())
    E = (U[:, :2] @ Vh[:2]).flatten()
    assert row.polar_curvature == pytest.approx(float(E @ H @ E), rel=1e-4)


def test_gpt_curvature_is_the_second_difference_of_its_loss() -> None:
    model = GPT(GPTConfig(width=8, depth=2, heads=2, context=8), vocabulary=11)
    x = torch.randint(11, (4, 9))
    batch = x[:, :-1], x[:, 1:]
    with torch.no_grad():
        rows = muon_conditions(model, _cross_entropy, batch)
    assert [row.matrix for row in rows][:2] == [
        "blocks.0.attention.query.weight",
        "blocks.0.attention.key.weight",
    ]
    assert len(rows) == 12
    for row in rows[::5]:
        W = model.get_parameter(row.matrix)
        E = polar(_gradient(model, _cross_entropy, batch, row.matrix))
        start, values = W.detach().clone(), []
        for t in (-1e-3, 0.0, 1e-3):
            W.data = start + t * E
            values.append(_cross_entropy(model, batch).item())
        W.data = start
        found = (values[0] - 2 * values[1] + values[2]) / 1e-6
        assert row.polar_curvature == pytest.approx(found, rel=2e-3, abs=1e-5)


def test_same_generator_same_numbers_and_the_mean_of_batches() -> None:
    model = _mlp(3, 4, 2)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    once, again, several = (
        muon_conditions(
            model, _mse, batch, "0.weight", tolerance=1e-9, generator=torch.manual_seed(1)
        )[0]
        for batch in ((x, y), (x, y), Batches([(x[:2], y[:2]), (x[2:], y[2:])]))
    )
    assert once == again
    assert several.polar_curvature == pytest.approx(once.polar_curvature, rel=1e-10)
    assert several.smoothness == pytest.approx(once.smoothness, rel=1e-7)


def test_matrices_without_a_gradient_have_no_row() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 3, 3))
            self.unused = nn.Linear(3, 3)
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x @ self.experts[1]).tanh())

    rows = muon_conditions(Idle(), _mse, (torch.randn(4, 3), torch.randn(4, 1)))
    assert [row.matrix for row in rows] == ["experts[1]"]


def test_refuses_what_is_no_matrix() -> None:
    model = _mlp(3, 4, 2)
    batch = torch.randn(4, 3), torch.randn(4, 2)
    for call in (muon_conditions, blockwise_diagonal):
        with pytest.raises(ValueError, match=r"0\.bias \(1-dim"):
            call(model, _mse, batch, ["0.*"])
    with pytest.raises(ValueError, match="tolerance=0"):
        muon_conditions(model, _mse, batch, tolerance=0)
    with pytest.raises(ValueError, match="max_products=0"):
        muon_conditions(model, _mse, batch, max_products=0)
    with (
        pytest.warns(UserWarning, match="matrix update"),
        pytest.raises(ValueError, match="without hidden matrices"),
    ):
        muon_conditions(nn.Linear(3, 1), _mse, (batch[0], batch[1][:, :1]))


# ------------------------------------------------------------------------------- diagonal shares


def test_shares_have_the_errors_they_state() -> None:
    model = _mlp(4, 5, 5, 3)
    batch = torch.randn(8, 4), torch.randn(8, 3)
    names = ["0.weight", "2.weight"]
    H = _dense(model, _mse, batch, names)
    first = 20  # entries of the first matrix
    block = torch.cat([torch.zeros(first), torch.ones(25)])
    truth = {"both": _share(H, block), "rows": _share(H[first:, first:], torch.arange(25) // 5)}
    assert truth["both"] < 0.1  # what couples the layers is most of it
    assert 0.5 < truth["rows"] < 0.8
    found: dict[str, list[tuple[float, float]]] = {"both": [], "rows": []}
    for seed in range(40):
        shares = blockwise_diagonal(
            model, _mse, batch, names, tolerance=0.04, generator=torch.manual_seed(seed)
        )
        assert list(shares.across_rows) == names
        for key, share in (
            ("both", shares.across_matrices),
            ("rows", shares.across_rows[names[1]]),
        ):
            found[key].append((share.share.value, share.share.error))
            assert share.share.converged == (share.share.error <= 0.04)
    for key, pairs in found.items():
        values, errors = torch.tensor(pairs).T
        spread = values.std()
        assert abs(values.mean() - truth[key]) < 3 * spread / 40**0.5
        assert 0.7 < errors.square().mean().sqrt() / spread < 1.5
        assert ((values - truth[key]).abs() < 3 * errors).double().mean() >= 0.9
    assert shares.across_matrices.even == pytest.approx((20**2 + 25**2) / 45**2)
    assert (shares.across_matrices.blocks, shares.across_rows[names[1]].blocks) == (2, 5)
    assert shares.across_rows[names[1]].even == pytest.approx(0.2)


def _share(H: Tensor, block: Tensor) -> float:
    same = block[:, None] == block
    return float((H.square() * same).sum() / H.square().sum())


def test_shares_of_hessians_known_in_closed_form() -> None:
    model = _mlp(4, 4, 12)

    def apart(model: Any, x: Any) -> Tensor:
        return 0.5 * sum(each.weight.square().sum() * each.in_features for each in model[::2])

    found = blockwise_diagonal(model, apart, torch.zeros(1), ["*.weight"])
    for share in (found.across_matrices, *found.across_rows.values()):
        assert share.share.value == pytest.approx(1, abs=1e-9)
        assert share.share.error < 1e-9
        assert share.share.converged

    def alike(model: Any, x: Any) -> Tensor:
        """½ ‖1ᵀ W + 1ᵀ V‖²: every row of both matrices sees every other alike."""
        return 0.5 * sum(each.weight.sum(0) for each in model[::2]).square().sum()

    found = blockwise_diagonal(
        model,
        alike,
        torch.zeros(1),
        ["*.weight"],
        tolerance=0.01,
        max_products=2000,
        generator=torch.Generator().manual_seed(0),
    )
    both = found.across_matrices  # rows of 4 and 12: (4² + 12²) of 16²
    assert abs(both.share.value - 0.625) < 3 * both.share.error + 1e-9 < 0.04
    few, many = found.across_rows.values()
    assert few.even == few.share.value == pytest.approx(1 / 4)
    assert many.even == pytest.approx(1 / 12)
    assert abs(many.share.value - 1 / 12) < 3 * many.share.error + 1e-9 < 0.04


@pytest.mark.parametrize(
    ("rows", "most", "least", "taken"),
    [(5, 49, 40, 45), (9, 39, 32, 36)],
    ids=["a product each", "by signs"],
)
def test_shares_stop_where_they_are_told(rows: int, most: int, least: int, taken: int) -> None:
    model = _mlp(4, 5, rows, 3)
    batch = torch.randn(8, 4), torch.randn(8, 3)
    found = blockwise_diagonal(model, _mse, batch, "2.weight", tolerance=1e-6, max_products=most)
    row = found.across_rows["2.weight"].share
    assert row.products == taken
    assert not row.converged
    with pytest.raises(ValueError, match=f"max_products={least - 1}"):
        blockwise_diagonal(model, _mse, batch, "2.weight", max_products=least - 1)
    with pytest.raises(ValueError, match="tolerance=2"):
        blockwise_diagonal(model, _mse, batch, tolerance=2)

    def flat(model: Any, x: Any) -> Tensor:
        return model[0].weight.sum()

    with pytest.raises(ValueError, match="Hessian of zero"):
        blockwise_diagonal(model, flat, torch.zeros(1), "0.weight")


def test_shares_of_many_rows_are_found_by_signs() -> None:
    model = _mlp(4, 5, 12, 3)
    batch = torch.randn(8, 4), torch.randn(8, 3)
    truth = _share(_dense(model, _mse, batch, ["2.weight"]), torch.arange(60) // 5)
    shares = []
    for seed in range(40):
        found = blockwise_diagonal(
            model,
            _mse,
            batch,
            "2.weight",
            tolerance=1e-6,
            max_products=40,
            generator=torch.manual_seed(seed),
        )
        shares.append(found.across_rows["2.weight"].share)
    values, errors = (torch.tensor([getattr(s, key) for s in shares]) for key in ("value", "error"))
    assert 0.2 < truth < 0.95
    assert 0.01 < values.std() < 0.15
    assert abs(values.mean() - truth) < 3 * values.std() / 40**0.5
    assert 0.7 < errors.mean() / values.std() < 1.5


# ---------------------------------------------------------------------------------------- stacks


def _beside(X: Tensor) -> Tensor:
    return torch.cat(list(X), 1)


def _below(X: Tensor) -> Tensor:
    return torch.cat(list(X), 0)


@pytest.mark.parametrize("K", [2, 3])
def test_stack_against_the_dense_hessian(K: int) -> None:
    model = _mlp(*[3] * (K + 2))
    batch = torch.randn(6, 3), torch.randn(6, 3)
    names = [f"{2 * i}.weight" for i in range(K)]
    H = _dense(model, _mse, batch, names)
    G = torch.stack([_gradient(model, _mse, batch, name) for name in names])
    rows = {row.norm: row for row in stack_conditions(model, _mse, batch, [names], tolerance=1e-7)}
    polars: dict[str, Callable[[Tensor], Tensor]] = {
        "layerwise": lambda X: torch.stack([polar(each) for each in X]),
        "mode 1": lambda X: torch.stack(polar(_beside(X)).chunk(K, 1)),
        "mode 2": lambda X: torch.stack(polar(_below(X)).chunk(K, 0)),
    }
    duals = {
        "layerwise": sum(_nuclear(each) for each in G),
        "mode 1": _nuclear(_beside(G)),
        "mode 2": _nuclear(_below(G)),
    }
    assert list(rows) == list(polars)
    for norm, direction in polars.items():
        row, d = rows[norm], direction(G).flatten()
        assert row.matrices == tuple(names)
        assert row.shape == (K, 3, 3)
        assert row.curvature == pytest.approx(float(d @ H @ d), rel=1e-9)
        assert row.dual_norm == pytest.approx(duals[norm], rel=1e-10)
        assert row.smoothness_at_least >= abs(row.curvature) * (1 - 1e-6)
        assert row.decrease >= row.guarantee_at_most * (1 - 1e-6)
    # The best from many random starts is not far.
    for norm, direction in polars.items():
        best = 0.0
        for _ in range(30):
            E = torch.randn(K, 3, 3)
            for _ in range(15):
                image = (H @ direction(E).flatten()).view(E.shape)
                E = image
            best = max(best, float((direction(image) * image).sum()))
        assert rows[norm].smoothness_at_least == pytest.approx(best, rel=0.1)
    stacked, layerwise = rows["mode 1"].smoothness_at_least, rows["layerwise"].smoothness_at_least
    assert stacked <= layerwise * (1 + 1e-9)  # theorem 4.5
    assert layerwise <= K * stacked * (1 + 1e-6)


def test_stack_of_layers_that_only_act_together() -> None:
    """½ ‖Σ W_k - X‖² with K layers of size m: all constants in closed form."""
    m, K = 3, 4
    model = nn.Sequential(*[nn.Linear(m, m, bias=False) for _ in range(K)])

    def loss(model: Any, x: Any) -> Tensor:
        return 0.5 * (sum(each.weight for each in model) - x).square().sum()

    names = [f"{i}.weight" for i in range(K)]
    layerwise, one, two = stack_conditions(model, loss, torch.randn(m, m), [names], tolerance=1e-9)
    assert layerwise.curvature == pytest.approx(K**2 * m)
    assert layerwise.smoothness_at_least == pytest.approx(K**2 * m)
    for stacked in (one, two):  # K times smoother, and the dual norm is sqrt(K) times smaller
        assert stacked.curvature == pytest.approx(K * m)
        assert stacked.smoothness_at_least == pytest.approx(K * m)
        assert stacked.dual_norm == pytest.approx(layerwise.dual_norm / math.sqrt(K))
        assert stacked.decrease == pytest.approx(layerwise.decrease)


def test_stacks_are_those_of_teon() -> None:
    model = GPT(GPTConfig(width=8, depth=4, heads=2, context=8), vocabulary=11)
    x = torch.randint(11, (2, 9))
    rows = stack_conditions(model, _cross_entropy, (x[:, :-1], x[:, 1:]), tolerance=0.3)
    assert sorted({row.matrices for row in rows}) == sorted(TEON(model).stacks)
    assert len(rows) == 18  # three norms of q, k, v of two pairs of layers

    fused = nn.Sequential(Attention(), nn.Flatten())
    pair = [("0.attention.in_proj_weight[0]", "0.attention.out_proj.weight")]
    batch = torch.randn(5, 4, 4), torch.randn(5, 2)
    [row, *_] = stack_conditions(fused, _mse, batch, pair)
    H = _dense(fused, _mse, batch, ["0.attention.in_proj_weight", "0.attention.out_proj.weight"])
    where = torch.cat([torch.arange(16), 48 + torch.arange(16)])
    parts = [name.partition("[")[0] for name in pair[0]]
    D = torch.cat([polar(_gradient(fused, _mse, batch, name)[:4]).flatten() for name in parts])
    assert row.curvature == pytest.approx(float(D @ H[where[:, None], where] @ D), rel=1e-9)


@pytest.mark.parametrize(
    ("stacks", "match"),
    [
        ([("0.weight", "2.weight")], "matrices of one shape"),
        ([("2.weight", "2.weight")], "matrices of one shape"),
        ([("2.weight[1]", "4.weight")], r"'2.weight\[1\]'.* 1 matri"),
        ([("2.bias", "4.bias")], "expected matrices"),
        ([("8.weight", "4.weight")], "no parameter is called"),
        (None, "without queries"),
    ],
)
def test_refuses_stacks_that_are_none(stacks: Any, match: str) -> None:
    model = _mlp(3, 4, 4, 4, 2)
    with pytest.raises(ValueError, match=match):
        stack_conditions(model, _mse, (torch.randn(4, 3), torch.randn(4, 2)), stacks)
