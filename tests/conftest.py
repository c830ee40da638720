"""Every test starts from the same state: one thread, seed 0, default modes, no foreign modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that a test wrote into its folder is not there for the next test."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        place = getattr(sys.modules[name], "__file__", None)
        if place and Path(place).is_relative_to(tmp_path_factory.getbasetemp()):
            del sys.modules[name]
