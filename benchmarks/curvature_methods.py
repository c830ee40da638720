"""Methods for the largest eigenvalues and the trace of a Hessian, and the best setting of each.

Settings are chosen with hindsight: the fewest products that reach the error. A method that starts
at v and takes m products stays in the span of v, Hv, ..., H^m v. There H is a tridiagonal matrix T.
So settings for eigenvalues are tried on T, which costs the real products of one Lanczos process for
each start. Numbers of probes for the trace are tried on subsets of one pool of probes.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from curvature_products import (
    STEEPEST,
    Counted,
    Problem,
    by_hand,
    curvlinops,
    fastest_columns,
    hessian,
    installed,
    near_gradient,
    pyhessian,
)
from networks import seeded
from steepest.curvature import Hessian
from steepest.linalg.krylov import Lanczos, Operator, eigenpairs
from steepest.linalg.probes import Estimate, trace

EIGENVALUE_ERROR, TRACE_ERROR = 1e-3, 0.05
NEAR_GRADIENT = "eigsh, by hand, our start"
TOLERANCES = (0.5, 0.2, 0.1, 0.08, 0.07, 0.06, 0.055, 0.05, 0.045, 0.04, 0.035, 0.03, 0.01)
TOLERANCES += (0.003, 0.001, 0.0003, 0.0001)
SUBSPACES = {
    1: (3, 4, 5, 6, 8, 10, 12, 16, 20),
    10: (12, 14, 16, 18, 20, 22, 24, 27, 30, 35, 40, 45, 50),
}
LANCZOS_STEPS, POOL = 60, 48
POWER_LIMIT = 400  # products of a power iteration before it counts as failed

Answer = tuple[Any, int]  # a value or several, and the number of products
Method = Callable[..., Answer]  # of a problem, a seed and the setting
Methods = dict[str, tuple[Method, dict[str, Any]]]


def relative_error(value: Any, reference: Any) -> float:
    """The largest one; infinite where a value is missing."""
    error = np.max(np.abs(np.asarray(value) - reference) / np.abs(reference))
    return float(error) if np.isfinite(error) else math.inf


def root_mean_square(errors: list[float]) -> float:
    return math.sqrt(statistics.mean(error**2 for error in errors))


# Eigenvalues.


def lanczos(operator: Operator, start: Tensor, count: int, tolerance: float) -> Answer:
    pairs = eigenpairs(operator, start, count, tolerance=tolerance)
    return pairs.values.numpy(), pairs.products


def steepest_eigenvalues(problem: Problem, seed: int, count: int, tolerance: float) -> Answer:
    H = hessian(problem)
    return lanczos(H, near_gradient(H, seed), count, tolerance)


def arpack(
    operator: Operator, start: Tensor, count: int, tol: float, ncv: int | None = None
) -> Answer:
    """SciPy's `eigsh`; without convergence the values are NaN."""
    product = Counted(lambda v: operator(torch.from_numpy(v).flatten()).numpy())
    v0 = start.numpy()
    A = LinearOperator((len(v0), len(v0)), matvec=product, dtype=v0.dtype)
    settings = {"which": "LA", "v0": v0, "ncv": ncv, "tol": tol, "return_eigenvectors": False}
    try:
        values = eigsh(A, count, **settings)
    except ArpackNoConvergence:
        values = np.full(count, np.nan)
    return np.sort(values)[::-1], product.calls


def arpack_by_hand(problem: Problem, seed: int, **setting: Any) -> Answer:
    return arpack(by_hand(problem), problem.random_vector(seed), **setting)


def arpack_near_gradient(problem: Problem, seed: int, **setting: Any) -> Answer:
    return arpack(by_hand(problem), near_gradient(hessian(problem), seed), **setting)


def arpack_curvlinops(problem: Problem, seed: int, **setting: Any) -> Answer:
    return arpack(curvlinops(problem).__matmul__, problem.random_vector(seed), **setting)


def pyhessian_eigenvalues(problem: Problem, seed: int, count: int, tol: float) -> Answer:
    torch.manual_seed(seed)
    peer, product = pyhessian(problem)
    values, _ = peer.eigenvalues(maxIter=1000, tol=tol, top_n=count)
    return np.sort(values)[::-1], product.calls


def power_iteration(T: Tensor, count: int, tol: float) -> Answer:
    """PyHessian's power iterations on T, with its rule to stop, in the basis of Ritz vectors.

    Each starts at a random vector, whose entries have the sizes of those of the first start.
    """
    ritz_values, coefficients = torch.linalg.eigh(T)
    generator = seeded(3)
    values: list[float] = []
    vectors = torch.zeros(len(T), 0, dtype=T.dtype)
    products = 0
    while len(values) < count and products < POWER_LIMIT:
        v = coefficients[0] * torch.randn(len(T), generator=generator, dtype=T.dtype)
        value = math.inf
        while products < POWER_LIMIT:
            v = v - vectors @ (vectors.T @ v)
            v = v / v.norm()
            before, value = value, float(ritz_values @ v.square())
            v = ritz_values * v
            products += 1
            if abs(before - value) / (abs(before) + 1e-6) < tol:
                break
        values.append(value)
        vectors = torch.column_stack([vectors, v / v.norm()])
    return np.sort(values + [math.nan] * (count - len(values)))[::-1], products


def tridiagonal(operator: Operator, start: Tensor) -> Tensor:
    """T of a start, `(LANCZOS_STEPS, LANCZOS_STEPS)` in float64."""
    process = Lanczos(operator, start)
    while process.size < LANCZOS_STEPS:
        process.step()
    return process.tridiagonal()


def tridiagonals(problem: Problem, starts: int) -> tuple[list[Tensor], list[Tensor]]:
    """T from random starts, and T from starts near the gradient."""
    H, seeds = hessian(problem), range(starts)
    from_random = [tridiagonal(H, problem.random_vector(seed)) for seed in seeds]
    return from_random, [tridiagonal(H, near_gradient(H, seed)) for seed in seeds]


def eigenvalue_methods(
    count: int, from_random: list[Tensor], from_gradient: list[Tensor]
) -> tuple[Methods, np.ndarray]:
    """Methods with their best settings, and the largest Ritz values over all starts."""
    tops = [torch.linalg.eigvalsh(T).flip(0)[:count].numpy() for T in from_random + from_gradient]
    reference = np.max(tops, axis=0)

    def on_T(solver: Callable[..., Answer]) -> Callable[..., Answer]:
        return lambda T, **setting: solver(T.matmul, torch.eye(len(T)).to(T)[0], **setting)

    def best(solver: Callable[..., Answer], settings: list[dict], Ts: list[Tensor]) -> dict | None:
        """The setting with the fewest products that reaches the error from every start."""
        chosen, fewest = None, math.inf
        for setting in settings:
            answers = [solver(T, count=count, **setting) for T in Ts]
            error = max(relative_error(values, reference) for values, _ in answers)
            products = statistics.mean(products for _, products in answers)
            if error <= EIGENVALUE_ERROR and products < fewest:
                chosen, fewest = {"count": count, **setting}, products
        return chosen

    ours = [{"tolerance": tolerance} for tolerance in TOLERANCES]
    default = [{"tol": tol} for tol in TOLERANCES]
    subspaces = [{"ncv": ncv, "tol": tol} for tol in TOLERANCES for ncv in SUBSPACES[count]]
    power = [{"tol": tol / 10} for tol in TOLERANCES]
    tuned = best(on_T(arpack), subspaces, from_random)
    methods = {
        STEEPEST: (steepest_eigenvalues, best(on_T(lanczos), ours, from_gradient)),
        "eigsh, product by hand": (arpack_by_hand, tuned),
        NEAR_GRADIENT: (arpack_near_gradient, best(on_T(arpack), subspaces, from_gradient)),
        "eigsh, curvlinops": (arpack_curvlinops, tuned),
        "eigsh, as it is": (arpack_by_hand, best(on_T(arpack), default, from_random)),
        "PyHessian": (pyhessian_eigenvalues, best(power_iteration, power, from_random)),
    }
    return {k: (m, s) for k, (m, s) in methods.items() if s and installed(k)}, reference


# The trace.


def steepest_trace(problem: Problem, seed: int, tolerance: float) -> Answer:
    H = hessian(problem)
    return trace_near(H, near_gradient(H, seed), seed, tolerance).value, H.products


def trace_near(operator: Operator, start: Tensor, seed: int, tolerance: float) -> Estimate:
    return trace(operator, start, tolerance, generator=seeded(100 + seed), start=start)


def pyhessian_trace(problem: Problem, seed: int, products: int) -> Answer:
    torch.manual_seed(seed)
    peer, product = pyhessian(problem)
    return float(np.mean(peer.trace(maxIter=products, tol=0))), product.calls


def curvlinops_trace(name: str, columns: int, problem: Problem, seed: int, products: int) -> Answer:
    torch.manual_seed(seed)
    operator = curvlinops(problem, columns)
    estimate = getattr(importlib.import_module("curvlinops"), name)
    return float(estimate(operator, products)), operator.calls


def hutchpp(M1: Tensor, M2: Tensor, M3: Tensor) -> float:
    """Hutch++ of A, whose first half of probes spans the range. Mₚ is WᵀAᵖW of its probes W."""
    k = len(M1) // 2
    R, inside = projected(M2[:k, :k], M3[:k, :k])
    probes, images = (torch.linalg.solve_triangular(R.T, M[:k, k:], upper=False) for M in (M1, M2))
    outside = M1.diagonal()[k:] - 2 * (probes * images).sum(0)
    return float(inside.trace() + (outside + (probes * (inside @ probes)).sum(0)).mean())


def xtrace(M1: Tensor, M2: Tensor, M3: Tensor) -> float:
    """XTrace of A (Epperly, Tropp and Webber, 2024): each probe against the range of the others."""
    R, inside = projected(M2, M3)
    S = torch.linalg.inv(R.T)
    S = S / S.norm(dim=0)  # what the range loses without each probe
    probes = torch.linalg.solve_triangular(R.T, M1, upper=False)
    probes = probes - S * (S * probes).sum(0)
    images = R - S * (S * R).sum(0)
    left = inside.trace() - (S * (inside @ S)).sum(0)
    outside = M1.diagonal() - 2 * (probes * images).sum(0) + (probes * (inside @ probes)).sum(0)
    return float((left + outside).mean())


def projected(M2: Tensor, M3: Tensor) -> tuple[Tensor, Tensor]:
    """R of AW = QR, and QᵀAQ."""
    R = torch.linalg.cholesky(M2, upper=True)
    half = torch.linalg.solve_triangular(R.T, M3, upper=False)
    inside = torch.linalg.solve_triangular(R.T, half.T, upper=False)
    return R, (inside + inside.T) / 2


def products_needed(operator: Operator, size: int, reference: float) -> dict[str, int]:
    """Products with which each estimator reaches the trace in the root mean square."""
    W = torch.randint(2, (POOL, size), generator=seeded(77)).float() * 2 - 1
    Y = torch.stack([operator(w) for w in W])
    Z = torch.stack([operator(y) for y in Y])
    moments = [(W @ Y.T).double(), (Y @ Y.T).double(), (Y @ Z.T).double()]
    generator = seeded(5)
    orders = [torch.randperm(POOL, generator=generator) for _ in range(200)]

    def error(estimate: Callable[..., float], probes: int) -> float:
        subsets = [order[:probes] for order in orders]
        values = [estimate(*(M[subset][:, subset] for M in moments)) for subset in subsets]
        return root_mean_square([relative_error(value, reference) for value in values])

    deviation = float(moments[0].diagonal().std()) / abs(reference)
    needed = {"hutchinson_trace": math.ceil((deviation / TRACE_ERROR) ** 2)}
    for k in range(2, POOL // 2 + 1):
        for name, estimate, probes, products in (
            ("hutchpp_trace", hutchpp, 2 * k, 3 * k),
            ("xtrace", xtrace, k, 2 * k),
        ):
            if name not in needed and error(estimate, probes) <= TRACE_ERROR:
                needed[name] = products
    return needed


def largest_tolerance(H: Hessian, reference: float, seeds: int) -> float | None:
    """The largest tolerance with which `trace` reaches its error in the root mean square."""
    starts = {seed: near_gradient(H, seed) for seed in range(100, 100 + seeds)}
    for tolerance in TOLERANCES:
        values = [trace_near(H, start, seed, tolerance).value for seed, start in starts.items()]
        if root_mean_square([relative_error(v, reference) for v in values]) <= TRACE_ERROR:
            return tolerance
    return None


def trace_methods(problem: Problem, seeds: int) -> tuple[Methods, Estimate]:
    """Methods with their best settings, and the trace from 200 products."""
    H = hessian(problem)
    reference = trace(H, problem.random_vector(0), 1e-4, 200, seeded(999))
    needed = products_needed(H, problem.size, reference.value)
    methods: Methods = {}
    if tolerance := largest_tolerance(H, reference.value, 3 * seeds):
        methods[STEEPEST] = steepest_trace, {"tolerance": tolerance}
    methods["PyHessian"] = pyhessian_trace, {"products": needed["hutchinson_trace"]}
    columns = fastest_columns(problem) if installed("curvlinops") else 1
    for name, products in needed.items():
        estimator = partial(curvlinops_trace, name, columns)
        methods[f"curvlinops {name}"] = estimator, {"products": products}
    return {k: method for k, method in methods.items() if installed(k)}, reference
