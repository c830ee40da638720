"""Time to the same error of the Hessian's largest eigenvalues and of its trace, beside the peers.

What is compared is the time to reach a relative error: 1e-3 for the largest eigenvalue, 1e-3 for
each of the ten largest, 5 % for the trace. Every method may turn its own knob (ours has one, the
tolerance): the setting with the fewest products that reaches the error is the one that is timed.

Eigenvalues must be reached from each of several starts: random ones for the peers, ours near the
gradient, as `sharpness` does. What SciPy would take from there too is shown, and counts as no peer.
A method that starts at v and multiplies m times stays in the span of v, Hv, ..., H^m v, where H is
a small tridiagonal matrix T: so knobs are tried on T, once for each start, and T's of real products
are all that costs. The trace must be reached in the root mean square over probes: knobs of the
peers are tried on subsets of one pool of probes, ours on fresh ones. References are the largest
Ritz values over all starts, and our trace with ten times as many products. The timed runs then show
the error they reached: what is marked "!" did not get there after all, and is no best peer.

Install the peers with `pip install -e '.[bench]'`; those that are missing are left out, and named.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from measure import quiet, save, table
from peers import Peer
from steepest.curvature import Hessian
from steepest.lab.data import Sampler, load
from steepest.lab.models import GPT, GPTConfig
from steepest.linalg.krylov import eigenpairs, gaussian, start_near
from steepest.linalg.probes import Estimate, trace

EIGENVALUE, TRACE = 1e-3, 0.05
TOLERANCES = (
    0.5,
    0.2,
    0.1,
    0.08,
    0.07,
    0.06,
    0.055,
    0.05,
    0.045,
    0.04,
    0.035,
    0.03,
    0.01,
    0.003,
    0.001,
    0.0003,
    0.0001,
)
STEPS, PROBES, REFERENCE = 60, 48, 200
LIMIT = 400
NCV = {
    1: (3, 4, 5, 6, 8, 10, 12, 16, 20),
    10: (12, 14, 16, 18, 20, 22, 24, 27, 30, 35, 40, 45, 50),
}
PACKAGES = ("steepest", "PyHessian", "curvlinops-for-pytorch", "scipy", "torch")
COLUMNS = ["method", "setting", "products", "ms", "ms each", "error", "ours / this"]


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    problems: tuple[str, ...] = ("mlp", "cnn", "gpt")
    """Which networks."""
    untrained: bool = True
    """Whether to measure at initialization too, in one round."""
    steps: int = 60
    """Steps of AdamW before the others."""
    starts: int = 4
    """Starts for each of which eigenvalues must be reached."""
    rounds: int = 3
    """How often each method is timed."""
    products: bool = True
    """Whether to time products against sizes of models and batches."""
    threads: int | None = None
    """Threads on the CPU; by default as many as PyTorch takes."""
    data: str = "data"
    """Folder with mnist/mnist.npz and cifar10/cifar10_5k_1k.npz; clusters of noise without it."""
    out: Path = Path("benchmarks/results")
    """Folder for the figures."""


# Problems.


@dataclass
class Problem:
    """A network, a batch, and their loss as everybody takes it."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    data: str
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.criterion(model(batch[0]), batch[1])

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def vector(self, seed: int) -> Tensor:
        return gaussian(torch.zeros(self.size), torch.Generator().manual_seed(seed))


def problem(name: str, data: Path, batch: int | None = None, wide: int = 0) -> Problem:
    torch.manual_seed(0)
    if name == "gpt":
        config = GPTConfig(width=wide or 64, depth=2, context=128)
        x, y = Sampler(load("stdlib").train, batch or 16, 128, seed=0).batch(10**6)
        model = nn.Sequential(GPT(config, 256), nn.Flatten(0, 1))
        return Problem(f"GPT {config.width} x 2", model, x, y.flatten(), "standard library")
    if name == "mlp":
        n = wide or 512
        layers = [
            nn.Linear(784, n),
            nn.ReLU(),
            nn.Linear(n, n),
            nn.ReLU(),
            nn.Linear(n, 10),
        ]
        x, y, what = images(data / "mnist" / "mnist.npz", (1, 28, 28), batch or 1024)
        return Problem(f"MLP {n}", nn.Sequential(nn.Flatten(), *layers), x, y, what)
    n = wide or 16
    layers = []
    for i, o in ((3, n), (n, 2 * n), (2 * n, 4 * n)):
        layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * n, 10))
    x, y, what = images(data / "cifar10" / "cifar10_5k_1k.npz", (3, 32, 32), batch or 128)
    return Problem(f"CNN {n}", model, x, y, what)


def images(place: Path, shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor, str]:
    if not place.exists():
        y = torch.randint(10, (count,))
        return (
            torch.randn(10, *shape)[y] + torch.randn(count, *shape),
            y,
            "ten clusters of noise",
        )
    with np.load(place) as content:
        chosen = np.random.default_rng(0).permutation(len(content["y_train"]))[:count]
        x, y = (torch.from_numpy(content[key][chosen]) for key in ("x_train", "y_train"))
    if x.shape[-1] == 3:
        x = x.permute(0, 3, 1, 2)
    return x.reshape(-1, *shape).float() / 64 - 2, y.long().flatten(), place.stem


def trained(given: Problem, steps: int) -> Problem:
    made = deepcopy(given)
    optimizer = torch.optim.AdamW(made.parameters, 2e-3)
    generator = torch.Generator().manual_seed(1)
    whole = made.inputs.ndim == 2  # windows of text: all of them at every step
    for _ in range(steps):
        chosen = torch.randint(len(made.inputs), (128,), generator=generator)
        batch = made.batch if whole else (made.inputs[chosen], made.targets[chosen])
        optimizer.zero_grad()
        made.loss(made.model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return made


# Products.


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.calls = function, 0

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        return self.function(*given)


def ours(given: Problem) -> Counted:
    return Counted(Hessian(given.model, given.loss, given.batch))


def by_hand(given: Problem) -> Counted:
    """The gradient with its graph, differentiated again and again: as people write it."""
    parameters = given.parameters
    gradients = torch.autograd.grad(
        given.loss(given.model, given.batch), parameters, create_graph=True
    )

    def product(v: Tensor) -> Tensor:
        pieces = [
            piece.view_as(p)
            for piece, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        found = torch.autograd.grad(gradients, parameters, pieces, retain_graph=True)
        return torch.cat([each.reshape(-1) for each in found])

    return Counted(product)


def curvlinops(given: Problem, columns: int = 1) -> Any:
    """Its operator, without its check of determinism; so many columns of a matrix at once."""

    class Operator(importlib.import_module("curvlinops").HessianLinearOperator):
        calls = 0

        def _matmat(self, M: list[Tensor]) -> list[Tensor]:
            self.calls += M[0].shape[-1]
            parts = zip(*(m.split(columns, -1) for m in M), strict=True)
            found = [super(Operator, self)._matmat(list(part)) for part in parts]
            return [torch.cat(each, -1) for each in zip(*found, strict=True)]

    model, criterion, data = given.model, given.criterion, [given.batch]
    return Operator(model, criterion, given.parameters, data, check_deterministic=False)


class PyHessian:
    """Its class on a problem; `limit` products at most."""

    def __init__(self, given: Problem, limit: float = math.inf):
        self._module = importlib.import_module("pyhessian.hessian")
        self.product = Counted(importlib.import_module("pyhessian.utils").hessian_vector_product)
        self.limit = limit
        self._module.hessian_vector_product = self._product
        self.hessian = self._module.hessian(
            given.model, given.criterion, data=given.batch, cuda=False
        )

    def _product(self, *given: Any) -> Any:
        if self.product.calls >= self.limit:
            raise TooLong
        return self.product(*given)


class TooLong(Exception):
    """More products than make sense to wait for."""


# Methods: each takes a problem, a seed and its knobs, and returns an answer and how many products.

Answer = tuple[Any, int]
Method = Callable[..., Answer]


def our_start(given: Problem, H: Any, seed: int) -> Tensor:
    """What `sharpness` starts from."""
    return start_near(H.gradient(), torch.Generator().manual_seed(seed))


def our_eigenvalues(given: Problem, seed: int, count: int, tolerance: float) -> Answer:
    H = Hessian(given.model, given.loss, given.batch)
    found = eigenpairs(H, our_start(given, H, seed), count, tolerance=tolerance)
    return found.values.numpy(), H.products


def arpack(
    product: Callable[[Tensor], Tensor], start: Tensor, count: int, ncv: int | None, tol: float
) -> Answer:
    counted = Counted(lambda v: product(torch.from_numpy(v).flatten()).numpy())
    kind = start.numpy().dtype
    operator = LinearOperator((len(start), len(start)), matvec=counted, dtype=kind)
    values = _eigsh(operator, start, count, ncv, tol)
    return values, counted.calls


def _eigsh(operator: Any, start: Tensor, count: int, ncv: int | None, tol: float) -> np.ndarray:
    try:
        values = eigsh(
            operator,
            count,
            which="LA",
            v0=start.numpy(),
            ncv=ncv,
            tol=tol,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence:
        return np.full(count, np.nan)
    return np.sort(values)[::-1]


def arpack_by_hand(
    given: Problem, seed: int, count: int, tol: float, ncv: int | None = None
) -> Answer:
    return arpack(by_hand(given), given.vector(seed), count, ncv, tol)


def arpack_from_gradient(
    given: Problem, seed: int, count: int, tol: float, ncv: int | None = None
) -> Answer:
    start = our_start(given, Hessian(given.model, given.loss, given.batch), seed)
    return arpack(by_hand(given), start, count, ncv, tol)


def arpack_curvlinops(given: Problem, seed: int, count: int, ncv: int | None, tol: float) -> Answer:
    operator = curvlinops(given)
    scipy_operator = operator.to_scipy(np.float32)
    return _eigsh(scipy_operator, given.vector(seed), count, ncv, tol), operator.calls


def pyhessian_eigenvalues(
    given: Problem, seed: int, count: int, tol: float, limit: float = math.inf
) -> Answer:
    torch.manual_seed(seed)
    peer = PyHessian(given, limit)
    try:
        values, _ = peer.hessian.eigenvalues(maxIter=1000, tol=tol, top_n=count)
    except TooLong:
        values = [math.nan] * count
    return np.sort(values)[::-1], peer.product.calls


def our_trace(given: Problem, seed: int, tolerance: float) -> Answer:
    H = Hessian(given.model, given.loss, given.batch)
    found = from_our_start(H, our_start(given, H, seed), seed, tolerance)
    return found.value, H.products


def from_our_start(product: Any, start: Tensor, seed: int, tolerance: float) -> Estimate:
    generator = torch.Generator().manual_seed(100 + seed)
    return trace(product, start, tolerance, generator=generator, start=start)


def pyhessian_trace(given: Problem, seed: int, products: int) -> Answer:
    torch.manual_seed(seed)
    peer = PyHessian(given)
    return float(np.mean(peer.hessian.trace(maxIter=products, tol=0))), peer.product.calls


def curvlinops_trace(name: str, columns: int) -> Method:
    def method(given: Problem, seed: int, products: int) -> Answer:
        torch.manual_seed(seed)
        operator = curvlinops(given, columns)
        estimate = getattr(importlib.import_module("curvlinops"), name)
        return float(estimate(operator, products)), operator.calls

    return method


# Knobs.


class Pool:
    """Rademacher probes W with A W and A A W, as the inner products that estimates are made of."""

    def __init__(self, product: Callable[[Tensor], Tensor], size: int, probes: int):
        generator = torch.Generator().manual_seed(77)
        W = torch.randint(2, (probes, size), generator=generator).float() * 2 - 1
        Y = torch.stack([product(w) for w in W])
        Z = torch.stack([product(y) for y in Y])
        self.WY, self.YY, self.YZ = ((a @ b.T).double() for a, b in ((W, Y), (Y, Y), (Y, Z)))
        self.probes = probes

    def hutchpp(self, chosen: Tensor) -> float:
        s, g = chosen.chunk(2)
        R, inside = self._range(s)
        # Qᵀg and Qᵀ A g of the others
        coordinates, images = (self._solve(R, M[s][:, g]) for M in (self.WY.T, self.YY))
        outside = self.WY.diagonal()[g] - 2 * (coordinates * images).sum(0)
        outside = outside + (coordinates * (inside @ coordinates)).sum(0)
        return float(inside.trace() + outside.mean())

    def xtrace(self, chosen: Tensor) -> float:
        R, inside = self._range(chosen)
        S = torch.linalg.inv(R.T)
        S = S / S.norm(dim=0)
        each = inside.trace() - (S * (inside @ S)).sum(0)
        V = self._solve(R, self.WY.T[chosen][:, chosen])
        V = V - S * (S * V).sum(0)
        images = R - S * (S * R).sum(0)
        each = each + self.WY.diagonal()[chosen]
        each = each - 2 * (V * images).sum(0) + (V * (inside @ V)).sum(0)
        return float(each.mean())

    def _range(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """R of the images, and the operator in their orthonormal basis."""
        R = torch.linalg.cholesky(self.YY[chosen][:, chosen], upper=True)
        inside = self._solve(R, self._solve(R, self.YZ[chosen][:, chosen]).T)
        return R, (inside + inside.T) / 2

    @staticmethod
    def _solve(R: Tensor, M: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(R.T, M, upper=False)


def krylov(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """T of a start, with every vector orthogonalized against all before it, twice."""
    Q = start.new_empty(steps, len(start))
    T = torch.zeros(steps, steps, dtype=torch.float64)
    w = start
    for k in range(steps):
        norm = torch.linalg.vector_norm(w)
        Q[k] = w / norm
        if k:
            T[k, k - 1] = T[k - 1, k] = norm.double()
        w = product(Q[k])
        for _ in range(2):
            along = Q[: k + 1] @ w
            w = w - Q[: k + 1].T @ along
            T[k, k] += along[k].double()
    return T


def on_tridiagonal(T: Tensor, count: int) -> Iterator[tuple[str, dict[str, Any], Answer]]:
    """What each method answers from a start, by family and setting."""
    start = torch.eye(len(T), dtype=T.dtype)[0]
    for tolerance in TOLERANCES:
        for ncv in NCV[count]:
            setting = {"ncv": ncv, "tol": tolerance}
            yield (
                "arpack",
                setting,
                arpack(lambda v: T @ v, start, count, ncv, tolerance),
            )
        yield "default", {"tol": tolerance}, arpack(lambda v: T @ v, start, count, None, tolerance)
        yield "power", {"tol": tolerance / 10}, power(T, count, tolerance / 10)


def from_gradient(T: Tensor, count: int) -> Iterator[tuple[str, dict[str, Any], Answer]]:
    """The same from the gradient: ours, and SciPy's if its user knew."""
    start = torch.eye(len(T), dtype=T.dtype)[0]
    for tolerance in TOLERANCES:
        found = eigenpairs(lambda v: T @ v, start, count, tolerance=tolerance)
        yield "ours", {"tolerance": tolerance}, (found.values.numpy(), found.products)
        for ncv in NCV[count]:
            answer = arpack(lambda v: T @ v, start, count, ncv, tolerance)
            yield "arpack, gradient", {"ncv": ncv, "tol": tolerance}, answer


def power(T: Tensor, count: int, tol: float) -> Answer:
    """PyHessian's iterations, each from a random vector, and its rule to stop.

    A vector is as random in the Ritz vectors as the start was, whose part in each is known.
    """
    values, vectors = torch.linalg.eigh(T)
    generator = torch.Generator().manual_seed(3)
    found: list[float] = []
    known = torch.zeros(len(T), 0, dtype=T.dtype)
    products = 0
    while len(found) < count and products < LIMIT:
        v = vectors[0] * torch.randn(len(T), generator=generator, dtype=T.dtype)
        value = math.inf
        while products < LIMIT:
            v = v - known @ (known.T @ v)
            v = v / v.norm()
            before, value = value, float(values @ v.square())
            v = values * v
            products += 1
            if abs(before - value) / (abs(before) + 1e-6) < tol:
                break
        found.append(value)
        known = torch.column_stack([known, v / v.norm()])
    return np.sort(found + [math.nan] * (count - len(found)))[::-1], products


def cheapest(
    found: list[list[tuple[str, dict[str, Any], Answer]]], reference: np.ndarray
) -> dict[str, dict[str, Any]]:
    """The setting of each family that reaches all values from all starts with fewest products."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for same in zip(*found, strict=True):
        family, setting, _ = same[0]
        error = max(off(values, reference) for _, _, (values, _) in same)
        products = statistics.mean(count for _, _, (_, count) in same)
        if error <= EIGENVALUE and products < best.get(family, (math.inf,))[0]:
            best[family] = products, setting
    return {family: setting for family, (_, setting) in best.items()}


def off(value: Any, reference: Any) -> float:
    """The largest relative error; infinite for what is not there."""
    error = np.max(np.abs(np.asarray(value) - reference) / np.abs(reference))
    return float(error) if np.isfinite(error) else math.inf


def probes_needed(pool: Pool, reference: float) -> dict[str, int]:
    """Products with which each estimator reaches the trace in the root mean square."""
    generator = torch.Generator().manual_seed(5)
    chosen = [torch.randperm(pool.probes, generator=generator) for _ in range(200)]

    def rms(estimate: Callable[[Tensor], float], count: int) -> float:
        errors = [off(estimate(each[:count]), reference) for each in chosen]
        return math.sqrt(statistics.mean(e**2 for e in errors))

    deviation = float(pool.WY.diagonal().std()) / abs(reference)
    needed = {"hutchinson_trace": math.ceil((deviation / TRACE) ** 2)}
    for k in range(2, pool.probes // 2 + 1):
        for name, estimate, probes, products in (
            ("hutchpp_trace", pool.hutchpp, 2 * k, 3 * k),
            ("xtrace", pool.xtrace, k, 2 * k),
        ):
            if name not in needed and rms(estimate, probes) <= TRACE:
                needed[name] = products
    return needed


class Kept:
    """Products that are kept for those who ask for the same."""

    def __init__(self, product: Callable[[Tensor], Tensor]):
        self._product, self._kept = product, {}

    def __call__(self, v: Tensor) -> Tensor:
        key = hashlib.sha256(v.numpy()).digest()
        if key not in self._kept:
            self._kept[key] = self._product(v)
        return self._kept[key].clone()


def our_tolerance(given: Problem, reference: float, seeds: int) -> float | None:
    """The largest tolerance of `trace` with which the root mean square error is reached."""
    H = Hessian(given.model, given.loss, given.batch)
    starts = {seed: our_start(given, H, seed) for seed in range(100, 100 + seeds)}
    kept = {seed: Kept(H) for seed in starts}
    for tolerance in TOLERANCES:
        errors = [
            off(from_our_start(kept[seed], start, seed, tolerance).value, reference)
            for seed, start in starts.items()
        ]
        if math.sqrt(statistics.mean(e**2 for e in errors)) <= TRACE:
            return tolerance
    return None


# The comparison.

Candidates = dict[str, tuple[Method, dict[str, Any]]]
OURS = "steepest"
LIKE_OURS = "eigsh, by hand, our start"


def eigenvalue_methods(
    given: Problem, count: int, found: list[Tensor], ours: list[Tensor]
) -> tuple[Candidates, np.ndarray]:
    tops = [torch.linalg.eigvalsh(T).flip(0)[:count].numpy() for T in (*found, *ours)]
    reference = np.max(tops, axis=0)
    best = cheapest([list(on_tridiagonal(T, count)) for T in found], reference)
    best |= cheapest([list(from_gradient(T, count)) for T in ours], reference)
    methods: Candidates = {}
    for name, family, method in (
        (OURS, "ours", our_eigenvalues),
        ("eigsh, product by hand", "arpack", arpack_by_hand),
        (LIKE_OURS, "arpack, gradient", arpack_from_gradient),
        ("eigsh, curvlinops", "arpack", arpack_curvlinops),
        ("eigsh, as it is", "default", arpack_by_hand),
        ("PyHessian", "power", pyhessian_eigenvalues),
    ):
        if family in best and is_here(name):
            methods[name] = method, {"count": count, **best[family]}
    return methods, reference


def trace_methods(given: Problem, seeds: int) -> tuple[Candidates, float, float]:
    H, like = ours(given), given.vector(0)
    generator = torch.Generator().manual_seed(999)
    reference = trace(H, like, 1e-4, REFERENCE, generator)
    needed = probes_needed(Pool(H, given.size, PROBES), reference.value)
    methods: Candidates = {}
    if tolerance := our_tolerance(given, reference.value, 3 * seeds):
        methods[OURS] = our_trace, {"tolerance": tolerance}
    columns = fastest_columns(given) if is_here("curvlinops") else 1
    methods["PyHessian"] = pyhessian_trace, {"products": needed["hutchinson_trace"]}
    for name, products in needed.items():
        methods[f"curvlinops {name}"] = (
            curvlinops_trace(name, columns),
            {"products": products},
        )
    methods = {name: method for name, method in methods.items() if is_here(name)}
    return methods, reference.value, reference.error / abs(reference.value)


def fastest_columns(given: Problem) -> int:
    """How many columns at once are fastest for curvlinops."""
    V = torch.stack([given.vector(i) for i in range(8)], 1)
    seconds = {}
    for columns in (1, 4, 8):
        operator = curvlinops(given, columns)
        began = clock()
        operator @ V
        seconds[columns] = clock() - began
    return min(seconds, key=seconds.get)


def race(
    given: Problem, methods: Candidates, reference: Any, rounds: int, bound: float
) -> list[dict[str, Any]]:
    """Time the methods in turns; those beyond three times the fastest take part once."""
    runs: dict[str, list[tuple[float, int, float]]] = {name: [] for name in methods}
    order = random.Random(0)
    for round in range(rounds):
        fastest = min((seen[0][0] for seen in runs.values() if seen), default=math.inf)
        for name in order.sample(sorted(methods), len(methods)):
            if round and runs[name][0][0] > 3 * fastest:
                continue
            method, setting = methods[name]
            began = clock()
            answer, products = method(given, round, **setting)
            seconds = clock() - began
            runs[name].append((seconds, products, off(answer, reference)))
            given.model.zero_grad()
    rows = []
    for name, seen in runs.items():
        ratios = [a[0] / b[0] for a, b in zip(runs.get(OURS, []), seen, strict=False)]
        reached = [error for _, _, error in seen]
        worst = (
            max(reached)
            if bound == EIGENVALUE
            else math.sqrt(sum(e * e for e in reached) / len(seen))
        )
        rows.append(
            {
                "method": name,
                "reached": worst <= (bound if bound == EIGENVALUE else 2 * bound),
                "setting": {k: v for k, v in methods[name][1].items() if k != "count"},
                "ms": 1e3 * statistics.median(s for s, _, _ in seen),
                "products": statistics.mean(p for _, p, _ in seen),
                "ms_product": 1e3 * statistics.median(s / p for s, p, _ in seen),
                "error": worst if math.isfinite(worst) else None,
                "rounds": len(seen),
                "ratio": statistics.median(ratios) if ratios else None,
            }
        )
    return rows


def against_best(rows: list[dict[str, Any]]) -> tuple[str, float] | None:
    """The fastest peer that got there, and our time by its time if we got there too."""
    peers = [r for r in rows if r["method"] not in (OURS, LIKE_OURS) and r["reached"]]
    best = min(peers, key=lambda r: r["ms"], default=None)
    there = any(r["reached"] for r in rows if r["method"] == OURS)
    return (best["method"], best["ratio"] if there else math.inf) if best else None


def compare(given: Problem, state: str, settings: Settings) -> Iterator[dict[str, Any]]:
    short = state == "untrained"
    H = ours(given)
    starts = 3 if short else settings.starts
    found = [krylov(H, given.vector(seed), STEPS) for seed in range(starts)]
    kept = Hessian(given.model, given.loss, given.batch)
    from_ours = [krylov(kept, our_start(given, kept, seed), STEPS) for seed in range(starts)]
    tasks = [
        (
            f"{count} largest",
            *eigenvalue_methods(given, count, found, from_ours),
            EIGENVALUE,
            0.0,
        )
        for count in (1, 10)
    ]
    if not short:  # where the trace of an untrained network nearly cancels, 5 % of it are nothing
        methods, reference, error = trace_methods(given, settings.starts)
        tasks.append(("trace", methods, reference, TRACE, error))
    for task, methods, reference, bound, reference_error in tasks:
        rows = race(given, methods, reference, 1 if short else settings.rounds, bound)
        best = against_best(rows)
        table(
            f"{given.name}, {state}: {task} to {bound:g}",
            COLUMNS,
            [
                [
                    r["method"],
                    ", ".join(f"{k} {v:g}" for k, v in r["setting"].items()),
                    f"{r['products']:.0f}",
                    f"{r['ms']:.0f}",
                    f"{r['ms_product']:.1f}",
                    ("" if r["reached"] else "! ")
                    + (f"{r['error']:.1e}" if r["error"] else "nothing"),
                    f"{r['ratio']:.2f}" if r["ratio"] else "-",
                ]
                for r in sorted(rows, key=lambda r: r["ms"])
            ],
            f"{given.size:,} parameters, {given.data}; best peer: {best[0]}" if best else "",
        )
        yield {
            "problem": given.name,
            "state": state,
            "task": task,
            "data": given.data,
            "parameters": given.size,
            "reference": np.atleast_1d(reference).tolist(),
            "reference_error": reference_error,
            "best_peer": best[0] if best else None,
            "ratio": best[1] if best and math.isfinite(best[1]) else None,
            "methods": rows,
        }


def costs(data: Path) -> list[dict[str, Any]]:
    """Milliseconds of a product, in the median of five rounds."""
    rows = []
    for name, batch, wide in (
        *(("mlp", batch, 512) for batch in (64, 1024)),
        ("mlp", 256, 1024),
        *(("cnn", batch, 16) for batch in (32, 256)),
        *(("gpt", batch, 64) for batch in (2, 16)),
        ("gpt", 4, 128),
    ):
        given = problem(name, data, batch, wide)
        v = given.vector(0)
        pieces = [
            piece.view_as(p)
            for piece, p in zip(
                v.split([p.numel() for p in given.parameters]),
                given.parameters,
                strict=True,
            )
        ]
        runs: dict[str, Callable[[], object]] = {
            "gradient": lambda given=given: torch.autograd.grad(
                given.loss(given.model, given.batch), given.parameters
            ),
            OURS: partial(ours(given), v),
            "by hand": partial(by_hand(given), v),
        }
        if is_here("PyHessian"):
            peer = PyHessian(given)
            known = peer.hessian.gradsH, peer.hessian.params, pieces
            runs["PyHessian"] = partial(peer.product, *known)
        if is_here("curvlinops"):
            runs["curvlinops"] = partial(curvlinops(given).__matmul__, v)
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(6):
            for key, run in runs.items():
                began = clock()
                run()
                seconds[key].append(clock() - began)
        given.model.zero_grad()
        found = {key: 1e3 * statistics.median(each[1:]) for key, each in seconds.items()}
        rows.append(
            {
                "problem": given.name,
                "batch": batch,
                "parameters": given.size,
                "ms": found,
            }
        )
    table(
        "one product, ms",
        ["problem", "batch", "parameters", *rows[0]["ms"], "ours / gradient"],
        [
            [
                r["problem"],
                str(r["batch"]),
                f"{r['parameters']:,}",
                *(f"{ms:.1f}" for ms in r["ms"].values()),
                f"{r['ms'][OURS] / r['ms']['gradient']:.2f}",
            ]
            for r in rows
        ],
    )
    return rows


MODULES = {"PyHessian": "pyhessian", "curvlinops": "curvlinops"}


def clock() -> float:
    """Seconds; of the processor where there is one thread, as others may run beside it."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def missing() -> dict[str, str]:
    """Peers that are not there."""
    return {k: "not installed" for k, m in MODULES.items() if not importlib.util.find_spec(m)}


def is_here(method: str) -> bool:
    return not any(name in method for name in missing())


@contextmanager
def differentiable() -> Iterator[None]:
    """Attention that can be differentiated twice, which the peers leave to their users."""
    with sdpa_kernel([SDPBackend.MATH]):
        yield


def main(settings: Settings) -> None:
    quiet()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    absent = missing()
    console = Console(stderr=True)
    with differentiable():
        rows = costs(Path(settings.data)) if settings.products else []
        found = []
        for name in settings.problems:
            given = problem(name, Path(settings.data))
            states = {"trained": trained(given, settings.steps)}
            if settings.untrained:
                states["untrained"] = given
            for state, each in states.items():
                console.print(f"{each.name}, {state} ...")
                found += compare(each, state, settings)
    table(
        "time of ours by that of the best peer",
        ["problem", "state", "task", "best peer", "ratio"],
        [
            [
                *(r[key] or "-" for key in ("problem", "state", "task", "best_peer")),
                f"{r['ratio']:.2f}"
                if r["ratio"]
                else "no peer"
                if not r["best_peer"]
                else "not there",
            ]
            for r in found
        ],
    )
    peers = [Peer(p, lambda *_: None, p) for p in PACKAGES]
    save(
        settings.out / "curvature_cpu.json",
        settings,
        peers,
        absent,
        products=rows,
        rows=found,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
