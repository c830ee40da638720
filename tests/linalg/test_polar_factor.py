from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from steepest.linalg import polar, polynomials
from steepest.linalg.newton_schulz import JORDAN, SAFETY, SCHATTEN
from steepest.linalg.polar_factor import PolarMethod

POLYNOMIALS: list[PolarMethod] = ["jordan", "you", "polar-express", "cans", "tuned", "nonic"]
EXACT: list[PolarMethod] = ["svd", "eigh", "qdwh"]
METHODS = [*POLYNOMIALS, *EXACT, "zolotarev"]
SHAPES = [(6, 6), (4, 9), (9, 4), (1, 7), (7, 1), (1, 1)]
WORST_ERROR = {  # the docstring's, rounded
    "polar-express": 0.13,
    "you": 0.0325,
    "jordan": 0.32,
    "cans": 0.1394,
    "tuned": 0.2521,
    "nonic": 0.1737,
}


def _reference(G: Tensor) -> Tensor:
    """U Vᵀ in float64, over the singular values that are not rounding."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    keep = (1e-6 * S[..., :1] < S).to(S)
    return (U * keep.unsqueeze(-2)) @ Vh


def _applied(step: tuple[float, ...], x: Tensor) -> Tensor:
    a, b, c, *inner = step
    u = x**4 + inner[0] * x**2 if inner else x**2
    return (a + b * u + c * u**2) * x


def _by_hand(G: Tensor, method: PolarMethod, steps: int) -> Tensor:
    """The polynomials applied to the singular values of G, in float64."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    x = S / torch.linalg.vector_norm(S, 4 if method in SCHATTEN else 2, dim=-1, keepdim=True)
    x = x / SAFETY if method in ("polar-express", *SCHATTEN) else x
    for step in polynomials(method, steps):
        x = _applied(step, x)
    return (U * x.unsqueeze(-2)) @ Vh


def _with_spectrum(m: int, n: int, values: Tensor) -> Tensor:
    U = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64)).Q
    return (U * values) @ V.T


def _pairs(low: float, count: int = 2000) -> tuple[Tensor, Tensor]:
    """Diagonal matrices of Frobenius norm 1 whose first singular value runs over [low, 1]."""
    x = torch.logspace(torch.tensor(low).log10().item(), 0, count, dtype=torch.float64)
    return x, torch.diag_embed(torch.stack([x, (1 - x.square()).clamp(min=0).sqrt()], -1))


# ------------------------------------------------------------------------------- what it returns


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_methods_are_exact(shape: tuple[int, int], method: PolarMethod) -> None:
    G = torch.randn(3, *shape, dtype=torch.float64)
    Q = polar(G, method)
    assert torch.allclose(Q, _reference(G), atol=1e-12 if method == "svd" else 1e-9)
    small = Q @ Q.mT if shape[0] <= shape[1] else Q.mT @ Q
    assert torch.allclose(small, torch.eye(min(shape)).to(Q).expand_as(small), atol=1e-9)


@pytest.mark.parametrize("method", POLYNOMIALS)
@pytest.mark.parametrize("shape", SHAPES)
def test_polynomials_act_on_each_singular_value(
    shape: tuple[int, int], method: PolarMethod
) -> None:
    G = torch.randn(3, *shape, dtype=torch.float64)
    for steps in (1, 2, len(polynomials(method))):
        assert torch.allclose(polar(G, method, steps), _by_hand(G, method, steps), atol=1e-10)


def test_polar_express_converges_to_the_svd() -> None:
    G = _with_spectrum(30, 20, torch.logspace(0, -6, 20, dtype=torch.float64))
    errors = [float((polar(G, steps=k) - polar(G, "svd")).norm()) for k in (5, 8, 11, 14, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("method", POLYNOMIALS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stated_error_after_five_steps(method: PolarMethod, dtype: torch.dtype) -> None:
    _, G = _pairs(0.01)
    singular = polar(G.to(dtype), method).diagonal(dim1=-2, dim2=-1)[:, 0].double()
    error = float((singular - 1).abs().max())
    stated = WORST_ERROR[method]
    assert 0.95 * stated < error < stated + 1e-6  # neither broken nor overstated


def test_stated_error_of_eight_steps_of_polar_express() -> None:
    x, G = _pairs(1e-3)
    for dtype in (torch.float64, torch.float32):
        singular = polar(G.to(dtype), steps=8).diagonal(dim1=-2, dim2=-1).double()
        assert float((singular[:, 0] - 1).abs().max()) < 5e-5
        assert float((singular[x < 0.999][:, 1] - 1).abs().max()) < 5e-5


def test_default_is_five_steps_of_polar_express() -> None:
    G = torch.randn(5, 8)
    assert torch.equal(polar(G), polar(G, "polar-express", 5))
    assert not torch.equal(polar(G), polar(G, steps=4))


@pytest.mark.parametrize("shape", [(8, 8), (20, 8), (8, 20), (64, 96), (1, 5), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_jordan_in_bfloat16_is_that_of_torch_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    G = torch.randn(shape, dtype=dtype)
    theirs = _zeropower_via_newtonschulz(G.clone(), JORDAN, 5, 1e-7)  # divides in place
    ours = polar(G, "jordan", dtype=torch.bfloat16)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs.to(dtype))


# ----------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-110, -40, -3, 40, 120])
def test_a_power_of_two_changes_no_bit(method: PolarMethod, exponent: int) -> None:
    G = torch.randn(2, 5, 8)
    assert torch.equal(polar(torch.ldexp(G, torch.tensor(exponent)), method), polar(G, method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 3.0, 1e25, 3e38])
def test_scale_does_not_matter_in_float32(method: PolarMethod, scale: float) -> None:
    G = torch.randn(8, 5)
    G /= G.abs().max()
    assert torch.allclose(polar(G * scale, method), polar(G, method), atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_scale_does_not_matter_in_float64(method: PolarMethod, scale: float) -> None:
    G = torch.randn(8, 5, dtype=torch.float64)
    assert torch.allclose(polar(G * scale, method), polar(G, method), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_smallest_and_largest_representable_entries(
    method: PolarMethod, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    expected = polar(torch.eye(3), method)
    for entry in (info.smallest_normal * info.eps, info.tiny, info.max):
        G = torch.eye(3, dtype=dtype) * entry
        assert G.any()
        assert torch.allclose(polar(G, method).float(), expected, atol=float(info.eps))


def test_scale_does_not_matter_in_bfloat16_arithmetic() -> None:
    G = torch.randn(8, 16)
    for exponent in (-100, 100):
        scaled = torch.ldexp(G, torch.tensor(exponent))
        assert torch.equal(polar(scaled, dtype=torch.bfloat16), polar(G, dtype=torch.bfloat16))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
def test_transpose_rotation_and_sign(method: PolarMethod, shape: tuple[int, int]) -> None:
    G = torch.randn(shape, dtype=torch.float64)
    U = torch.linalg.qr(torch.randn(shape[0], shape[0], dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64)).Q
    Q = polar(G, method)
    assert torch.allclose(polar(G.mT, method), Q.mT, atol=1e-12)
    assert torch.allclose(polar(-G, method), -Q, atol=1e-12)
    assert torch.allclose(polar(U @ G @ V, method), U @ Q @ V, atol=1e-11)
    rows, columns = torch.randperm(shape[0]), torch.randperm(shape[1])
    assert torch.allclose(polar(G[rows][:, columns], method), Q[rows][:, columns], atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 7), (2, 3, 7, 4), (1, 5, 5), (6, 1, 4)])
def test_a_batch_is_a_loop(method: PolarMethod, shape: tuple[int, ...]) -> None:
    scales = torch.logspace(-30, 30, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    G = torch.randn(shape) * scales  # no matrix sees the scale of another
    Q = polar(G, method)
    assert Q.shape == G.shape
    for index in torch.cartesian_prod(*map(torch.arange, shape[:-2])).reshape(-1, len(shape) - 2):
        one = tuple(index.tolist())
        # products of a batch round otherwise, and polynomials of degree nine magnify that most
        tolerance = 5e-5 if method == "nonic" else 1e-5
        assert torch.allclose(Q[one], polar(G[one], method), atol=tolerance)


# ---------------------------------------------------------------------------------- corner cases


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_zero_gives_exactly_zero(method: PolarMethod, dtype: torch.dtype | None) -> None:
    for shape in SHAPES:
        assert not polar(torch.zeros(shape), method, dtype=dtype).any()
    G = torch.randn(3, 4, 5)
    G[1] = 0
    Q = polar(G, method)
    assert not Q[1].any()
    assert Q[0].any()
    assert Q[2].any()


def test_zero_gives_exactly_zero_in_bfloat16_arithmetic() -> None:
    for method in POLYNOMIALS:
        assert not polar(torch.zeros(4, 6), method, dtype=torch.bfloat16).any()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 4, 5), (2, 0, 5)])
@pytest.mark.parametrize("method", METHODS)
def test_empty_stays_empty(shape: tuple[int, ...], method: PolarMethod) -> None:
    assert polar(torch.zeros(shape), method).shape == shape


def _leak(G: Tensor, Q: Tensor, rank: int) -> float:
    """Spectral norm of what Q has outside the row and column space of G."""
    U, _, Vh = torch.linalg.svd(G.double())
    left, right = U[:, rank:].T @ Q.double(), Q.double() @ Vh[rank:].T
    return max(float(torch.linalg.matrix_norm(X, 2)) for X in (left, right))


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (50, 50)])
def test_svd_keeps_the_null_space_null_to_rounding(shape: tuple[int, int]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        G = torch.randn(shape[0], 4, dtype=dtype) @ torch.randn(4, shape[1], dtype=dtype)
        Q = polar(G, "svd")
        assert _leak(G, Q, 4) < tolerance
        assert int((torch.linalg.svdvals(Q) > 0.5).sum()) == 4
        assert torch.allclose(Q.double(), _reference(G), atol=10 * tolerance)


@pytest.mark.parametrize(
    ("method", "steps", "tolerance"),
    [("jordan", 5, 2e-4), ("you", 5, 2e-4), ("polar-express", 5, 4e-4), ("polar-express", 8, 3e-3)],
)
def test_polynomials_keep_the_null_space_small_in_float32(
    method: PolarMethod, steps: int, tolerance: float
) -> None:
    """Rounding of 1e-7 grows by the product of the slopes at zero: 500 to 1000 in 5 steps."""
    for shape in ((64, 96), (96, 64), (50, 50)):
        G = torch.randn(shape[0], 4) @ torch.randn(4, shape[1])
        assert _leak(G, polar(G, method, steps), 4) < tolerance


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_overwriting_gives_the_same_result(method: PolarMethod) -> None:
    for G in (torch.randn(3, 16, 400), torch.randn(9, 400, 16), torch.randn(40, 40)):
        expected, before = polar(G, method), G.clone()
        assert torch.equal(G, before)
        assert torch.allclose(polar(G, method, overwrite=True), expected, rtol=0, atol=1e-5)


def test_overwriting_saves_memory_in_gram_form() -> None:
    G = torch.randn(16, 20, 400)
    assert polar(G, "auto", overwrite=True).data_ptr() == G.data_ptr()


def test_null_rows_and_columns_stay_exactly_null() -> None:
    G = torch.randn(6, 8)
    G[2], G[:, 5] = 0, 0
    for method in POLYNOMIALS:
        Q = polar(G, method)
        assert not Q[2].any()
        assert not Q[:, 5].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_raises_and_counts(method: PolarMethod, bad: float) -> None:
    G = torch.randn(2, 3, 4, 5)
    G[1, 2, 0, 0] = G[0, 1, 3, 4] = bad
    with pytest.raises(ValueError, match=r"2 of 6 matrices.* NaN"):
        polar(G, method)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 5), (5, 4)])
def test_nonfinite_is_reported_for_that_matrix_alone(
    method: PolarMethod, bad: float, shape: tuple[int, int]
) -> None:
    G = torch.randn(3, *shape)
    clean = polar(G, method)
    G[1, 2, 3] = bad
    Q = polar(G, method, nonfinite="nan")
    assert Q[1].isnan().all()
    assert torch.equal(Q[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_layout_gives_the_same_and_the_input_is_left_alone(
    method: PolarMethod, dtype: torch.dtype
) -> None:
    G = torch.randn(3, 6, 4, dtype=dtype, requires_grad=True)
    before = G.detach().clone()
    Q = polar(G, method)
    assert Q.dtype == dtype
    assert Q.device == G.device
    assert not Q.requires_grad
    tolerance = 4 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5
    wide = torch.zeros(3, 12, 9, dtype=dtype)
    wide[:, ::2, 1::2] = before
    for same in (before.mT.contiguous().mT, wide[:, ::2, 1::2], before.expand(2, 3, 6, 4)):
        assert torch.allclose(polar(same, method).float(), Q.float(), atol=tolerance)
    assert torch.equal(G.detach(), before)
    assert torch.equal(wide[:, ::2, 1::2], before)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_never_the_input(method: PolarMethod) -> None:
    G = torch.eye(3) / 3
    Q = polar(G, method)
    Q.add_(1)
    assert torch.equal(G, torch.eye(3) / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    G = torch.randn(5, 8).to(dtype)
    for method in METHODS:
        assert torch.equal(polar(G, method), polar(G.float(), method).to(dtype))


def test_dtype_is_that_of_the_computation() -> None:
    G = torch.randn(20, 30)
    exact = _by_hand(G, "polar-express", 5)
    errors = [
        float((polar(G, dtype=dtype).double() - exact).norm() / exact.norm())
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ]
    assert polar(G, dtype=torch.bfloat16).dtype == torch.float32
    assert errors[0] < 1e-7 < 1e-4 > errors[1]
    assert 1e-4 < errors[2] < 0.05


# ------------------------------------------------------------------------------------ the errors


@pytest.mark.parametrize(
    ("method", "errors"),
    [
        ("jordan", [0.965560, 0.881566, 0.599938, 0.318169, 0.318169]),
        ("you", [0.959159, 0.839086, 0.617919, 0.146776, 0.031775]),
        ("polar-express", [0.991713, 0.965966, 0.865724, 0.560417, 0.129737, 0.002562, 5e-6]),
        ("cans", [0.991558, 0.96504, 0.862985, 0.560274, 0.139312]),
        ("tuned", [1.011199, 0.981454, 0.874388, 0.538322, 0.252118]),
        ("nonic", [0.955692, 0.721357, 0.173659]),
    ],
)
def test_coefficients_have_no_slip(method: PolarMethod, errors: list[float]) -> None:
    """Worst error on [0.01, 1] after each step: a changed digit shows."""
    x = torch.logspace(-2, 0, 20001, dtype=torch.float64)
    x = x / SAFETY if method in ("polar-express", *SCHATTEN) else x
    for step, error in zip(polynomials(method, len(errors)), errors, strict=True):
        x = _applied(step, x)
        assert float((x - 1).abs().max()) == pytest.approx(error, abs=1e-6)


def test_polynomials_repeat_or_end() -> None:
    assert polynomials("jordan", 7) == (JORDAN,) * 7
    assert len(polynomials("you")) == 5
    assert polynomials("polar-express", 9)[7:] == ((1.875, -1.25, 0.375),) * 2
    assert polynomials("polar-express", 3) == polynomials("polar-express", 9)[:3]


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_too_few_steps(method: PolarMethod) -> None:
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps={steps}, .* least 1"):
            polar(torch.eye(3), method, steps)


@pytest.mark.parametrize("method", ["you", "cans", "tuned", "nonic"])
def test_too_many_steps(method: PolarMethod) -> None:
    most = len(polynomials(method))
    with pytest.raises(ValueError, match=rf'"{method}" has {most} '):
        polar(torch.eye(3), method, most + 1)


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_take_no_steps(method: PolarMethod) -> None:
    with pytest.raises(ValueError, match="exact and takes no steps"):
        polar(torch.eye(3), method, 5)


def test_terms_of_zolotarev_that_float32_can_carry() -> None:
    for terms, dtype in ((5, torch.float32), (7, torch.float64)):
        with pytest.raises(ValueError, match=f"steps={terms}, .* 1 to"):
            polar(torch.eye(3), "zolotarev", terms, dtype=dtype)


def test_auto_takes_no_steps_and_the_others_no_tolerance() -> None:
    with pytest.raises(ValueError, match='steps=3, but "auto"'):
        polar(torch.eye(3), "auto", 3)
    with pytest.raises(ValueError, match=r'=0\.1 for "tuned"'):
        polar(torch.eye(3), "tuned", tolerance=0.1)


@pytest.mark.parametrize("method", ["newton", "SVD", ""])
def test_unknown_method_names_the_known_ones(method: str) -> None:
    with pytest.raises(ValueError, match=f"method='{method}'.*auto"):
        polar(torch.eye(3), method)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected"):
        polar(torch.zeros(0, 3), method)  # type: ignore[arg-type]


def test_svd_has_no_polynomials() -> None:
    with pytest.raises(ValueError, match="got method='svd'"):
        polynomials("svd")


def test_unknown_choice_for_nonfinite_input() -> None:
    with pytest.raises(ValueError, match="nonfinite='skip'"):
        polar(torch.eye(3), nonfinite="skip")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_real_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"{dtype}, .* real"):
        polar(torch.ones(3, 3, dtype=dtype))
    with pytest.raises(TypeError, match=f"dtype={dtype}, .* real"):
        polar(torch.ones(3, 3), dtype=dtype)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(\.\.\., m, n\)"):
        polar(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [*EXACT, "zolotarev"])
def test_factorizations_in_half_precision_are_refused(
    dtype: torch.dtype, method: PolarMethod
) -> None:
    with pytest.raises(ValueError, match=rf'"{method}" needs '):
        polar(torch.eye(3), method, dtype=dtype)


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_autocast_around_it_changes_nothing(method: PolarMethod) -> None:
    G = torch.randn(24, 24)
    expected = polar(G, method)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(polar(G, method), expected)
