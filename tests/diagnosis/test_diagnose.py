"""`diagnose` against brute force in float64: ranks, gains between batches, curvature, verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.curvature import Hessian
from steepest.curvature.loss_function import LossFunction
from steepest.diagnosis.descent import Descent, descents
from steepest.diagnosis.diagnosis import Diagnosis, Prediction
from steepest.diagnosis.evidence import GEOMETRIES, gather, unit
from steepest.diagnosis.race import race
from steepest.diagnosis.verdicts import _verdict, answer, diagnose, single_layer
from steepest.diagnosis.warmup import LEARNING_RATES, SHUFFLES
from steepest.lab.models import GPT, GPTConfig
from steepest.linalg import nuclear_rank, polar, stable_rank
from steepest.model.inputs import Inputs
from steepest.model.parameter_roles import all_roles
from steepest.statistics import Interval

Batch = tuple[Tensor, Tensor]


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))


def _batches(count: int, size: int = 40) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(6, 4, generator=generator)
    inputs = [torch.randn(size, 6, generator=generator) for _ in range(count)]
    return [(x, (x @ teacher).argmax(1)) for x in inputs]


def _loss(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _gradient(model: nn.Module, batch: Batch, name: str) -> Tensor:
    return torch.autograd.grad(_loss(model, batch), model.get_parameter(name))[0]


def test_structure_is_that_of_the_activations_and_gradients() -> None:
    model, batches = _mlp(), _batches(4)
    row = diagnose(model, _loss, batches, level="quick")["2.weight"]
    entering = [model[1](model[0](x)) for x, _ in batches]
    leaving = [model[2](A) for A in entering]
    for stated, tokens in (  # what only describes is of the first batch
        (row.stable_rank, entering),
        (row.stable_rank_centred, [entering[0] - entering[0].mean(0)]),
        (row.stable_rank_output, leaving[:1]),
    ):
        assert stated == pytest.approx(fmean(float(stable_rank(A)) for A in tokens), rel=0.05)
    G = [_gradient(model, batch, "2.weight") for batch in batches]
    assert row.nuclear_rank == pytest.approx(fmean(float(nuclear_rank(g)) for g in G), rel=0.03)
    for found, matrix in ((row.gradient, G[0]), (row.momentum, torch.stack(G).mean(0))):
        values = torch.linalg.svdvals(matrix) / matrix.norm()
        assert found.stable_rank == pytest.approx(float(stable_rank(matrix)), rel=1e-3)
        assert found.nuclear_rank == pytest.approx(float(nuclear_rank(matrix)), rel=0.03)
        assert found.leading == pytest.approx(values[:8].tolist(), abs=1e-3)
    assert (row.tokens, row.shape, row.role) == (40, (8, 10), "hidden")


def _directions(G: list[Tensor]) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Exact directions of length 1; the second moment of "adamw" is without batch j."""

    def adaptive(M: Tensor, j: int) -> Tensor:
        root = torch.stack([g**2 for k, g in enumerate(G) if k != j]).mean(0).sqrt()
        D = torch.where(root > 0, M / root, 0.0)
        return D / (root * D**2).sum().sqrt()

    return {
        "euclidean": lambda M, j: M / M.norm(),
        "sign": lambda M, j: M.sign(),
        "spectral": lambda M, j: polar(M, "svd"),
        "adamw": adaptive,
    }


def test_gains_and_curvature_against_dense_matrices() -> None:
    """Gains are between batches, and curvature is that of the next batch."""
    model, batches = _mlp().double(), [(x.double(), y) for x, y in _batches(3)]
    found = gather(LossFunction(model, _loss), batches, None, curvature=True)
    assert [each.label for each in found] == ["0.weight", "2.weight", "4.weight"]
    name, place = "2.weight", found[1]
    G = [_gradient(model, batch, name) for batch in batches]
    exact = _directions(G)
    for geometry in GEOMETRIES:
        tolerance = 0.05 if geometry == "spectral" else 1e-3
        for i, j in ((0, 1), (1, 2), (2, 0), (0, 2)):
            D = exact[geometry](G[i], j)
            scale = abs((D * G[i]).sum().item())
            gain = (D * G[j]).sum().item()
            assert place.gains[geometry][i, j].item() == pytest.approx(gain, abs=tolerance * scale)
            if j == (i + 1) % 3:
                H = Hessian(model, _loss, batches[j], [name]).to_dense()
                along = (D.flatten() @ H @ D.flatten()).item()
                assert place.curvatures[geometry][i].item() == pytest.approx(
                    along, rel=2 * tolerance, abs=1e-3 * tolerance
                )


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_descent_against_steps_by_hand(geometry: Any) -> None:
    """Steps on a copy of the model, directions in turn from all batches but the one that judges."""
    count, name = 4, "2.weight"
    model, batches = _mlp().double(), [(x.double(), y) for x, y in _batches(count)]
    [place] = gather(LossFunction(model, _loss), batches, [name], curvature=True)
    [found] = descents(LossFunction(model, _loss), batches, [single_layer(place)])
    mine = found[geometry]
    step = _directions([_gradient(model, batch, name) for batch in batches])[geometry]
    assert mine.falls.shape == (count, len(mine.sizes))
    for turn in range(count):
        judge = batches[turn - 1]
        for size, fall in zip(mine.sizes, mine.falls[turn].tolist(), strict=True):
            moved = deepcopy(model)
            for k, b in enumerate((turn, turn + 1, turn + 2, turn)):  # three, and the first again
                G = _gradient(moved, batches[b % count], name)
                D = step(G, (turn - 1) % count)
                with torch.no_grad():
                    moved.get_parameter(name).sub_(D, alpha=size * (1, 0.75, 0.5, 0.25)[k])
            expected = (_loss(model, judge) - _loss(moved, judge)).item()
            close = 0.02 if geometry == "spectral" else 1e-6
            assert fall == pytest.approx(expected, rel=close, abs=close * 0.1)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_best_size_lies_inside_of_those_that_were_tried(geometry: Any) -> None:
    """Also from a guess that is far off, and then it decreases the loss as much."""
    model, batches = _mlp().double(), [(x.double(), y) for x, y in _batches(4)]
    [place] = gather(LossFunction(model, _loss), batches, ["2.weight"], curvature=True)
    layer = single_layer(place)
    decreases = []
    for far in (1.0, 2.0**8, 2.0**-8):
        guesses = {name: guess * far for name, guess in layer.guesses.items()}
        [found] = descents(LossFunction(model, _loss), batches, [replace(layer, guesses=guesses)])
        sizes = torch.tensor(found[geometry].sizes)
        best = sizes[found[geometry].falls.mean(0).argmax()]
        assert sizes.min() < best < sizes.max()
        decreases.append(math.exp(found[geometry].log_decrease(range(4))))
    assert min(decreases) > 0.9 * max(decreases)


def test_the_decrease_is_that_of_the_best_size() -> None:
    falls = torch.tensor([[0.1, 3.0, -1.0, -math.inf], [0.4, 1.0, 5.0, 9.0], [-2.0, -3.0, -1.0, 0]])
    found = Descent((1.0, 2.0, 4.0, 8.0), falls)
    assert found.log_decrease([0]) == pytest.approx(math.log(3))
    assert found.log_decrease([0, 1]) == pytest.approx(math.log(2))
    assert math.isnan(found.log_decrease([2]))


def test_curvature_that_is_not_positive_starts_from_a_small_step() -> None:
    model = _mlp()
    [place] = gather(LossFunction(model, _loss), _batches(3), ["2.weight"], curvature=True)
    W = model.get_parameter("2.weight")
    for geometry in GEOMETRIES:
        gain = fmean(
            place.gains[geometry][i, j].item() for i in range(3) for j in range(3) if i != j
        )
        curvature = abs(place.curvatures[geometry].mean().item())
        assert place.best_step(geometry) == pytest.approx(gain / curvature)
        place.curvatures[geometry].zero_()
        length = (
            place.best_step(geometry) * torch.linalg.matrix_norm(unit(geometry, W, W**2)).item()
        )
        assert 0.001 < length / W.norm().item() < 0.1


def test_the_model_is_left_as_it_was_by_a_loss_that_blows_up() -> None:
    """Beyond a step of some size the loss is infinite: that size counts as the worst."""

    def loss(model: Any, batch: Batch) -> Tensor:
        error = (model(batch[0]) - 1).square().sum(1).mean()
        return torch.where(error > 30, torch.inf, error)

    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    batches = [(torch.randn(40, 6), torch.zeros(40)) for _ in range(4)]
    row = diagnose(model, loss, batches)["weight"]
    assert row.prediction("spectral").log_ratio is not None


def test_the_condition_compares_guarantees_not_outcomes() -> None:
    """Least squares beside a spike in the input that the target leaves alone: with steps of the
    best size Euclidean decreases more, though the nuclear rank is ten times the stable rank.
    """
    torch.manual_seed(0)
    model = nn.Linear(20, 20, bias=False)
    nn.init.zeros_(model.weight)
    target = torch.randn(20, 20)
    target = target - target.mean(1, keepdim=True)

    def batch() -> Batch:
        x = torch.randn(2000, 20)
        x = x - x.mean(0) + 6.0
        return x, x @ target.mT

    def loss(model: Any, given: Batch) -> Tensor:
        return 0.5 * (model(given[0]) - given[1]).square().sum(1).mean()

    batches = [batch() for _ in range(5)]
    [row] = diagnose(model, loss, batches)
    bound, predictions = row.mixed_bound(), [row.prediction(n) for n in ("spectral", "euclidean")]
    assert bound is not None
    assert bound > 10
    spectral, euclidean = (0.0 if each is None else each.decrease or 0.0 for each in predictions)
    assert 0 < spectral < 0.8 * euclidean


def test_a_batch_does_not_judge_its_own_direction() -> None:
    """Pure noise has a large nuclear rank, and no advantage across batches."""
    torch.manual_seed(0)
    model = nn.Linear(30, 30, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    batches = [(torch.randn(50, 30), torch.randn(50, 30)) for _ in range(8)]

    def loss(model: Any, batch: Batch) -> Tensor:
        return (model(batch[0]) * batch[1]).sum(1).mean()  # a gradient of mean zero

    [row] = diagnose(model, loss, batches, level="quick")
    assert row.nuclear_rank > 15
    assert row.verdict == "cannot tell"
    spectral = row.prediction("spectral")
    assert spectral is not None
    own = math.sqrt(row.nuclear_rank) * 1.0
    assert abs(spectral.gain) < 0.2 * own


def test_spectral_wins_where_the_signal_has_full_rank_and_the_input_a_spike() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 20, bias=False)
    with torch.no_grad():
        model.weight.zero_()

    def batch() -> Batch:
        x = torch.randn(400, 20) + 3.0 * torch.ones(20)
        return x, x - x.mean(0)

    def loss(model: Any, given: Batch) -> Tensor:
        return 0.5 * (model(given[0]) - given[1]).square().sum(1).mean()

    found = diagnose(model, loss, [batch() for _ in range(5)], level="quick", warmup_steps=0)
    [row] = found
    assert row.stable_rank is not None
    assert row.stable_rank < 2
    assert row.nuclear_rank_across == pytest.approx(20, rel=0.2)
    assert row.verdict == "spectral"
    assert "times" in row.reason


def test_the_bound_is_nuclear_rank_over_stable_rank() -> None:
    model, batches = _mlp(), _batches(4)
    row = diagnose(model, _loss, batches, level="quick")["4.weight"]
    ratio = row.prediction("spectral")
    assert ratio is not None
    assert ratio.log_ratio is not None
    assert row.nuclear_rank_across is not None
    assert row.stable_rank is not None
    assert ratio.log_ratio.value == pytest.approx(
        math.log(row.nuclear_rank_across / row.stable_rank), rel=1e-6
    )


def test_the_mixed_bound_goes_from_the_input_to_the_gradient() -> None:
    row = diagnose(_mlp(), _loss, _batches(4), level="quick")["2.weight"]
    across, stable, own = row.nuclear_rank_across, row.stable_rank, row.gradient.stable_rank
    assert across is not None
    assert stable is not None
    assert row.mixed_bound() == pytest.approx(across / stable)
    assert row.mixed_bound(1e9) == pytest.approx(across / own, rel=1e-6)
    # Euclidean blocks are divided by L_F + C / st(G), spectral ones by L_op + C.
    L, C = 0.3, 0.7
    spectral, euclidean = across / (stable * L + C), 1 / (L + C / own)
    assert row.mixed_bound(C / L) == pytest.approx(spectral / euclidean)
    assert replace(row, stable_rank=None).mixed_bound() is None


def test_predictions_are_those_of_the_quadratic_model() -> None:
    model, batches = _mlp(), _batches(4)
    for row in diagnose(model, _loss, batches):
        for each in row.predictions:
            assert each.curvature is not None
            assert each.decrease == pytest.approx(each.gain**2 / (2 * abs(each.curvature)))
            assert each.best_step == pytest.approx(each.gain / abs(each.curvature))
            assert each.log_ratio is not None
            assert each.log_ratio.low <= each.log_ratio.value <= each.log_ratio.high


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.5, 0.1, 0.9), (0.2, 0.1, 0.3)], "sign"),
        ([(0.5, -0.1, 1.1), (0.2, 0.1, 0.3)], "cannot tell"),  # perhaps nothing
        ([(0.06, 0.03, 0.09), (0.0, -0.1, 0.09)], "euclidean"),  # surely less than 10%
        ([(0.06, 0.03, 0.30), (0.0, -0.1, 0.09)], "cannot tell"),
        ([(-0.5, -0.8, -0.2), (-0.3, -0.4, -0.2)], "euclidean"),
    ],
)
def test_a_verdict_needs_a_gain_that_is_worth_it(intervals: Any, verdict: str) -> None:
    euclidean = Prediction("euclidean", 1.0, 1.0, 1.0, 0.5, Interval(0.0, 0.0, 0.0))
    others = [
        Prediction(name, 1.0, 1.0, 1.0, 0.5, Interval(*interval))
        for name, interval in zip(("sign", "spectral"), intervals, strict=True)
    ]
    found, reason = _verdict((euclidean, *others), True, None)
    assert found == verdict
    assert "predicted" in reason


def test_nothing_is_changed() -> None:
    model, batches = nn.Sequential(_mlp(), nn.Dropout(0.5)), _batches(8, 10)
    model[0][0].weight.grad = torch.ones(10, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    diagnose(model, _loss, batches, level="thorough", parameters=["0.2.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0][0].weight.grad, torch.ones(10, 6))
    assert model[0][2].weight.grad is None
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_race_finds_the_better_geometry() -> None:
    """Least squares with a spike in the input: Euclidean steps follow the spike first."""
    torch.manual_seed(0)
    model = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        model.weight.zero_()

    def batch() -> Batch:
        x = torch.randn(300, 12) + 6.0 * torch.ones(12)
        return x, x - x.mean(0)

    def loss(model: Any, given: Batch) -> Tensor:
        return 0.5 * (model(given[0]) - given[1]).square().sum(1).mean()

    batches = [batch() for _ in range(4)]
    function = LossFunction(model, loss)
    [place] = gather(function, batches, None, curvature=True)
    results = {row.geometry: row for row in race(function, batches, [place])["weight"]}
    spectral = results["spectral"]
    assert spectral.log_ratio is not None
    assert spectral.log_ratio.low > 0
    assert spectral.decrease > results["euclidean"].decrease > 0
    assert results["euclidean"].log_ratio == Interval(0.0, 0.0, 0.0)


class _Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.unused = nn.Linear(3, 3)
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).flatten(2).mT
        return self.head(self.lstm(y)[0][:, -1])


def test_other_networks() -> None:
    torch.manual_seed(0)
    model = _Grouped()
    batches = [(torch.randn(8, 4, 6, 6), torch.arange(8) % 4) for _ in range(4)]
    found = {row.matrix: row for row in diagnose(model, _loss, batches)}
    assert {"conv.weight[0]", "conv.weight[1]", "head.weight"} <= set(found)
    assert found["unused.weight"].reason.startswith("its gradient is zero on some batch")
    assert found["unused.weight"].nuclear_rank is None
    recurrent = [row for name, row in found.items() if name.startswith("lstm.")]
    assert recurrent
    inside = ("lstm.weight_hh_l0", "lstm.weight_ih_l1")
    assert all((row.stable_rank is None) == (row.parameter in inside) for row in recurrent)
    assert all(row.predictions for row in recurrent)
    quick = diagnose(model, _loss, batches, level="quick")
    assert "steps of the best size" not in str(quick.table().caption)  # it took none
    lost = [row for row in quick if row.parameter in inside]
    assert lost
    assert all(row.verdict == "cannot tell" and "not known" in row.reason for row in lost)
    patches = F.unfold(batches[0][0][:, :2], 3).mT.reshape(-1, 18)
    [first] = gather(LossFunction(model, _loss), batches, ["conv.weight"], curvature=False)[:1]
    assert first.inputs[0].entering == pytest.approx(float(stable_rank(patches)), rel=0.03)


def test_embeddings_multiply_indicators() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 4))
    tokens = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4])
    batches = [(tokens, torch.randint(4, (8,))) for _ in range(3)]
    row = diagnose(model, _loss, batches, level="quick", parameters=["0.weight"])[0]
    H = F.one_hot(tokens, 7).double()
    assert row.stable_rank == pytest.approx(float(stable_rank(H)))
    assert row.stable_rank_centred == pytest.approx(float(stable_rank(H - H.mean(0))), rel=1e-3)


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = diagnose(_mlp(), _loss, _batches(8), level="thorough", parameters=["4.weight"])
    found.save(tmp_path / "d.json")
    again = Diagnosis.load(tmp_path / "d.json")
    assert list(again) == list(found)
    assert (again.level, again.batches) == ("thorough", 8)
    assert str(again) == str(found)
    assert "thorough, 8 batches" in str(found)
    (tmp_path / "other.json").write_text(json.dumps({"rows": 3}))
    with pytest.raises(ValueError, match="which holds no diagnosis"):
        Diagnosis.load(tmp_path / "other.json")
    with pytest.raises(KeyError, match="which no matrix is called"):
        found["nothing"]


def test_directions_of_zero_are_zero() -> None:
    zero = torch.zeros(3, 4)
    for geometry in GEOMETRIES:
        assert torch.equal(unit(geometry, zero, zero), zero)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"2 batches.* 3 .*'quick'"):
        diagnose(_mlp(), _loss, _batches(2), level="quick")
    with pytest.raises(ValueError, match="level='full'"):
        diagnose(_mlp(), _loss, _batches(3), level="full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without matrices"):
        diagnose(nn.LayerNorm(6), lambda m, b: m(b[0]).square().mean(), _batches(4))
    with pytest.raises(FloatingPointError, match="got a loss of nan"):
        diagnose(_mlp(), lambda m, b: _loss(m, b) * math.nan, _batches(4))


def test_progress_counts_what_is_dear() -> None:
    calls: list[tuple[int, int, str]] = []
    diagnose(_mlp(), _loss, _batches(4), on_progress=lambda *call: calls.append(call))
    seen = [done for done, _, _ in calls]
    assert seen == list(range(1, len(seen) + 1))
    assert 0.4 * seen[-1] < calls[0][1] < 2.5 * seen[-1]  # an estimate from the start
    assert calls[-1][1] == seen[-1]
    assert {message for _, _, message in calls} == {
        "gradients", "descent 0.weight", "descent 2.weight", "descent 4.weight",
    }  # fmt: skip
    # Gradients, products, and at least three sizes of three more steps in each geometry.
    assert len(seen) >= 4 + 4 * 3 * 4 * (1 + 3 * 3)


class _Attention(nn.Module):
    """A fused projection, and experts without names."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.experts = nn.Linear(6, 18), nn.Parameter(torch.randn(2, 6, 6) / 3)
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        y = (q @ k.mT).softmax(-1) @ v
        return self.out(y @ self.experts[0].mT + y @ self.experts[1].mT)


def test_fused_parts_are_named_query_key_and_value() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(5, 7, 6) for _ in range(4)]
    found = diagnose(_Attention(), lambda m, x: (m(x) - x).square().mean(), batches, level="quick")
    names = [f"qkv.weight[{part}]" for part in ("query", "key", "value")]
    assert [row.matrix for row in found] == ["experts[0]", "experts[1]", *names, "out.weight"]
    assert all(f"qkv[{part}]" in str(found) for part in ("query", "key", "value"))
    stacked = gather(
        LossFunction(
            GPT(GPTConfig(width=8, depth=1, heads=2, context=4), 5),
            lambda m, b: _loss(lambda x: m(x).flatten(0, 1), (b, b.flatten())),
        ),
        [torch.randint(5, (3, 4)) for _ in range(3)], ["*query*"], curvature=False,
    )  # fmt: skip
    assert [place.label for place in stacked] == ["blocks.0.attention.query.weight"]


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "4.weight"])
def test_no_rank_is_above_the_sides_of_its_matrix(name: str) -> None:
    """Noise takes the ratio of gains between batches beyond them; the prediction moves with it."""
    [place] = gather(LossFunction(_mlp(), _loss), _batches(4), [name], curvature=False)
    before = answer(place, {}, ())
    place.gains["spectral"] *= 10
    after, most = answer(place, {}, ()), min(place.shape)
    assert after.nuclear_rank_across == most
    for result in (before, after):
        assert result.nuclear_rank_across is not None
        assert result.stable_rank is not None
        assert result.bound is not None
        prediction = result.prediction("spectral")
        assert prediction is not None
        assert prediction.log_ratio is not None
        ratio = math.log(result.nuclear_rank_across / result.stable_rank)
        assert prediction.log_ratio.value == pytest.approx(ratio)
        assert result.bound.value == pytest.approx(ratio)
    width = before.bound.high - before.bound.low
    assert after.bound.high - after.bound.low == pytest.approx(width)  # no surer than before


def test_what_cannot_be_diagnosed_is_said_before_any_work() -> None:
    def count(*_: Any) -> None:
        raise AssertionError("began")

    for model, given in ((_mlp(), {"parameters": ["nothing"]}), (nn.LayerNorm(6), {})):
        with pytest.raises(ValueError, match=r"nothing|without matrices"):
            diagnose(model, _loss, _batches(20), on_progress=count, **given)


def test_wide_layers_are_within_the_stated_errors() -> None:
    """Sides above `EXACT`, where polar factors and stable ranks are estimates; float64 is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(150, 400), nn.ReLU(), nn.Linear(400, 160), nn.ReLU(), nn.Linear(160, 5)
    )
    teacher = torch.randn(150, 5)
    inputs = [torch.randn(300, 150) for _ in range(4)]
    batches = [(x, (x @ teacher).argmax(1)) for x in inputs]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for stage in range(2):
        found = diagnose(model, _loss, batches, level="quick")
        for name in ("0.weight", "2.weight"):
            G = torch.stack([_gradient(model, batch, name) for batch in batches]).double()
            flat = G.flatten(1)
            others = ~torch.eye(4, dtype=torch.bool)
            spectral = (polar(G, "svd").flatten(1) @ flat.mT)[others].mean()
            euclidean = (flat / flat.norm(dim=1, keepdim=True) @ flat.mT)[others].mean()
            row = found[name]
            if row.nuclear_rank_across is None:
                assert min(float(spectral), float(euclidean)) < 1e-2 * float(flat.norm(dim=1).max())
            else:
                across = float(spectral / euclidean) ** 2
                assert row.nuclear_rank_across == pytest.approx(across, rel=0.11)
            assert row.nuclear_rank == pytest.approx(float(nuclear_rank(G).mean()), rel=0.11)
            mean = G.mean(0)
            assert row.momentum.nuclear_rank == pytest.approx(float(nuclear_rank(mean)), rel=0.02)
            assert row.momentum.stable_rank == pytest.approx(float(stable_rank(mean)), rel=1e-4)
            layers = model if name == "2.weight" else model[:0]
            entering = [layers[:2](x) if len(layers) else x for x in inputs]
            exact = fmean(float(stable_rank(each.detach().double())) for each in entering)
            assert exact * 0.999 < row.stable_rank < exact * 1.1
        for batch in batches * 10 * (stage == 0):
            optimizer.zero_grad()
            _loss(model, batch).backward()
            optimizer.step()


def test_layers_of_one_input_share_its_ranks_until_it_is_written_to() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
    x = torch.randn(40, 6)
    first = x.double()
    with Inputs(model, all_roles(model)) as seen:
        for layer in model:
            layer(x)
            if layer is model[1]:
                x[:, 0] += 10.0
    for name, given in (("0", first), ("1", first), ("2", x.double())):
        found = seen.ranks[f"{name}.weight", 0]
        assert found.entering == pytest.approx(float(stable_rank(given)), rel=1e-4)
        centred = float(stable_rank(given - given.mean(0)))
        assert found.centred == pytest.approx(centred, rel=1e-4)
    assert seen.ranks["0.weight", 0].leaving != seen.ranks["1.weight", 0].leaving


@pytest.mark.parametrize("level", ["quick", "standard", "thorough"])
def test_the_model_and_its_loss_are_packed_once(
    level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the loss is evaluated twice, to see whether it stays the same, for the first batch."""
    packed = []
    pack, evaluate = LossFunction.__init__, LossFunction._evaluated
    evaluated: list[int] = []

    def counted(function: LossFunction, *arguments: Any, **options: Any) -> None:
        packed.append(function)
        pack(function, *arguments, **options)

    def counted_evaluation(function: LossFunction, batch: Any) -> Tensor:
        evaluated.append(id(batch))
        return evaluate(function, batch)

    monkeypatch.setattr(LossFunction, "__init__", counted)
    monkeypatch.setattr(LossFunction, "_evaluated", counted_evaluation)
    model, batches = _mlp(), _batches(8)
    weights = [p.detach().clone() for p in model.parameters()]
    diagnose(model, _loss, batches, level=level, parameters=["0.weight"], warmup_steps=0)
    assert len(packed) == 1
    assert all(map(torch.equal, weights, model.parameters()))
    if level == "quick":  # once for each batch, and shuffled weights and the check on the first
        assert len(evaluated) == 8 + 1 + 1 + SHUFFLES
    packed.clear()
    diagnose(model, _loss, batches, level="quick", warmup_steps=2)
    assert len(packed) <= 1 + len(LEARNING_RATES)  # a copy for each rate that was tried
