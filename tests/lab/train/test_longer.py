"""A finished run that is asked for more steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steepest.files import read_json
from steepest.lab.errors import InputError
from steepest.lab.train import TrainConfig, train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} and {i * i % 97}; " for i in range(3000)))
    return TrainConfig(
        data=str(path), width=16, depth=1, context=16, model_options=("heads=2",), steps=10,
        batch=4, warmup=2, threads=1, validate_every=5, validate_windows=4, checkpoint_every=4,
    )  # fmt: skip


def _end(out: Path) -> tuple[bytes, Any]:
    last = max((out / "checkpoints").glob("step-*"))
    return (last / "model.safetensors").read_bytes(), read_json(out / "result.json")


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_longer_run_ends_as_if_it_had_been_planned_so(
    config: TrainConfig, tmp_path: Path, schedule: Any
) -> None:
    short = replace(config, schedule=schedule)
    longer = replace(short, steps=20)
    train(short, tmp_path / "parts")
    said: list[str] = []
    train(longer, tmp_path / "parts", say=said.append)
    begin = 10 if schedule == "constant" else 6  # the last 40% of a run decay
    assert f"20 steps in place of 10: going on from step {begin}" in said
    train(longer, tmp_path / "whole")
    (weights, result), (expected, whole) = _end(tmp_path / "parts"), _end(tmp_path / "whole")
    assert weights == expected
    assert result["validation_loss"] == whole["validation_loss"]
    assert result["steps"] == 20
    assert read_json(tmp_path / "parts" / "config.json")["steps"] == 20


def test_tokens_can_grow_too(config: TrainConfig, tmp_path: Path) -> None:
    short = replace(config, schedule="constant", tokens=10 * 64)
    assert train(short, tmp_path / "run")["steps"] == 10
    assert train(replace(short, tokens=15 * 64), tmp_path / "run")["tokens"] == 15 * 64


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"schedule": "linear"}, {"steps": 20}),
        ({"schedule": "cosine"}, {"steps": 20}),
        ({"schedule": "constant"}, {"steps": 5}),
        ({"schedule": "constant", "warmup": None}, {"steps": 90}),  # 2 steps of warm-up, then 18
    ],
)
def test_a_schedule_that_cannot_go_on_says_so_and_nothing_is_lost(
    config: TrainConfig, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    first = replace(config, **before)
    result = train(first, tmp_path / "run")
    with pytest.raises(InputError, match=r"holds a run .*(another --out|Choose another)"):
        train(replace(first, **after), tmp_path / "run")
    assert train(first, tmp_path / "run") == result


def test_other_settings_still_have_to_be_the_same(config: TrainConfig, tmp_path: Path) -> None:
    first = replace(config, schedule="constant")
    train(first, tmp_path / "run")
    with pytest.raises(InputError, match=r"batch was 4, now 2"):
        train(replace(first, steps=20, batch=2), tmp_path / "run")


def test_a_short_run_goes_on_with_the_warm_up_that_it_had(
    config: TrainConfig, tmp_path: Path
) -> None:
    short = replace(config, schedule="wsd", warmup=None)  # a fifth: 2 steps
    train(short, tmp_path / "parts")
    settings = (tmp_path / "parts" / "config.toml").read_text()
    with pytest.raises(InputError, match=r"holds a run with a warm-up of 2 .* add --warmup 2"):
        train(replace(short, steps=30), tmp_path / "parts")
    assert (tmp_path / "parts" / "config.toml").read_text() == settings
    longer = replace(short, steps=30, warmup=2)
    train(longer, tmp_path / "parts")
    train(longer, tmp_path / "whole")
    assert _end(tmp_path / "parts")[0] == _end(tmp_path / "whole")[0]
