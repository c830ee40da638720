"""Functions of linalg inside of autocast, as outside of it."""

from __future__ import annotations

import pytest
import torch

from steepest import linalg
from steepest.geometry import Euclidean, LayerwiseSpectral, Spectral, StackedSpectral
from steepest.linalg.autocast import without_autocast
from steepest.linalg.matrix_roots import eigendecomposition, follow_eigenvectors, inverse_root
from steepest.linalg.solvers import eigh, qr, svd

G = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(3))
A = G @ G.mT
FUNCTIONS = {
    "polar": lambda: linalg.polar(G),
    "polar, auto": lambda: linalg.polar(G, "auto"),
    "spectral_norm": lambda: linalg.spectral_norm(G),
    "spectral_norm, power": lambda: linalg.spectral_norm(G, "power"),
    "spectral_norm, krylov": lambda: linalg.spectral_norm(G, "krylov"),
    "nuclear_norm": lambda: linalg.nuclear_norm(G),
    "nuclear_norm, polar": lambda: linalg.nuclear_norm(G, "polar"),
    "leading_singular_values": lambda: linalg.leading_singular_values(G, 3),
    "gram_singular_values": lambda: linalg.gram_singular_values(G),
    "nuclear_rank": lambda: linalg.nuclear_rank(G, "polar"),
    "stable_rank": lambda: linalg.stable_rank(G, "krylov"),
    "inverse_root": lambda: inverse_root(A, 1 / 4),
    "eigendecomposition": lambda: torch.cat(eigendecomposition(A)[:1]),
    "follow_eigenvectors": lambda: follow_eigenvectors(A, eigh(A)[1]),
    "svd": lambda: svd(G)[0],
    "qr": lambda: qr(G)[0],
    "the direction of a geometry": lambda: Spectral().direction(G),
    "the direction of a stack": lambda: StackedSpectral().direction(G),
    "the norm of layers": lambda: LayerwiseSpectral().norm(G),
    "the Euclidean direction": lambda: Euclidean().direction(G),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit(name, dtype):
    expected = FUNCTIONS[name]()
    with torch.autocast("cpu", dtype):
        actual = FUNCTIONS[name]()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(actual, expected)


def test_autocast_is_as_before_afterwards_also_after_an_error():
    @without_autocast
    def enabled():
        return torch.is_autocast_enabled("cpu")

    with torch.autocast("cpu", torch.bfloat16):
        assert not enabled()
        with pytest.raises(ValueError, match="expected at least 2"):
            linalg.spectral_norm(G, "power", iterations=1)
        assert torch.is_autocast_enabled("cpu")
        assert (G @ G.mT).dtype == torch.bfloat16
    assert not enabled()
