from __future__ import annotations

import threading

import pytest
import torch

from steepest.linalg import fast_products, polar, products

SETTINGS = torch.backends.mkldnn.matmul


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where oneDNN is the faster one."""
    monkeypatch.setattr(products, "oneDNN_is_exact", lambda: True)


@pytest.mark.usefixtures("switched")
def test_the_setting_is_restored() -> None:
    before = SETTINGS.fp32_precision
    with fast_products():
        assert SETTINGS.fp32_precision == "bf16"
        with fast_products():
            assert SETTINGS.fp32_precision == "bf16"
        assert SETTINGS.fp32_precision == "bf16"
    assert SETTINGS.fp32_precision == before
    with pytest.raises(RuntimeError, match="inside"), fast_products():
        raise RuntimeError("inside")
    assert SETTINGS.fp32_precision == before


@pytest.mark.usefixtures("switched")
def test_polar_restores_it_also_when_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SETTINGS.fp32_precision
    polar(torch.randn(40, 90), "auto")
    assert SETTINGS.fp32_precision == before

    def broken(*_: object) -> None:
        assert SETTINGS.fp32_precision == "bf16"
        raise RuntimeError("no memory")

    monkeypatch.setattr("steepest.linalg.polar_factor.by_eigh", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        polar(torch.randn(40, 90), "eigh")
    assert SETTINGS.fp32_precision == before


@pytest.mark.usefixtures("switched")
def test_threads_that_overlap_restore_it_in_the_end() -> None:
    before = SETTINGS.fp32_precision
    first_is_in, first_is_out = threading.Event(), threading.Event()

    def second() -> None:
        first_is_in.wait(10)
        with fast_products():
            first_is_out.wait(10)
            inside.append(SETTINGS.fp32_precision)

    inside: list[str] = []
    thread = threading.Thread(target=second)
    thread.start()
    with fast_products():
        first_is_in.set()
        while products._depth < 2:
            pass
    first_is_out.set()
    thread.join(10)
    assert inside == ["bf16"]  # still, although the first has left
    assert SETTINGS.fp32_precision == before


@pytest.mark.usefixtures("switched")
def test_products_inside_are_as_exact() -> None:
    if getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"):
        pytest.skip("this processor would compute in bfloat16, so the context never switches here")
    A, B = torch.randn(2, 200, 200)
    exact = A.double() @ B.double()
    with fast_products():
        error = (A @ B - exact).norm() / exact.norm()
    assert float(error) < 2e-6


def test_nothing_changes_where_it_would_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "oneDNN_is_exact", lambda: False)
    before = SETTINGS.fp32_precision
    with fast_products():
        assert SETTINGS.fp32_precision == before


def test_the_decision_is_made_once_and_leaves_no_trace() -> None:
    before = SETTINGS.fp32_precision
    assert products.oneDNN_is_exact() is products.oneDNN_is_exact.__wrapped__()
    assert SETTINGS.fp32_precision == before


def test_a_product_that_rounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with bfloat16 matrix units."""
    monkeypatch.setattr(torch.linalg, "matrix_norm", lambda A: A.norm() * (1 + 1e4 * (A < 1).all()))
    assert products.oneDNN_is_exact.__wrapped__() is False


@pytest.mark.usefixtures("switched")
def test_traced_code_is_left_alone() -> None:
    def product(A: torch.Tensor) -> torch.Tensor:
        with fast_products():
            return A @ A

    A = torch.randn(5, 5)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(A), A @ A, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 100, 449, 600, 901])
def test_a_symmetric_product_by_halves_is_the_product(n: int, dtype: torch.dtype) -> None:
    X = torch.randn(n, 70).to(dtype)
    C = torch.randn(n, n, dtype=torch.float64)
    C = (C + C.mT).to(dtype)
    exact = X.double() @ X.mT.double()
    tolerance = 10 * torch.finfo(dtype).eps * float(exact.max())
    S = products.symmetric_product(X, X.mT)
    assert (S.double() - exact).abs().max() < tolerance
    S = products.symmetric_product(X, X.mT, C, 0.5, -2.0)
    assert (S.double() - 0.5 * C.double() + 2 * exact).abs().max() < 3 * tolerance
    one = products.symmetric_product(X[None], X[None].mT, C[None], 0.5, -2.0)
    assert torch.equal(one, S[None])
    two = products.symmetric_product(torch.stack([X, X]), torch.stack([X, X]).mT)
    assert torch.allclose(two[1].double(), exact, atol=tolerance)


def test_products_of_batches_are_those_of_their_matrices() -> None:
    A, B, C = torch.randn(3, 4, 5), torch.randn(3, 5, 6), torch.randn(3, 4, 6)
    for batch in (slice(0, 1), slice(0, 3)):
        assert torch.allclose(products.product(A[batch], B[batch]), A[batch] @ B[batch])
        expected = 0.5 * C[batch] + 2 * A[batch] @ B[batch]
        assert torch.allclose(products.product(A[batch], B[batch], C[batch], 0.5, 2.0), expected)
