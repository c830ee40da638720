"""Whether memory can hold what is asked for, before any of it is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from steepest.lab.errors import InputError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_memory(device: torch.device | str = "cpu") -> int | None:
    """Return the bytes of memory of a device; None where nobody says.

    That of a CPU is what the machine has, or what the container of the process may take.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    for path in map(Path, _LIMITS):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)


def check_fits(request: str, needed: int, remedy: str, device: torch.device | str = "cpu") -> None:
    """Refuse what no memory of the device can hold.

    Args:
        request: what is asked for, such as "a batch of 8 sequences".
        needed: bytes that it takes at least.
        remedy: what to do.
        device: where it is to be.

    Raises:
        InputError: with both numbers of bytes.

    >>> check_fits("a number", 8, "take none")
    >>> check_fits("a model", 10**18, "take a smaller width")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    steepest.lab.errors.InputError: got a model; that takes at least 1,000,000 TB of memory, and ...
    """
    has = device_memory(device)
    if has is not None and needed > has:
        where = "this machine" if torch.device(device).type == "cpu" else str(device)
        raise InputError(
            f"got {request}; that takes at least {readable(needed)} of memory, and {where} has "
            f"{readable(has)}; {remedy}"
        )


def readable(size: int) -> str:
    """Return a number of bytes in units of 1000.

    >>> readable(800), readable(24_500_000_000), readable(3 * 10**15)
    ('800 bytes', '24.5 GB', '3,000 TB')
    """
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            scaled = size / 10**power
            return f"{scaled:,.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{size} bytes"


def bytes_of(value: object) -> int:
    """Return the bytes that the tensors in a container show; a tensor is one too.

    >>> bytes_of([torch.zeros(3), {"x": torch.zeros(2, dtype=torch.int64)}, 5])
    28
    """
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
