"""`parametrize`: initialization, groups, and the traps of other libraries."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steepest
from steepest.files import read_json
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.parametrize.rules import Rule
from steepest.transfer import parametrize

BASE, TARGET = {"width": 16, "depth": 2}, {"width": 64, "depth": 8}
RULES: list[Rule] = ["sp", "ntp", "mup", "depth-mup", "completep", "spectral"]
OPTIMIZERS: list[str] = [
    "sgd", "adamw", "signum", "muon", "teon", "shampoo", "kl-shampoo", "soap",
]  # fmt: skip


def gpt(width: int = 16, depth: int = 2, **more: Any) -> GPT:
    return GPT(GPTConfig(width=width, depth=depth, heads=2, context=8, **more), vocabulary=50)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )


def _rms(p: torch.Tensor) -> float:
    return float(p.detach().double().square().mean().sqrt())


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    tokens = torch.arange(16).reshape(2, 8)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_at_the_base_it_is_the_users_own_model(rule: Rule, optimizer: str) -> None:
    def build(width: int, depth: int) -> nn.Module:
        return gpt(width, depth, tied=True)

    torch.manual_seed(3)
    own = build(**BASE)
    torch.manual_seed(3)
    made = parametrize(build, BASE, BASE, rule=rule, optimizer=optimizer)
    for (name, p), q in zip(own.named_parameters(), made.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert all((row.init, row.lr, row.eps, row.weight_decay) == (1, 1, 1, 1) for row in made.rows)
    assert not made.readout
    rates = {group["lr"] for group in made.groups(lr=0.02)}
    assert rates == ({0.02, 0.15 * 0.02} if optimizer in ("muon", "teon") else {0.02})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_every_parameter(optimizer: str) -> None:
    rate = {"sgd": 0.3, "muon": 0.05, "teon": 0.05}.get(optimizer, 0.005)
    made = parametrize(gpt, BASE, TARGET, rule="completep", optimizer=optimizer)
    stepper = made.optimizer(rate)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    losses = [_step(made.model, stepper) for _ in range(4)]
    assert losses[-1] < losses[0]
    still = [n for n, p in made.model.named_parameters() if torch.equal(p, before[n])]
    assert not still


def test_initialization_has_the_size_the_rule_asks_for() -> None:
    torch.manual_seed(0)
    made = parametrize(mlp, {"width": 64}, {"width": 1024})
    torch.manual_seed(1)
    base = mlp(64)
    for name, power in (("0.weight", 0), ("2.weight", -0.5), ("4.weight", -1), ("0.bias", 0)):
        expected = _rms(base.get_parameter(name)) * 16.0**power
        error = 4 / math.sqrt(base.get_parameter(name).numel())  # of two measured numbers
        assert _rms(made.model.get_parameter(name)) == pytest.approx(expected, rel=error)


def test_a_model_that_scales_with_depth_itself() -> None:
    """The GPT divides the ends of its branches by sqrt(2 L). No rule may do that twice."""
    own = {depth: _rms(gpt(depth=depth).blocks[0].mlp.down.weight) for depth in (2, 8)}  # type: ignore[union-attr, arg-type]
    assert own[8] == pytest.approx(own[2] / 2, rel=0.1)
    for rule, expected in (
        ("mup", own[8]),  # says nothing of depth: the user's own stays
        ("depth-mup", own[2] / 2),
        ("completep", own[2] / 4),
    ):
        made = parametrize(gpt, BASE, {"depth": 8}, rule=rule)  # type: ignore[arg-type]
        found = _rms(made.model.get_parameter("blocks.7.mlp.down.weight"))
        assert found == pytest.approx(expected, rel=0.1), rule


def test_constants_and_buffers_stay_and_folded_constants_follow() -> None:
    class Model(nn.Module):
        def __init__(self, width: int, depth: int):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
            for layer in self.layers:
                nn.init.constant_(layer.bias, 0.5)  # type: ignore[arg-type]
            self.norm = nn.BatchNorm1d(width)
            self.head = nn.Linear(width, 2)
            nn.init.zeros_(self.head.weight)

    made = parametrize(Model, BASE, TARGET, rule="completep", branches=["layers.*"])
    model: Any = made.model
    assert model.norm.weight.eq(1).all()
    assert model.norm.running_var.eq(1).all()
    assert model.head.weight.eq(0).all()
    assert model.layers[3].bias.eq(0.5 / 4).all()


def test_frozen_parameters_stay_and_are_in_no_group() -> None:
    def build(width: int) -> nn.Module:
        model = mlp(width)
        model.get_parameter("0.weight").requires_grad_(False)
        return model

    torch.manual_seed(0)
    own = build(64)
    torch.manual_seed(0)
    made = parametrize(build, {"width": 16}, {"width": 64})
    assert torch.equal(own.get_parameter("0.weight"), made.model.get_parameter("0.weight"))
    names = [name for group in made.groups(0.1) for name, _ in group["params"]]
    assert sorted(names) == ["0.bias", "2.bias", "2.weight", "4.bias", "4.weight"]


def test_the_caller_s_generator_moves_as_with_build_alone() -> None:
    torch.manual_seed(0)
    mlp(64)
    after = torch.rand(1)
    torch.manual_seed(0)
    parametrize(mlp, {"width": 16}, {"width": 64})
    assert torch.equal(torch.rand(1), after)


def test_groups_are_ordinary_and_say_what_they_are() -> None:
    made = parametrize(mlp, {"width": 16}, {"width": 64})
    groups = made.groups(0.1, eps=1e-6)
    assert len({group["name"] for group in groups}) == len(groups)
    for group in groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_factor"])
    hidden = next(g for g in groups if any(name == "2.weight" for name, _ in g["params"]))
    assert hidden["lr_factor"] == 0.25
    assert hidden["eps"] == pytest.approx(1e-6 / 4)
    assert [len(g["params"]) for g in torch.optim.RAdam(groups).param_groups]  # any optimizer


def test_independent_decay_is_the_same_at_every_size() -> None:
    """Coupled, lr times decay falls with the width, and decay silently vanishes."""
    for rule, optimizer in (
        ("mup", "adamw"),
        ("mup", "sgd"),
        ("ntp", "adamw"),
        ("completep", "soap"),
    ):
        made = parametrize(gpt, BASE, TARGET, rule=rule, optimizer=optimizer)  # type: ignore[arg-type]
        matrices = [
            g for g in made.optimizer(0.1, weight_decay=0.2).param_groups
            if g.get("geometry") != "adamw"
        ]  # fmt: skip
        products = [g["lr"] * g["weight_decay"] for g in matrices if g["weight_decay"]]
        assert products == pytest.approx([0.1 * 0.2] * len(products))
    coupled = parametrize(mlp, {"width": 16}, {"width": 64}).groups(
        0.1, 0.2, decay="coupled", adamw_weight_decay=0.2
    )
    assert {g["weight_decay"] for g in coupled} == {0.2}
    shrink = {round(g["lr"] * g["weight_decay"], 6) for g in coupled}
    assert shrink == {0.02, 0.005}
    with pytest.raises(ValueError, match="got decay"):
        parametrize(mlp, {"width": 16}, {"width": 64}).groups(0.1, decay="decoupled")  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_biases_and_gains_do_not_decay(optimizer: str) -> None:
    """As in CompleteP's code, and in the optimizers of this package."""
    made = parametrize(mlp, {"width": 16}, {"width": 64}, optimizer=optimizer)
    decays = {
        name: group["weight_decay"]
        for group in made.groups(0.1, weight_decay=0.2)
        for name, _ in group["params"]
    }
    assert {name for name, decay in decays.items() if not decay} >= {"0.bias", "2.bias", "4.bias"}
    assert decays["2.weight"] > 0
    every = made.groups(0.1, weight_decay=0.2, adamw_weight_decay=0.2)
    assert all(group["weight_decay"] for group in every)
    assert len({group["name"] for group in every}) == len(every)


def test_decay_factors_of_the_papers() -> None:
    """MuAdam multiplies the decay of matrices by the width ratio; CompleteP's Table 1: λ m_N."""
    made = parametrize(gpt, BASE, TARGET, rule="completep")
    assert made["blocks.0.mlp.up.weight"].weight_decay == 4
    assert made["embedding.weight"].weight_decay == 1


def test_weights_shrink_alike_at_every_width() -> None:
    for width in (16, 128):
        made = parametrize(mlp, {"width": 16}, {"width": width})
        weight = made.model.get_parameter("2.weight")
        before = weight.detach().clone()
        optimizer = made.optimizer(0.1, weight_decay=0.5)
        for p in made.model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5))


def test_schedulers_that_multiply_keep_the_factors() -> None:
    optimizer = parametrize(mlp, {"width": 16}, {"width": 64}).optimizer(0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.05 * group["lr_factor"])
    # And what the documentation warns of: one rate for all groups.
    optimizer = parametrize(mlp, {"width": 16}, {"width": 64}).optimizer(0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_copying_pickling_and_loading_lose_nothing(tied: bool) -> None:
    def build(width: int) -> nn.Module:
        return gpt(width, tied=tied)

    made = parametrize(build, {"width": 16}, {"width": 64}, optimizer="muon")
    _step(made.model, made.optimizer(0.1))
    tokens = torch.arange(16).reshape(2, 8)
    expected = made.model(tokens)
    assert torch.equal(copy.deepcopy(made.model)(tokens), expected)
    assert torch.equal(pickle.loads(pickle.dumps(made.model))(tokens), expected)
    file = io.BytesIO()
    torch.save(made.model.state_dict(), file)
    file.seek(0)
    again = parametrize(build, {"width": 16}, {"width": 64}, optimizer="muon")
    again.model.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.model(tokens), expected)
    plain = build(64)  # without `parametrize`, only the tied head's multiplier is missing
    plain.load_state_dict(made.model.state_dict())
    assert torch.equal(plain(tokens), expected) != tied


def test_an_optimizer_resumes() -> None:
    made = parametrize(gpt, BASE, TARGET, rule="depth-mup", optimizer="muon")
    optimizer = made.optimizer(0.05)
    _step(made.model, optimizer)
    model, state = copy.deepcopy(made.model), copy.deepcopy(optimizer.state_dict())
    expected = [_step(made.model, optimizer) for _ in range(2)]
    made.model.load_state_dict(model.state_dict())
    resumed = made.optimizer(0.05)
    resumed.load_state_dict(state)
    assert [_step(made.model, resumed) for _ in range(2)] == expected


def test_the_tied_head_is_multiplied() -> None:
    made = parametrize(lambda width: gpt(width, tied=True), {"width": 16}, {"width": 64})
    assert made.readout == {"head": 0.25}
    assert made["embedding.weight"].lr == 1  # as TP-V Table 8 has it for both ends
    x = torch.randn(2, 64)
    model: Any = made.model
    expected = 0.25 * F.linear(x, model.embedding.weight)
    torch.testing.assert_close(model.head(x), expected)
    torch.testing.assert_close(model.head(input=x), expected)


def test_it_compiles() -> None:
    made = parametrize(lambda width: gpt(width, depth=1, tied=True), {"width": 16}, {"width": 32})
    tokens = torch.arange(16).reshape(2, 8)
    compiled: Any = torch.compile(made.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), made.model(tokens))


def test_it_can_be_sharded() -> None:
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        made = parametrize(gpt, BASE, TARGET, rule="completep")
        plain = copy.deepcopy(made.model)
        fully_shard(made.model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        optimizer = made.optimizer(0.01)
        losses = [_step(made.model, optimizer) for _ in range(3)]
        made.model = plain
        optimizer = made.optimizer(0.01)
        assert losses == pytest.approx([_step(plain, optimizer) for _ in range(3)])
    finally:
        distributed.destroy_process_group()


def test_layers_added_later_are_an_error() -> None:
    made = parametrize(mlp, {"width": 16}, {"width": 64})
    made.model.add_module("late", nn.Linear(64, 2))
    with pytest.raises(ValueError, match=r"late\.weight"):
        made.groups(0.1)


def test_settings_that_need_other_factors_belong_to_parametrize() -> None:
    made = parametrize(mlp, {"width": 16}, {"width": 64}, optimizer="shampoo")
    assert made.optimizer(0.01, beta2=0.9, block=32).param_groups[0]["block"] == 32
    with pytest.raises(ValueError, match=r"settings=\.\.\."):
        made.optimizer(0.01, length="muon", scale="spectral")
    with pytest.raises(ValueError, match="scale"):
        parametrize(mlp, {"width": 16}, {"width": 64}, optimizer="muon", settings={"scale": "none"})
    with pytest.raises(ValueError, match="graft_eps"):
        made.optimizer(0.01, graft_eps=1e-6)
    with pytest.raises(ValueError, match="'eps'"):
        parametrize(mlp, {"width": 16}, {"width": 64}, settings={"eps": 1e-6})
    norm_one = {"length": "spectral", "scale": "spectral"}
    bare = parametrize(mlp, {"width": 16}, {"width": 64}, optimizer="soap")
    with pytest.raises(ValueError, match=r"settings=\.\.\."):
        bare.optimizer(0.01, **norm_one)
    soap = parametrize(mlp, {"width": 16}, {"width": 64}, optimizer="soap", settings=norm_one)
    matrices, *others = soap.optimizer(0.1).param_groups
    assert matrices["lr"] == 0.1
    assert [g["lr"] / g["lr_factor"] for g in others] == pytest.approx([0.015] * len(others))
    graft_eps = made.optimizer(0.01, eps=1e-6).param_groups[0]["graft_eps"]
    assert graft_eps == pytest.approx(1e-6 / 4)  # entries of its gradient are 1/out as large
    control = {"scale": "match-rms-adamw"}  # the negative control: one rate, as it is
    made = parametrize(
        mlp, {"width": 16}, {"width": 64}, rule="sp", optimizer="muon", settings=control
    )
    assert {group["lr"] for group in made.groups(0.01)} == {0.01}
    assert made.optimizer(0.01).param_groups[0]["scale"] == "match-rms-adamw"


def test_teon_keeps_its_stacks() -> None:
    made = parametrize(gpt, BASE, TARGET, rule="completep", optimizer="teon")
    assert len(made.optimizer(0.02).stacks) == 3 * 4  # type: ignore[attr-defined]
    assert len(made.optimizer(0.02, stack=4).stacks) == 3 * 2  # type: ignore[attr-defined]


def test_the_scale_of_muon_sets_the_rate_of_what_is_no_matrix() -> None:
    rates = []
    for given, later in (({"scale": "match-rms-adamw"}, {}), ({}, {"scale": "match-rms-adamw"})):
        made = parametrize(
            mlp, {"width": 16}, {"width": 64}, rule="sp", optimizer="muon", settings=given
        )
        rates.append([group["lr"] for group in made.optimizer(0.01, **later).param_groups])
    assert rates[0] == rates[1] == [0.01, 0.01]


class Queries(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        layers = (nn.ModuleDict({"q_proj": nn.Linear(width, width)}) for _ in range(2))
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, 2)


@pytest.mark.parametrize("optimizer", [steepest.Muon, steepest.TEON])
def test_stacked_updates_do_not_depend_on_the_width(optimizer: Any) -> None:
    """The derivation for TEON and Muon: a step moves what a layer says of an input of RMS 1 by as
    much at any width, here for the gradients of one example."""
    moved = []
    for width in (32, 256):
        model = Queries(width)
        x = torch.randn(width)
        x *= math.sqrt(width) / x.norm()
        weights = [model.get_parameter(f"layers.{i}.q_proj.weight") for i in range(2)]
        before = [W.detach().clone() for W in weights]
        g = torch.randn(width)
        for W, k in zip(weights, (1.0, 2.0), strict=True):
            W.grad = k * torch.outer(g / width, x)
        stepper = optimizer(model, lr=0.1, method="svd")
        assert (len(stepper.stacks) if optimizer is steepest.TEON else 1) == 1
        stepper.step()
        moved.append([_rms((W - V) @ x) for W, V in zip(weights, before, strict=True)])
    assert moved[0] == pytest.approx(moved[1], rel=0.01)
    assert math.hypot(*moved[0]) == pytest.approx(
        0.1 * (2**0.5 if optimizer is steepest.Muon else 1)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "mup2"}, "rule='mup2'"),
        ({"target": {"wide": 3}}, "base has no value for"),
        ({"rule": "completep", "branches": ["*.nothing"]}, "matches no module"),
        ({"rule": "completep", "branches": ["blocks.0.mlp.down"]}, "match nothing in blocks"),
        ({"rule": "completep", "branches": ["head", "blocks.*.mlp.down"]}, "in no list of layers"),
        ({"rule": "completep", "branches": "blocks.*"}, "list of patterns"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parametrize(gpt, **{"base": BASE, "target": TARGET, **settings})


def test_it_prints_and_saves(tmp_path: Path) -> None:
    made = parametrize(gpt, BASE, TARGET, rule="completep", optimizer="muon")
    text = str(made)
    assert "blocks.*.attention.query.weight" in text
    assert "CompleteP Table 1" in text
    assert "attention 1/d" in made["blocks.0.attention.query.weight"].why
    made.save(tmp_path / "factors.json")
    read = read_json(tmp_path / "factors.json")
    assert read == json.loads(json.dumps(made.as_dict()))
    assert all(row["source"] for row in read["parameters"])


def test_the_old_name_of_the_decay_gives_the_same_groups_and_a_warning() -> None:
    made = parametrize(mlp, {"width": 8}, {"width": 32}, optimizer="muon")
    with pytest.warns(DeprecationWarning, match='decay="base"'):
        old = made.groups(0.02, weight_decay=0.1, decay="independent")  # type: ignore[arg-type]
    now = made.groups(0.02, weight_decay=0.1)
    assert [group["weight_decay"] for group in old] == [group["weight_decay"] for group in now]


def test_the_old_name_of_adamw_gives_the_same_factors_and_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match='"adamw"') as warned:
        old = parametrize(mlp, {"width": 8}, {"width": 32}, optimizer="adam")
    assert len(warned) == 1
    assert old.rows == parametrize(mlp, {"width": 8}, {"width": 32}).rows


def test_iteration_goes_over_the_rows() -> None:
    made = parametrize(mlp, {"width": 8}, {"width": 32})
    assert list(made) == list(made.rows)


@pytest.mark.parametrize("kind", [steepest.Muon, torch.optim.SGD])
def test_an_optimizer_that_is_made_already_is_refused(kind: Any) -> None:
    optimizer = kind(mlp(8).parameters(), lr=0.1) if kind is torch.optim.SGD else kind(mlp(8))
    with pytest.raises(TypeError, match=f"optimizer={kind.__name__}.*the class itself"):
        parametrize(mlp, {"width": 8}, {"width": 32}, optimizer=optimizer)


def test_a_class_with_inherited_records_is_refused() -> None:
    class Inherits(steepest.Muon):
        pass

    with pytest.raises(ValueError, match="`records` of its own; Inherits has only those"):
        parametrize(mlp, {"width": 8}, {"width": 32}, optimizer=Inherits)
