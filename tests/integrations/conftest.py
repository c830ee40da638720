"""What watches an optimizer through all wrappers of a trainer, and what runs two processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from steepest import MatrixView
from steepest.optim import update_scale


class Update(NamedTuple):
    """The singular values of one step of one matrix, in units of its rate and scale."""

    name: str
    singular_values: Tensor


class Observer:
    """What every step of every optimizer of this package did to the matrices."""

    def __init__(self) -> None:
        self.steps: list[list[Update]] = []
        self._before: dict[Tensor, Tensor] = {}

    def before(self, optimizer: Optimizer, *_: object) -> None:
        # all of them: with a closure, gradients are made only inside of the step
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._before = {p: p.detach().clone() for p in params}

    def after(self, optimizer: Optimizer, *_: object) -> None:
        matrices = self._matrices(optimizer)
        if matrices:
            self.steps.append([u for matrix in matrices for u in self._updates(*matrix)])

    @staticmethod
    def _matrices(optimizer: Optimizer) -> list[tuple[dict, Tensor, str]]:
        """Group, parameter and name of what is to be updated in the spectral geometry."""
        return [
            (group, p, name)
            for group in optimizer.param_groups
            if group.get("geometry") == "spectral" and group["lr"] > 1e-4
            for p, name in zip(group["params"], group["param_names"], strict=True)
            if p.grad is not None
        ]

    def _updates(self, group: dict, p: Tensor, name: str) -> Iterator[Update]:
        views = {id(q): view for q, view in zip(group["params"], group["views"], strict=True)}
        decayed = self._before[p] * (1 - group["lr"] * group["weight_decay"])
        for matrix in MatrixView(*views[id(p)]).matrices((decayed - p.detach()).double()):
            unit = group["lr"] * update_scale(group["scale"], *matrix.shape)
            yield Update(name, torch.linalg.svdvals(matrix) / unit)

    def assert_spectral(self, names: set[str], steps: int) -> None:
        """Every one of `names`, and nothing else, moved as an orthogonal matrix, in each step.

        Singular values are one where the gradient has any; a gradient of low rank leaves some near
        zero. Those of gradient descent or Adam are spread over all sizes, and not in these units.
        """
        assert len(self.steps) >= steps
        for updates in self.steps:
            assert {update.name for update in updates} == names
            for name, values in updates:
                assert 0.8 < values[0] < 1.2, name
                assert (values > 0.7).sum() >= min(4, len(values)), name
                assert values.square().mean().sqrt() > 0.4, name


@pytest.fixture
def observer() -> Iterator[Observer]:
    """Watches all optimizers of this package while a test runs."""
    watching = Observer()
    hooks = [
        register_optimizer_step_pre_hook(watching.before),
        register_optimizer_step_post_hook(watching.after),
    ]
    yield watching
    for hook in hooks:
        hook.remove()


BEGIN = """
import os, sys, warnings
import torch

warnings.simplefilter("ignore")
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
)
"""
END = """
torch.distributed.barrier()
os._exit(0)  # gloo's threads now and then abort a process that ends as usual
"""


def run_in_two(script: str, folder: Path) -> None:
    """Run `script` twice, with its `rank` and the text `folder`; it can import the tests here."""
    file = folder / "worker.py"
    file.write_text(BEGIN + textwrap.dedent(script) + END)
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path,
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, str(file), str(rank), str(folder)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=180)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.fixture(scope="session", name="run_in_two")
def _run_in_two() -> Callable[[str, Path], None]:
    """`run_in_two`, which test files cannot import from here."""
    return run_in_two
