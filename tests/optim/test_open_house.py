"""An optimizer that is defined here works everywhere, without an edit of the package.

NorMuon (Li et al., arXiv 2510.05491): the polar factor of the momentum, each row divided by the
root of an average of its mean squares, then as long as the polar factor was.
"""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from steepest import Muon
from steepest.curvature import preconditioned_sharpness
from steepest.diagnosis.audit import audit
from steepest.lab.errors import InputError
from steepest.lab.studies.optimizer_study import study
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.train import TrainConfig
from steepest.optim.family import FAMILY, register, study_names
from steepest.optim.record import Record
from steepest.transfer import parametrize

NORMUON = """
import torch

from steepest.geometry import Spectral
from steepest.linalg.matrix_norms import frobenius_norm
from steepest.optim import SteepestDescent
from steepest.optim.checks import Fraction, Rate
from steepest.optim.momentum import Momentum
from steepest.optim.record import SPECTRAL, Record, Update


class NorMuon(SteepestDescent):
    records = (
        Record(
            name="normuon", label="NorMuon", geometry="spectral", rates=(0.02, 0.04, 0.08),
            memory="momentum and second moment of rows",
            update=lambda settings, free: Update("normuon", SPECTRAL),
        ),
    )

    def __init__(
        self, params, lr: Rate = 0.02, *, momentum: Fraction = 0.95, beta2: Fraction = 0.95, **more
    ):
        super().__init__(
            params, lr, geometry=Spectral("auto"), memory=Momentum(momentum, nesterov=True),
            scale="spectral", options={"beta2": beta2}, **more,
        )

    def start(self, group, matrices):
        for state, G in zip(matrices.states(self.state), matrices.gradients, strict=True):
            if "rows" not in state:
                state["rows"] = torch.zeros(len(G), 1, device=G.device)

    def direction(self, group, batch, N):
        D = super().direction(group, batch, N)
        rows = [state["rows"] for state in batch.states]
        torch._foreach_lerp_(rows, list(D.float().square().mean(-1, True)), 1 - group["beta2"])
        normalized = D / (torch.stack(rows).sqrt().to(D.dtype) + 1e-8)
        norms = (frobenius_norm(X, keepdim=True) for X in (D, normalized))
        return normalized * torch.nan_to_num(next(norms) / next(norms))
"""


@pytest.fixture(scope="module")
def kind(tmp_path_factory):
    place = tmp_path_factory.mktemp("outside")
    (place / "outside.py").write_text(NORMUON)
    sys.path.insert(0, str(place))
    yield importlib.import_module("outside").NorMuon
    sys.path.remove(str(place))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def batch(i: int = 0):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(64, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def trained(net, optimizer, first: int, last: int) -> list[float]:
    losses = []
    for i in range(first, last):
        optimizer.zero_grad()
        value = loss(net, batch(i))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def test_it_is_about_as_long_as_muon_is_to_be_defined():
    lines = [
        line for line in NORMUON.splitlines() if line and not line.startswith(("import", "from"))
    ]
    assert len(lines) <= 35


def test_it_trains_and_follows_its_paper(kind):
    net = model()
    losses = trained(net, kind(net), 0, 60)
    assert losses[-1] < 0.5 * losses[0]
    W = nn.Parameter(torch.zeros(4, 8, dtype=torch.float64))
    group = {"params": [W], "scale": "none", "method": "svd"}
    optimizer = kind([group], 1.0, momentum=0.0, beta2=0.0)
    W.grad = torch.randn(4, 8, dtype=torch.float64)
    optimizer.step()
    rows = W.detach().square().mean(-1)  # without memory all rows are equally long
    torch.testing.assert_close(rows, rows.mean().expand(4), rtol=1e-5, atol=0)
    assert float(W.detach().norm()) == pytest.approx(2.0)  # and together as long as Muon's


def test_it_prints_and_is_audited(kind):
    net = model()
    optimizer = kind(net)
    assert "NorMuon" in repr(optimizer)
    assert "spectral" in repr(optimizer)
    report = audit(net, optimizer, loss, [batch()])
    assert report["2.weight"].geometry == "spectral"
    muon = audit(net, Muon(net), loss, [batch()])
    assert report["2.weight"].rms == pytest.approx(muon["2.weight"].rms, rel=1e-3)
    with pytest.raises(ValueError, match="beta2"):
        kind(net, beta2=1.5)


def test_it_is_parametrized_with_the_column_of_its_record(kind):
    def build(width):
        return nn.Sequential(
            nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 3)
        )

    made = parametrize(build, {"width": 16}, {"width": 64}, optimizer=kind)
    rates = {row.name: (row.update, row.lr) for row in made.rows if row.name.endswith("weight")}
    assert rates["2.weight"] == ("normuon", 1.0)
    assert rates["3.weight"] == ("adamw", 0.25)
    optimizer = made.optimizer(0.02)
    assert type(optimizer) is kind
    assert trained(made.model, optimizer, 0, 5)


def test_its_curvature_is_measured(kind):
    net = model()
    optimizer = kind(net)
    trained(net, optimizer, 0, 5)
    rows = preconditioned_sharpness(net, loss, batch(), optimizer)
    assert all(0 < row.ratio < 100 for row in rows)


def test_it_resumes_bit_for_bit(kind):
    net = model()
    optimizer = kind(net)
    trained(net, optimizer, 0, 5)
    other = copy.deepcopy(net)
    fresh = kind(other)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(net, optimizer, 5, 10)
    trained(other, fresh, 5, 10)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_it_takes_part_in_a_study(kind, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(sys.modules[kind.__module__].__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(sys.modules[kind.__module__].__file__).parent))
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n * n}.\n" for n in range(4000)))
    config = StudyConfig(
        optimizers=("muon", "outside:NorMuon"),
        data=str(tmp_path / "text.txt"),
        width=8,
        depth=1,
        model_options=("heads=2",),
        context=8,
        steps=3,
        seeds=1,
        batch=2,
    )
    summary = study(config, tmp_path / "study", Silent())
    row = summary["optimizers"][1]
    assert (row["label"], row["memory"]) == ("NorMuon", "momentum and second moment of rows")
    assert row["rates"]


def test_training_needs_rates_only_without_a_learning_rate(kind):
    class NoRates(kind):
        records = (Record(name="no-rates", label="NoRates", geometry="spectral", memory="none"),)

    sys.modules[kind.__module__].NoRates = NoRates
    assert TrainConfig(optimizer="outside:NoRates", lr=0.02).rate == 0.02
    with pytest.raises(InputError, match="pass --lr"):
        TrainConfig(optimizer="outside:NoRates")
    with pytest.raises(InputError, match=r"no rates for a study.*rates=\("):
        StudyConfig(optimizers=("muon", "outside:NoRates"))
    with pytest.raises(InputError, match="at least one"):
        StudyConfig(optimizers=())


@pytest.mark.parametrize(
    "rates", [("a",), (0.2, 0.1), (0.1, -1), (-1, 0.1), (0.1, float("inf")), (0.1, 0.1), 0.1]
)
def test_rates_of_a_record_ascend(rates):
    with pytest.raises(ValueError, match=r"rates=.*'mine', expected .* ascending"):
        Record(name="mine", label="Mine", geometry="spectral", memory="none", rates=rates)


@pytest.mark.parametrize(
    "records",
    [("muon",), Record(name="x", label="X", geometry="spectral", memory="none"), "muon", None],
)
def test_records_are_a_tuple_of_records(records):
    class Own(Muon):
        pass

    Own.records = records
    with pytest.raises(ValueError, match=r"records=.* in Own, expected a tuple of Record"):
        register(Own)


class Silent:
    def say(self, sentence):
        pass

    def phase(self, name, runs):
        pass

    def steps(self, running):
        pass


def test_the_table_of_the_readme_is_that_of_the_records():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [line.split("|")[1:-1] for line in readme.splitlines() if line.startswith("| ")]
    places = {"sign": 0, "spectral": 1, "spectral, stacked": 2}
    table = [row for row in rows if row[0].strip().startswith(("sign", "spectral"))]
    columns = {"none": 1, "momentum": 2, "momentum and second moment": 3}
    for name in study_names():
        record = FAMILY[name]
        if not record.kind.__module__.startswith("steepest.optim."):
            continue  # which other tests, or claims of papers, have brought in
        row = table[places[record.geometry.removesuffix(", adapted")]]
        assert record.kind.__name__ in row[columns[record.memory]]
