"""Errors of the polar factor on spectra as they occur, and on hostile matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from steepest.linalg import polar, polar_plan
from steepest.linalg.newton_schulz import JORDAN, by_polynomials, polynomials
from steepest.linalg.planner import METHODS, PolarMethod

POLYNOMIALS: list[PolarMethod] = ["jordan", "you", "polar-express", "cans", "tuned", "nonic"]
SQUARES = [(64, 64), (128, 128), (256, 256), (768, 768)]
OTHERS = [(1024, 256), (256, 1024), (96, 64), (64, 768), (16, 768), (1, 256), (256, 1), (24, 24)]


def _torchs(G: Tensor) -> Tensor:
    """Five steps of Newton-Schulz in bfloat16, as in torch.optim.Muon."""
    return _zeropower_via_newtonschulz(G.clone(), JORDAN, 5, 1e-7)


def _error(Q: Tensor, reference: Tensor) -> float:
    return float((Q.double() - reference).norm() / reference.norm())


def _with_spectrum(m: int, n: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 matrix with these singular values, and its polar factor in float64."""
    U = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64)).Q
    return ((U * values) @ V.T).float(), U @ V.T


def _spectrum(name: str, m: int, n: int) -> tuple[Tensor, Tensor]:
    k = min(m, n)
    if name == "gauss":
        G = torch.randn(m, n)
        U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
        return G, U @ Vh
    values = {
        "power law": 1 / torch.arange(1, k + 1, dtype=torch.float64),
        "condition 1e4": torch.logspace(0, -4, k, dtype=torch.float64),
        "rank 8": torch.linspace(1, 0.5, min(k, 8), dtype=torch.float64),
        "isometry of rank 8": torch.ones(min(k, 8), dtype=torch.float64),
    }[name]
    return _with_spectrum(m, n, values)


# --------------------------------------------------------------------------- the promise of "auto"


@pytest.mark.parametrize(
    "name", ["gauss", "power law", "condition 1e4", "rank 8", "isometry of rank 8"]
)
@pytest.mark.parametrize("shape", [*SQUARES, *OTHERS])
def test_auto_is_at_least_as_exact_as_torchs_muon(shape: tuple[int, int], name: str) -> None:
    torch.manual_seed(0)
    G, reference = _spectrum(name, *shape)
    Q = polar(G, "auto")
    error = _error(Q, reference)
    assert error <= _error(_torchs(G), reference)
    assert float(torch.linalg.matrix_norm(Q, 2)) < 1.25
    if name in ("gauss", "power law"):
        assert error <= polar_plan(shape).error


@pytest.mark.parametrize("shape", SQUARES[:3])
def test_and_so_it_is_without_bfloat16(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steepest.linalg.planner.has_bfloat16", lambda: False)
    for name in ("gauss", "power law", "condition 1e4", "rank 8"):
        G, reference = _spectrum(name, *shape)
        assert _error(polar(G, "auto"), reference) <= _error(_torchs(G), reference)


def test_auto_on_momenta_of_a_training_run() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 128),
        torch.nn.Linear(128, 384, bias=False),
        torch.nn.ReLU(),
        torch.nn.Linear(384, 128, bias=False),
        torch.nn.Linear(128, 128, bias=False),
        torch.nn.Linear(128, 50),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.95)
    tokens = torch.randint(0, 50, (50,))  # a permutation of words to learn, with noise
    for _ in range(60):
        x = torch.randint(0, 50, (256,))
        y = torch.where(torch.rand(256) < 0.8, tokens[x], torch.randint(0, 50, (256,)))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for layer in (1, 3, 4):
        M = optimizer.state[model[layer].weight]["momentum_buffer"]
        U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
        reference = (U * (1e-6 * S[0] < S)) @ Vh
        assert _error(polar(M, "auto"), reference) <= _error(_torchs(M), reference)


@pytest.mark.parametrize("tolerance", [1.0, 0.3, 0.12, 0.1, 0.04, 0.01, 1e-3, 1e-4, 1e-9])
@pytest.mark.parametrize("shape", [(60, 60), (120, 40), (40, 200), (1100, 1100)])
def test_a_tolerance_is_kept(shape: tuple[int, int], tolerance: float) -> None:
    k = min(shape)
    if k > 1000 and tolerance not in (0.04, 1e-3):
        pytest.skip("one of each kind is enough at this size")
    spectra = [torch.logspace(0, -3, k), torch.linspace(1, 0.5, k), torch.ones(k)]
    spectra[0][: k // 2] = 1.0
    for values in spectra[: 1 if k > 1000 else 3]:
        values = values.double() / values.norm(4)
        values = values.clamp(min=1e-3 * float(values.norm(4)))
        U = torch.linalg.qr(torch.randn(shape[0], k, dtype=torch.float64)).Q
        V = torch.linalg.qr(torch.randn(shape[1], k, dtype=torch.float64)).Q
        Q = polar((U * values) @ V.T, "auto", tolerance=tolerance)
        assert _error(Q, U @ V.T) <= tolerance


def test_polynomials_for_a_tolerance_on_an_accelerator() -> None:
    for tolerance in (0.5, 0.1, 1e-2, 1e-3):
        plan = polar_plan((64, 96), device="cuda", tolerance=tolerance)
        G, reference = _with_spectrum(64, 96, torch.logspace(0, -3, 64, dtype=torch.float64))
        Q = polar(G, plan.method, plan.steps, dtype=plan.dtype)
        assert _error(Q, reference) <= tolerance


# ---------------------------------------------------------------------------------------- low rank


@pytest.mark.parametrize("method", ["polar-express", "cans", "tuned", "nonic", "you"])
@pytest.mark.parametrize("size", [128, 256])
def test_noise_of_bfloat16_is_damped(method: PolarMethod, size: int) -> None:
    """What rounding to bfloat16 puts into the null space: torch 0.46, Polar Express as is 1.1."""
    G, reference = _spectrum("isometry of rank 8", size, size)
    assert _error(polar(G, method, dtype=torch.bfloat16), reference) < 0.42


@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (16, 300)])
def test_null_space_stays_null_in_float32(shape: tuple[int, int]) -> None:
    G, reference = _spectrum("rank 8", *shape)
    U, _, Vh = torch.linalg.svd(G.double())
    for method, leaks, error in (
        ("svd", 1e-6, 1e-5),
        ("eigh", 1e-3, 1e-2),
        ("qdwh", 2e-2, 0.03),
        ("zolotarev", 1e-3, 0.12),
        ("tuned", 1e-3, 0.26),
        ("nonic", 1e-3, 0.18),
        ("polar-express", 1e-3, 0.14),
    ):
        Q = polar(G, method)  # type: ignore[arg-type]
        leak = U[:, 8:].T @ Q.double() @ Vh[8:].T
        assert float(torch.linalg.matrix_norm(leak, 2)) < leaks
        assert _error(Q, reference) < error


# ----------------------------------------------------------------- where every peer fails somewhere

HOSTILE = {
    "condition 1e8": lambda: _with_spectrum(48, 40, torch.logspace(0, -8, 40, dtype=torch.float64))[
        0
    ],
    "rank one": lambda: torch.randn(48, 1) @ torch.randn(1, 40),
    "one row": lambda: torch.randn(1, 300),
    "one column": lambda: torch.randn(300, 1),
    "one entry": lambda: torch.full((1, 1), -3.0),
    "times 1e-12": lambda: torch.randn(40, 64) * 1e-12,
    "all 1e-38": lambda: torch.full((40, 64), 1e-38),
    "all 1e38": lambda: torch.full((64, 40), 1e38),
    "1e25": lambda: torch.randn(40, 40) * 1e25,
    "denormal": lambda: torch.randn(40, 64) * 1e-42,
    "constant": lambda: torch.full((64, 64), 0.3),
    "signs": lambda: torch.randint(0, 2, (64, 32)) * 2.0 - 1,
    "identity": lambda: torch.eye(64),
    "isometry": lambda: torch.linalg.qr(torch.randn(96, 64)).Q,
    "isometry of rank 8": lambda: _spectrum("isometry of rank 8", 16, 768)[0],
    "one large entry": lambda: torch.randn(40, 40).index_put_(
        (torch.tensor(3), torch.tensor(5)), torch.tensor(1e6)
    ),
    "zero": lambda: torch.zeros(40, 64),
    "wide Gauss": lambda: torch.randn(16, 768),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTILE)
def test_finite_and_bounded_whatever_comes(
    name: str, method: PolarMethod, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and method not in (*POLYNOMIALS, "auto"):
        pytest.skip("a factorization is not available in half precision")
    torch.manual_seed(1)
    G = HOSTILE[name]()
    Q = polar(G, method, dtype=dtype)
    assert bool(Q.isfinite().all())
    norm = float(torch.linalg.matrix_norm(Q.double(), 2))
    assert norm < 1.3
    if name == "zero":
        assert norm == 0
    else:  # the largest singular value, whose direction is what matters, is neither lost nor turned
        assert norm > 0.5
        U, _, Vh = torch.linalg.svd(G.double() / G.double().abs().max(), full_matrices=False)
        assert float(U[:, 0] @ Q.double() @ Vh[0]) > 0.5
        assert float(U[:, 0] @ Q.double() @ Vh[0]) < 1.3


@pytest.mark.parametrize("method", POLYNOMIALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_of_constant_matrix_keeps_its_sign(
    method: PolarMethod, dtype: torch.dtype
) -> None:
    """Rounding goes the same way in all entries here, so a norm can come out too small."""
    for n in range(1, 70, 3):
        Q = polar(torch.full((n, n), 1.0 + n / 70), method, dtype=dtype).double()
        assert 0.5 < float(Q.sum() / n) < 1.3


@pytest.mark.parametrize("method", METHODS)
def test_matrices_of_a_batch_do_not_meet(method: PolarMethod) -> None:
    """Zero, broken, tiny, huge and singular neighbours change nothing."""
    G = torch.randn(6, 40, 48)
    alone = polar(G, method)
    mixed = G.clone()
    mixed[0] = 0
    mixed[1, 3, 4] = torch.nan
    mixed[3] *= 1e30
    mixed[3, :, 1:] = 0
    mixed[4] *= 1e-36
    Q = polar(mixed, method, nonfinite="nan")
    assert not Q[0].any()
    assert Q[1].isnan().all()
    assert Q[[0, 3, 4]].isfinite().all()
    for i in (2, 5):
        assert torch.allclose(Q[i], alone[i], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(7, 64, 64), (7, 64, 256), (7, 256, 64)])
def test_matrices_of_a_batch_are_what_they_are_alone(
    method: PolarMethod, shape: tuple[int, ...]
) -> None:
    G = torch.randn(shape)
    Q = polar(G, method)
    assert Q.shape == G.shape
    for i in range(7):
        assert torch.allclose(Q[i], polar(G[i], method), atol=2e-2 if method == "auto" else 2e-4)


# ---------------------------------------------------------------------------------------- the form


@pytest.mark.parametrize("method", POLYNOMIALS)
@pytest.mark.parametrize("shape", [(20, 20), (3, 12, 50), (1, 9)])
def test_gram_form_is_the_plain_form(method: PolarMethod, shape: tuple[int, ...]) -> None:
    X = torch.randn(shape, dtype=torch.float64)
    X /= X.abs().amax((-2, -1), keepdim=True) / 1.5
    for steps in (1, 2, 5, 7) if method == "polar-express" else (1, 2, len(polynomials(method))):
        schedule = polynomials(method, steps)
        plain, gram = (
            by_polynomials(X.clone(), method, schedule, torch.float64, form)
            for form in (False, True)
        )
        assert torch.allclose(plain, gram, rtol=0, atol=1e-11)


def test_gram_form_in_float32_holds_its_steps() -> None:
    """Rounding of the Gram matrix grows by the square of the slopes: too much beyond five steps."""
    G, _ = _spectrum("condition 1e4", 64, 512)
    for steps in (5, 8, 12, 20):
        Q = polar(G, "polar-express", steps)
        exact = polar(G.double(), "polar-express", steps)
        assert _error(Q, exact) < 0.05
        assert float(torch.linalg.matrix_norm(Q, 2)) < 1.15
