"""Weights that look fresh, and the copy that is trained before it is judged."""

from __future__ import annotations

import random
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steepest
from steepest.curvature.loss_function import LossFunction
from steepest.diagnosis import Diagnosis, Plan, diagnose
from steepest.diagnosis.warmup import (
    LEARNED,
    checked_steps,
    divided,
    learned,
    looks_fresh,
    warmed_up,
)
from steepest.lab.models import GPT, GPTConfig

Batch = tuple[Tensor, Tensor]


def _loss(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def _classes(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(60, 8, generator=generator) for _ in range(count)]
    return [(x, x[:, :4].argmax(1)) for x in inputs]


def _text(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(11, (16, 9), generator=generator).cummax(1)[0] for _ in range(count)]
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


def _images(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(40, 1, 6, 6, generator=generator) for _ in range(count)]
    return [(x, (x[:, 0, :3].mean((1, 2)) > x[:, 0, 3:].mean((1, 2))).long()) for x in inputs]


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )


def _gpt() -> nn.Module:
    return GPT(GPTConfig(width=16, depth=2, heads=2, context=8), 11)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2),
    )  # fmt: skip


def _orthogonal() -> nn.Module:
    model = _mlp()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    return model


def _zeros() -> nn.Module:
    model = _mlp()
    nn.init.zeros_(model[4].weight)
    return model


NETWORKS = [
    (_mlp, _classes), (_orthogonal, _classes), (_zeros, _classes), (_gpt, _text), (_cnn, _images),
]  # fmt: skip


@pytest.mark.parametrize(("build", "batches"), NETWORKS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_untrained_weights_look_fresh_and_trained_ones_do_not(
    build: Any, batches: Any, optimizer: str
) -> None:
    """Steps of Muon have no direction that stands out of the weights, and are seen as well."""
    torch.manual_seed(0)
    model, examples = build(), batches(8)
    assert looks_fresh(LossFunction(model, _loss), examples)
    made: Any = steepest.Muon(model)
    if optimizer == "adamw":
        made = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(100):
        made.zero_grad()
        _loss(model, batches(1 + step % 8)[-1]).backward()
        made.step()
    assert not looks_fresh(LossFunction(model, _loss), examples)


def test_a_fresh_adapter_of_a_trained_model_looks_fresh() -> None:
    """Only what is trained is shuffled: a factor of zeros does nothing in any order."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down = nn.Parameter(torch.randn(2, 8))
            self.up = nn.Parameter(torch.zeros(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.down.mT @ self.up.mT

    torch.manual_seed(0)
    base = nn.Linear(8, 4)
    with torch.no_grad():
        base.weight.copy_(10 * torch.eye(4, 8))
    assert learned(LossFunction(base, _loss), _classes(2)) > LEARNED
    assert learned(LossFunction(Adapted(base), _loss), _classes(2)) == 0


def test_a_loss_that_is_not_positive_is_compared_as_it_is() -> None:
    torch.manual_seed(0)
    model = _mlp()

    def loss(model: Any, batch: Batch) -> Tensor:
        return _loss(model, batch) - 5

    assert looks_fresh(LossFunction(model, loss), _classes(2))
    copy, _ = warmed_up(LossFunction(model, loss), _classes(8), _classes(2), 60)
    assert not looks_fresh(copy, _classes(2))


def test_a_fresh_model_is_judged_after_a_warm_up() -> None:
    torch.manual_seed(0)
    model = _mlp()
    result = diagnose(model, _loss, _classes(20), level="quick")
    warm_up = result.warm_up
    assert warm_up is not None
    assert (warm_up.optimizer, warm_up.lr, warm_up.steps, warm_up.batches) == ("Muon", 0.02, 60, 12)
    assert warm_up.loss_after < 0.7 * warm_up.loss_before
    assert (result.batches, result.fresh) == (8, False)
    # By hand: sixty steps of Muon, then a diagnosis of those weights by the first 8 batches.
    made = steepest.Muon(model)
    for step in range(60):
        made.zero_grad()
        _loss(model, _classes(20)[8 + step % 12]).backward()
        made.step()
    by_hand = diagnose(model, _loss, _classes(8), level="quick")
    assert by_hand.warm_up is None
    assert list(by_hand) == list(result)


def test_trained_weights_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    copy, _ = warmed_up(LossFunction(_mlp(), _loss), _classes(8), _classes(2), 60)
    result = diagnose(copy.model, _loss, _classes(20), level="quick")
    assert (result.warm_up, result.batches, result.notes) == (None, 20, ())


def test_what_was_done_is_told_everywhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = diagnose(_mlp(), _loss, _classes(16), level="quick")
    result.plan().save(tmp_path / "plan.toml")
    stored = " ".join(tomllib.loads((tmp_path / "plan.toml").read_text())["notes"])
    for text in (stored, " ".join(str(result).split()), " ".join(str(result.plan()).split())):
        assert (
            "60 steps of Muon at a rate of 0.02 on 8 batches that judge nothing (7.5 times" in text
        )
        assert "quick diagnosis takes no steps, so its plan is Muon" in text
    assert result.as_dict()["warm_up"]["steps"] == 60
    result.save(tmp_path / "d.json")
    again = Diagnosis.load(tmp_path / "d.json")
    assert (again.warm_up, again.notes, again.fresh) == (result.warm_up, result.notes, False)
    assert str(again) == str(result)


class _Noisy(nn.Module):
    """Draws from every generator in training, with batch norm, dropout, and a part in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.frozen = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.inside, self.drop, self.last = nn.Linear(16, 16), nn.Dropout(0.2), nn.Linear(16, 4)
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + 0.01 * (random.random() + np.random.rand())  # noqa: NPY002
        y = self.norm(self.first(x * scale)).relu()
        return self.last(self.drop(self.inside(self.frozen(y)).relu()))


def test_the_caller_keeps_weights_gradients_modes_and_generators() -> None:
    torch.manual_seed(0)
    model = _Noisy()
    model.first.weight.grad = torch.ones(16, 8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    batches = _classes(16)
    before = [tuple(part.clone() for part in batch) for batch in batches]

    with torch.no_grad():
        copy, _ = warmed_up(LossFunction(model, _loss), batches[8:], batches[:8], 20)
        fresh = looks_fresh(LossFunction(model, _loss), batches)
    assert fresh
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.first.weight.grad, torch.ones(16, 8))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "first.weight")
    assert [module.training for module in model.modules()] == modes
    assert [module.training for module in copy.model.modules()] == modes
    assert all(p.grad is None for p in copy.model.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.random.get_state()[1].tolist() == generators[2][1].tolist()  # noqa: NPY002
    for batch, kept in zip(batches, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, kept, strict=True))
    again, _ = warmed_up(LossFunction(model, _loss), batches[8:], batches[:8], 20)
    for ours, theirs in zip(copy.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the same random numbers each time


@pytest.mark.parametrize("level", ["quick", "standard"])
def test_batches_that_judge_are_not_trained_on(level: Any) -> None:
    """No gradient in training mode is of a batch that judges; one forward pass finds the roles."""
    torch.manual_seed(0)
    batches = _classes(16)
    passed: Counter[int] = Counter()
    trained: set[int] = set()

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if all(module.training for module in self.modules()) and y.requires_grad:
                place = x.data_ptr()
                passed[place] += 1
                y.register_hook(lambda gradient: trained.add(place))
            return y

    model = Watched(*_mlp(), nn.Dropout(0.0))  # whose mode tells training from judging
    result = diagnose(model, _loss, batches, level=level)
    judges, others = ([x.data_ptr() for x, _ in part] for part in (batches[:8], batches[8:]))
    assert (result.warm_up is not None, result.batches) == (True, 8)
    assert trained == set(others)
    assert sum(passed[place] for place in others) == 60
    assert [place for place in judges if passed[place]] == judges[:1]  # roles, without a gradient
    assert len({*judges, *others}) == 16


@pytest.mark.parametrize(
    ("batches", "others", "fewest", "judging", "warming"),
    [(16, 0, 4, 8, 8), (40, 0, 4, 8, 32), (8, 0, 4, 4, 4), (7, 0, 4, 4, 3), (5, 0, 3, 3, 2),
     (8, 60, 4, 8, 60), (20, 3, 4, 20, 3), (8, 1, 4, 5, 4), (16, 0, 8, 8, 8)],
)  # fmt: skip
def test_how_batches_are_divided(
    batches: int, others: int, fewest: int, judging: int, warming: int
) -> None:
    judges, trained = divided(range(batches), range(100, 100 + others), fewest)
    assert (len(judges), len(trained)) == (judging, warming)
    assert not set(judges) & set(trained)


def test_too_few_batches_keep_muon_and_say_so() -> None:
    torch.manual_seed(0)
    model = _mlp()
    result = diagnose(model, _loss, _classes(6))
    assert (result.warm_up, result.fresh, result.batches) == (None, True, 6)
    text = " ".join(str(result).split())
    assert (
        "The weights look fresh and were not warmed up: got 6 batches, expected at least 7" in text
    )
    assert [row.geometry for row in result.plan()] == [r.geometry for r in Plan.default(model)]
    with pytest.raises(ValueError, match=r"6 batches.* 7 to warm up"):
        diagnose(model, _loss, _classes(6), warmup_steps=10)


@pytest.mark.parametrize("level", ["quick", "standard"])
def test_fresh_weights_taken_as_they_are_keep_muon(level: Any) -> None:
    torch.manual_seed(0)
    model = _mlp()
    result = diagnose(
        model, _loss, _classes(16 if level == "quick" else 5), level=level, warmup_steps=0
    )
    assert (result.warm_up, result.fresh) == (None, True)
    assert [row.geometry for row in result.plan()] == [r.geometry for r in Plan.default(model)]
    assert (
        "weights that look fresh say little of training, so the plan is Muon" in result.plan().notes
    )


def test_so_many_steps_are_taken_of_any_weights() -> None:
    torch.manual_seed(0)
    copy, _ = warmed_up(LossFunction(_mlp(), _loss), _classes(8), _classes(2), 60)
    result = diagnose(copy.model, _loss, _classes(8), level="quick", warmup_steps=5)
    assert result.warm_up is not None
    assert (result.warm_up.steps, result.batches, result.warm_up.batches) == (5, 4, 4)
    for wrong in (-1, 2.5, True, "always", None):
        with pytest.raises(ValueError, match=r'warmup_steps=.*"auto"'):
            checked_steps(wrong)


def test_the_rate_falls_where_the_first_one_is_too_large() -> None:
    """Beyond a length of the weights the loss is infinite."""
    torch.manual_seed(0)
    model = _mlp()
    start = float(model[2].weight.detach().norm())

    def loss(model: Any, batch: Batch) -> Tensor:
        inside = (model[2].weight.norm() - start).abs() < 0.3
        return torch.where(inside, _loss(model, batch), torch.inf)

    _, warm_up = warmed_up(LossFunction(model, loss), _classes(8), _classes(2), 60)
    assert warm_up.lr in (0.005, 0.00125)
    flat = LossFunction(model, lambda m, b: -_loss(m, b).detach() + 0 * _loss(m, b))
    with pytest.raises(ValueError, match=r"5 steps .*0\.02, 0\.005"):
        warmed_up(flat, _classes(8), _classes(1), 5)


def test_what_cannot_be_warmed_up_is_judged_as_it_is_and_keeps_muon() -> None:
    torch.manual_seed(0)
    model = _mlp()

    def closure(_: Any, batch: Batch) -> Tensor:
        return _loss(model, batch)  # not the model that it gets

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _mlp()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            self.last = y  # no leaf, which cannot be copied
            return y

    held = Held()
    _loss(held, _classes(1)[0])
    for examples, loss, reason in (
        (model, closure, "does not use the model"),
        (held, _loss, "Held that cannot be copied"),
    ):
        result = diagnose(examples, loss, _classes(8), level="quick")
        assert result.fresh
        assert reason in result.notes[0]
        with pytest.raises(ValueError, match=reason):
            diagnose(examples, loss, _classes(8), level="quick", warmup_steps=3)
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_is_trained_in_float32() -> None:
    torch.manual_seed(0)
    model = _mlp().bfloat16()
    batches = [(x.bfloat16(), y) for x, y in _classes(8)]
    result = diagnose(model, _loss, batches, level="quick")
    assert result.warm_up is not None
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
