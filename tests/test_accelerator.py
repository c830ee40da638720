"""What only an accelerator can show; skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from steepest import SOAP, TEON, KLShampoo, Muon, Shampoo, SignSGD, Signum, SpectralDescent
from steepest.diagnosis import LayerConditions
from steepest.lab.train import TrainConfig, train
from steepest.linalg import polar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 24), nn.Linear(24, 5)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["svd", "polar-express"])
def test_polar_on_the_device_equals_polar_on_the_cpu(dtype, method):
    G = torch.randn(3, 20, 12, dtype=torch.float64).to(dtype)
    error = polar(G.cuda(), method).cpu().double() - polar(G, method).double()
    assert float(error.abs().max()) < 1e-4 + 4 * torch.finfo(dtype).eps


EXACT = {"method": "svd", "dtype": None}
OPTIMIZERS = [
    (SignSGD, {}),
    (Signum, {}),
    (SpectralDescent, EXACT),
    (Muon, EXACT),
    (TEON, EXACT),
    (Shampoo, {"interval": 2, "block": 16}),
    (Shampoo, {"interval": 1, "length": "muon", "exponent": 1 / 4, "sides": "left"}),
    (KLShampoo, {"interval": 2, "block": 16}),
    (KLShampoo, {"interval": 1, "sequential": True}),
    (SOAP, {"interval": 2}),
    (SOAP, {"interval": 3, "max_side": 24}),
]
every_optimizer = pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
unstacked = pytest.mark.filterwarnings("ignore:TEON found nothing to stack")


@unstacked
@every_optimizer
def test_an_optimizer_takes_the_same_steps_on_the_device(optimizer, options):
    settings = {"weight_decay": 0.1, "lr": 0.01, **options}
    ours, theirs = _model().double(), _model().double().cuda()
    steppers = [optimizer(model, **settings) for model in (ours, theirs)]
    for _ in range(4):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        for stepper in steppers:
            stepper.step()
    # The sign of an eigenvector, and those of a null space, are the library's to choose.
    tolerance = 1e-2 if optimizer is SOAP else 1e-5 if optimizer in (Shampoo, KLShampoo) else 1e-8
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=tolerance, atol=tolerance)


@unstacked
@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_on_the_device_continues_bit_for_bit(optimizer, options, dtype, tmp_path):
    def train(model, stepper, steps):
        for step in steps:
            generator = torch.Generator("cuda").manual_seed(step)
            for p in model.parameters():
                p.grad = torch.empty_like(p).normal_(generator=generator)
            stepper.step()

    settings = {"lr": 0.01, "rounding": "stochastic", **options}
    model, other = (_model().to("cuda", dtype) for _ in range(2))
    stepper, resumed = optimizer(model, **settings), optimizer(other, **settings)
    train(model, stepper, range(5))
    torch.save([model.state_dict(), stepper.state_dict()], tmp_path / "state.pt")
    for where in ("cuda", "cpu"):
        weights, state = torch.load(tmp_path / "state.pt", weights_only=True, map_location=where)
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
    train(model, stepper, range(5, 12))
    train(other, resumed, range(5, 12))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@unstacked
@every_optimizer
def test_a_step_on_the_device_refuses_what_is_not_finite(optimizer, options):
    model = _model().cuda()
    stepper = optimizer(model, lr=0.01, **options)
    for bad in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if bad:
            model[3].weight.grad[5, 7] = torch.inf
            with pytest.raises(FloatingPointError, match="nothing was updated"):
                stepper.step()
        else:
            stepper.step()
        same = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert all(same) if bad else not any(same)


def test_conditions_on_the_device_equal_those_on_the_cpu():
    rows = []
    batch = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    for device in ("cpu", "cuda"):
        model = _model().double().to(device)
        with LayerConditions(model) as conditions:
            model(batch.to(device)).square().sum().backward()
            rows.append(conditions.measure())
    for a, b in zip(*rows, strict=True):
        assert a.ratio == pytest.approx(b.ratio, rel=1e-6)


def test_a_stopped_run_on_the_device_ends_bit_for_bit_the_same(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("sphinx of black quartz, judge my vow. " * 300)
    config = TrainConfig(
        data=str(text), width=32, depth=1, context=16, model_options=("heads=2",), steps=12,
        batch=2,
        checkpoint_every=3, device="cuda",
    )  # fmt: skip

    class Stop(Exception):
        pass

    def stop(step: int, values: dict) -> None:
        if step == 7:
            raise Stop

    whole = train(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(config, tmp_path / "parts", on_step=stop)
    assert train(config, tmp_path / "parts")["validation_loss"] == whole["validation_loss"]
    assert whole["peak_memory_bytes"] > 0
