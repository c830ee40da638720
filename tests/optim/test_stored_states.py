"""States and training runs of version 0.1 go on as they would have then.

`stored/` holds, for every optimizer, a state after 20 steps of a small GPT and the weights after 5
more, in float32 and bfloat16. It also holds a run folder of each optimizer as it was after a kill.
On the processor that wrote them the same bits come out, elsewhere nearly the same numbers.
`python tests/optim/test_stored_states.py` wrote them; they are never to be written again.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest import SOAP, TEON, KLShampoo, Muon, Shampoo, SignSGD, Signum, SpectralDescent
from steepest.lab.models import GPT, GPTConfig
from steepest.lab.train.config import TrainConfig
from steepest.lab.train.loop import train
from steepest.optim.family import study_names

STORED = Path(__file__).parent / "stored"
SIZES = GPTConfig(width=8, depth=2, heads=2, context=8)
VOCABULARY, BATCH = 12, 4


def plan_of_all_geometries(model: nn.Module) -> torch.optim.Optimizer:
    """What a plan builds: a geometry for each group."""
    geometries = {"query": "euclidean", "key": "sign"}
    table = steepest.roles(model)
    groups: dict[str, list[Any]] = {}
    for row in table:
        geometry = "adamw"
        if row in table.matrices:
            geometry = geometries.get(row.name.split(".")[-2], "spectral")
        groups.setdefault(geometry, []).append((row.name, row.parameter))
    made = [{"params": params, "geometry": name, "lr": 0.02} for name, params in groups.items()]
    return Muon(made, 0.02, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "signsgd": lambda model: SignSGD(model, 1e-3),
    "signum": lambda model: Signum(model, 1e-3, weight_decay=0.1),
    "spectral-descent": lambda model: SpectralDescent(model, 0.02),
    "spectral-descent-dual": lambda model: SpectralDescent(model, 0.02, length="dual"),
    "muon": lambda model: Muon(model, 0.02, weight_decay=0.1),
    "muon-heavy-ball": lambda model: Muon(model, 0.02, heavy_ball=True, decay="cautious"),
    "muon-rounding": lambda model: Muon(model, 0.02, rounding="stochastic", decay="independent"),
    "teon": lambda model: TEON(model, 0.02),
    "teon-compensated": lambda model: TEON(model, 0.02, mode=2, compensate=True),
    "plan": plan_of_all_geometries,
    "shampoo": lambda model: Shampoo(model, 3e-3),
    "shampoo-muon": lambda model: Shampoo(model, 0.02, graft="muon", block=5, interval=3),
    "shampoo-quarter": lambda model: Shampoo(model, 0.02, exponent=1 / 4, graft="none"),
    "kl-shampoo": lambda model: KLShampoo(model, 3e-3),
    "kl-shampoo-sequential": lambda model: KLShampoo(model, 3e-3, sequential=True, graft="none"),
    "soap": lambda model: SOAP(model, 3e-3),
    "soap-spectral": lambda model: SOAP(model, 0.02, normalize="spectral", scale="spectral"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def machine() -> str:
    """The processor and the version of PyTorch, which decide the bits."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = dict(re.findall(r"^([^:\t]+)\t*: (.*)$", text.partition("\n\n")[0], re.M))
    parts = [fields.get(key, "") for key in ("vendor_id", "cpu family", "model")]
    flags = sorted(
        x for x in fields.get("flags", "").split() if x.startswith(("avx", "amx", "fma"))
    )
    return " ".join([platform.machine(), *parts, *flags, "torch", torch.__version__])


def model_of(dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    return GPT(SIZES, VOCABULARY).to(dtype)


def steps(model: GPT, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (BATCH, SIZES.context + 1), generator=generator)
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stored_state_goes_on_as_it_did(name: str, dtype: str) -> None:
    stored = torch.load(STORED / f"{name}-{dtype}.pt", weights_only=True)
    model = model_of(DTYPES[dtype])
    optimizer = OPTIMIZERS[name](model)
    model.load_state_dict(stored["weights"])
    optimizer.load_state_dict(stored["optimizer"])
    steps(model, optimizer, 20, 25)
    for key, value in model.state_dict().items():
        compare(value, stored["after"][key], 1e-6 if dtype == "float32" else 0.05)


def compare(value: Tensor, expected: Tensor, tolerance: float) -> None:
    """The same bits on the machine that wrote them, nearly the same numbers elsewhere."""
    if machine() == (STORED / "machine.txt").read_text():
        assert torch.equal(value, expected)
    else:
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance * 10)


TEXT = "".join(f"{n} times {n % 7} is {n * (n % 7)}.\n" for n in range(2000))


def run_of(name: Any) -> TrainConfig:
    return TrainConfig(
        optimizer=name,
        data="text.txt",
        width=8,
        depth=2,
        model_options=("heads=2",),
        context=8,
        steps=25,
        checkpoint_every=20,
        validate_windows=8,
        batch=BATCH,
        threads=1,
        device="cpu",
    )


@pytest.mark.parametrize("name", [p.name for p in sorted((STORED / "training").glob("*"))])
def test_a_stored_run_goes_on_as_it_did(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(STORED / "training" / name, tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    sentences: list[str] = []
    result = train(run_of(name), tmp_path / name, say=sentences.append)
    assert "going on from step 20 of 25" in sentences
    expected = json.loads((STORED / "losses.json").read_text())[name]
    compare(torch.tensor(result["validation_loss"]), torch.tensor(expected), 1e-6)


class Killed(Exception):
    pass


def write() -> None:
    """Write all files, with the versions that stand here."""
    torch.set_num_threads(1)
    shutil.rmtree(STORED, ignore_errors=True)
    (STORED / "training").mkdir(parents=True)
    (STORED / "machine.txt").write_text(machine())
    for dtype_name, dtype in DTYPES.items():
        for name, build in OPTIMIZERS.items():
            model = model_of(dtype)
            optimizer = build(model)
            steps(model, optimizer, 0, 20)
            stored = {
                "weights": {key: value.clone() for key, value in model.state_dict().items()},
                "optimizer": optimizer.state_dict(),
            }
            place = STORED / f"{name}-{dtype_name}.pt"
            torch.save(stored, place)
            stored = torch.load(place, weights_only=True)  # before more steps move its tensors
            steps(model, optimizer, 20, 25)
            torch.save({**stored, "after": model.state_dict()}, place)
    (STORED / "text.txt").write_text(TEXT)
    losses = {}

    os.chdir(STORED)
    for name in study_names():

        def stop(step: int, values: dict[str, Any]) -> None:
            if step == 21:
                raise Killed

        folder = STORED / "training" / name
        with contextlib.suppress(Killed):
            train(run_of(name), folder, on_step=stop)
        copy = STORED / f"copy-{name}"
        shutil.copytree(folder, copy)
        losses[name] = train(run_of(name), copy)["validation_loss"]
        shutil.rmtree(copy)
    (STORED / "text.txt").unlink()
    (STORED / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    write()
