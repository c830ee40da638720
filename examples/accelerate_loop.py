"""Muon under accelerate: prepared with the model, with accumulation, clipping and a schedule.

A network learns what another one, with random weights, says.

Run it with `python examples/accelerate_loop.py`, or on several devices with
`accelerate launch examples/accelerate_loop.py`; a few seconds on a CPU.
"""

import accelerate
import torch
from torch import nn

import steepest

EPOCHS = 6


def network(hidden: int) -> nn.Sequential:
    """Three layers from 16 numbers to 4."""
    return nn.Sequential(
        nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4)
    )


def main() -> accelerate.Accelerator:
    """Train the larger network on the answers of the smaller one."""
    accelerate.utils.set_seed(0)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
    teacher, model = network(8), network(48)
    inputs = torch.randn(1024, 16)
    with torch.no_grad():
        answers = 4 * teacher(inputs)
    loader = torch.utils.data.DataLoader(list(zip(inputs, answers, strict=True)), 32, shuffle=True)
    optimizer = steepest.Muon(model, lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, EPOCHS * len(loader) // 2)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for epoch in range(EPOCHS):
        total = 0.0
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:  # clip what the step will see, before it
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            total += accelerator.reduce(loss.detach(), "mean").item()
        accelerator.print(f"epoch {epoch}  loss {total / len(loader):.4f}")
    return accelerator


if __name__ == "__main__":
    main()
