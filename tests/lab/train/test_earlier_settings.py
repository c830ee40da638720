"""Settings of run folders that an earlier version wrote."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.data.shapes import TextShape
from steepest.lab.files import write_json
from steepest.lab.models import GPTConfig, sizes_of
from steepest.lab.train.run_folder import stored_settings


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"width": 64},  # with 4 heads, where there are 2 by default now
        {"width": 256, "heads": 4, "mlp": "swiglu"},
        {"width": 24, "heads": 2, "depth": 1, "context": 16, "tied": True},
        {"positions": "learned", "bias": True},
    ],
)
def test_a_gpt_of_an_earlier_version_is_the_same_model(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    before = replace(GPTConfig(), **changes)
    sizes = asdict(before)
    del sizes["norm"]  # which there was not
    write_json(tmp_path / "config.json", {"model": sizes, "steps": 25})
    now = stored_settings(tmp_path, {"steps": 300, "seed": 0})
    assert (now["steps"], now["seed"]) == (25, 0)
    shape = TextShape(256, now["context"])
    options = now["model_options"]
    sizes_now = sizes_of(
        now["model"], shape, width=now["width"], depth=now["depth"], options=options
    )
    assert sizes_now == before
