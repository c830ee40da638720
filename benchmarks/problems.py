"""What is stepped on: sets of matrices as they occur in models, and gradients of known spectra."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from steepest import linalg
from steepest.lab.data import Sampler, load
from steepest.lab.models import GPT, GPTConfig

Shape = tuple[int, int]
Set = Literal["gpt2-small", "tiny", "micro", "heads", "lora"]
SETS: tuple[Set, ...] = get_args(Set)


def shapes(name: Set, layers: int = 12) -> list[Shape]:
    """The matrices of a set, of which those of a GPT come in `layers` blocks."""
    if name in ("gpt2-small", "tiny"):
        n = 768 if name == "gpt2-small" else 128
        return ([(n, n)] * 4 + [(4 * n, n), (n, 4 * n)]) * layers
    return {"micro": [(64, 64)] * 96, "heads": [(64, 768)] * 36, "lora": [(16, 768)] * 48}[name]


class Matrices:
    """Weights that all optimizers share, and gradients of which each step gets fresh copies.

    Some optimizers write into the gradients they are given, or take them away. With `fresh`, each
    round has gradients of its own, with variances that fall as 1/i over rows and columns. Those are
    needed where second moments are decomposed. Without it all rounds have the same noise.
    """

    def __init__(self, shapes: list[Shape], device: str, dtype: torch.dtype, fresh: bool = False):
        self.generator = torch.Generator(device).manual_seed(0)
        self.weights = [torch.randn(s, device=device).mul(0.02).to(dtype) for s in shapes]
        self.gradients = [torch.empty_like(W) for W in self.weights]
        self.copies = [torch.empty_like(W) for W in self.weights]
        self.fresh = fresh
        self.draw()

    def draw(self) -> None:
        for G in self.gradients:
            G.normal_(std=1e-3, generator=self.generator)
            if self.fresh:
                for n, view in ((G.shape[0], G.mT), (G.shape[1], G)):
                    view.mul_(torch.arange(1, n + 1, device=G.device).rsqrt())

    def parameters(self) -> list[nn.Parameter]:
        return [nn.Parameter(W) for W in self.weights]

    def give(self, parameters: list[nn.Parameter]) -> None:
        for p, copy, G in zip(parameters, self.copies, self.gradients, strict=True):
            p.grad = copy.copy_(G)

    def take(self, parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            p.grad = None

    def largest_batch(self) -> int:
        """Bytes of the largest set of weights of one shape."""
        sizes: dict[torch.Size, int] = {}
        for W in self.weights:
            sizes[W.shape] = sizes.get(W.shape, 0) + W.nbytes
        return max(sizes.values())


def spectra(n: int = 256) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """For each spectrum, gradients `(n, n)` in float32 with their polar factors in float64."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(noise)
    i = torch.arange(n, dtype=torch.float64)
    values = {
        "gaussian": S,
        "power law": 1 / (i + 1),
        "cond 1e4": 1e4 ** (-i / (n - 1)),
        "rank 8": (i < 8).double(),
    }
    made = {name: [((U * s @ Vh).float(), U * (s > 0) @ Vh)] for name, s in values.items()}
    made["trained"] = [(M, linalg.polar(M.double(), "svd")) for M in momenta(Training(width=n))]
    return made


@dataclass(frozen=True)
class Training:
    """A short run, of which the momenta are kept."""

    width: int = 256
    depth: int = 2
    steps: int = 100
    batch: int = 8
    context: int = 128
    lr: float = 0.02


def momenta(settings: Training) -> list[Tensor]:
    """The momenta `(width, width)` of a GPT trained by torch's Muon; made once, then kept."""
    key = hashlib.sha256(repr((asdict(settings), torch.__version__)).encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"steepest-momenta-{key}.pt"
    if place.exists():
        return torch.load(place, weights_only=True)
    torch.manual_seed(0)
    corpus = load("stdlib")
    config = GPTConfig(width=settings.width, depth=settings.depth, context=settings.context)
    model, sampler = GPT(config, 256), Sampler(corpus.train, settings.batch, config.context, 0)
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    muon = torch.optim.Muon(hidden, settings.lr, weight_decay=0)
    adamw = torch.optim.AdamW(others, 0.15 * settings.lr, betas=(0.9, 0.95), weight_decay=0)
    for step in track(range(settings.steps), "training", console=Console(stderr=True)):
        model.zero_grad()
        model.loss(*sampler.batch(step)).backward()
        muon.step()
        adamw.step()
    square = [muon.state[p]["momentum_buffer"] for p in hidden if p.shape[0] == p.shape[1]]
    torch.save(square, place.with_suffix(".part"))
    place.with_suffix(".part").replace(place)
    return square
