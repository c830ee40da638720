"""What a run costs: seconds, the optimizer's share of them, and memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_leaves

from steepest.lab.memory import check_fits

RECENT = 200  # steps that the median is taken over


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps between steps."""
    kept = tree_leaves([*optimizer.state.values()])
    tensors = [leaf for leaf in kept if isinstance(leaf, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def check_memory(
    model: str,
    batch: str,
    *,
    parameters: int,
    constants: int = 0,
    activations: int = 0,
    device: torch.device | str,
    remedy: str = "width, depth or context",
) -> None:
    """Refuse a model or a batch that the memory of the device cannot hold, before it is made.

    Weights, their gradients and constants count as float32.

    Args:
        model: what it is called, with its sizes, such as "a model of width 128".
        batch: what it is called, such as "a batch of 8 x 128 tokens".
        parameters: how many numbers the model trains.
        constants: how many it has besides, such as tables of angles.
        activations: bytes of a batch and of what a forward pass keeps, at least.
        device: where the model is to be.
        remedy: which sizes of the model can be smaller.

    Raises:
        InputError: with the bytes that are needed and those that there are.

    >>> check_memory("a model", "a batch", parameters=10**15, device="cpu")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    steepest.lab.errors.InputError: got a model; that takes at least 8,000 TB of memory, and ...
    """
    weights = 4 * (2 * parameters + constants)
    check_fits(model, weights, f"choose a smaller {remedy}", device)
    passed = f"{batch} in {model}"
    check_fits(passed, weights + activations, f"choose a smaller batch, {remedy}", device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once: by tensors on an accelerator, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Clock:
    """Seconds spent on updates, without validation, measurements and checkpoints."""

    def __init__(self, device: torch.device, seconds: float = 0.0, **recent: Any):
        self.device = device
        self.seconds = seconds
        self.step_times = deque(recent.get("step_times", []), maxlen=RECENT)
        self.optimizer_times = deque(recent.get("optimizer_times", []), maxlen=RECENT)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        """Begin a step."""
        self._started = self._now()

    def optimizer_starts(self) -> None:
        """Mark that what follows is the optimizer's."""
        self._optimizer_started = self._now()

    def stop(self, count: bool) -> None:
        """End a step; one that also measured something counts as long as a usual one."""
        now = self._now()
        if count:
            self.step_times.append(now - self._started)
            self.optimizer_times.append(now - self._optimizer_started)
        self.seconds += self.step_times[-1] if self.step_times else now - self._started

    def totals(self) -> dict[str, float | None]:
        """Seconds of all steps; the median of recent ones, and the optimizer's share of it."""
        if not self.step_times:
            return {"seconds": self.seconds, "step_seconds": None, "optimizer_share": None}
        step = statistics.median(self.step_times)
        optimizer = statistics.median(self.optimizer_times)
        return {
            "seconds": self.seconds,
            "step_seconds": step,
            "optimizer_share": optimizer / step,
        }

    def state(self) -> dict[str, Any]:
        """What the clock needs to go on after a restart."""
        return {
            "seconds": self.seconds,
            "step_times": list(self.step_times),
            "optimizer_times": list(self.optimizer_times),
        }
