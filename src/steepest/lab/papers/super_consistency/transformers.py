"""Transformers: a ViT over depths on CIFAR-10, and a language model over widths on WikiText-2."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from steepest.lab.data import load
from steepest.lab.losses import loss_of
from steepest.lab.models import GPT, GPTConfig
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting
from steepest.lab.papers.super_consistency.best_rates import drift_of, rate_curves
from steepest.lab.papers.super_consistency.convnets import photo_batches
from steepest.lab.papers.super_consistency.digits_networks import LabelledBatch, reseeded, widths_of
from steepest.lab.papers.super_consistency.width_sharpness import (
    sharpness_curves,
    sharpness_numbers,
)
from steepest.transfer import rate_transfer, super_consistency

_BYTES = 256


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 pixels, blocks of torch's encoder with the norm first, the mean, a readout.

    Args:
        depth: number of blocks.
        width: size of the residual stream.
        side: of the images in pixels.
    """

    def __init__(self, depth: int, width: int, side: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn((side // 4) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 2, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, 10)` of images `(B, 3, side, side)`."""
        x = self.patches(images).flatten(2).mT + self.places
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def vit_depths(
    seed: int,
    data: str,
    depths: tuple[int, ...],
    width: int,
    side: int,
    steps: int,
    batch: int,
    examples: int,
    lr: float,
) -> Numbers:
    """Sharpness and the drift of the best rate of Adam over depths under depth-muP."""
    batches = photo_batches(data, side, examples, batch, seed)
    build = reseeded(partial(VisionTransformer, width=width, side=side), seed)
    sizes = [{"depth": depth} for depth in depths]
    followed = super_consistency(
        build, sizes, batches, loss_of, lr=lr, rule="depth-mup", optimizer=torch.optim.AdamW,
        steps=steps, seeds=1,
    )  # fmt: skip
    transfer = rate_transfer(
        build, sizes, batches, loss_of, lr=lr, rule="depth-mup", optimizer=torch.optim.AdamW,
        steps=steps, seeds=1, grid_only=True,
    )  # fmt: skip
    return {
        "sharpness": sharpness_numbers(followed),
        "drift": drift_of(transfer),
        "curves": [
            sharpness_curves("ViT: sharpness in Adam's geometry under depth-muP", followed),
            rate_curves("ViT: best rate of Adam by depth", transfer),
        ],
    }


def small_gpt(width: int, context: int) -> GPT:
    """Two blocks on bytes, with a readout of zeros."""
    model = GPT(GPTConfig(width=width, depth=2, heads=2, context=context), vocabulary=_BYTES)
    nn.init.zeros_(model.get_parameter("head.weight"))
    return model


def gpt_widths(
    seed: int, data: str, widths: tuple[int, ...], context: int, steps: int, batch: int
) -> Numbers:
    """Drifts of the best rates of Adam and Muon over widths under muP."""
    sampler = load(data).training(batch=batch, context=context, seed=seed)

    def batches(i: int) -> LabelledBatch:
        device = torch.get_default_device()
        inputs, targets = sampler.batch(i)
        return inputs.to(device), targets.to(device)

    search = partial(
        rate_transfer, reseeded(partial(small_gpt, context=context), seed), widths_of(widths),
        batches, loss_of, steps=steps, seeds=1, grid_only=True,
    )  # fmt: skip
    transfers = {
        "adam": search(lr=0.005, optimizer="adamw"),
        "muon": search(lr=0.03, optimizer="muon"),
    }
    return {
        **{name: drift_of(transfer) for name, transfer in transfers.items()},
        "curves": [
            rate_curves(f"Language model: best rate by width, {name}", transfer)
            for name, transfer in transfers.items()
        ],
    }


VIT_DEPTHS = Experiment(
    name="vit-depths",
    title="ViT over depths, on CIFAR-10",
    kind="real data",
    measure=vit_depths,
    scales={
        "cpu": Setting(
            sizes={
                "depths": (2, 4, 8), "width": 32, "side": 8, "steps": 80, "batch": 32,
                "examples": 64, "lr": 0.002,
            },
            seeds=3,
            data="cifar10",
            minutes=5,
        ),
        "gpu": Setting(
            sizes={
                "depths": (3, 6, 12), "width": 128, "side": 32, "steps": 2000, "batch": 64,
                "examples": 1024, "lr": 5e-4,
            },
            seeds=3,
            data="cifar10",
            minutes=120,
            gigabytes=20,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={
                "depths": (3, 6, 12, 48), "width": 384, "side": 32, "steps": 15000, "batch": 64,
                "examples": 1024, "lr": 5e-4,
            },
            seeds=3,
            data="cifar10",
            minutes=3000,
            gigabytes=60,
            on_gpu=True,
        ),
    },
)  # fmt: skip
GPT_WIDTHS = Experiment(
    name="gpt-widths",
    title="A small GPT over widths, on WikiText-2",
    kind="real data",
    measure=gpt_widths,
    scales={
        "cpu": Setting(
            sizes={"widths": (16, 32, 64), "context": 32, "steps": 60, "batch": 16},
            seeds=3,
            data="wikitext2",
            minutes=5,
        ),
        "gpu": Setting(
            sizes={"widths": (128, 256, 512, 1024), "context": 128, "steps": 1000, "batch": 64},
            seeds=3,
            data="wikitext2",
            minutes=240,
            gigabytes=20,
            on_gpu=True,
        ),
        "paper": Setting(
            sizes={"widths": (128, 512, 2048, 4096), "context": 128, "steps": 2000, "batch": 512},
            seeds=3,
            data="wikitext2",
            minutes=6000,
            gigabytes=80,
            on_gpu=True,
        ),
    },
)

CLAIMS = (
    Claim(
        name="vit-sharpness-differs",
        sentence="Sharpness of a ViT depends on the depth under depth-muP, whose blocks have "
        "several layers.",
        place="Section 3, ViT; notebook vit",
        source="first-hand",
        experiment=VIT_DEPTHS,
        quantity="largest over smallest sharpness of all depths at the end, in Adam's geometry",
        value=lambda numbers: float(numbers["sharpness"]["spread"]),
        low=1.25,
        paper="from 10 at depth 6 to 2.3 at 96, of the plain Hessian",
        checks=("vit",),
    ),
    Claim(
        name="vit-rate-transfers",
        sentence="The best rate of a ViT with Adam stays within a step of the grid over depths.",
        place="Section 3, ViT; notebook vit",
        source="first-hand",
        experiment=VIT_DEPTHS,
        quantity="drift of the best rate over depths, octaves",
        value=lambda numbers: float(numbers["drift"]),
        low=-1.0,
        high=1.0,
        paper="2.8e-4 to 4.6e-4",
        checks=("vit",),
    ),
    Claim(
        name="gpt-adam-rate-transfers",
        sentence="Under muP the best rate of Adam on a language model is the same at all widths.",
        place="abstract, WikiText",
        source="first-hand",
        experiment=GPT_WIDTHS,
        quantity="drift of the best rate over widths, octaves",
        value=lambda numbers: float(numbers["adam"]),
        low=-1.0,
        high=1.0,
        checks=("G4",),
    ),
    Claim(
        name="gpt-muon-rate-transfers",
        sentence="Under muP the best rate of Muon on a language model moves by at most a half.",
        place="Qiu et al., Section 3 (arXiv 2512.05620)",
        source="first-hand",
        experiment=GPT_WIDTHS,
        quantity="drift of the best rate over widths, octaves",
        value=lambda numbers: float(numbers["muon"]),
        low=-math.log2(1.5),
        high=math.log2(1.5),
        paper="a factor of 1.5 at most",
        checks=("G4",),
    ),
)
