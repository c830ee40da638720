from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steepest.geometry import Euclidean, Geometry, Sign, Spectral

EXACT: list[Geometry] = [Euclidean(), Sign(), Spectral("svd")]
ALL: list[Geometry] = [*EXACT, Spectral(), Spectral("you"), Spectral("jordan", 3)]
SHAPES = [(6, 6), (3, 8), (8, 3), (1, 5), (5, 1)]


def _batch(*shape: int) -> Tensor:
    return torch.randn(4, *shape, dtype=torch.float64)


@pytest.mark.parametrize("geometry", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_inner_product_with_the_direction_is_the_dual_norm(
    geometry: Geometry, shape: tuple[int, int]
) -> None:
    G = _batch(*shape)
    D = geometry.direction(G)
    assert torch.allclose((G * D).sum((-2, -1)), geometry.dual_norm(G), rtol=1e-12)
    assert torch.allclose(geometry.norm(D), torch.ones(4).double(), rtol=1e-12)


@pytest.mark.parametrize("geometry", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_direction_is_steeper(geometry: Geometry, shape: tuple[int, int]) -> None:
    G = _batch(*shape)
    D = geometry.direction(G)
    best = geometry.dual_norm(G)
    for spread in (1e-3, 0.1, 1.0, 100.0):  # from next to the best one to anywhere
        other = D + spread * torch.randn(200, 4, *shape, dtype=torch.float64)
        other = other / geometry.norm(other)[..., None, None]
        assert bool(((G * other).sum((-2, -1)) <= best * (1 + 1e-12)).all())


@pytest.mark.parametrize("geometry", EXACT)
def test_norm_and_dual_norm_are_norms(geometry: Geometry) -> None:
    A, B = _batch(5, 7), _batch(5, 7)
    for norm in (geometry.norm, geometry.dual_norm):
        assert bool((norm(A + B) <= norm(A) + norm(B)).all())
        assert torch.allclose(norm(-3 * A), 3 * norm(A))
        assert torch.equal(norm(torch.zeros(2, 3, 4)), torch.zeros(2))


def test_norms_by_hand() -> None:
    W = torch.diag(torch.tensor([3.0, -4.0]))
    norms = [(float(g.norm(W)), float(g.dual_norm(W))) for g in EXACT]
    assert norms == [(5.0, 5.0), (4.0, 7.0), (4.0, 7.0)]
    W = torch.ones(2, 3)
    assert [float(g.dual_norm(W)) for g in EXACT] == pytest.approx([6**0.5, 6.0, 6**0.5])


@pytest.mark.parametrize("geometry", ALL)
@pytest.mark.parametrize("scale", [1e-38, 1e-12, 1.0, 1e12, 1e38])
def test_direction_does_not_depend_on_the_scale(geometry: Geometry, scale: float) -> None:
    G = torch.randn(5, 4)
    G /= G.abs().max()
    assert torch.allclose(geometry.direction(G * scale), geometry.direction(G), atol=2e-5)


@pytest.mark.parametrize("geometry", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_direction_keeps_dtype_and_input_and_zero(geometry: Geometry, dtype: torch.dtype) -> None:
    G = torch.randn(3, 5, 4).to(dtype)
    G[1] = 0
    before = G.clone()
    D = geometry.direction(G)
    assert D.dtype == dtype
    assert D.shape == G.shape
    assert not D[1].any()
    assert torch.equal(G, before)
    assert torch.allclose(geometry.direction(G.mT).float(), D.mT.float(), atol=0.02)


@pytest.mark.parametrize("geometry", [Euclidean(), *(g for g in ALL if isinstance(g, Spectral))])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_matrix_spoils_only_itself(geometry: Geometry, bad: float) -> None:
    G = torch.randn(3, 5, 4)
    clean = geometry.direction(G)
    G[1, 2, 3] = bad
    D = geometry.direction(G)
    assert torch.equal(D[[0, 2]], clean[[0, 2]])
    assert D[1].isnan().all()


def test_spectral_direction_is_as_long_as_its_method_says() -> None:
    G = torch.randn(20, 24, 24, dtype=torch.float64)
    for geometry, low, high in (
        (Spectral("svd"), 1.0, 1.0),
        (Spectral(), 1.0, 1.13),
        (Spectral(steps=12), 1.0, 1.0 + 1e-9),
        (Spectral("jordan"), 1.0, 1.21),  # below 0.01 the polynomial overshoots more
    ):
        norm = geometry.norm(geometry.direction(G))
        assert low - 1e-9 <= float(norm.min()) <= float(norm.max()) <= high + 1e-9


def test_spectral_passes_its_options_on() -> None:
    G = torch.randn(6, 9)
    half = Spectral("jordan", 3, torch.bfloat16).direction(G)
    assert not torch.equal(half, Spectral("jordan", 3).direction(G))
    assert not torch.equal(half, Spectral("jordan", 4, torch.bfloat16).direction(G))
    with pytest.raises(ValueError, match="expected at least 1"):
        Spectral(steps=0).direction(G)


def test_geometries_compare_by_their_options() -> None:
    assert Spectral() == Spectral("polar-express")
    assert Spectral() != Spectral("svd")
    assert len({Euclidean(), Euclidean(), Sign(), Spectral()}) == 3
