"""What an optimizer does with gradients that it was not made for.

Each is stepped from zero weights, at a rate of 1, on gradients that are tiny, huge, zero, of rank
one, or a single row. The table shows the Frobenius norm of the step beside that of an exact polar
factor. Then one entry of a gradient is NaN, and the table says what became of the weights. A step
on a clean gradient follows, with the weights back at zero. It is finite if the memory survived.
Second-order optimizers take 11 steps, of which the last is shown; how
long theirs should be is a matter of taste, but not whether it depends on the scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from measure import quiet, save, table
from peers import INTERVAL, Peer, first_order, present, second_order


@dataclass(frozen=True)
class Settings:
    """What to probe."""

    only: tuple[str, ...] = ()
    """Parts of names of optimizers; all by default."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


def gradients() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 64, generator=generator)
    row, signs = noise[:1], noise[:, :1].sign()
    broken = noise.clone()
    broken[3, 5] = torch.nan
    return {
        "usual": noise,
        "x 1e-12": 1e-12 * noise,
        "x 1e25": 1e25 * noise,
        "zero": torch.zeros_like(noise),
        "rank one": signs @ row,
        "1 x n": row,
        "one NaN": broken,
    }


def exact(G: Tensor) -> str:
    """The Frobenius norm of a polar factor, the root of the rank."""
    if not G.isfinite().all():
        return "-"
    return f"{float(torch.linalg.matrix_rank(G)) ** 0.5:.3g}"


def probe(peer: Peer, G: Tensor, steps: int, device: str) -> str:
    """The norm of the last of some steps on a gradient, or what happened instead."""
    weight = nn.Parameter(torch.zeros_like(G, device=device))
    optimizer = peer.make([weight], 1.0)
    before, said = torch.zeros_like(weight), ""
    try:
        for _ in range(steps):
            before = weight.detach().clone()
            weight.grad = G.clone().to(device)
            optimizer.step()
    except Exception as error:
        said = f"{type(error).__name__}"
    step = before - weight.detach()
    if not said:
        share = float((~step.isfinite()).float().mean())
        said = f"{100 * share:.0f} % NaN" if share else f"{float(step.norm()):.3g}"
    if G.isfinite().all():
        return said
    weight.data.zero_()
    weight.grad = torch.nan_to_num(G).to(device)
    optimizer.step()
    return f"{said}, then {'fine' if bool(weight.isfinite().all()) else 'NaN'}"


def main(settings: Settings) -> None:
    quiet()
    muons = [peer for peer in first_order() if peer.orthogonal]
    wanted = [
        peer
        for peer in muons + second_order()
        if not settings.only or any(part in peer.name for part in settings.only)
    ]
    peers, missing = present(wanted, settings.device)
    probes = gradients()
    rows = {
        peer.name: {
            name: probe(peer, G, 1 if peer.orthogonal else INTERVAL + 1, settings.device)
            for name, G in probes.items()
        }
        for peer in peers
    }
    shown = {"an exact polar factor": {name: exact(G) for name, G in probes.items()}, **rows}
    table(
        "the norm of a step on gradients of another kind",
        ["optimizer", *probes],
        [[name, *row.values()] for name, row in shown.items()],
    )
    place = settings.out / f"failures_{settings.device.partition(':')[0]}.json"
    save(place, settings, wanted, missing, rows=rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
