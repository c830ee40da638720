"""What only an accelerator can show; skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from steepest import Muon, SignSGD, Signum, SpectralDescent
from steepest.diagnosis import LayerConditions
from steepest.lab.models import GPTConfig
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


@pytest.mark.parametrize("optimizer", [Muon, SpectralDescent, Signum, SignSGD])
def test_an_optimizer_takes_the_same_steps_on_the_device(optimizer):
    settings = {"weight_decay": 0.1, "lr": 0.01}
    if optimizer in (Muon, SpectralDescent):
        settings |= {"method": "svd", "dtype": None}
    ours, theirs = _model().double(), _model().double().cuda()
    steppers = [optimizer(model, **settings) for model in (ours, theirs)]
    for _ in range(4):
        batch = torch.randn(6, 2, 8, 8, dtype=torch.float64)
        for model, stepper in zip((ours, theirs), steppers, strict=True):
            stepper.zero_grad()
            model(batch.to(next(model.parameters()).device)).square().sum().backward()
            stepper.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-8)


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
        data=str(text), model=GPTConfig(width=32, depth=1, heads=2, context=16), steps=12, batch=2,
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
