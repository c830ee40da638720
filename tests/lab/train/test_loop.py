from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.curvature import SharpnessTracker
from steepest.lab.errors import Diverged, InputError
from steepest.lab.interruption import Terminated
from steepest.lab.models import GPTConfig
from steepest.lab.train import TrainConfig, loop, train
from steepest.lab.train.run_folder import locked, read_metrics
from steepest.optim.family import study_names

SIZES = GPTConfig(width=16, depth=1, heads=2, context=16)
MODEL: dict[str, Any] = {
    "width": 16, "depth": 1, "context": 16, "model_options": ("heads=2",)
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} and {i * i % 97}; " for i in range(3000)))
    return path


def _config(text: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "data": str(text), **MODEL, "steps": 12, "batch": 4, "warmup": 2, "threads": 1,
        "validate_every": 4, "validate_windows": 4, "checkpoint_every": 3, "log_every": 1,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


class Stop(Exception):
    pass


def _stop_after(step: int) -> Any:
    def on_step(done: int, values: dict[str, Any]) -> None:
        if done == step:
            raise Stop

    return on_step


def _losses(out: Path) -> list[tuple[str, int, float]]:
    kinds = ("train", "validation")
    return [(r["kind"], r["step"], r["loss"]) for r in read_metrics(out) if r["kind"] in kinds]


def _sharpness(out: Path) -> list[dict[str, Any]]:
    rows = [row for row in read_metrics(out) if row["kind"] == "sharpness"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def _weights(out: Path) -> bytes:
    return (sorted((out / "checkpoints").glob("step-*"))[-1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("optimizer", study_names())
def test_a_run_stopped_anywhere_ends_bit_for_bit_like_one_that_was_not(
    tmp_path: Path, text: Path, optimizer: Any
) -> None:
    own: dict[str, Any] = {
        "accumulate": 2,
        "clip": 1.0,
        "conditions_every": 5,
        "sharpness_every": 4,
    }
    if optimizer == "teon":
        own["depth"] = 2  # something to stack
    config = _config(text, optimizer=optimizer, **own)
    whole = train(config, tmp_path / "whole")
    for step in (2, 3, 7, 12):  # before the first checkpoint, at one, between two, at the end
        with pytest.raises(Stop):
            train(config, tmp_path / "parts", on_step=_stop_after(step))
    parts = train(config, tmp_path / "parts")
    assert parts["validation_loss"] == whole["validation_loss"]
    assert _weights(tmp_path / "parts") == _weights(tmp_path / "whole")
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert _sharpness(tmp_path / "parts") == _sharpness(tmp_path / "whole")
    assert [row["step"] for row in _sharpness(tmp_path / "whole")] == [4, 8, 12]
    states = [
        torch.load(
            tmp_path / name / "checkpoints" / "step-00000012" / "state.pt", weights_only=True
        )["optimizer"]["state"]
        for name in ("whole", "parts")
    ]
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())


def test_a_killed_process_goes_on_and_ends_the_same(tmp_path: Path, text: Path) -> None:
    """Kill -9 at moments of its own choosing, in the middle of whatever it does."""
    settings = ["--data", str(text), "--steps", "400", "--batch", "4", "--threads", "1"]
    settings += ["--width", "16", "--depth", "1", "--model-options", "heads=2"]
    settings += ["--context", "16", "--checkpoint-every", "5", "--log-every", "1"]
    command = [sys.executable, "-m", "steepest.cli", "train", *settings, "--out"]

    def run(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    whole = run(tmp_path / "whole")
    assert whole.wait(120) == 0, whole.stderr and whole.stderr.read()
    kills = 0
    for lines in (20, 120, 260):
        process = run(tmp_path / "parts")
        metrics = tmp_path / "parts" / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.005)
    assert kills == 3
    last = run(tmp_path / "parts")
    assert last.wait(120) == 0
    assert last.stderr is not None
    assert b"going on from step" in last.stderr.read()
    assert _weights(tmp_path / "parts") == _weights(tmp_path / "whole")
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")


def test_training_learns_and_measures(tmp_path: Path, text: Path) -> None:
    result = train(_config(text, steps=60, conditions_every=30, lr=0.05), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    validation = [row["loss"] for row in rows if row["kind"] == "validation"]
    assert result["validation_loss"] == validation[-1] < validation[0] - 1.5
    conditions = [row for row in rows if row["kind"] == "condition"]
    assert {row["step"] for row in conditions} == {1, 31}
    assert len(conditions) == 2 * 8  # six hidden matrices, embedding and head
    assert 0 < result["optimizer_share"] < 1
    assert result["optimizer_state_bytes"] > 0


@pytest.mark.parametrize("what", ["conditions_every", "sharpness_every"])
def test_measuring_changes_nothing(tmp_path: Path, text: Path, what: str) -> None:
    config = _config(text)
    plain = train(config, tmp_path / "plain")
    changes: dict[str, Any] = {what: 2}
    measured = train(replace(config, **changes), tmp_path / "measured")
    assert plain["validation_loss"] == measured["validation_loss"]
    assert _weights(tmp_path / "plain") == _weights(tmp_path / "measured")


def test_accumulated_batches_count_as_one(tmp_path: Path, text: Path) -> None:
    config = _config(text, batch=2, accumulate=3, steps=1, warmup=0, checkpoint_every=0)
    train(config, tmp_path / "run")
    row = next(row for row in read_metrics(tmp_path / "run") if row["kind"] == "train")
    assert row["tokens"] == 2 * 3 * 16
    from steepest.lab.data import Sampler, load
    from steepest.lab.models import GPT

    torch.manual_seed(0)
    model = GPT(SIZES, 256)
    sampler = Sampler(load(str(text)).train_tokens, 2, 16, 0)
    losses = [model.loss(*sampler.batch(0, part)) for part in range(3)]
    assert abs(row["loss"] - sum(loss.item() for loss in losses) / 3) < 1e-5


def test_clipping_reaches_the_raw_gradient_and_not_the_orthogonal_update(
    tmp_path: Path, text: Path
) -> None:
    """A first step of Muon does not depend on the length of the gradient, clipped or not."""
    from safetensors.torch import load_file

    from steepest.lab.models import GPT

    torch.manual_seed(0)
    start = GPT(SIZES, 256).state_dict()
    sizes: dict[float | None, list[float]] = {}
    for clip in (None, 1e-3):
        config = _config(text, steps=1, warmup=0, clip=clip, optimizer="muon", adamw_lr=0.0)
        train(config, tmp_path / str(clip))
        folder = tmp_path / str(clip) / "checkpoints" / "step-00000001"
        end = load_file(folder / "model.safetensors")
        sizes[clip] = [float((end[k] - start[k]).norm()) for k in end if "weight" in k]
    assert max(sizes[None]) > 0.05
    assert sizes[1e-3] == pytest.approx(sizes[None], rel=0.02)


def test_a_finished_run_is_not_run_again(tmp_path: Path, text: Path) -> None:
    first = train(_config(text), tmp_path / "run")
    said: list[str] = []
    again = train(_config(text), tmp_path / "run", on_step=_stop_after(1), say=said.append)
    assert again == first
    assert "finished already" in said[0]


def test_another_configuration_or_other_data_is_refused(tmp_path: Path, text: Path) -> None:
    train(_config(text), tmp_path / "run")
    with pytest.raises(InputError, match=r"lr was None, now 0\.5"):
        train(_config(text, lr=0.5), tmp_path / "run")
    with pytest.raises(InputError, match=r"width was 16, "):
        train(_config(text, width=32), tmp_path / "run")
    text.write_text(text.read_text() + "more")
    with pytest.raises(InputError, match="data_sha256"):
        train(_config(text), tmp_path / "run")


def test_divergence_is_an_error_and_no_checkpoint_holds_it(tmp_path: Path, text: Path) -> None:
    config = _config(text, optimizer="adamw", lr=1e30, adamw_lr=1e30, warmup=0, checkpoint_every=1)
    with pytest.raises(Diverged, match="NaN or infinite"):
        train(config, tmp_path / "run")
    from safetensors.torch import load_file

    for place in (tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors"):
        assert all(bool(t.isfinite().all()) for t in load_file(place).values())


def test_folders_that_cannot_be_used_get_a_sentence(tmp_path: Path, text: Path) -> None:
    config = _config(text)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not a folder"):
        train(config, tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"files .*thesis\.tex"):
        train(config, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "metrics.jsonl").write_text("")
    for damaged in ('{"steps": 1', "null", ""):
        (tmp_path / "half" / "config.json").write_text(damaged)
        with pytest.raises(InputError, match=r"damaged: .* JSON object"):
            train(config, tmp_path / "half")


def test_a_start_that_came_to_nothing_binds_nobody(tmp_path: Path, text: Path) -> None:
    with pytest.raises(InputError, match="not to be had here"):
        train(_config(text, device="nonsense"), tmp_path / "run")
    assert train(_config(text), tmp_path / "run")["status"] == "finished"
    assert '"device": "auto"' in (tmp_path / "run" / "config.json").read_text()


def test_short_runs_warm_up_over_a_part_of_them(text: Path) -> None:
    assert _config(text, steps=10, warmup=None).warmup_steps == 2
    assert _config(text, steps=1000, warmup=None).warmup_steps == 20
    with pytest.raises(InputError, match="fewer than all"):
        _config(text, steps=12, warmup=12)


def test_a_folder_has_one_writer(tmp_path: Path, text: Path) -> None:
    config = _config(text)
    with pytest.raises(Stop):
        train(config, tmp_path / "run", on_step=_stop_after(1))
    code = (
        "import sys; from pathlib import Path; from steepest.lab.train.run_folder import locked\n"
        f"with locked(Path({str(tmp_path / 'run')!r})): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another process"):
            train(config, tmp_path / "run")
        (tmp_path / "run" / "metrics.jsonl").unlink()  # as if the holder had just begun
        settings = (tmp_path / "run" / "config.json").read_text()
        with pytest.raises(InputError, match="another process"):
            train(replace(config, lr=0.5), tmp_path / "run")
        assert (tmp_path / "run" / "config.json").read_text() == settings
        holder.kill()
    with locked(tmp_path / "run"):  # a killed holder holds nothing
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_gets_a_sentence_and_loses_nothing(tmp_path: Path, text: Path) -> None:
    config = _config(text)
    with pytest.raises(Stop):
        train(config, tmp_path / "run", on_step=_stop_after(7))
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_text()
    metrics.unlink()
    metrics.symlink_to("/dev/full")
    with pytest.raises(InputError, match="no space left"):
        train(config, tmp_path / "run")
    metrics.unlink()
    metrics.write_text(before)
    whole = train(config, tmp_path / "whole")
    assert train(config, tmp_path / "run")["validation_loss"] == whole["validation_loss"]


def test_a_torn_last_line_of_metrics_is_dropped(tmp_path: Path, text: Path) -> None:
    config = _config(text)
    with pytest.raises(Stop):
        train(config, tmp_path / "run", on_step=_stop_after(8))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text()[:-10])
    train(config, tmp_path / "run")
    assert _losses(tmp_path / "run") == _losses_of_a_whole_run(config, tmp_path)


def _losses_of_a_whole_run(config: TrainConfig, tmp_path: Path) -> list[tuple[str, int, float]]:
    train(config, tmp_path / "whole")
    return _losses(tmp_path / "whole")


def test_a_damaged_line_within_the_metrics_is_an_error(tmp_path: Path, text: Path) -> None:
    config = _config(text)
    with pytest.raises(Stop):
        train(config, tmp_path / "run", on_step=_stop_after(8))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b"\xff", 1))
    with pytest.raises(InputError, match=r"metrics\.jsonl .* line \d"):
        train(config, tmp_path / "run")


def test_metrics_are_whole_while_lines_beyond_the_checkpoint_are_dropped(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(text)
    with pytest.raises(Stop):
        train(config, tmp_path / "run", on_step=_stop_after(8))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()

    def killed(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(Stop):
        train(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_start_killed_before_its_settings_were_written_is_no_strangers_folder(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steepest.lab.train import run_folder

    def killed(path: Path, content: Any) -> None:
        if path.name == "config.json":
            raise Stop
        path.write_text("{}")

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_json", killed)
        with pytest.raises(Stop):
            train(_config(text), tmp_path / "run")
    assert train(_config(text), tmp_path / "run")["status"] == "finished"


def test_a_run_that_goes_on_shows_a_loss_at_once(tmp_path: Path, text: Path) -> None:
    config = _config(text, log_every=10)
    shown: list[float] = []
    with pytest.raises(Stop):
        train(config, tmp_path / "run", on_step=_stop_after(4))
    train(config, tmp_path / "run", on_step=lambda step, values: shown.append(values["loss"]))
    assert len(shown) == 9
    assert not any(math.isnan(loss) for loss in shown)
    train(config, tmp_path / "whole")
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


def test_every_line_of_metrics_is_json_and_in_order(tmp_path: Path, text: Path) -> None:
    train(_config(text), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)


def test_autocast_trains_in_bfloat16(tmp_path: Path, text: Path) -> None:
    full = train(_config(text, steps=30, lr=0.05), tmp_path / "full")
    half = train(_config(text, steps=30, lr=0.05, precision="bfloat16"), tmp_path / "half")
    assert half["validation_loss"] != full["validation_loss"]
    assert abs(half["validation_loss"] - full["validation_loss"]) < 0.1


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"batch": 0}, {"lr": -1.0}, {"lr": float("nan")}, {"warmup": -1},
     {"clip": float("inf")}, {"log_every": 0}, {"threads": -1}, {"threads": 0}, {"seed": 2**63},
     {"final_lr": -0.1}, {"final_lr": float("nan")}],
)  # fmt: skip
def test_impossible_settings_get_a_sentence(text: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        _config(text, **changes)


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_a_device_that_is_not_there_gets_a_sentence(
    tmp_path: Path, text: Path, device: str
) -> None:
    with pytest.raises(InputError, match="not to be had here"):
        train(_config(text, device=device), tmp_path / "run")


def test_a_compiled_model_trains_the_same_and_is_compiled_once(tmp_path: Path, text: Path) -> None:
    from torch._dynamo.utils import counters

    plain = train(_config(text, steps=6), tmp_path / "plain")
    counters.clear()
    compiled = train(_config(text, steps=6, compile=True), tmp_path / "compiled")
    assert abs(compiled["validation_loss"] - plain["validation_loss"]) < 1e-3
    assert counters["stats"]["unique_graphs"] == 1  # whatever the learning rate does


def test_ctrl_c_and_sigterm_save_the_step_and_the_run_ends_as_if_nothing_had_been(
    tmp_path: Path, text: Path
) -> None:
    config = _config(text, optimizer="soap", checkpoint_every=0)
    train(config, tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    for number, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)):
        said: list[str] = []

        def during(step: int, values: dict[str, Any], number: int = number) -> None:
            if step in (3, 6):
                signal.raise_signal(number)

        with pytest.raises(kind):
            train(config, tmp_path / "parts", on_step=during, say=said.append)
        assert any("which is saved" in sentence for sentence in said)
        assert signal.getsignal(signal.SIGINT) is before
    names = sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000007"]
    train(config, tmp_path / "parts")
    assert _weights(tmp_path / "parts") == _weights(tmp_path / "whole")
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")


def test_a_second_ctrl_c_ends_the_step_too(tmp_path: Path, text: Path) -> None:
    def twice(step: int, values: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(_config(text, checkpoint_every=0), tmp_path / "run", on_step=twice)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "shampoo", "soap"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_checkpoint_is_written_of_a_broken_memory(
    tmp_path: Path, text: Path, optimizer: Any, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a memory that does not reach the weights at once, or ever."""
    made: list[torch.optim.Optimizer] = []
    build = loop.build
    monkeypatch.setattr(loop, "build", lambda *a, **k: made.append(build(*a, **k)) or made[0])
    config = _config(text, optimizer=optimizer, checkpoint_every=3, log_every=100)

    def breaks(step: int, values: dict[str, Any]) -> None:
        if step == 5:  # the step after it is the one that is saved
            state = made[0].state[made[0].param_groups[-1]["params"][-1]]
            state["spare"] = torch.full((2,), value)

    with pytest.raises(Diverged, match=r"\(spare of .*\) at step 6"):
        train(config, tmp_path / "run", on_step=breaks)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_no_checkpoint_is_written_of_broken_eigenvectors(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        SharpnessTracker,
        "state_dict",
        lambda self: {"top": None, "rows": [{"vector": torch.tensor([1.0, math.nan])}]},
    )
    config = _config(text, checkpoint_every=3, sharpness_every=100)
    with pytest.raises(Diverged, match="eigenvectors"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("happens", ["removed", "renamed", "replaced"])
@pytest.mark.parametrize("checkpoint_every", [0, 3])
def test_a_folder_that_goes_away_is_an_error_and_does_not_come_back(
    tmp_path: Path, text: Path, happens: str, checkpoint_every: int
) -> None:
    out = tmp_path / "run"

    def goes(step: int, values: dict[str, Any]) -> None:
        if step == 2:
            out.rename(tmp_path / "other")
            if happens == "removed":
                shutil.rmtree(tmp_path / "other")
            if happens == "replaced":
                out.mkdir()

    config = _config(text, checkpoint_every=checkpoint_every, log_every=100, validate_every=100)
    with pytest.raises(InputError, match="removed or renamed"):
        train(config, out, on_step=goes)
    assert out.exists() == (happens == "replaced")


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_a_norm_to_clip_at_is_above_zero(text: Path, clip: float) -> None:
    with pytest.raises(InputError, match=r"finite .* leave --clip"):
        _config(text, clip=clip)
