"""What libraries do to the rates of groups, and the lines of the documents that keep them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from steepest import Muon


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4))


@pytest.mark.parametrize(("swa", "alarms"), [(0.01, 1), ([0.01, 0.0015], 0)])
def test_weight_averaging_of_lightning_takes_a_rate_for_each_group(swa, alarms) -> None:
    L = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.last: list[float] = []

        def training_step(self, batch, index):
            self.last = [group["lr"] for group in self.optimizers().param_groups]
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return Muon(self, lr=0.02)

    module = Module()
    trainer = L.Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StochasticWeightAveraging(swa, swa_epoch_start=2, annealing_epochs=2)],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=8))
    assert sum("base_lr" in str(warning.message) for warning in caught) == alarms
    assert module.last == pytest.approx([0.01, 0.01] if alarms else [0.01, 0.0015])


def test_groups_of_the_zero_redundancy_optimizer_have_base_rates(tmp_path: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model, plain = network(), network()
        groups = Muon(model, lr=0.02).param_groups
        groups = [{k: g[k] for k in g if k not in ("views", "param_names")} for g in groups]
        zero = ZeroRedundancyOptimizer(groups, optimizer_class=Muon, lr=0.02)
        alone = Muon(plain, lr=0.02)
        for step in range(4):
            for optimizer, net in ((zero, model), (alone, plain)):
                for group in optimizer.param_groups:
                    group["lr"] = (1 - step / 4) * group["base_lr"]
                optimizer.zero_grad()
                net(torch.ones(2, 8)).square().mean().backward()
                optimizer.step()
        assert [group["base_lr"] for group in zero.param_groups] == pytest.approx([0.02, 0.003])
        assert [g["lr"] for g in zero.optim.param_groups] == pytest.approx([0.005, 0.00075])
        assert all(map(torch.equal, model.parameters(), plain.parameters()))
    finally:
        dist.destroy_process_group()
