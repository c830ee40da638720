from __future__ import annotations

import pytest
import torch

from steepest.linalg import polar, polar_plan
from steepest.linalg.planner import has_bfloat16


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.linalg.planner.has_bfloat16", lambda: True)


@pytest.mark.parametrize(
    ("shape", "method", "steps", "dtype", "form"),
    [
        ((768, 768), "tuned", 5, torch.bfloat16, "plain"),
        ((1, 96, 64), "zolotarev", 3, torch.float32, None),
        ((96, 64, 64), "nonic", 3, torch.bfloat16, "plain"),
        ((4, 256, 256), "tuned", 5, torch.bfloat16, "plain"),
        ((3072, 768), "zolotarev", 3, torch.float32, None),
        ((768, 3072), "zolotarev", 3, torch.float32, None),
        ((36, 64, 768), "nonic", 3, torch.float32, "gram"),
        ((768, 64), "nonic", 3, torch.float32, "gram"),
        ((48, 16, 768), "nonic", 3, torch.float32, "gram"),
        ((8, 768), "eigh", None, torch.float32, None),
        ((256, 1), "eigh", None, torch.float32, None),
        ((1, 1), "eigh", None, torch.float32, None),
        ((24, 24), "tuned", 5, torch.bfloat16, "plain"),
        ((8, 8), "tuned", 5, torch.float32, "plain"),
    ],
)
@pytest.mark.usefixtures("with_bfloat16")
def test_choices_on_a_cpu(
    shape: tuple[int, ...], method: str, steps: int | None, dtype: torch.dtype, form: str | None
) -> None:
    plan = polar_plan(shape)
    assert (plan.method, plan.steps, plan.dtype, plan.form) == (method, steps, dtype, form)
    assert plan == polar_plan((*shape[:-2], shape[-1], shape[-2]))
    assert plan == polar_plan(shape, torch.bfloat16, torch.device("cpu"))


def test_without_bfloat16_in_hardware_it_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.linalg.planner.has_bfloat16", lambda: False)
    assert polar_plan((768, 768)).dtype == torch.float32


def test_hardware_is_asked_by_a_public_name() -> None:
    assert isinstance(has_bfloat16(), bool)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx512_bf16"):
        assert has_bfloat16()


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (16, 768), (2, 1, 5)])
def test_choices_on_an_accelerator(shape: tuple[int, ...]) -> None:
    plan = polar_plan(shape, device="cuda")
    assert (plan.method, plan.dtype, plan.form) == ("tuned", torch.bfloat16, "plain")


@pytest.mark.parametrize(
    ("tolerance", "method", "steps", "dtype"),
    [
        (0.5, "zolotarev", 3, torch.float32),
        (0.05, "zolotarev", 4, torch.float32),
        (0.01, "svd", None, torch.float32),
        (1e-6, "svd", None, torch.float64),
    ],
)
def test_choices_for_a_tolerance(
    tolerance: float, method: str, steps: int | None, dtype: torch.dtype
) -> None:
    plan = polar_plan((100, 200), tolerance=tolerance)
    assert (plan.method, plan.steps, plan.dtype) == (method, steps, dtype)
    assert plan.error <= tolerance


def test_large_and_exact_is_qdwh() -> None:
    assert polar_plan((2000, 4000), tolerance=1e-3).method == "qdwh"
    assert polar_plan((2000, 4000), tolerance=1e-3).dtype == torch.float32
    assert polar_plan((2000, 4000), tolerance=1e-4).dtype == torch.float64


def test_polar_follows_the_plan() -> None:
    for shape in ((3, 40, 80), (60, 60), (40, 50), (80, 8)):
        G = torch.randn(shape)
        plan = polar_plan(shape)
        assert torch.equal(polar(G, "auto"), polar(G, plan.method, plan.steps, dtype=plan.dtype))


def test_a_given_dtype_is_that_of_polynomials_only() -> None:
    square, wide = torch.randn(64, 64), torch.randn(8, 64)
    in_float64 = polar(square, "nonic", dtype=torch.float64)
    assert torch.equal(polar(square, "auto", dtype=torch.float64), in_float64)
    assert torch.equal(polar(wide, "auto", dtype=torch.bfloat16), polar(wide, "eigh"))
    assert polar(square.double(), "auto").dtype == torch.float64


def test_it_prints_as_a_sentence() -> None:
    text = str(polar_plan((3072, 768)))
    assert text.startswith("zolotarev, 3 terms, float32: error 0.1. Two products")
    assert "nonic, 3 steps, float32, gram form" in str(polar_plan((64, 768)))


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 0)])
def test_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"m and n positive"):
        polar_plan(shape)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 1e-12, 2.0, float("nan")])
def test_tolerances_out_of_range(tolerance: float) -> None:
    with pytest.raises(ValueError, match="1e-9 to 1, or None"):
        polar_plan((3, 3), tolerance=tolerance)
    with pytest.raises(ValueError, match="1e-9 to 1, or None"):
        polar(torch.eye(3), "auto", tolerance=tolerance)
