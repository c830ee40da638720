"""Finite gradients of any kind, for every optimizer: no NaN, and steps of every scale.

After each step weights and memory are finite, or an error has come before weights moved.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from steepest import SOAP, TEON, KLShampoo, Muon, Shampoo, SignSGD, Signum, SpectralDescent
from steepest.geometry import Euclidean
from steepest.linalg.matrix_norms import frobenius_norm

EVERY = {
    "sign-sgd": (SignSGD, {}),
    "signum": (Signum, {}),
    "signum, heavy ball": (Signum, {"heavy_ball": True}),
    "spectral": (SpectralDescent, {}),
    "muon": (Muon, {}),
    "muon, heavy ball": (Muon, {"heavy_ball": True}),
    "teon": (TEON, {"stack": 1}),
    "shampoo": (Shampoo, {}),
    "shampoo, interval 1": (Shampoo, {"interval": 1}),
    "shampoo, left": (Shampoo, {"sides": "left", "interval": 3}),
    "shampoo, as muon": (Shampoo, {"length": "muon", "interval": 3}),
    "shampoo, 1/4, blocks": (Shampoo, {"exponent": 1 / 4, "interval": 3, "block": 5}),
    "shampoo, 1/4, not grafted": (Shampoo, {"length": "own", "exponent": 1 / 4, "interval": 3}),
    "kl-shampoo": (KLShampoo, {}),
    "kl-shampoo, interval 1": (KLShampoo, {"interval": 1}),
    "kl-shampoo, sequential": (KLShampoo, {"sequential": True, "interval": 3}),
    "kl-shampoo, as muon": (KLShampoo, {"length": "muon", "interval": 3}),
    "kl-shampoo, not grafted": (KLShampoo, {"length": "own", "interval": 3}),
    "soap": (SOAP, {}),
    "soap, interval 1": (SOAP, {"interval": 1}),
    "soap, norm 1": (SOAP, {"length": "spectral", "interval": 3}),
    "spectral, dual": (SpectralDescent, {"length": "dual"}),
    "muon, svd": (Muon, {"method": "svd"}),
    "muon, eigh": (Muon, {"method": "eigh"}),
    "muon, qdwh": (Muon, {"method": "qdwh"}),
    "muon, zolotarev": (Muon, {"method": "zolotarev"}),
    "euclidean": (Muon, {}),
    "adamw": (Muon, {}),
    "adamw, no eps": (Muon, {"adamw_eps": 0.0}),
    "shampoo, no eps": (Shampoo, {"eps": 0.0, "graft_eps": 0.0, "interval": 3}),
    "shampoo, not grafted": (Shampoo, {"length": "own", "interval": 3}),
    "shampoo, exponent 1": (Shampoo, {"exponent": 1.0, "interval": 3}),
    "kl-shampoo, no eps": (KLShampoo, {"eps": 0.0, "graft_eps": 0.0, "interval": 3}),
    "soap, no eps": (SOAP, {"eps": 0.0, "interval": 3}),
}
SHAPES = [(6, 5), (8, 16), (16, 8), (3, 40), (20, 21)]
KINDS = (
    *("rows", "columns", "rows and columns", "entries", "small rows", "small columns"),
    *("one huge entry", "one tiny entry", "one entry", "one row again and again", "rank one"),
    *("denormal", "1e-33", "1e-30", "1e-20", "1e-16", "1e10", "1e15", "1e18", "1e38"),
    *("zero", "dead rows", "gaussian"),
)


def gradient(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A hostile gradient in float64."""
    m, n = shape
    options = {"generator": generator, "dtype": torch.float64}
    G = torch.randn(m, n, **options)

    def spread(*shape: int, high: float = 16.0, low: float = -16.0) -> Tensor:
        return 10.0 ** (low + (high - low) * torch.rand(*shape, **options))

    if kind == "rows":
        return G * spread(m, 1)
    if kind == "columns":
        return G * spread(1, n)
    if kind == "rows and columns":
        return G * spread(m, 1).sqrt() * spread(1, n).sqrt()
    if kind == "entries":
        return G * spread(m, n)
    if kind == "small rows":
        return G * spread(m, 1, high=0.0, low=-44.0)
    if kind == "small columns":
        return G * spread(1, n, high=0.0, low=-44.0)
    if kind.startswith("one ") and kind.endswith("entry"):
        if kind == "one entry":
            G.zero_()
        G[m // 2, n // 3] = 1e15 if "huge" in kind else 1e-44
        return G
    if kind == "one row again and again":
        return G[:1].expand(m, n).clone()
    if kind == "rank one":
        return G[:, :1] @ G[:1]
    if kind == "dead rows":
        return G * (torch.rand(m, 1, **options) < 0.3)
    sizes = {"denormal": 1e-44, "zero": 0.0, "gaussian": 1.0}
    return G.clamp(-1, 1) * (sizes[kind] if kind in sizes else float(kind))


def made(name, W, **more):
    optimizer, settings = EVERY[name]
    group = {"params": [W]}
    if name.startswith("adamw"):
        group["geometry"] = "adamw"
    if name == "euclidean":
        group["geometry"] = "euclidean"
    return optimizer([group], **{"lr": 0.5, **settings, **more})


def finite(optimizer, W):
    return all(bool(t.isfinite().all()) for t in (W, *optimizer.state[W].values()))


PRECISIONS = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("dtype", "state_dtype"), PRECISIONS, ids=str)
def test_no_finite_gradient_makes_a_nan(name, dtype, state_dtype):
    number = [*EVERY].index(name)
    for seed in range(2):
        generator = torch.Generator().manual_seed(100 * number + seed)
        shape = SHAPES[(number + seed) % len(SHAPES)]
        W = nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = made(name, W, state_dtype=state_dtype)
        chosen = [KINDS[i] for i in torch.randint(len(KINDS), (3,), generator=generator)]
        # Each for a while, or in turns.
        kinds = chosen * 3 if seed else [kind for kind in chosen for _ in range(3)]
        for t, kind in enumerate(kinds):
            G = gradient(kind, shape, generator).to(dtype)
            assert G.isfinite().all()
            W.grad, before = G, W.detach().clone()
            try:
                optimizer.step()
            except FloatingPointError as error:
                assert torch.equal(W.detach(), before)
                if "nothing was updated" not in str(error):
                    break  # memory has moved, so that this run is over
            assert finite(optimizer, W), (chosen, f"at step {t} of {kind}")


@pytest.mark.parametrize("name", ["muon", "shampoo", "kl-shampoo", "soap", "euclidean", "teon"])
def test_the_rows_of_a_gradient_can_have_any_size(name):
    """Siblings of the seed with which eigh returned NaN."""
    for seed in (264, *range(12)):
        generator = torch.Generator().manual_seed(seed)
        G = torch.randn(8, 16, generator=generator)
        G = G * 10.0 ** ((torch.rand(8, 1, generator=generator) * 2 - 1) * 15)
        W = nn.Parameter(torch.zeros(8, 16))
        optimizer = made(name, W, lr=1.0, scale="none")
        for _ in range(3):
            W.grad = G.clone()
            optimizer.step()
        assert finite(optimizer, W)
        assert W.detach().abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_layers_has_no_nan_either(kind):
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.zeros(6, 10)) for _ in range(2)]
    optimizer = TEON([{"params": params, "stacks": [[0], [0]]}], lr=0.5)
    for _ in range(2):
        for p, size in zip(params, (1.0, 1e-7), strict=True):
            p.grad = (size * gradient(kind, (6, 10), generator)).float()
        optimizer.step()
        assert all(finite(optimizer, p) for p in params)


# Lengths of steps


def length(name, size, steps=20, **settings):
    """RMS entry of the last of some updates at a rate of 1, and what is printed."""
    generator = torch.Generator().manual_seed(0)
    W = nn.Parameter(torch.zeros(12, 8))
    optimizer = made(name, W, lr=1.0, **settings)
    for _ in range(steps):
        G = size * torch.randn(12, 8, generator=generator, dtype=torch.float64)
        W.grad = G.float()
        before = W.detach().clone()
        optimizer.step()
    moved = float((W.detach() - before).double().square().mean().sqrt())
    return moved, str(optimizer).splitlines()[-2].split("│")[-2].strip()


WITH_EPS = ["shampoo", "kl-shampoo", "soap", "adamw", "shampoo, left", "kl-shampoo, interval 1"]


@pytest.mark.parametrize("name", WITH_EPS)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-33, 1e-25])
def test_steps_of_adams_length_shrink_with_the_gradients_below_eps(name, size):
    expected, _ = length(name, 1e-15)
    assert length(name, size)[0] == pytest.approx(expected * size / 1e-15, rel=0.1)


@pytest.mark.parametrize("name", WITH_EPS)
@pytest.mark.parametrize("size", [1e-12, 1e-10, 1e-8, 1e-3])
def test_print_says_how_far_steps_go_below_eps(name, size):
    moved, said = length(name, size, steps=40)
    assert float(said) / 2.5 < moved < float(said) * 2.5


@pytest.mark.parametrize(
    "name",
    ["muon", "euclidean", "shampoo, as muon", "shampoo, 1/4, not grafted", "kl-shampoo, as muon",
     "kl-shampoo, not grafted", "soap, norm 1"],
)  # fmt: skip
@pytest.mark.parametrize("size", [1e-38, 1e-33, 1e-25, 1e-18, 1e10])
def test_steps_without_units_are_as_long_at_every_scale(name, size):
    assert length(name, 1.0)[0] / 4 < length(name, size)[0] < length(name, 1.0)[0] * 4


@pytest.mark.parametrize(
    ("make", "settings", "factor"),
    [
        (Shampoo, {"length": "own"}, 8),  # Muon's direction of the right length
        (Shampoo, {"length": "own", "sides": "left"}, 3),
        (Shampoo, {"length": "own", "exponent": 1 / 4}, 3),
        (Shampoo, {"length": "own", "relative_eps": False}, 1.001),
        (Shampoo, {"length": "own", "relative_eps": False, "eps": 1e-30}, 1.001),
        (Shampoo, {"relative_eps": False}, 1.001),
        (KLShampoo, {"relative_eps": False}, 1.001),
    ],
)
@pytest.mark.parametrize("size", [1e-37, 1e-33, 1e-24, 1e-20])
def test_steps_on_tiny_gradients_are_as_long_as_in_float64(make, settings, factor, size):
    lengths = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        W = nn.Parameter(torch.zeros(8, 6, dtype=dtype))
        optimizer = make([W], lr=0.01, **settings)
        for _ in range(12):
            W.grad = (torch.randn(8, 6, dtype=torch.float64) * size).to(dtype)
            optimizer.step()
        lengths.append(W.detach().double().norm().item())
    assert lengths[1] / factor < lengths[0] < lengths[1] * factor


@pytest.mark.parametrize("name", ["adamw, no eps", "shampoo, no eps", "soap, no eps"])
def test_without_eps_steps_are_bounded_where_squares_underflow(name):
    lengths = [length(name, 10.0**-power)[0] for power in (0, 10, 19, 25, 33, 44)]
    assert all(0 < later <= 1.2 * first for first, later in itertools.pairwise(lengths))


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-22, 1.0, 1e15, 1e30])
def test_norms_of_any_size(size):
    X = size * torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])
    norm = frobenius_norm(X)
    assert torch.equal(frobenius_norm(X, keepdim=True).flatten(), norm)
    assert torch.equal(Euclidean().norm(X), norm)
    assert float(norm[0]) == pytest.approx(
        5 * float(X.max()) / 4, rel=0.2 if size < 1e-40 else 1e-6
    )
    assert float(norm[1]) == 0.0
