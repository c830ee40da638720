"""The networks of the curvature benchmark, and Hessian-vector products by each package."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from measure import table
from networks import chain, seeded
from steepest.curvature import Hessian
from steepest.lab.data import Sampler, load
from steepest.lab.models import GPT, GPTConfig
from steepest.linalg.krylov import Operator, gaussian, start_near

STEEPEST = "steepest"
MODULES = {"PyHessian": "pyhessian", "curvlinops": "curvlinops"}
MISSING = {k: "not installed" for k, m in MODULES.items() if not importlib.util.find_spec(m)}
CRITERION = nn.CrossEntropyLoss()


def installed(method: str) -> bool:
    """Whether the package that a method names is installed."""
    return not any(package in method for package in MISSING)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of a call; CPU time where there is one thread, as others may share it."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    result = work()
    return clock() - began, result


# Networks.


@dataclass
class Problem:
    """A network, one batch, and the mean cross entropy of it."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    data: str

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return CRITERION(model(batch[0]), batch[1])

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def random_vector(self, seed: int) -> Tensor:
        return gaussian(torch.zeros(self.size), seeded(seed))

    def split(self, v: Tensor) -> list[Tensor]:
        """The vector `(n,)` in the shapes of the parameters."""
        parts = v.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]


def problem(name: str, folder: Path, batch: int | None = None, width: int | None = None) -> Problem:
    torch.manual_seed(0)
    if name == "gpt":
        config = GPTConfig(width=width or 64, depth=2, context=128)
        x, y = Sampler(load("stdlib").train, batch or 16, 128, seed=0).batch(10**6)
        model = nn.Sequential(GPT(config, 256), nn.Flatten(0, 1))
        return Problem(f"GPT {config.width} x 2", model, x, y.flatten(), "standard library")
    if name == "mlp":
        n = width or 512
        model = nn.Sequential(nn.Flatten(), chain((784, n, n, 10), nn.ReLU))
        return Problem(
            f"MLP {n}", model, *images(folder / "mnist" / "mnist.npz", (1, 28, 28), batch or 1024)
        )
    n = width or 16
    layers: list[nn.Module] = []
    for i, o in ((3, n), (n, 2 * n), (2 * n, 4 * n)):
        layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * n, 10))
    path = folder / "cifar10" / "cifar10_5k_1k.npz"
    return Problem(f"CNN {n}", model, *images(path, (3, 32, 32), batch or 128))


def images(path: Path, shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor, str]:
    """Images, labels and the name of the data; without the file, ten clusters of noise."""
    if not path.exists():
        y = torch.randint(10, (count,))
        x = torch.randn(10, *shape)[y] + torch.randn(count, *shape)
        return x, y, "ten clusters of noise"
    with np.load(path) as arrays:
        rows = np.random.default_rng(0).permutation(len(arrays["y_train"]))[:count]
        x, y = (torch.from_numpy(arrays[key][rows]) for key in ("x_train", "y_train"))
    if x.shape[-1] == 3:
        x = x.permute(0, 3, 1, 2)
    return x.reshape(-1, *shape).float() / 64 - 2, y.long().flatten(), path.stem


def trained(initial: Problem) -> Problem:
    """A copy after 60 steps of AdamW, on 128 images or on all windows of text."""
    problem = deepcopy(initial)
    optimizer = torch.optim.AdamW(problem.parameters, 2e-3)
    generator = seeded(1)
    for _ in range(60):
        rows = torch.randint(len(problem.inputs), (128,), generator=generator)
        text = problem.inputs.ndim == 2
        batch = problem.batch if text else (problem.inputs[rows], problem.targets[rows])
        optimizer.zero_grad()
        problem.loss(problem.model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return problem


# Products.


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.function(*arguments)


def hessian(problem: Problem) -> Hessian:
    return Hessian(problem.model, problem.loss, problem.batch)


def near_gradient(H: Hessian, seed: int) -> Tensor:
    """The start of `sharpness`: the gradient with a tenth of a random vector."""
    return start_near(H.gradient(), seeded(seed))


def by_hand(problem: Problem) -> Operator:
    """The gradient with its graph, which each product differentiates again."""
    parameters = problem.parameters
    loss = problem.loss(problem.model, problem.batch)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)

    def product(v: Tensor) -> Tensor:
        images = torch.autograd.grad(gradients, parameters, problem.split(v), retain_graph=True)
        return torch.cat([image.reshape(-1) for image in images])

    return product


def pyhessian(problem: Problem) -> tuple[Any, Counted]:
    """PyHessian's object, and the product that it calls."""
    module = importlib.import_module("pyhessian.hessian")
    product = Counted(importlib.import_module("pyhessian.utils").hessian_vector_product)
    module.hessian_vector_product = product
    return module.hessian(problem.model, CRITERION, data=problem.batch, cuda=False), product


def curvlinops(problem: Problem, columns: int = 1) -> Any:
    """The operator of curvlinops without its check of determinism.

    It multiplies `columns` columns of a matrix at once, and counts all columns in `calls`.
    """

    class CountedOperator(importlib.import_module("curvlinops").HessianLinearOperator):
        calls = 0

        def _matmat(self, M: list[Tensor]) -> list[Tensor]:
            self.calls += M[0].shape[-1]
            blocks = zip(*(m.split(columns, -1) for m in M), strict=True)
            images = [super(CountedOperator, self)._matmat(list(block)) for block in blocks]
            return [torch.cat(parts, -1) for parts in zip(*images, strict=True)]

    data = [problem.batch]
    return CountedOperator(
        problem.model, CRITERION, problem.parameters, data, check_deterministic=False
    )


def fastest_columns(problem: Problem) -> int:
    """How many columns at once are fastest for curvlinops."""
    V = torch.stack([problem.random_vector(seed) for seed in range(8)], 1)
    operators = {columns: curvlinops(problem, columns) for columns in (1, 4, 8)}
    return min(operators, key=lambda columns: timed(partial(operators[columns].__matmul__, V))[0])


def product_times(folder: Path) -> list[dict[str, Any]]:
    """Milliseconds of a gradient and of one product by each package: medians of five rounds."""
    sizes = [("mlp", 64, 512), ("mlp", 1024, 512), ("mlp", 256, 1024)]
    sizes += [("cnn", 32, 16), ("cnn", 256, 16)]
    sizes += [("gpt", 2, 64), ("gpt", 16, 64), ("gpt", 4, 128)]
    rows = []
    for name, batch, width in sizes:
        network = problem(name, folder, batch, width)
        v = network.random_vector(0)
        loss = partial(network.loss, network.model, network.batch)
        runs: dict[str, Callable[[], object]] = {
            "gradient": lambda loss=loss, p=network.parameters: torch.autograd.grad(loss(), p),
            STEEPEST: partial(hessian(network), v),
            "by hand": partial(by_hand(network), v),
        }
        if installed("PyHessian"):
            peer, product = pyhessian(network)
            runs["PyHessian"] = partial(product, peer.gradsH, peer.params, network.split(v))
        if installed("curvlinops"):
            runs["curvlinops"] = partial(curvlinops(network).__matmul__, v)
        rounds = [{key: timed(run)[0] for key, run in runs.items()} for _ in range(6)][1:]
        network.model.zero_grad()
        ms = {key: 1e3 * statistics.median(seconds[key] for seconds in rounds) for key in runs}
        size = network.size
        rows.append({"problem": network.name, "batch": batch, "parameters": size, "ms": ms})
    table(
        "one product, ms",
        ["problem", "batch", "parameters", *rows[0]["ms"], "ours / gradient"],
        [
            [
                row["problem"],
                str(row["batch"]),
                f"{row['parameters']:,}",
                *(f"{ms:.1f}" for ms in row["ms"].values()),
                f"{row['ms'][STEEPEST] / row['ms']['gradient']:.2f}",
            ]
            for row in rows
        ],
    )
    return rows
