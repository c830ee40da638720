"""One warning, by the name of base_lr, where a program undoes the ratio of the groups' rates."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import SWALR

from steepest import SOAP, Muon, SignSGD

STEPS = 30


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 2))


def made(optimizer=Muon, **settings):
    tested = optimizer(network(), lr=0.02, **settings)
    for group in tested.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    return tested


def warned(tested, before: Callable[[int], None], steps: int = STEPS) -> list[int]:
    """The steps that warned."""
    seen = []
    for step in range(steps):
        before(step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tested.step()
        seen += [step for warning in caught if "base_lr" in str(warning.message)]
        assert all(w.filename == __file__ for w in caught)
    return seen


def setting(tested, rate: Callable[[int], float], groups: slice = slice(None)):
    def before(step: int) -> None:
        for group in tested.param_groups[groups]:
            group["lr"] = rate(step)

    return before


def cosine(step: int) -> float:
    return 0.02 * (1 + math.cos(math.pi * step / STEPS)) / 2


def warm_up(step: int) -> float:
    return 0.02 * step / STEPS


# Loops that undo the ratio


@pytest.mark.parametrize(
    ("rate", "first"),
    [
        (cosine, 0),
        (warm_up, 1),  # in step 0 the rate is zero
        (lambda step: 1e-6 * (step + 1), 1),  # too small to know, and then it changes
        (lambda step: 0.003, 0),
        (lambda step: 0.02, 0),
    ],
    ids=["cosine", "warm-up", "tiny", "that of AdamW", "that of the matrices"],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_one_rate_for_all_groups_warns_once(rate, first, tensor):
    tested = made()

    def before(step: int) -> None:
        for group in tested.param_groups:
            group["lr"] = torch.tensor(rate(step)) if tensor else rate(step)

    assert warned(tested, before) == [first]


@pytest.mark.parametrize("rate", [1e-6, 1e-4])
def test_one_small_rate_that_stays_warns_after_a_hundred_steps(rate):
    tested = made()
    assert warned(tested, setting(tested, lambda step: rate), steps=110) == [99]


def test_a_loop_that_begins_later_warns_where_it_begins():
    tested = made()
    one = setting(tested, lambda step: 0.001)
    assert warned(tested, lambda step: one(step) if step >= 12 else None) == [12]


@pytest.mark.parametrize("rate", [cosine, warm_up])
def test_the_first_group_alone_warns_once(rate):
    tested = made()
    assert len(warned(tested, setting(tested, rate, slice(1)))) == 1
    own = made(roles={"head": {"lr": 0.01}})
    assert len(warned(own, setting(own, rate, slice(1)))) == 1


SCALARS = {
    "OneCycleLR": lambda o: OneCycleLR(o, 0.02, total_steps=STEPS, cycle_momentum=False),
    "CyclicLR": lambda o: CyclicLR(o, 0.001, 0.02, step_size_up=5, cycle_momentum=False),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=5),
}


@pytest.mark.parametrize("scheduler", SCALARS.values(), ids=SCALARS)
def test_schedulers_with_one_number_for_all_groups_warn_once(scheduler):
    tested = made()
    schedule = scheduler(tested)
    assert len(warned(tested, lambda step: schedule.step() if step else None, STEPS - 1)) == 1


# No false alarm


def bases(optimizer, factor: float = 1.0) -> list[float]:
    return [factor * group["base_lr"] for group in optimizer.param_groups]


FAITHFUL = {
    "LambdaLR": lambda o: LambdaLR(o, lambda step: min(step / 5, 1.0)),
    "lambdas of the groups": lambda o: LambdaLR(o, [warm_up, lambda step: 1.0]),
    "eta_min": lambda o: CosineAnnealingLR(o, T_max=10, eta_min=1e-3),
    "a large eta_min": lambda o: CosineAnnealingLR(o, T_max=10, eta_min=2.5e-3),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 7, eta_min=1e-4),
    "LinearLR": lambda o: LinearLR(o, 0.1, total_iters=10),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: PolynomialLR(o, total_iters=20),
    "OneCycleLR": lambda o: OneCycleLR(o, bases(o), total_steps=STEPS, cycle_momentum=False),
    "CyclicLR": lambda o: CyclicLR(o, bases(o, 0.1), bases(o), 5, cycle_momentum=False),
    "SWALR": lambda o: SWALR(o, swa_lr=bases(o, 0.5), anneal_epochs=5),
    "SequentialLR": lambda o: SequentialLR(
        o, [ConstantLR(o, 0.1, 5), CosineAnnealingLR(o, 20, eta_min=1e-4)], [5]
    ),
}


@pytest.mark.parametrize("scheduler", FAITHFUL.values(), ids=FAITHFUL)
def test_schedules_that_keep_the_ratio_do_not_warn(scheduler):
    tested = made()
    schedule = scheduler(tested)
    assert warned(tested, lambda step: schedule.step() if step else None, STEPS - 1) == []


def test_a_floor_of_all_rates_does_not_warn():
    tested = made()
    schedule = ReduceLROnPlateau(tested, factor=0.5, patience=0, min_lr=1e-3)
    assert warned(tested, lambda step: schedule.step(1.0) if step else None) == []
    assert {group["lr"] for group in tested.param_groups} == {1e-3}
    resumed = made()
    resumed.load_state_dict(copy.deepcopy(tested.state_dict()))
    assert warned(resumed, lambda step: None) == []


def test_a_warm_up_from_a_small_rate_of_all_groups_does_not_warn():
    tested = made()  # as timm's schedulers do, epoch by epoch

    def before(step: int) -> None:
        for group in tested.param_groups:
            part = min(1.0, step // 3 / 5)
            group["lr"] = 1e-5 + part * (group["base_lr"] - 1e-5)

    assert warned(tested, before) == []


@pytest.mark.parametrize("optimizer", [Muon, SignSGD, SOAP])
def test_equal_base_rates_are_a_choice(optimizer):
    tested = made(optimizer, adamw_lr=0.02)
    assert warned(tested, setting(tested, cosine)) == []


def test_one_group_and_rates_that_are_set_by_hand_do_not_warn():
    tested = Muon([nn.Parameter(torch.ones(3, 3))])
    assert warned(tested, setting(tested, cosine)) == []
    tested = made()
    tested.param_groups[1]["lr"] = 0.01
    assert warned(tested, lambda step: None) == []
    tested.param_groups[0]["lr"] *= 0.1  # once
    assert warned(tested, lambda step: None) == []


def test_a_copy_does_not_warn_again():
    tested = made()
    assert warned(tested, setting(tested, cosine), 3) == [0]
    twin = copy.deepcopy(tested)
    assert warned(twin, setting(twin, cosine)) == []
