"""Sums, differences, multiples and blocks of operators against dense matrices in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steepest
from steepest import curvature
from steepest.curvature import (
    NTK,
    Batches,
    GaussNewton,
    Hessian,
    SharpnessTracker,
    blockwise_diagonal,
    directional_curvature,
    effective_rank,
    gauss_newton_split,
    muon_conditions,
    ntk_spectrum,
    preconditioned_sharpness,
    sharpness,
    spectrum,
    stack_conditions,
    trace,
)
from steepest.curvature import jacobian as jacobian_module
from steepest.curvature.linear_map import CurvatureOperator

DOUBLE = torch.float64
Batch = tuple[Tensor, Tensor]


def _loss(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3))


def _cnn() -> nn.Module:
    layers = [nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(48, 3)]
    return nn.Sequential(nn.Linear(5, 25), nn.Unflatten(1, (1, 5, 5)), *layers)


def _attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Unflatten(1, (2, 4)), layer, nn.Flatten(), nn.Linear(8, 3)
    )


@pytest.fixture(params=[_mlp, _cnn, _attention])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param().double()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(9, 5, dtype=DOUBLE, generator=generator), torch.arange(9) % 3


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def _columns(A: CurvatureOperator) -> Tensor:
    """The matrix, a product at a time."""
    return torch.stack([A(e) for e in torch.eye(A.shape[1], dtype=A.dtype)], dim=1)


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_combinations_are_those_of_the_matrices(model: nn.Module, batch: Batch) -> None:
    H, G = Hessian(model, _loss, batch), GaussNewton(model, _loss, batch)
    h, g = _columns(H), _columns(G)
    for operator, matrix in (
        (H + G, h + g),
        (H - G, h - g),
        (2 * H, 2 * h),
        (G * -0.5, -0.5 * g),
        (-H, -h),
        (np.float64(3) * H, 3 * h),
        (H - 2 * (G - H) + G, 3 * h - g),
        (H - G.block(list(G.parameters)), h - g),
    ):
        _close(operator.to_dense(), matrix)
        v = torch.randn(len(h), dtype=DOUBLE, generator=_seeded())
        _close(operator @ v, matrix @ v)
        values = operator.to_scipy() @ np.eye(len(h))[:, :3]
        _close(torch.from_numpy(values), matrix[:, :3])
        assert operator.is_symmetric
        assert operator.shape == H.shape


def test_functions_of_combinations(model: nn.Module, batch: Batch) -> None:
    H, G = Hessian(model, _loss, batch), GaussNewton(model, _loss, batch)
    h, g = _columns(H), _columns(G)
    top = torch.linalg.eigvalsh(h)[-1].item()
    assert sharpness(2 * H, tolerance=1e-8).value == pytest.approx(2 * top, rel=1e-7)
    lowest = torch.linalg.eigvalsh(h - g)[0].item()
    assert sharpness(G - H, tolerance=1e-8).value == pytest.approx(-lowest, rel=1e-7)
    rest = trace(H - G, tolerance=0.01, max_products=len(h), generator=_seeded())
    assert abs(rest.value - (h - g).trace().item()) <= 4 * rest.error + 1e-9
    small = H.block(["0.bias"]) - G.block(["0.bias"])
    if small.shape[0] <= 24:  # the trace is exact
        assert trace(small).value == pytest.approx(_columns(small).trace().item(), abs=1e-10)
    ends = spectrum(H + G, count=1, tolerance=1e-6, probes=2, steps=5).extremes.values
    assert ends[0].item() == pytest.approx(torch.linalg.eigvalsh(h + g)[-1].item(), rel=2e-6)
    rank = effective_rank(-H, probes=20, steps=20, generator=_seeded())
    assert rank.value == pytest.approx(effective_rank(H, generator=_seeded()).value, rel=0.5)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, NTK])
@pytest.mark.parametrize("count", [1, 3, 19])
def test_blocks_of_vectors(model: nn.Module, batch: Batch, kind: type[Hessian], count: int) -> None:
    A = kind(model, _loss, batch)
    matrix = _columns(A)
    V = torch.randn(A.shape[1], count, dtype=DOUBLE, generator=_seeded())
    before = A.products
    _close(A @ V, matrix @ V)
    _close((A - 3 * A) @ V, -2 * matrix @ V)
    assert A.products == before + 3 * count


def test_blocks_of_vectors_over_several_batches_and_in_cross_blocks(batch: Batch) -> None:
    model = _mlp().double()
    batches = Batches([batch, (batch[0][:4] - 1, batch[1][:4])])
    cross = Hessian(model, _loss, batches, ["0.weight"], columns=["2.bias", "4.bias"])
    V = torch.randn(9, 10, dtype=DOUBLE, generator=_seeded())
    _close(cross @ V, _columns(cross) @ V)
    _close((cross + cross) @ V, 2 * _columns(cross) @ V)
    with pytest.raises(ValueError, match="not symmetric"):
        sharpness(cross)
    with pytest.raises(ValueError, match="symmetric"):
        cross.block(["0.weight"])
    H = Hessian(model, _loss, batches)
    _close(H.block("2.*").to_dense(), Hessian(model, _loss, batches, "2.*").to_dense())


def test_vectors_of_a_block_share_the_way(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    H = Hessian(_mlp().double(), _loss, batch)
    H.gradient()
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options["is_grads_batched"])
        return torch.autograd.grad(*arguments, **options)

    monkeypatch.setattr(jacobian_module, "grad", counted)
    _ = H @ torch.ones(H.shape[0], 17, dtype=DOUBLE)
    assert calls == [True, True, False]


def test_each_part_counts_its_own_products(batch: Batch) -> None:
    H, G = Hessian(_mlp().double(), _loss, batch), GaussNewton(_mlp().double(), _loss, batch)
    difference = H - G
    _ = difference(H.vector() + 1)
    _ = difference @ torch.ones(H.shape[0], 4, dtype=DOUBLE)
    _ = H(H.vector() + 1)
    assert (difference.products, H.products, G.products) == (5, 6, 5)


def test_operators_that_cannot_be_combined(batch: Batch) -> None:
    model = _mlp()
    floats = batch[0].float(), batch[1]
    H = Hessian(model, _loss, floats)
    others: dict[str, Callable[[], CurvatureOperator]] = {
        "GaussNewton .* rows": lambda: GaussNewton(model, _loss, floats, ["0.weight"]),
        "names of rows: .0.weight": lambda: Hessian(model, _loss, floats, list(H.rows)[::-1]),
        "differ in names of columns": lambda: Hessian(model, _loss, floats, columns=["0.weight"]),
        "precision: .*float64": lambda: Hessian(model, _loss, floats, dtype=DOUBLE),
        "NTK .* rows: .* outputs": lambda: NTK(model, _loss, floats),
        "differ in shape": lambda: Hessian(
            nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)),
            _loss,
            floats,
        ),
    }
    for sentence, build in others.items():
        with pytest.raises(ValueError, match=sentence) as error:
            _ = H + build()
        assert "make both of the same parameters" in str(error.value)
        with pytest.raises(ValueError, match="to combine"):
            _ = build() - 2 * H
    with pytest.raises(ValueError, match="factor nan"):
        _ = float("nan") * H
    for strange in ("2", None, torch.ones(2), H):
        with pytest.raises(TypeError):
            _ = H * strange  # type: ignore[operator]
    with pytest.raises(TypeError):
        _ = H + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="rows are outputs"):
        NTK(model, _loss, floats).block(["0.weight"])


def test_operators_of_other_weights_are_compared() -> None:
    """What a step changes in the Hessian, by their difference."""
    model, x = nn.Linear(3, 1, bias=False).double(), torch.eye(3, dtype=DOUBLE)

    def loss(model: Any, x: Tensor) -> Tensor:
        return model(x).pow(4).sum()

    before = Hessian(model, loss, x)
    start = model.weight.detach().clone().flatten()
    with torch.no_grad():
        model.weight.mul_(2)
    _close((Hessian(model, loss, x) - before).to_dense(), torch.diag(12 * 3 * start**2))


# --------------------------------------------------------------------------- the two forms agree


def _optimizer(model: nn.Module, batch: Batch) -> torch.optim.Optimizer:
    optimizer = steepest.Muon(model, 1e-3)
    _loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _numbers(result: Any) -> list[Any]:
    if isinstance(result, Tensor):
        return result.flatten().tolist()
    if isinstance(result, list | tuple):
        return [number for part in result for number in _numbers(part)]
    if isinstance(result, dict):
        return [number for part in result.values() for number in _numbers(part)]
    return _numbers(list(vars(result).values())) if hasattr(result, "__dict__") else [result]


FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Any], dict[str, Any]]] = {
    "sharpness": (sharpness, Hessian, [], {"tolerance": 0.01}),
    "spectrum": (spectrum, Hessian, [], {"probes": 2, "steps": 4}),
    "trace": (trace, Hessian, [], {"tolerance": 0.2}),
    "effective rank": (effective_rank, Hessian, [], {"probes": 2, "steps": 4}),
    "split": (gauss_newton_split, Hessian, [], {"trace_tolerance": 0.3}),
    "kernel": (ntk_spectrum, NTK, [], {"count": 2}),
    "muon": (muon_conditions, Hessian, ["*.weight"], {"tolerance": 0.1}),
    "shares": (blockwise_diagonal, Hessian, ["*.weight"], {"tolerance": 0.3}),
}


@pytest.mark.parametrize("name", FORMS)
def test_both_forms_give_the_same_bits(name: str, batch: Batch) -> None:
    function, build, parameters, options = FORMS[name]
    torch.manual_seed(0)
    model = _mlp()
    settings: dict[str, Any] = {"dtype": DOUBLE}
    direct = function(model, _loss, batch, *parameters, **options, **settings, generator=_seeded())
    operator = build(model, _loss, batch, *parameters, **settings)
    assert _numbers(function(operator, **options, generator=_seeded())) == _numbers(direct)
    if name in ("muon", "shares"):  # a block of the whole is as good
        block = Hessian(model, _loss, batch, **settings).block("*.weight")
        assert _numbers(function(block, **options, generator=_seeded())) == _numbers(direct)
    by_name = function(model=model, loss=_loss, batch=batch, **options, **settings)
    assert type(by_name) is type(direct)


def test_both_forms_give_the_same_bits_with_an_argument(batch: Batch) -> None:
    torch.manual_seed(0)
    model = _mlp().double()
    H = Hessian(model, _loss, batch)
    D = {"2.weight": torch.ones(6, 7), "0.bias": torch.ones(7)}
    pair = [("0.weight",), ("2.weight",)]
    optimizer = _optimizer(model, batch)
    H = Hessian(model, _loss, batch)
    for function, argument in (
        (directional_curvature, D),
        (preconditioned_sharpness, optimizer),
        (stack_conditions, pair),
    ):
        direct = function(model, _loss, batch, argument)  # type: ignore[operator]
        assert _numbers(function(H, argument)) == _numbers(direct)  # type: ignore[operator]


def test_the_old_name_of_the_spectrum_warns() -> None:
    with pytest.warns(DeprecationWarning, match="now called spectrum"):
        old = curvature.hessian_spectrum
    assert old is spectrum
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = curvature.nothing


# ------------------------------------------------------------------------------- graphs are built


class Counted:
    """A loss that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        self.calls += 1
        return _loss(model, batch)


def _calls_of_one_operator(model: nn.Module, batch: Batch) -> int:
    loss = Counted()
    Hessian(model, loss, batch).gradient()
    return loss.calls


@pytest.mark.parametrize("name", ["sgd", "muon", "soap"])
def test_a_tracker_builds_one_operator_a_measurement(name: str, batch: Batch) -> None:
    torch.manual_seed(0)
    model = _mlp().double()
    optimizer = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), 0.1),
        "muon": lambda: steepest.Muon(model, 1e-3),
        "soap": lambda: steepest.SOAP(model, 1e-3),
    }[name]()
    loss = Counted()
    tracker = SharpnessTracker(model, loss, batch, optimizer)
    _loss(model, batch).backward()
    optimizer.step()
    assert tracker.step() is None
    record = tracker.measure()
    assert len(record["stability"]) == (2 if name == "muon" else 1)
    assert loss.calls == _calls_of_one_operator(model, batch)


def test_conditions_and_splits_build_one_operator(batch: Batch) -> None:
    torch.manual_seed(0)
    model = _mlp().double()
    one = _calls_of_one_operator(model, batch)
    for function, calls in (
        (muon_conditions, one),
        (blockwise_diagonal, one),
        (gauss_newton_split, 2 * one),  # the outputs of G are those of a call of its own
    ):
        loss = Counted()
        if function is gauss_newton_split:
            function(model, loss, batch)
        else:
            function(model, loss, batch, "*.weight", tolerance=0.3)
        assert loss.calls <= calls


def test_a_block_takes_the_graph_of_the_whole(batch: Batch) -> None:
    loss = Counted()
    H = Hessian(_mlp().double(), loss, batch)
    before = sharpness(H.block(["2.weight"])).value
    calls = loss.calls
    assert sharpness(H.block(["2.weight"]), start=None).value == pytest.approx(before, rel=1e-2)
    assert len(H.block(["4.bias", "0.weight"]).gradient()) == 38
    assert (loss.calls, H.products) == (calls, 0)


def test_halves_and_sums_of_lists() -> None:
    model, x = nn.Linear(3, 2, bias=False).double(), torch.eye(3, dtype=DOUBLE)

    def loss(model: Any, x: Tensor) -> Tensor:
        return model(x).square().sum()

    H, G = Hessian(model, loss, x), GaussNewton(model, loss, x)
    assert torch.equal((H / 2).to_dense(), H.to_dense() / 2)
    assert torch.equal(sum([H, G]).to_dense(), H.to_dense() + G.to_dense())  # type: ignore
    with pytest.raises(TypeError):
        1 + H
