from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("STEEPEST_CACHE", str(folder))
    return folder


@pytest.fixture
def real_data() -> Path:
    if "STEEPEST_DATA" not in os.environ:
        pytest.skip("STEEPEST_DATA names no folder with real data")
    return Path(os.environ["STEEPEST_DATA"])
