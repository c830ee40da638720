"""Every setting refused when made, by name; the step of the theory; memory in full precision."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steepest import (
    SOAP,
    TEON,
    KLShampoo,
    Muon,
    Shampoo,
    SignSGD,
    Signum,
    SpectralDescent,
)
from steepest.optim import Settings

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


# Every setting, of every optimizer

NOT_NUMBERS = ["0.1", None, True, [0.1], (0.1,), Fraction(1, 10), 1j, math.nan, math.inf, -math.inf]
NOT_NUMBERS += [torch.tensor(0.1)]
SIZE = [*NOT_NUMBERS, -1e-9]
FRACTION = [*NOT_NUMBERS, -1e-9, 1.0, 2]
RATE = [*SIZE[:-2], -1e-9, torch.tensor(math.nan), torch.tensor(-1.0), torch.tensor(True)]
RATE += [torch.tensor(1j), torch.ones(2)]
BOOL = ["yes", "True", 1, 0, 1.0, None, torch.tensor(True)]
COUNT = [0, -1, 1.0, 2.5, "3", True, None, [1], math.nan, math.inf]
LIMIT = [value for value in COUNT if value is not None]
BETAS = [(0.9,), (0.9, 0.95, 0.99), (0.9, 1.0), (-0.1, 0.9), 0.9, "ab", ("0.9", "0.95"), None]
BETAS += [(True, 0.9), (math.nan, 0.9), {0.9: 0, 0.95: 0}]
DTYPE = ["auto", "float32", 2, float, torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn]
CHOICE = ["other", "", None, 1, True, ["none"], ("both",)]

WRONG = {
    "lr": RATE,
    "weight_decay": SIZE,
    "eps": SIZE,
    "graft_eps": SIZE,
    "momentum": FRACTION,
    "beta2": FRACTION,
    "graft_beta2": FRACTION,
    "exponent": [*NOT_NUMBERS, 0, -0.5],
    "nesterov": BOOL,
    "heavy_ball": BOOL,
    "maximize": BOOL,
    "compensate": BOOL,
    "relative_eps": BOOL,
    "bias_correction": BOOL,
    "sequential": BOOL,
    "scale": CHOICE,
    "decay": CHOICE,
    "rounding": CHOICE,
    "nonfinite": CHOICE,
    "length": CHOICE,
    "sides": CHOICE,
    "graft": CHOICE,
    "normalize": CHOICE,
    "mode": [0, 3, True, 1.0, "1", None, [1]],
    "method": ["newton", None, 1, ["svd"]],
    "steps": [0, -1, 2.5, "5", True, math.nan, 3],  # "auto" takes none
    "dtype": DTYPE,
    "state_dtype": [*DTYPE, torch.float16, torch.bfloat16],
    "interval": COUNT,
    "stack": COUNT,
    "block": LIMIT,
    "max_side": LIMIT,
    "adamw_lr": [value for value in RATE if value is not None],
    "adamw_betas": BETAS,
    "adamw_eps": SIZE,
    "adamw_weight_decay": SIZE,
    "roles": ["conv", 1, ["conv"], {"conv": 0.1}, {"conv": {"lr": "x"}}, {"conv": {"rate": 1}}],
}
IN_GROUPS = {"betas": BETAS, "eps": SIZE, "base_lr": SIZE, "step_count": [-1, 1.5, "1", True, None]}
IN_GROUPS |= {"fused": [1, "yes"], "lr": RATE, "weight_decay": SIZE}
OPTIMIZERS = [SignSGD, Signum, SpectralDescent, Muon, TEON, Shampoo, KLShampoo, SOAP]


def settings_of(optimizer) -> list[str]:
    own = [name for name in inspect.signature(optimizer).parameters if name != "params"]
    return [name for name in own if name != "settings"] + list(Settings.__annotations__)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_setting_is_refused_when_the_optimizer_is_made(optimizer):
    for key in settings_of(optimizer):
        assert key in WRONG, f"{key} needs a row of the table"
        for value in WRONG[key]:
            with pytest.raises(ValueError, match="role|lr" if key == "roles" else rf"\b{key}\b"):
                optimizer(small(), **{key: value})
            with pytest.raises(ValueError, match=rf"\b{key}\b"):
                optimizer([nn.Parameter(torch.ones(2, 2))], **{key: value})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_setting_of_a_group_is_refused_when_it_is_added(optimizer):
    tested = optimizer([nn.Parameter(torch.ones(2, 2))])
    for key, values in (WRONG | IN_GROUPS).items():
        if key not in tested.defaults | IN_GROUPS:
            continue
        for value in values:
            for geometry in ({}, {"geometry": "adamw"}):
                if key == "steps" and value == 3 and geometry:
                    continue  # AdamW has no method that they could not go with
                if key in ("eps", "betas", "fused") and key not in tested.defaults | geometry:
                    continue
                group = {"params": [nn.Parameter(torch.ones(2, 2))], **geometry, key: value}
                with pytest.raises(ValueError, match=rf"\b{key}\b"):
                    tested.add_param_group(group)
                assert len(tested.param_groups) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_numbers_of_other_libraries_and_whole_numbers_are_taken(optimizer):
    settings = {"lr": 1, "weight_decay": np.float32(0.5), "adamw_betas": [0, np.float64(0.9)]}
    settings |= {"adamw_lr": torch.tensor([0.1]), "adamw_eps": 0, "state_dtype": torch.float32}
    if "interval" in inspect.signature(optimizer).parameters:
        settings |= {"interval": np.int64(2), "block": None}
    model = small()
    tested = optimizer(model, **settings)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    tested.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "svd", "steps": 3}, "steps=3.*takes no steps"),
        ({"method": "you", "steps": 6}, "steps=6"),
        ({"method": "eigh", "dtype": torch.bfloat16}, r"dtype=torch\.bfloat16"),
        ({"steps": 3}, 'steps=3, but "auto"'),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    for optimizer in (SpectralDescent, Muon, TEON):
        with pytest.raises(ValueError, match=message):
            optimizer(small(), **settings)
        with pytest.raises(ValueError, match=message):
            optimizer(small(), roles={"conv": settings})


def test_stacks_are_refused_when_they_are_made():
    def group(stacks, **settings):
        return {"params": [nn.Parameter(torch.ones(2, 2))] * 1, "stacks": stacks, **settings}

    for stacks in ("0", 0, [0], [[0.0]], [[True]], [[0, 1]], [[0], [0]]):
        with pytest.raises(ValueError, match="stack"):
            TEON([group(stacks)])
    with pytest.raises(ValueError, match=r"stacks for .* 'sign'"):
        TEON([group([[0]], geometry="sign")])
    adamw = TEON([group([[0]]), group([[0]], geometry="adamw")])
    assert "stacks" not in adamw.param_groups[1]


@pytest.mark.parametrize("views", ["ab", 3, [3], [(1, 2)], ["abc"], [(1, 2, 2, 0, ())], {0: None}])
def test_views_are_refused_when_they_are_made(views):
    with pytest.raises(ValueError, match=r"(?i)view"):
        Muon([{"params": [nn.Parameter(torch.ones(2, 2))], "views": views}])
