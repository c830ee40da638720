"""How the momenta of neighbouring layers lie to each other while a GPT is trained by Muon.

Mode 1 stacks layers along their inputs. It is said to gain where their top right singular vectors
agree, and mode 2 where the top left ones do (proposition 4.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

import torch
from torch import Tensor

from steepest.geometry import LayerwiseSpectral, StackedSpectral
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting, curve
from steepest.lab.papers.teon.training import attention_matrices, run_of_muon, stopped_steps
from steepest.linalg import polar
from steepest.linalg.polar_factor import PolarMethod

_METHODS: tuple[PolarMethod, ...] = ("jordan", "you", "polar-express")
_SIDES = ("right", "left")


def alignment(
    seed: int, data: str, every: int, width: int, depth: int, context: int, batch: int, steps: int
) -> Numbers:
    """Means over training, kinds and neighbouring layers, taken every so many steps.

    Args:
        seed: of the model and the order of the data.
        data: text.
        every: steps between two measurements; the first one is after so many.
        width, depth, context, batch, steps: of the run.
    """
    setup, optimizer = run_of_muon(
        seed, data, width=width, depth=depth, context=context, batch=batch, steps=steps
    )
    measured: dict[int, dict[str, float]] = {}
    for step in stopped_steps(setup, optimizer):
        if step and step % every == 0:
            momenta = attention_matrices(setup, optimizer)
            measured[step] = {
                **_neighbours("momentum", momenta),
                **_neighbours("gradient", attention_matrices(setup)),
                **{method: _cosine(momenta, method) for method in _METHODS},
            }
    rows = list(measured.values())
    lines = {
        f"{side}, {kind}": [row[f"momentum, {side}, {kind}"] for row in rows]
        for side in _SIDES
        for kind in momenta
    }
    chance = math.sqrt(2 / (math.pi * width))
    lines["two random vectors"] = [chance] * len(rows)
    figure = curve(
        "Alignment of the top singular vectors of neighbouring layers' momenta",
        list(map(float, measured)), lines, across="step", up="absolute cosine",
    )  # fmt: skip
    means = {name: fmean(row[name] for row in rows) for name in rows[0]}
    return {"means": means, "chance": chance, "curves": [figure]}


def _neighbours(memory: str, matrices: dict[str, Tensor]) -> dict[str, float]:
    """Alignments and ratios of dual norms for every kind, and their means over kinds."""
    kinds = {kind: _alignments(M) for kind, M in matrices.items()}
    names = next(iter(kinds.values()))
    means = {f"{memory}, {name}": fmean(row[name] for row in kinds.values()) for name in names}
    return means | {
        f"{memory}, {name}, {kind}": row[name] for kind, row in kinds.items() for name in names
    }


def _alignments(M: Tensor) -> dict[str, float]:
    """Of the top singular vectors of layers (L, m, n) that follow each other, and the dual norms.

    A ratio is ‖[M₁ M₂]‖_* / (‖M₁‖_* + ‖M₂‖_*): 1 if stacking them loses nothing, 1/√2 at worst.
    """
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    pairs = torch.stack([M[:-1], M[1:]], dim=1)
    apart = LayerwiseSpectral().dual_norm(pairs)
    u, v = U[:, :, 0], Vh[:, 0]
    return {
        "right": float((v[:-1] * v[1:]).sum(-1).abs().mean()),
        "left": float((u[:-1] * u[1:]).sum(-1).abs().mean()),
        "mode 1": float((StackedSpectral(1).dual_norm(pairs) / apart).mean()),
        "mode 2": float((StackedSpectral(2).dual_norm(pairs) / apart).mean()),
    }


def _cosine(matrices: dict[str, Tensor], method: PolarMethod) -> float:
    """The least cosine between a polar factor of five steps and the exact one, over stacks of 2."""
    Z = torch.cat([StackedSpectral().matrix(M.unflatten(0, (-1, 2))) for M in matrices.values()])
    steps, exact = polar(Z.float(), method), polar(Z, "svd").float()
    return float(torch.cosine_similarity(steps.flatten(-2), exact.flatten(-2), dim=-1).min())


TEON_ALIGNMENT = Experiment(
    name="teon-alignment",
    title="Alignment of neighbouring layers' momenta in a GPT",
    kind="real data",
    measure=alignment,
    scales={
        "quick": Setting(
            sizes={
                "every": 10, "width": 32, "depth": 4, "context": 32, "batch": 4, "steps": 40,
            },
            seeds=2, data="stdlib", minutes=0.15,
        ),
        "cpu": Setting(
            sizes={
                "every": 30, "width": 128, "depth": 4, "context": 64, "batch": 8, "steps": 300,
            },
            seeds=4, data="wikitext2", minutes=2,
        ),
        "gpu": Setting(
            sizes={
                "every": 100, "width": 512, "depth": 8, "context": 256, "batch": 64, "steps": 2000,
            },
            seeds=3, data="gutenberg", minutes=15, gigabytes=12, on_gpu=True,
        ),
        "paper": Setting(
            sizes={
                "every": 1000, "width": 768, "depth": 12, "context": 1024, "batch": 64,
                "steps": 20000,
            },
            seeds=1, data="fineweb", minutes=600, gigabytes=60, on_gpu=True,
        ),
    },
)  # fmt: skip


def _mean(name: str) -> Callable[[Numbers], float]:
    return lambda numbers: float(numbers["means"][name])


CLAIMS = (
    Claim(
        name="teon-right-vectors",
        sentence="The top right singular vectors of neighbouring layers' queries, keys and values "
        "are strongly aligned in momentum.",
        place="behind Proposition 4.6",
        source="second-hand",
        experiment=TEON_ALIGNMENT,
        quantity="mean absolute cosine along training",
        value=_mean("momentum, right"),
        low=0.5,
        paper="strongly aligned",
        checks=("D2.e",),
    ),
    Claim(
        name="teon-left-vectors",
        sentence="The top left singular vectors of neighbouring layers' queries, keys and values "
        "are nearly orthogonal in momentum.",
        place="behind Proposition 4.6",
        source="second-hand",
        experiment=TEON_ALIGNMENT,
        quantity="mean absolute cosine along training",
        value=_mean("momentum, left"),
        high=0.25,
        paper="nearly orthogonal",
        checks=("D2.e",),
    ),
    Claim(
        name="teon-right-gradients",
        sentence="The same holds for gradients: right vectors are more aligned than left ones.",
        place="behind Proposition 4.6",
        source="ours",
        experiment=TEON_ALIGNMENT,
        quantity="mean absolute cosine of right vectors minus that of left ones",
        value=lambda numbers: (
            numbers["means"]["gradient, right"] - numbers["means"]["gradient, left"]
        ),
        low=0.1,
        checks=("D2.e",),
    ),
    Claim(
        name="teon-dual-norm",
        sentence="Stacked in mode 1, momenta keep more of Muon's dual norm than in mode 2.",
        place="Proposition 4.6",
        source="second-hand",
        experiment=TEON_ALIGNMENT,
        quantity="share that mode 1 keeps minus share that mode 2 keeps",
        value=lambda numbers: (
            numbers["means"]["momentum, mode 1"] - numbers["means"]["momentum, mode 2"]
        ),
        low=0.0,
        paper="mode 1 is the better one",
        checks=("D2.e",),
    ),
    Claim(
        name="teon-polar-steps",
        sentence="Five steps of Jordan, You or Polar Express turn the momentum of a stack as its "
        "SVD does.",
        place="ablation of polar methods",
        source="second-hand",
        experiment=TEON_ALIGNMENT,
        quantity="least mean cosine with the step by SVD",
        value=lambda numbers: min(numbers["means"][method] for method in _METHODS),
        low=0.99,
        checks=("D1.14",),
    ),
)
