"""Muon in Lightning: `configure_optimizers` returns it, with a schedule for every step.

An autoencoder learns points near a curved surface in many dimensions.

Run it with `python examples/lightning_module.py`; a few seconds on a CPU.
"""

import lightning
import torch
from torch import nn

import steepest

DIMENSIONS, EPOCHS = 32, 5


class Autoencoder(lightning.LightningModule):
    """Squeezes points through four numbers and back."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(DIMENSIONS, 64), nn.Tanh(), nn.Linear(64, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, DIMENSIONS))

    def training_step(self, points: torch.Tensor, index: int) -> torch.Tensor:
        """Return the squared error of a batch."""
        loss = nn.functional.mse_loss(self.decoder(self.encoder(points)), points)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        """One optimizer for everything: matrices get Muon, all else AdamW inside."""
        optimizer = steepest.Muon(self, lr=0.02)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_epoch_end(self):
        """Print the mean loss of the epoch."""
        print(f"epoch {self.current_epoch}  loss {self.trainer.callback_metrics['loss']:.4f}")


def main() -> lightning.Trainer:
    """Train the autoencoder."""
    lightning.seed_everything(0)
    angles = 6 * torch.rand(1024, 3)
    points = torch.sin(angles @ torch.randn(3, DIMENSIONS)) + 0.05 * torch.randn(1024, DIMENSIONS)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Autoencoder(), torch.utils.data.DataLoader(points, batch_size=64, shuffle=True))
    return trainer


if __name__ == "__main__":
    main()
