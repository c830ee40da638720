"""The examples run, their loss falls, and it is the spectral update that makes it fall."""

from __future__ import annotations

import logging
import re
import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

LLAMA = {
    f"model.layers.{layer}.{name}_proj.weight"
    for layer in (0, 1)
    for name in [f"self_attn.{x}" for x in "qkvo"] + [f"mlp.{x}" for x in ("gate", "up", "down")]
}
BERT = {
    f"bert.encoder.layer.{layer}.{name}.weight"
    for layer in (0, 1)
    for name in [f"attention.self.{x}" for x in ("query", "key", "value")]
    + [f"{x}.dense" for x in ("attention.output", "intermediate", "output")]
} | {"bert.pooler.dense.weight"}

# library it needs, matrices, least number of steps seen, least factor between first and last loss
EXPECTED = {
    "plain_loop": ("torch", {"0.weight", "2.weight", "5.weight"}, 55, 2.0),
    "hugging_face_factory": ("transformers", LLAMA, 45, 2.0),
    "hugging_face_instance": ("transformers", BERT, 55, 1.4),
    "lightning_module": (
        "lightning",
        {"encoder.0.weight", "encoder.2.weight", "decoder.0.weight"},
        75,
        1.2,
    ),
    "accelerate_loop": ("accelerate", {"0.weight", "2.weight"}, 90, 10.0),
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No network, and no process-wide state of accelerate for the tests that follow."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    try:
        from accelerate.state import AcceleratorState
    except ImportError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_example_is_expected_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("example", EXPECTED)
def test_an_example_takes_spectral_steps_and_its_loss_falls(example, observer, capsys):
    library, matrices, steps, factor = EXPECTED[example]
    pytest.importorskip(library)
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"\bloss\b\W+([\d.]+)", printed)]
    assert len(losses) >= 5, printed
    assert losses[-1] * factor < losses[0]
    observer.assert_spectral(matrices, steps)


def test_the_plain_loop_resumes_bit_for_bit():
    import torch

    example = runpy.run_path(str(EXAMPLES / "plain_loop.py"))
    straight, parts = example["build"](), example["build"]()
    example["train"](**straight, steps=range(10))
    example["train"](**parts, steps=range(5))
    resumed = example["build"]()
    for name, part in parts.items():
        resumed[name].load_state_dict(part.state_dict())
    example["train"](**resumed, steps=range(5, 10))
    pairs = zip(straight["model"].parameters(), resumed["model"].parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("example", EXPECTED)
def test_an_example_is_short_and_says_how_to_run_it(example):
    text = (EXAMPLES / f"{example}.py").read_text()
    assert f"`python examples/{example}.py`" in text.split('"""')[1]
    assert 30 <= len(text.splitlines()) <= 70
