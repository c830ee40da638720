"""Muon in a loop of your own: mixed precision, clipping, a schedule, stop and resume.

A small convolutional network learns ten noisy pictures. Half-way everything is saved, thrown away
and loaded again, as after a crash.

Run it with `python examples/plain_loop.py`; a few seconds on a CPU.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import steepest

STEPS = 60
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build() -> dict:
    """Make everything that a checkpoint has to hold, under the names it is saved with."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    ).to(DEVICE)  # fmt: skip
    optimizer = steepest.Muon(model, lr=0.02, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    scaler = torch.amp.GradScaler(DEVICE)
    return {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}


def batch(step: int, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noisy pictures; the same ones for the same step."""
    pictures = torch.randn(10, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + step)
    labels = torch.randint(10, (size,), generator=generator)
    noise = 2 * torch.randn(size, 1, 12, 12, generator=generator)
    return (pictures[labels] + noise).to(DEVICE), labels.to(DEVICE)


def train(model, optimizer, schedule, scaler, steps: range) -> None:
    """Train for some steps, and say how it goes."""
    for step in steps:
        images, labels = batch(step)
        with torch.autocast(DEVICE, torch.float16):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # before the step: after it does nothing
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if step % 10 == 0 or step == STEPS - 1:
            rates = ", ".join(f"{group['lr']:.4f}" for group in optimizer.param_groups)
            print(f"step {step:3}  loss {loss.item():.3f}  rates {rates}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        parts, checkpoint = build(), Path(folder) / "checkpoint.pt"
        train(**parts, steps=range(STEPS // 2))
        torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)

        parts = build()
        for name, state in torch.load(checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)
        train(**parts, steps=range(STEPS // 2, STEPS))
