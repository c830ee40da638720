"""Plans: one optimizer for several geometries, and a file that survives being edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steepest
from steepest.diagnosis import Diagnosis, Plan, PlanRow, diagnose
from steepest.diagnosis.advice import better
from steepest.lab.models import GPT, GPTConfig
from steepest.optim import SteepestDescent
from steepest.statistics import Interval


class Net(nn.Module):
    """A convolution, a fused projection, tied embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).flatten(2).mT)
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        return self.head((q @ k.mT).softmax(-1) @ v).mean(1)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(8, 1, 6, 6, generator=generator)
        y = torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def _all(geometry: Any, model: nn.Module) -> Plan:
    """The default plan with another geometry for the matrices."""
    return Plan(
        PlanRow(r.parameter, r.shape, geometry if r.geometry == "spectral" else r.geometry)
        for r in Plan.default(model)
    )


@pytest.mark.parametrize(
    ("geometry", "build"),
    [
        ("spectral", lambda model: steepest.Muon(model, lr=0.02)),
        ("sign", lambda model: steepest.Signum(model, lr=0.001, adamw_lr=0.003)),
    ],
)
def test_a_plan_of_one_geometry_is_that_optimizer_bit_for_bit(
    geometry: str, build: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    ours, theirs = _net(), _net()
    mine = _train(ours, _all(geometry, ours).optimizer(ours, lr=0.02))
    for a, b in zip(mine, _train(theirs, build(theirs)), strict=True):
        assert torch.equal(a, b)


def test_a_stacked_plan_is_teon_bit_for_bit() -> None:
    def trained(build: Callable[[GPT], torch.optim.Optimizer]) -> list[Tensor]:
        torch.manual_seed(0)
        model = GPT(GPTConfig(width=16, depth=2, heads=2, context=8), 11)
        optimizer = build(model)
        tokens = torch.arange(16).view(2, 8) % 11
        for _ in range(3):
            optimizer.zero_grad()
            model.loss(tokens, tokens.roll(1, 1)).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    mine = trained(lambda model: _all("stacked", model).optimizer(model, lr=0.02))
    theirs = trained(lambda model: steepest.TEON(model, lr=0.02))
    other = trained(lambda model: steepest.Muon(model, lr=0.02))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_mixed_geometries_each_move_as_they_say() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    names = [name for name, _ in model.named_parameters()]
    geometries: list[Any] = ["spectral", "euclidean", "sign", "adamw"]
    plan = Plan(
        PlanRow(name, (6, 6), geometry, 2.0 if geometry == "euclidean" else 1.0)
        for name, geometry in zip(names, geometries, strict=True)
    )
    optimizer = plan.optimizer(model, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(20, 6)).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    moved = [a - p.detach() for a, p in zip(before, model.parameters(), strict=True)]
    values = torch.linalg.svdvals(moved[0]) / 0.1
    assert values.max() < 1.3
    assert values[:-1].min() > 0.6  # the last is lost in the polynomials
    exact = gradients[1] / gradients[1].norm() * 6**0.5 * 0.1 * 2
    torch.testing.assert_close(moved[1], exact)
    torch.testing.assert_close(moved[2], gradients[2].sign() * 0.1 * 0.05)
    torch.testing.assert_close(moved[3], gradients[3].sign() * 0.1 * 0.15, rtol=1e-3, atol=1e-6)
    printed = str(optimizer)
    assert all(word in printed for word in ("SteepestDescent", "euclidean", "sign", "spectral"))


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def build() -> tuple[Net, SteepestDescent]:
        model = _net()
        rows = list(Plan.default(model))
        rows[0] = PlanRow(rows[0].parameter, rows[0].shape, "euclidean")
        return model, Plan(rows).optimizer(model, lr=0.02)

    model, optimizer = build()
    _train(model, optimizer)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    expected = _train(model, optimizer)
    model, optimizer = build()
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for a, b in zip(_train(model, optimizer), expected, strict=True):
        assert torch.equal(a, b)


def test_a_file_gives_back_the_plan(tmp_path: Path) -> None:
    odd = 'layer "one".weight\\with\n\t[odd] = é # names'
    plan = Plan(
        [PlanRow(odd, (2, 3), "sign", 0.5, 'say "why" \\ not'), PlanRow("b", (), "adamw")],
        {"sign": 0.1},
    )
    plan.save(tmp_path / "plan.toml")
    again = Plan.load(tmp_path / "plan.toml")
    assert list(again) == list(plan)
    assert again.rates == plan.rates
    assert again.rates["sign"] == 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.toml"]


def test_an_edited_file_is_followed(tmp_path: Path) -> None:
    model = _net()
    path = tmp_path / "plan.toml"
    Plan.default(model).save(path)
    text = path.read_text()
    edited = text.replace(
        '[parameters."conv.weight"]\n# 4 x 1 x 3 x 3\ngeometry = "spectral"',
        '[parameters."conv.weight"]\ngeometry = "euclidean"\nlr_scale = 0.25',
    )
    assert edited != text
    path.write_text(edited)
    groups = Plan.load(path).optimizer(model, lr=0.02).param_groups
    found = next(group for group in groups if "conv.weight" in group["param_names"])
    assert (found["geometry"], found["lr"]) == ("euclidean", 0.005)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("conv.weight", "conv.wieght"), "'conv.wieght'.*'conv.wei"),
        (('"spectral"', '"spectrum"'), "'spectrum' .*'spectral'"),
        (("geometry", "geometri"), "conv.weight .* a geometry"),
        (("shape = [4, 1, 3, 3]", "shape = [4, 9]"), r"conv.weight as \(4, 9\)"),
        (("shape", "lr_scael = 2\nshape"), "'lr_scael' .*'lr_scale'"),
        (("shape", "lr_scale = -2\nshape"), "lr_scale of conv.* = -2"),
        (("[rates]", "[rates]\nspectal = 1"), "'spectal' .*'spectral'"),
        (("[rates]", "[rates"), "which is no TOML"),
        (("[rates]", "[note]"), "section 'note'.*'notes'"),
        (("[rates]", "[notes]"), "notes = .*a list of sentences"),
    ],
)
def test_edits_that_went_wrong(change: tuple[str, str], sentence: str, tmp_path: Path) -> None:
    model, path = _net(), tmp_path / "plan.toml"
    Plan.default(model).save(path)
    text = path.read_text()
    start = text.index("[parameters") if "rates" not in change[0] else 0
    assert change[0] in text[start:]
    path.write_text(text[:start] + text[start:].replace(*change, 1))
    with pytest.raises(ValueError, match=sentence):
        Plan.load(path).optimizer(model, lr=0.02)


def test_plans_that_cannot_be() -> None:
    model = _net()
    rows = list(Plan.default(model))
    with pytest.raises(ValueError, match=r"plan without .*\(1 of 7"):
        Plan(rows[1:]).optimizer(model, lr=0.1)
    with pytest.raises(ValueError, match="twice"):
        Plan([*rows, rows[0]])
    bias = next(i for i, row in enumerate(rows) if row.parameter == "norm.weight")
    rows[bias] = PlanRow("norm.weight", (4,), "spectral")
    with pytest.raises(ValueError, match=r'"spectral" for norm\.'):
        Plan(rows).optimizer(model, lr=0.1)


def test_a_diagnosis_makes_a_plan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )
    batches = [(x := torch.randn(300, 12), x[:, :4].argmax(1)) for _ in range(5)]

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    optimizer = Plan.default(model).optimizer(model, lr=0.02)
    for batch in batches * 10:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    found = diagnose(model, loss, batches)
    assert not found.fresh
    plan = found.plan()
    assert [row.parameter for row in plan] == [name for name, _ in model.named_parameters()]
    geometries = {row.parameter: row.geometry for row in plan}
    for row in found:
        chosen = better(row)
        expected = "spectral" if chosen is None else chosen[0]
        assert geometries[row.matrix] == ("adamw" if row.matrix == "4.weight" else expected)
    assert geometries["0.bias"] == "adamw"
    optimizer = plan.optimizer(model, lr=0.02)
    first = loss(model, batches[0]).item()
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    assert loss(model, batches[0]).item() < first


STRONG, WIDE, LITTLE = (0.5, 0.1, 0.9), (0.5, -0.1, 1.1), (0.09, 0.05, 0.13)
LOW, HIGH = (-1.0, -1.2, -0.8), (-1.0, -1.6, -0.4)  # of the theory's bound; log(1/2) is -0.69


def _diagnosis(
    over_spectral: dict[str, tuple[float, float, float]],
    bound: tuple[float, float, float] | None = None,
    level: Any = "standard",
    **more: Any,
) -> Diagnosis:
    """What is said of all matrices of a model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    batches = [(torch.randn(30, 6), torch.arange(30) % 3) for _ in range(4)]
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    measured = diagnose(model, loss, batches, warmup_steps=0)
    rows = [
        replace(
            row,
            bound=None if bound is None else Interval(*bound),
            predictions=tuple(
                replace(p, over_spectral=Interval(*over_spectral.get(p.geometry, (0.0, 0.0, 0.0))))
                for p in row.predictions
            ),
        )
        for row in measured
    ]
    return Diagnosis(rows, level, 4, Plan.default(model), **more)


@pytest.mark.parametrize(
    ("over_spectral", "bound", "geometry"),
    [
        ({"sign": STRONG}, None, "sign"),
        ({"adamw": STRONG}, None, "adamw"),
        ({"euclidean": STRONG}, None, "euclidean"),
        ({"sign": STRONG, "adamw": (0.6, 0.1, 1.1)}, None, "adamw"),
        ({"sign": WIDE}, None, "spectral"),
        ({"sign": WIDE}, LOW, "spectral"),  # the theory speaks of Euclidean steps alone
        ({"sign": LITTLE}, None, "spectral"),
        ({"euclidean": WIDE}, None, "spectral"),
        ({"euclidean": WIDE}, HIGH, "spectral"),
        ({"euclidean": WIDE}, LOW, "euclidean"),
        ({"euclidean": LITTLE}, LOW, "spectral"),
        ({}, LOW, "spectral"),  # the theory alone
        ({}, None, "spectral"),
    ],
)
def test_a_matrix_leaves_muon_on_strong_evidence(
    over_spectral: Any, bound: Any, geometry: str
) -> None:
    plan = _diagnosis(over_spectral, bound).plan()
    for row in plan:
        hidden = row.parameter in ("0.weight", "2.weight")
        assert row.geometry == (geometry if hidden else "adamw")
        if hidden and geometry != "spectral":
            assert f"{geometry} steps are predicted to decrease the loss" in row.reason
        elif hidden:
            assert "no other geometry is surely better than spectral" in row.reason


@pytest.mark.parametrize(
    ("more", "note"),
    [({"level": "quick"}, "a quick diagnosis takes no steps"), ({"fresh": True}, "look fresh")],
)
def test_a_plan_without_strong_evidence_is_that_of_muon(more: Any, note: str) -> None:
    plan = _diagnosis({"sign": STRONG, "euclidean": STRONG}, LOW, **more).plan()
    assert {row.geometry for row in plan if row.parameter[2:] == "weight"} == {
        "spectral", "adamw",
    }  # fmt: skip
    [sentence] = plan.notes
    assert note in sentence
    assert sentence.endswith("plan is Muon")


def test_a_fused_parameter_leaves_muon_where_most_of_its_matrices_do() -> None:
    whole = _diagnosis({"sign": STRONG})
    none = _diagnosis({})["0.weight"]
    for count, geometry in ((1, "spectral"), (2, "sign")):
        rows = [replace(whole["0.weight"], matrix=f"0.weight[{i}]") for i in range(count)]
        rows += [replace(none, matrix=f"0.weight[{i}]") for i in range(count, 3)]
        plan = Diagnosis(rows, "standard", 4, whole._default).plan()
        assert plan[0].geometry == geometry
    assert plan[0].reason.startswith("2 of 3: sign steps are predicted")


def test_a_matrix_without_evidence_stays_with_muon() -> None:
    """Its gradient is zero, or it was not looked at."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].bias.fill_(-100.0)  # behind which all is zero
    batches = [(torch.randn(30, 6), torch.arange(30) % 3) for _ in range(4)]
    found = diagnose(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batches, warmup_steps=0)
    assert [row.verdict for row in found] == ["cannot tell"] * 3
    assert found["0.weight"].reason.startswith("its gradient is zero on some batch")
    few = Diagnosis(found[:1], "standard", 4, found._default)
    for plan in (found.plan(), few.plan()):
        assert [r.geometry for r in plan] == [r.geometry for r in Plan.default(model)]
    assert "cannot tell (zero gradient)" in str(found)


def test_a_plan_of_version_0_1_is_read(tmp_path: Path) -> None:
    text = '[rates]\nadaptive = 0.3\n\n[parameters."0.weight"]\ngeometry = "adaptive"\n'
    (tmp_path / "plan.toml").write_text(text)
    plan = Plan.load(tmp_path / "plan.toml")
    assert [row.geometry for row in plan] == ["adamw"]
    assert plan.rates["adamw"] == 0.3
    assert "adaptive" not in plan.rates


def test_notes_survive_save_and_load(tmp_path: Path) -> None:
    notes = ('weights that look "fresh"', "a second\nline \x7f")
    plan, path = Plan(Plan.default(_net()), notes=notes), tmp_path / "plan.toml"
    plan.save(path)
    first = path.read_text()
    again = Plan.load(path)
    assert again.notes == notes
    assert again.as_dict() == plan.as_dict()
    again.save(path)
    assert path.read_text() == first


def test_files_with_notes_as_comments_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    Plan.default(_net()).save(path)
    path.write_text("# A note.\n" + path.read_text())
    assert Plan.load(path).notes == ()
