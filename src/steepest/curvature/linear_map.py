"""Linear maps that are known by their products, and sums, differences and multiples of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steepest.curvature.jacobian import TOGETHER
from steepest.linalg.krylov import gaussian

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator


class CurvatureOperator(ABC):
    """A linear map that is known by its products: `A @ v`, v of shape `(n,)` or `(n, k)`.

    Maps of the same parameters can be combined: `H - G`, `H + G`, `sum([H, G])`, `2 * H`,
    `H / 2`, `-H`.
    """

    __array_ufunc__ = None  # so that NumPy's numbers leave products to __rmul__

    products = 0
    """How many products were taken. The parts of a combination count their own."""

    rows: Sequence[str]
    """Names of what the map goes to, in order: parameters."""
    columns: Sequence[str]
    """Names of what the map comes from."""
    dtype: torch.dtype
    """Precision of products."""
    device: torch.device
    """Device of products."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def is_symmetric(self) -> bool:
        """Whether the map is its own transpose."""
        return self.rows == self.columns

    @abstractmethod
    def block(self, names: Sequence[str] | str) -> CurvatureOperator:
        """Return the diagonal block of some of the parameters."""

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """The product with `(n,)`, or with the rows of `(k, n)` where all operations allow it."""

    def __call__(self, v: Tensor) -> Tensor:
        """Return the product with one vector `(n,)`."""
        _check_tensor(v, self)
        if v.shape != self.shape[1:]:
            raise ValueError(f"got a vector of shape {tuple(v.shape)}, expected {self.shape[1:]}")
        self.products += 1
        return self._product(v.to(self.device, self.dtype))

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return the product with a vector `(n,)`, or with each column of `(n, k)`."""
        _check_tensor(v, self)
        if v.ndim != 2:
            return self(v)
        if v.shape[0] != self.shape[1] or not v.shape[1]:
            n = self.shape[1]
            raise ValueError(
                f"got a vector of shape {tuple(v.shape)}, expected ({n},), or columns ({n}, k)"
            )
        self.products += v.shape[1]
        blocks = v.T.to(self.device, self.dtype).split(TOGETHER)
        return torch.cat([self._together(rows) for rows in blocks]).T.contiguous()

    def _together(self, rows: Tensor) -> Tensor:
        if len(rows) > 1:
            try:
                return self._product(rows)
            except RuntimeError:  # some operation takes no batch of gradients
                pass
        return torch.stack([self._product(v) for v in rows])

    def vector(self) -> Tensor:
        """Return zeros `(n,)` of the device and precision that products have."""
        return torch.zeros(self.shape[1], dtype=self.dtype, device=self.device)

    def start(self, generator: torch.Generator | None = None) -> Tensor:
        """Return where a search for large eigenvalues begins, `(n,)`: here a random vector."""
        return gaussian(self.vector(), generator)

    def to_dense(self) -> Tensor:
        """Return the matrix, a product for each column: for small ones."""
        return self @ torch.eye(self.shape[1], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """Return a `scipy.sparse.linalg.LinearOperator`, for `eigsh` and its kind.

        Raises:
            ModuleNotFoundError: without SciPy.
        """
        from scipy.sparse.linalg import LinearOperator

        def matvec(v: np.ndarray) -> np.ndarray:
            return self(torch.from_numpy(v).reshape(-1)).cpu().numpy()

        def matmat(V: np.ndarray) -> np.ndarray:
            return (self @ torch.from_numpy(V)).cpu().numpy()

        return LinearOperator(
            self.shape,
            matvec=matvec,
            rmatvec=matvec if self.is_symmetric else None,
            matmat=matmat,
            dtype=torch.zeros((), dtype=self.dtype).numpy().dtype,
        )

    def __add__(self, other: CurvatureOperator) -> CurvatureOperator:
        """Return the sum of two maps of the same parameters."""
        return Combination([(1.0, self), (1.0, other)]) if _is_map(other) else NotImplemented

    def __radd__(self, other: int) -> CurvatureOperator:
        """Return the map itself for 0, with which `sum` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: CurvatureOperator) -> CurvatureOperator:
        """Return the difference of two maps of the same parameters."""
        return Combination([(1.0, self), (-1.0, other)]) if _is_map(other) else NotImplemented

    def __mul__(self, factor: float) -> CurvatureOperator:
        """Return the map times a number."""
        return Combination([(factor, self)]) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> CurvatureOperator:
        """Return the map divided by a number."""
        return self * (1 / divisor) if isinstance(divisor, int | float) else NotImplemented

    def __neg__(self) -> CurvatureOperator:
        """Return the map times -1."""
        return Combination([(-1.0, self)])


class Combination(CurvatureOperator):
    """A weighted sum of maps, which are of the same parameters in the same precision.

    Args:
        terms: factors and maps.

    Raises:
        ValueError: for a factor that is not finite, and maps that differ in shape, names of
            parameters, precision or device.

    >>> from steepest.curvature import Hessian
    >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 3.0]])
    >>> H = Hessian(model, lambda model, x: 0.5 * model(x).square().sum(), x)
    >>> (2 * H - H).to_dense()
    tensor([[1., 3.],
            [3., 9.]])
    """

    def __init__(self, terms: Sequence[tuple[float, CurvatureOperator]]):
        for factor, _ in terms:
            if not math.isfinite(factor):
                raise ValueError(f"got the factor {factor} for an operator, expected a finite one")
        first = terms[0][1]
        for _, other in terms[1:]:
            _check_agreement(first, other)
        self._terms = terms
        self.rows, self.columns = first.rows, first.columns
        self.dtype, self.device = first.dtype, first.device

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._terms[0][1].shape

    def block(self, names: Sequence[str] | str) -> Combination:
        """Return the diagonal block of some of the parameters."""
        return Combination([(factor, term.block(names)) for factor, term in self._terms])

    def start(self, generator: torch.Generator | None = None) -> Tensor:
        """Return where a search for large eigenvalues begins: that of the first map."""
        return self._terms[0][1].start(generator)

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return the product with a vector `(n,)`, or with each column of `(n, k)`."""
        _check_tensor(v, self)
        if v.ndim != 2:
            return self(v)
        total = self._sum(v)
        self.products += v.shape[1]
        return total

    def _product(self, v: Tensor) -> Tensor:
        return self._sum(v)

    def _sum(self, v: Tensor) -> Tensor:
        (factor, first), *others = self._terms
        total = factor * (first @ v)
        for factor, term in others:
            total.add_(term @ v, alpha=factor)
        return total


def check_symmetric(operator: CurvatureOperator) -> None:
    """Raise a ValueError for a map without eigenvalues on its diagonal blocks: a cross block."""
    if not operator.is_symmetric:
        raise ValueError(
            f"got {_described(operator)} that is not symmetric, expected a map from parameters to "
            "the same ones: without columns="
        )


def _check_tensor(v: object, operator: CurvatureOperator) -> None:
    if not isinstance(v, Tensor):
        n = operator.shape[1]
        raise TypeError(
            f"got a {type(v).__name__} to multiply with {_described(operator)}, expected a tensor "
            f"({n},) or ({n}, k): torch.tensor(...)"
        )


def _is_map(other: object) -> bool:
    return isinstance(other, CurvatureOperator)


def _check_agreement(A: CurvatureOperator, B: CurvatureOperator) -> None:
    differences = (
        ("names of rows", tuple(A.rows), tuple(B.rows)),
        ("names of columns", tuple(A.columns), tuple(B.columns)),
        ("shape", A.shape, B.shape),
        ("precision", A.dtype, B.dtype),
        ("device", A.device, B.device),
    )
    for aspect, left, right in differences:
        if left != right:
            raise ValueError(
                f"got {_described(A)} and {_described(B)} to combine, which differ in {aspect}: "
                f"{_short(left)} and {_short(right)}; make both of the same parameters, in the "
                "same order and precision"
            )


def _described(operator: CurvatureOperator) -> str:
    return f"the {type(operator).__name__} of shape {operator.shape}"


def _short(names: object) -> str:
    """A few of many names."""
    if isinstance(names, tuple) and len(names) > 5:
        return f"({', '.join(map(str, names[:5]))}, ...)"
    return f"({', '.join(map(str, names))})" if isinstance(names, tuple) else str(names)
