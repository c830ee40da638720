"""Floating-point operations: how many a model takes, how many a processor can do, and the share."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from steepest.lab.train.shadows import shadow, shadow_batch
from steepest.random_numbers import generators_kept

SIDE = 1024
"""Of the matrices whose product shows how fast a CPU is."""
_PRODUCTS = 4


def flops_of(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor]) -> int | None:
    """Return the floating-point operations of one forward and one backward pass.

    Those of matrix products and convolutions count, a multiplication and an addition as two. They
    are counted on a copy without data, on the meta device, so nothing is computed. The model, its
    gradients and the random generators stay as they are. Attention is counted as two products
    without a mask, also where a causal kernel leaves half of them out. Blocks that are computed
    again in the backward pass count again.

    Args:
        model: any module, on any device.
        batch: what `loss` takes; its tensors can be on any device.
        loss: `loss(model, batch) -> scalar`.

    Returns:
        The number, or None for a model that cannot run without data, such as one that looks at
        numbers.

    >>> layer = nn.Linear(3, 5, bias=False)
    >>> flops_of(layer, torch.ones(2, 3), lambda model, batch: model(batch).sum())
    120
    """
    try:
        with generators_kept():
            copy = shadow(model, "meta")
            with FlopCounterMode(display=False) as counter:
                value = loss(copy, shadow_batch(batch, "meta"))
                if value.requires_grad:
                    value.backward()
            return int(counter.get_total_flops())
    except Exception:  # whatever a model of the user's raises without data
        return None


class Peak(NamedTuple):
    """What a GPU can do in a second, in units of 10¹² operations, without sparsity.

    Attributes:
        words: of the name of the device; all of them are in it.
        half: in bfloat16 and float16, summed in float32, with tensor cores.
        tf32: in float32 rounded to TF32, with tensor cores.
        full: in float32.
    """

    words: tuple[str, ...]
    half: float
    tf32: float
    full: float


# From NVIDIA's data sheets of the H200, H100, A100, A10, L40S, L40 and L4, and its white papers on
# the Ada and Ampere GeForce. Where these give numbers with sparsity only, it is half of them.
PEAKS = (
    Peak(("H200", "NVL"), 835.5, 417.5, 60.0),
    Peak(("H200",), 989.5, 494.5, 67.0),
    Peak(("H100", "PCIe"), 756.5, 378.0, 51.0),
    Peak(("H100", "NVL"), 835.5, 417.5, 60.0),
    Peak(("H100",), 989.5, 494.5, 67.0),
    Peak(("A100",), 312.0, 156.0, 19.5),
    Peak(("A10",), 125.0, 62.5, 31.2),
    Peak(("L40S",), 362.0, 183.0, 91.6),
    Peak(("L40",), 181.0, 90.5, 90.5),
    Peak(("L4",), 121.0, 60.0, 30.3),
    Peak(("4090",), 165.2, 82.6, 82.6),
    Peak(("3090",), 71.0, 35.6, 35.6),
)
_OTHER_CHIPS = {"MIG", "Laptop", "D", "Ti"}


def peak_flops(device: torch.device | str, dtype: torch.dtype | str) -> float | None:
    """Return the floating-point operations that a processor can do in a second.

    GPUs are known by name, with the numbers of their data sheets. float32 means TF32 where
    `torch.set_float32_matmul_precision` allows it. A CPU has no such number: a few products of
    matrices of 1,024 rows are timed, once in a process for each type and number of threads.

    Args:
        device: of the model.
        dtype: of the products, such as `torch.bfloat16` or "bfloat16".

    Returns:
        The number, or None for GPUs and types that are not in the table.
    """
    device = torch.device(device)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if device.type == "cpu":
        return _measured(dtype, torch.get_num_threads())
    if device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return _of_gpu(torch.cuda.get_device_name(device), dtype, tf32)
    return None


def _of_gpu(name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    words = set(name.replace("-", " ").split())
    peak = next((peak for peak in PEAKS if words >= set(peak.words)), None)
    if peak is None or words & _OTHER_CHIPS:
        return None
    rates = {
        torch.bfloat16: peak.half,
        torch.float16: peak.half,
        torch.float32: peak.tf32 if tf32 else peak.full,
    }
    return 1e12 * rates[dtype] if dtype in rates else None


@functools.cache
def _measured(dtype: torch.dtype, threads: int) -> float:
    """Operations a second in the fastest of a few products; numbers of threads have their own."""
    X = torch.full((SIDE, SIDE), 0.5, dtype=dtype)
    times = []
    for _ in range(_PRODUCTS):
        began = time.perf_counter()
        X @ X
        times.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(times)


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Return the share of what a processor can do that the model's own operations take.

    "Model FLOPs utilization" (Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B).

    Args:
        flops: of one step, as from `flops_of`, times the number of forward passes in it.
        seconds: of one step.
        peak: operations a second, as from `peak_flops`.

    >>> mfu(3e12, 0.5, 12e12)
    0.5
    """
    return flops / seconds / peak
