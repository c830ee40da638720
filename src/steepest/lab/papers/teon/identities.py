"""What TEON's step is for stacks of a known form, and how its norms compare with Muon's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steepest.geometry import Geometry, LayerwiseSpectral, Spectral, StackedSpectral
from steepest.lab.papers.claim import Claim, Experiment, Numbers, Setting
from steepest.linalg import polynomials

_EXACT = Spectral("svd")
_MODE_1, _MODE_2 = StackedSpectral(1, _EXACT), StackedSpectral(2, _EXACT)
_LAYERWISE = LayerwiseSpectral(_EXACT)
_ROUNDING = 1e-10  # of float64, with a margin
_POLYNOMIAL_ERRORS = {"jordan": 0.318, "you": 0.032, "polar-express": 0.130}
"""Of singular values from 0.01 to 1 after five steps, as computed from the published numbers."""


def known_stacks(seed: int, sizes: tuple[int, ...], layers: tuple[int, ...]) -> Numbers:
    """The largest error of every identity, over square layers of some sizes and stacks of some K.

    TEON's direction for a stack (K, m, n) is compared with Muon's, which is one for each layer.
    """
    rows = [_known_stacks(n, K) for n in sizes for K in layers]
    return {name: max(row[name] for row in rows) for name in rows[0]}


def _known_stacks(n: int, K: int) -> dict[str, float]:
    G, tall = _normal(K, n, n), _normal(K, 2 * K * n, n)
    equal = _normal(n, n).expand(K, n, n)
    left, turns = torch.linalg.qr(_normal(n, n)).Q, torch.linalg.qr(_normal(K, n, n)).Q
    shared_left = left * torch.rand(n, dtype=torch.float64) @ turns  # equal U and S, other V
    aligned = left.T[:K, :, None] * _normal(n)  # rank one: orthogonal u, equal v
    order = torch.randperm(K)
    step, muon = _MODE_1.direction, _LAYERWISE.direction
    return {
        "one layer": _gap(step(G[:1]), muon(G[:1])),
        "equal layers": _gap(step(equal), muon(equal) / math.sqrt(K)),
        "shared left vectors": _gap(step(shared_left), muon(shared_left) / math.sqrt(K)),
        "aligned right vectors": _gap(step(aligned), muon(aligned)),
        "aligned, in mode 2": abs(_length(_MODE_2, aligned) - 1 / math.sqrt(K)),
        "inputs turned": _gap(step(G @ turns), step(G) @ turns),
        "layers reordered": _gap(step(G[order]), step(G)[order]),
        "transposed": _gap(_MODE_2.direction(tall), step(tall.mT).mT),
        "square length": abs(_length(_MODE_1, G) - 1 / math.sqrt(K)),
        "tall length": abs(_length(_MODE_1, tall) - 1),
        "length": _length(_MODE_1, G),
        "bounds": max(_outside(X) for X in (G, tall, tall.mT, equal, shared_left, aligned)),
        "duality": max(_duality(X) for X in (G, tall, tall.mT)),
    }


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _gap(X: Tensor, Y: Tensor) -> float:
    return float((X - Y).abs().max())


def _length(geometry: Geometry, G: Tensor) -> float:
    """The Frobenius norm of the step of a stack, over that of Muon's."""
    return float(geometry.direction(G).norm() / _LAYERWISE.direction(G).norm())


def _duality(G: Tensor) -> float:
    """How far the inner product with the direction is from the dual norm, relative to it."""
    return abs(float((_MODE_1.direction(G) * G).sum() / _MODE_1.dual_norm(G)) - 1)


def _outside(X: Tensor) -> float:
    """How far norm and dual norm are out of their bounds; 0 or less if inside."""
    root = math.sqrt(len(X))
    norm = float(_MODE_1.norm(X) / _LAYERWISE.norm(X))
    dual = float(_MODE_1.dual_norm(X) / _LAYERWISE.dual_norm(X))
    return max(1 - norm, norm - root, 1 / root - dual, dual - 1)


def polar_polynomials(seed: int, points: int) -> Numbers:
    """The largest error of singular values from 0.01 to 1 behind five steps of every method."""
    sigma = torch.logspace(-2, 0, points, dtype=torch.float64)
    errors = {}
    for method in _POLYNOMIAL_ERRORS:
        x = sigma / 1.01 if method == "polar-express" else sigma  # its margin at the start
        for a, b, c in polynomials(method):
            x = a * x + b * x**3 + c * x**5
        errors[method] = float((x - 1).abs().max())
    off = max(abs(errors[method] - error) for method, error in _POLYNOMIAL_ERRORS.items())
    return {"errors": errors, "off": off}


TEON_IDENTITIES = Experiment(
    name="teon-identities",
    title="TEON's direction and norms for stacks of a known form",
    kind="identity",
    measure=known_stacks,
    scales={
        "quick": Setting(sizes={"sizes": (8, 16), "layers": (2, 4)}, seeds=4, minutes=0.03),
        "cpu": Setting(sizes={"sizes": (8, 16, 64), "layers": (2, 3, 4)}, seeds=5, minutes=0.1),
        "gpu": Setting(
            sizes={"sizes": (64, 128), "layers": (2, 4, 12)}, seeds=5, minutes=1, on_gpu=True
        ),
        "paper": Setting(
            sizes={"sizes": (64, 128), "layers": (2, 4, 12)}, seeds=5, minutes=1, on_gpu=True
        ),
    },
)
TEON_POLYNOMIALS = Experiment(
    name="teon-polynomials",
    title="Errors of singular values behind five polynomials",
    kind="identity",
    measure=polar_polynomials,
    scales={
        scale: Setting(sizes={"points": 20001}, seeds=2, minutes=0.02)
        for scale in ("quick", "cpu", "gpu", "paper")
    },
)


def _identity(
    name: str, sentence: str, place: str, parts: tuple[str, ...], check: str, paper: str = ""
) -> Claim:
    return Claim(
        name=name,
        sentence=sentence,
        place=place,
        source="second-hand" if place.startswith(("Algorithm", "Section", "Prop")) else "ours",
        experiment=TEON_IDENTITIES,
        quantity="largest error in float64",
        value=lambda numbers: max(numbers[part] for part in parts),
        high=_ROUNDING,
        judged="every seed",
        paper=paper,
        checks=(check,),
    )


CLAIMS = (
    _identity(
        "teon-of-one-layer",
        "A stack of one layer takes Muon's step.",
        "Algorithm 1",
        ("one layer",),
        "D1.11",
    ),
    _identity(
        "teon-aligned-right",
        "For layers of rank one with equal right and orthogonal left vectors, mode 1 is Muon's "
        "step; mode 2 is shorter by sqrt(K).",
        "Proposition 4.6",
        ("aligned right vectors", "aligned, in mode 2"),
        "D1.11",
        "mode 1 gains most here",
    ),
    _identity(
        "teon-shared-left",
        "For layers with equal left singular vectors and values, mode 1 is Muon's step over "
        "sqrt(K).",
        "derived here",
        ("equal layers", "shared left vectors"),
        "D1.11",
    ),
    _identity(
        "teon-step-length",
        "A stack of square layers takes a step 1 / sqrt(K) as long as Muon's; one of tall layers "
        "an equally long one.",
        "derived here from Algorithm 1",
        ("square length", "tall length"),
        "D1.11",
    ),
    _identity(
        "teon-commutes",
        "TEON's step turns with the inputs of every layer, and is reordered with the layers.",
        "derived here",
        ("inputs turned", "layers reordered"),
        "D1.11",
    ),
    _identity(
        "teon-norm-bounds",
        "TEON's norm is from 1 to sqrt(K) times Muon's, its dual norm from 1 / sqrt(K) to 1 times.",
        "Section 4",
        ("bounds", "duality"),
        "D1.12",
        "1 to sqrt(K)",
    ),
    _identity(
        "teon-modes",
        "Mode 2 is mode 1 of the transposed layers, transposed.",
        "Section 3",
        ("transposed",),
        "D1.13",
    ),
    Claim(
        name="teon-polar-errors",
        sentence="Five steps leave singular values from 0.01 to 1 an error of 0.318 (Jordan), "
        "0.032 (You) and 0.130 (Polar Express).",
        place="ablation of polar methods",
        source="second-hand",
        experiment=TEON_POLYNOMIALS,
        quantity="largest distance from these three errors",
        value=lambda numbers: float(numbers["off"]),
        high=0.001,
        judged="every seed",
        paper="0.318, 0.032, 0.130",
        checks=("D1.14",),
    ),
    Claim(
        name="teon-equal-length",
        sentence="False on purpose: at equal rates, a stack of square layers moves as far as under "
        "Muon.",
        place="control",
        source="ours",
        experiment=TEON_IDENTITIES,
        quantity="length of TEON's step over that of Muon's",
        value=lambda numbers: float(numbers["length"]),
        low=0.95,
        control=True,
    ),
)
