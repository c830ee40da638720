from __future__ import annotations

import copy
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steepest import TEON, Shampoo
from steepest.lab.errors import InputError
from steepest.lab.models import GPT, GPTConfig
from steepest.lab.studies.study_config import StudyConfig
from steepest.lab.train import TrainConfig, train
from steepest.lab.train.optimizers import build, named_optimizer, spec_slug, starting_rates
from steepest.lab.train.split_optimizer import SplitOptimizer
from steepest.model.parameter_roles import roles
from steepest.optim.family import FAMILY, study_names

SHARED = {"momentum": 0.8, "weight_decay": 0.1, "adamw_lr": 0.003}
OWN = '''
import torch
from torch.optim import Optimizer


class Counted(Optimizer):
    """Gradient descent that counts its steps and keeps a number of its own."""

    def __init__(self, params, lr=0.5, *, beta: float = 0.5, order=1, name: str | None = None):
        super().__init__(params, {"lr": lr, "beta": beta})
        self.note = 0.0

    @torch.no_grad()
    def step(self, closure=None):
        self.note += 1.0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - group["beta"])
                    p.sub_(group["lr"] * mean)

    def state_dict(self):
        return {**super().state_dict(), "note": self.note}

    def load_state_dict(self, state_dict):
        self.note = state_dict["note"]
        super().load_state_dict(state_dict)


class Unknown(Counted):
    def __init__(self, params, lr, **more):
        super().__init__(params, lr, **more)


class NoRate(Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


class Broken(Counted):
    def __init__(self, params, lr=0.1):
        raise RuntimeError("no license")


def build(model, lr, momentum: float = 0.5):
    return torch.optim.SGD(model.parameters(), lr, momentum=momentum)


def other(model, *, lr=0.2):
    return torch.optim.SGD(model.parameters(), lr)


def nothing(model, lr=0.1):
    return model


def wrong(model):
    return None


number = 3
'''


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_steps.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_steps", raising=False)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for i in range(first, last):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


# names and options


@pytest.mark.parametrize("name", study_names())
def test_a_plain_name_is_its_record(name: str) -> None:
    known, record = named_optimizer(name), FAMILY[name]
    assert (known.name, known.label, known.rates) == (name, record.label, record.rates)
    assert (known.geometry, known.memory, known.kind) == (
        record.geometry,
        record.memory,
        record.kind,
    )
    assert known.settings == record.settings
    assert spec_slug(name) == name


def test_options_reach_the_class_by_their_types() -> None:
    net = GPT(GPTConfig(width=16, depth=4, heads=2, context=8), 10)
    optimizer = build("teon:length=muon,stack=4,nesterov=false,decay=cautious", net, 0.1, **SHARED)
    plain = TEON(
        roles(net), 0.1, length="muon", stack=4, nesterov=False, decay="cautious", **SHARED
    )
    assert isinstance(optimizer, TEON)
    assert optimizer.state_dict() == plain.state_dict()
    assert {len(stack) for stack in optimizer.stacks} == {4}
    name = "shampoo:block=none,max_side=3"
    with pytest.raises(InputError, match="'max_side', which is no option of shampoo"):
        build(name, net, 0.1, **SHARED)
    other = build("shampoo:block=none,scale=none,state-dtype=float64,eps=1e-3", net, 0.1, **SHARED)
    assert isinstance(other, Shampoo)
    group = other.param_groups[0]
    assert (group["block"], group["scale"], group["eps"]) == (None, "none", 1e-3)
    assert group["state_dtype"] is torch.float64


def test_options_go_before_the_settings_of_the_run() -> None:
    optimizer = build("muon:momentum=0.5,weight-decay=0,adamw_lr=0.7", model(), 0.1, **SHARED)
    matrices, others = optimizer.param_groups
    assert (matrices["momentum"], matrices["weight_decay"], others["lr"]) == (0.5, 0.0, 0.7)


def test_options_of_torchs_adamw_are_those_of_the_matrices() -> None:
    plain = build("adamw", model(), 0.1, **SHARED)
    own = build("adamw:betas=0.7,0.9,eps=1e-6", model(), 0.1, **SHARED)
    assert [g["betas"] for g in plain.param_groups] == [(0.8, 0.95), (0.9, 0.95)]
    assert [g["betas"] for g in own.param_groups] == [(0.7, 0.9), (0.9, 0.95)]
    assert [g["eps"] for g in own.param_groups] == [1e-6, 1e-8]
    assert own.param_groups[1] | {"params": 0} == plain.param_groups[1] | {"params": 0}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("teon:compensate=true,stack=3", "teon:length=muon,stack=3"),
        ("teon:compensate=false", "teon:length=own"),
        ("shampoo:graft=none", "shampoo:length=own"),
        ("soap:normalize=spectral", "soap:length=spectral"),
    ],
)
def test_old_names_of_options_are_understood(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match="is called length="):
        known = named_optimizer(old)
    assert known == named_optimizer(new)
    assert known.name == new


@pytest.mark.filterwarnings("ignore:compensate:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("muno", r"got 'muno' \(did you mean muon\?\), expected one of adamw"),
        ("muno:steps=3", r"got 'muno' \(did you mean muon\?\)"),
        ("teon:lenght=muon", r"'lenght', which is no option of teon \(did you mean length\?\)"),
        ("teon:length=adam", 'got length=\'adam\' for teon, expected "own" or "muon"'),
        ("teon:stack=0", "got stack='0' for teon, expected a whole number of at least 1"),
        ("teon:stack=2.5", "got stack='2.5' for teon, expected a whole number"),
        ("teon:stack=true", "got stack='true' for teon, expected a whole number"),
        ("teon:stack=2,stack=3", "got stack twice for teon"),
        ("teon:stack", "expected options as name=value"),
        ("teon:compensate=5", "got compensate='5', expected True or False"),
        ("teon:compensate=true,length=own", "give length alone"),
        ("muon:compensate=true", "'compensate', which is no option of muon"),
        ("muon:roles=2", "'roles', which is no option"),
        ("muon:lr=-1", "got lr='-1'"),
        ("muon:lr=0", "got lr=0 for muon, expected a finite number above 0"),
        ("adamw:betas=0.9", "got betas='0.9' for adamw"),
        ("torch.optim:LBFGS", "whose step needs closure"),
        ("own_steps:NoRate", "which takes no lr"),
        ("own_steps:wrong", r"expected a function build\(model, lr\)"),
        ("own_steps:number", r"expected a function build\(model, lr\)"),
        ("torch:rand", r"expected a function build\(model, lr\)"),
        ("torch.nn:Linear", "expected a subclass of steepest.optim.SteepestDescent or of torch"),
        ("own_steps:Counted:beta=high", "got beta='high'"),
        ("own_steps:Counted:gamma=1", "'gamma', which is no option of own_steps:Counted"),
        ("no_such_module:Own", "No module named"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(name: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        named_optimizer(name)


def test_equal_options_have_one_name_and_one_folder() -> None:
    texts = ("teon:stack=4,length=muon", "teon:length=muon,stack=4", "teon:length=muon,stack=4.0")
    with pytest.raises(InputError, match="stack"):  # 4.0 is no whole number
        named_optimizer(texts[2])
    assert spec_slug(texts[0]) == spec_slug(texts[1])
    assert spec_slug("muon:weight-decay=0.10") == spec_slug("muon:weight_decay=1e-1")
    slugs = {spec_slug(name) for name in ("muon", "muon:steps=5", "muon:steps=6", "adamw")}
    assert len(slugs) == 4
    assert all(set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_") for slug in slugs)
    with pytest.raises(InputError, match="each of them once"):
        StudyConfig(optimizers=texts[:2])


@pytest.mark.parametrize(
    "name",
    [
        "muon:dtype=bfloat16,method=svd,nesterov=false,steps=none",
        "adamw:betas=0.9,0.99,eps=1e-12,lr=1",
        "soap:max_side=none,scale=spectral",
        "own_steps:Counted:order=2,name=none,beta=1e-3",
        "own_steps:Counted:name=a,b",
    ],
)
def test_the_name_of_an_optimizer_names_it_again(name: str) -> None:
    known = named_optimizer(name)
    assert named_optimizer(known.name) == known
    assert named_optimizer(known.name).name == known.name


def test_labels_show_the_options() -> None:
    assert named_optimizer("teon:length=muon").label == "TEON, length muon"
    assert named_optimizer("soap:max-side=none").label == "SOAP, max side none"
    assert named_optimizer("adamw:betas=0.9,0.99").label == "AdamW, betas 0.9 and 0.99"
    assert named_optimizer("muon:lr=0.1").label == "Muon"


def test_a_grid_starts_around_the_rate_of_the_name_or_of_the_signature() -> None:
    assert named_optimizer("muon:lr=0.1").rates == (0.05, 0.1, 0.2)
    assert named_optimizer("own_steps:Counted").rates == (0.25, 0.5, 1.0)
    assert named_optimizer("own_steps:Counted:lr=2").rates == (1.0, 2, 4)
    assert named_optimizer("own_steps:other").rates == (0.1, 0.2, 0.4)
    for name in ("own_steps:Unknown", "own_steps:build"):
        assert named_optimizer(name).rates == ()
        with pytest.raises(InputError, match=f"such as {name}:lr=0.01"):
            starting_rates(name)
        with pytest.raises(InputError, match="pass --lr"):
            TrainConfig(optimizer=name)
        with pytest.raises(InputError, match="no rates for a study"):
            StudyConfig(optimizers=(name,))
        assert TrainConfig(optimizer=f"{name}:lr=0.3").rate == 0.3
        assert TrainConfig(optimizer=name, lr=0.4).rate == 0.4


def test_a_class_of_ones_own_passes_options_on() -> None:
    """What the class itself names, then what the classes it inherits from do."""

    class Longer(TEON):
        records = ()

        def __init__(self, params: Any, lr: float = 0.02, **settings: Any):
            super().__init__(params, lr, length="muon", **settings)

    from steepest.lab.train.optimizer_options import arguments_of, parsed_options

    assert {"stack", "mode", "adamw_lr", "lr"} <= arguments_of(Longer).keys()
    assert parsed_options("stack=3,mode=2", Longer, "longer") == {"mode": 2, "stack": 3}
    with pytest.raises(InputError, match=r"got mode='3' for longer, expected 1 or 2"):
        parsed_options("mode=3", Longer, "longer")


# optimizers of the user's


def test_a_users_class_gets_the_matrices_and_adamw_all_else() -> None:
    net, plain = model(), model()
    optimizer = build("own_steps:Counted:beta=0.2", net, 0.1, **SHARED)
    table = roles(plain)
    import own_steps  # type: ignore[import-not-found]

    separate = [
        own_steps.Counted([row.parameter for row in table.matrices], 0.1, beta=0.2),
        torch.optim.AdamW(
            [row.parameter for row in table.others],
            0.003,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]
    for i in range(5):
        trained(net, optimizer, i, i + 1)
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(i))
        plain.zero_grad()
        plain(x).square().mean().backward()
        for part in separate:
            part.step()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.003]
    assert set(optimizer.state) == set(net.parameters())


def test_momentum_and_weight_decay_go_to_those_that_have_them() -> None:
    sgd = build("torch.optim:SGD", model(), 0.1, **SHARED).param_groups[0]
    assert (sgd["momentum"], sgd["weight_decay"]) == (0.8, 0.1)
    own = build("torch.optim:SGD:momentum=0.3", model(), 0.1, **SHARED).param_groups[0]
    assert own["momentum"] == 0.3
    adam = build("torch.optim:Adam", model(), 0.1, **SHARED).param_groups[0]
    assert (adam["betas"], adam["weight_decay"]) == ((0.9, 0.999), 0.1)
    assert "momentum" not in adam


@pytest.mark.parametrize("name", ["torch.optim:SGD", "torch.optim:Adam", "own_steps:Counted"])
def test_one_state_resumes_both_bit_for_bit(name: str) -> None:
    whole, half = model(), model()
    trained(whole, build(name, whole, 0.05, **SHARED), 0, 8)
    first = build(name, half, 0.05, **SHARED)
    trained(half, first, 0, 4)
    first.param_groups[0]["lr"] = 0.025
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = model()
    resumed.load_state_dict(saved["model"])
    second = build(name, resumed, 0.05, **SHARED)
    second.load_state_dict(saved["optimizer"])
    assert second.param_groups[0]["lr"] == 0.025
    second.param_groups[0]["lr"] = 0.05
    trained(resumed, second, 4, 8)
    assert same(resumed, whole)
    keys = [i for group in saved["optimizer"]["param_groups"] for i in group["params"]]
    assert keys == list(range(6))
    assert set(saved["optimizer"]["state"]) == set(keys)


def test_what_a_users_class_adds_to_its_state_is_kept() -> None:
    net = model()
    optimizer = build("own_steps:Counted", net, 0.1, **SHARED)
    trained(net, optimizer, 0, 3)
    state = optimizer.state_dict()
    assert state["note"] == 3.0
    again = build("own_steps:Counted", model(), 0.1, **SHARED)
    again.load_state_dict(state)
    assert isinstance(again, SplitOptimizer)
    assert again.parts[0].note == 3.0  # type: ignore[attr-defined]


def test_schedules_and_hooks_act_on_all_groups() -> None:
    net = model()
    optimizer = build("own_steps:Counted", net, 0.1, **SHARED)
    steps: list[Any] = []
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: steps.append(optimizer))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
    assert isinstance(optimizer, SplitOptimizer)
    trained(net, optimizer, 0, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.0015]
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [0.05, 0.0015]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.003]
    assert steps == [optimizer]
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(net)
    trained(net, optimizer, 1, 2)
    assert same(net, before)
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_it_can_be_copied_and_refuses_what_it_cannot_do() -> None:
    net = model()
    optimizer = build("torch.optim:SGD", net, 0.1, **SHARED)
    trained(net, optimizer, 0, 2)
    twin, moved = copy.deepcopy((net, optimizer))
    trained(net, optimizer, 2, 4)
    trained(twin, moved, 2, 4)
    assert same(net, twin)
    with pytest.raises(NotImplementedError, match="no part of this optimizer has"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    smaller = build(
        "own_steps:Counted", nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)), 0.1, **SHARED
    )
    with pytest.raises(ValueError, match="expected those of this optimizer"):
        smaller.load_state_dict(optimizer.state_dict())
    calls: list[int] = []
    closure = lambda: calls.append(1) or 3.0  # noqa: E731
    assert optimizer.step(closure) == 3.0
    assert calls == [1]


def test_what_a_users_function_returns_is_used_as_it_is() -> None:
    net = model()
    optimizer = build("own_steps:build:momentum=0.25", net, 0.3, **SHARED)
    assert isinstance(optimizer, torch.optim.SGD)
    [group] = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.25, 0)
    assert isinstance(build("own_steps:other", net, 0.3, **SHARED), torch.optim.SGD)
    with pytest.raises(InputError, match="got a Sequential from own_steps:nothing, expected a tor"):
        build("own_steps:nothing", net, 0.3, **SHARED)
    with pytest.raises(InputError, match=r"no license, at .*own_steps\.py"):
        build("own_steps:Broken", net, 0.3, **SHARED)


def test_settings_that_do_not_go_together_are_a_sentence() -> None:
    with pytest.raises(InputError, match="heavy_ball=True for an optimizer without momentum"):
        build("spectral-descent:heavy_ball=true", model(), 0.1, **SHARED)


@pytest.mark.parametrize(
    "name", ["own_steps:Counted:lr=0.02", "own_steps:build:lr=0.1", "muon:momentum=0.5"]
)
def test_a_run_with_it_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, values: dict[str, Any]) -> None:
        if done == 5:
            raise Stop

    (tmp_path / "text.txt").write_text("".join(f"{i} and {i * i % 97}; " for i in range(900)))
    config = TrainConfig(
        optimizer=name,
        data=str(tmp_path / "text.txt"),
        width=8,
        depth=1,
        model_options=("heads=2",),
        context=8,
        steps=8,
        batch=2,
        validate_windows=2,
        checkpoint_every=3,
        threads=1,
    )
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(config, tmp_path / "parts", on_step=stop)
    assert train(config, tmp_path / "parts")["validation_loss"] == whole["validation_loss"]
    assert whole["optimizer_state_bytes"] > 0
