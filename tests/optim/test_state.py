"""A state belongs to its parameter: what is loaded, what is refused, and what a step checks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import steepest
from steepest import (
    SOAP,
    TEON,
    KLShampoo,
    Muon,
    Shampoo,
    SignSGD,
    Signum,
    SpectralDescent,
)
from steepest.optim.fitting import Fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:TEON found nothing to stack"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

OPTIMIZERS = [SignSGD, Signum, SpectralDescent, Muon, TEON, Shampoo, KLShampoo, SOAP]
KRONECKER = (Shampoo, KLShampoo, SOAP)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


class Net(nn.Module):
    def __init__(self, order: str = "abc", classes: int = 3) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(4, 4))
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(self.b(self.c(x))))


def gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(name for name, _ in model.named_parameters()):
        p = model.get_parameter(name)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def trained(optimizer, model: nn.Module, steps: int = 2, **settings):
    made = optimizer(model, **settings)
    for step in range(steps):
        gradients(model, step)
        made.step()
    return made


def everything(optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [t for p in params for t in optimizer.state.get(p, {}).values()]
    return [t.detach().clone() for t in params + state if isinstance(t, Tensor)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def settings_of(optimizer) -> list[dict]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


# Matched by name


@every_optimizer
def test_state_follows_the_name_whatever_the_order(optimizer):
    old, new = Net("abc"), Net("cab")
    new.load_state_dict(old.state_dict())
    first, second = trained(optimizer, old), optimizer(new)
    new.load_state_dict(old.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["param_names"] == ["c.weight", "a.weight", "b.weight"]
    for name, p in old.named_parameters():
        theirs = second.state.get(new.get_parameter(name), {})
        assert theirs.keys() == first.state.get(p, {}).keys()
        assert equal(list(theirs.values()), list(first.state.get(p, {}).values()))
    for model, each in ((old, first), (new, second)):
        gradients(model, 9)
        each.step()
    if optimizer not in KRONECKER:  # whose turns go by order
        for name, p in old.named_parameters():
            torch.testing.assert_close(p, new.get_parameter(name), rtol=1e-5, atol=1e-6)


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Compiled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


class Blocks(nn.Module):
    """Whose blocks are wrapped, not the whole."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([wrap(nn.Linear(4, 4)), wrap(nn.Linear(4, 4))])
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("saved", "own"),
    [
        (lambda: Net(), lambda: Wrapped(Net("bca"))),
        (lambda: Wrapped(Net()), lambda: Net("bca")),
        (lambda: Wrapped(Compiled(Net())), lambda: Compiled(Net("bca"))),
        (lambda: Blocks(Compiled), lambda: Wrapped(Blocks(lambda module: module))),
    ],
    ids=["wrapped", "unwrapped", "compiled", "blocks"],
)
@pytest.mark.parametrize("optimizer", [Muon, Signum, SOAP])
def test_wrappers_in_names_do_not_count(optimizer, saved, own):
    old, new = saved(), own()
    named = {"params": list(old.named_parameters()), "geometry": "adamw"}
    first = trained(lambda _: optimizer([named]), old)
    second = optimizer([{"params": list(new.named_parameters()), "geometry": "adamw"}])
    second.load_state_dict(first.state_dict())

    def plain(name: str) -> str:
        return name.replace("module.", "").replace("_orig_mod.", "")

    there = {plain(name): p for name, p in new.named_parameters()}
    for name, p in old.named_parameters():
        kept = second.state[there[plain(name)]]
        assert torch.equal(kept["exp_avg"], first.state[p]["exp_avg"])
    assert second.param_groups[0]["param_names"] == [name for name, _ in new.named_parameters()]


def test_a_layer_that_is_called_module_is_no_wrapper():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.module = nn.Linear(4, 4, bias=False)

    models = Twice(), Twice()
    pairs = [list(model.named_parameters()) for model in models]
    first = trained(lambda _: Muon(pairs[0]), models[0])
    second = Muon(pairs[1][::-1])
    second.load_state_dict(first.state_dict())
    for name, p in pairs[0]:
        kept = second.state[models[1].get_parameter(name)]["momentum_buffer"]
        assert torch.equal(kept, first.state[p]["momentum_buffer"])


@every_optimizer
def test_other_names_are_refused_by_name(optimizer):
    tested = trained(optimizer, Net("abc"))
    before = everything(tested)
    with pytest.raises(ValueError, match=r"'a\.weight'; .*pre_hook"):
        tested.load_state_dict(trained(optimizer, Net("dbc")).state_dict())
    assert equal(everything(tested), before)


def test_without_names_on_one_side_the_order_decides():
    old, new = Net(), Net()
    first = trained(Muon, old)
    state = first.state_dict()
    for group in state["param_groups"]:
        del group["param_names"]
    second = Muon(new)
    second.load_state_dict(state)
    assert second.param_groups[0]["param_names"] == ["a.weight", "b.weight", "c.weight"]
    unnamed = Muon([new.a.weight, new.b.weight, new.c.weight])
    named = Muon([("x", old.a.weight), ("y", old.b.weight), ("z", old.c.weight)])
    unnamed.load_state_dict(named.state_dict())
    assert unnamed.param_groups[0]["param_names"] == ["x", "y", "z"]  # as torch does


def test_an_error_prints_the_roles_that_restore_the_groups():
    old, new = Net(), Net()
    first = Muon(steepest.roles(old, {"head.weight": "hidden", "a.weight": "vector"}))
    second = Muon(new)
    call = r'{"a.weight": "head", "head.weight": steepest.MatrixView\(1, 3, 4, False, \(\)\)}'
    expected = rf"steepest.roles\(model, {call}\)"
    first.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))], "geometry": "adamw"})
    with pytest.raises(ValueError, match=expected):
        second.load_state_dict(first.state_dict())


# Refused, by name, before anything changes


def refused(tested, state, message: str) -> None:
    before, settings = everything(tested), settings_of(tested)
    with pytest.raises(ValueError, match=message):
        tested.load_state_dict(state)
    assert equal(everything(tested), before)
    assert settings_of(tested) == settings


@every_optimizer
def test_a_state_of_another_shape_is_refused(optimizer):
    tested = trained(optimizer, Net(classes=3))
    state = trained(optimizer, Net(classes=50)).state_dict()
    refused(tested, state, r"'exp_avg' of the parameter head.weight has the shape \(50, 4\)")


@pytest.mark.parametrize("optimizer", [Signum, Muon, TEON, *KRONECKER])
def test_memory_of_a_matrix_of_another_shape_is_refused(optimizer):
    tested = trained(optimizer, Net())
    state = copy.deepcopy(tested.state_dict())
    state["state"][1]["momentum_buffer"] = torch.zeros(2, 8)
    refused(tested, state, r"'momentum_buffer' of the parameter b.weight has the shape \(2, 8\)")
    state["state"][1]["momentum_buffer"] = torch.zeros(4, 4, dtype=torch.int64)
    refused(tested, state, "b.weight is of torch.int64, expected a real floating-point type")
    state["state"][1]["momentum_buffer"] = "lost"
    refused(tested, state, "b.weight is 'lost', expected a tensor")
    state["state"][1] = [1, 2]
    refused(tested, state, r"got the state \[1, 2\] for the parameter b.weight")


@pytest.mark.parametrize("optimizer", KRONECKER)
def test_factors_of_other_blocks_are_refused(optimizer):
    tested = trained(optimizer, Net())
    state = copy.deepcopy(tested.state_dict())
    state["state"][0]["right_root.0"] = torch.eye(3)
    refused(tested, state, r"'right_root.0' of the parameter a.weight has the shape \(3, 3\)")


@pytest.mark.parametrize("optimizer", [Signum, Muon, TEON, *KRONECKER])
def test_missing_memory_is_refused(optimizer):
    tested = trained(optimizer, Net())
    index = tested.param_groups[1]["param_names"].index("head.bias") + 3
    for i, name in ((2, "c.weight"), (index, "head.bias")):
        for key in tested.state_dict()["state"][i]:
            state = copy.deepcopy(tested.state_dict())
            del state["state"][i][key]
            refused(tested, state, f"without the memory '{key}' of the parameter {name}")


PAIRS = [
    (SignSGD, Signum, "without the memory 'momentum_buffer'"),
    (Signum, SignSGD, "'momentum_buffer'.*which SignSGD does not keep"),
    (SpectralDescent, Muon, "without the memory 'momentum_buffer'"),
    (Muon, SpectralDescent, "which SpectralDescent does not keep"),
    (Shampoo, SOAP, "geometry 'shampoo', expected 'soap'"),
    (Signum, Muon, "geometry 'sign', expected 'spectral'"),
]


@pytest.mark.parametrize(
    ("saved", "own", "message"), PAIRS, ids=lambda value: getattr(value, "__name__", "")
)
def test_the_state_of_another_optimizer_is_refused(saved, own, message):
    refused(trained(own, Net()), trained(saved, Net()).state_dict(), message)


def test_settings_of_another_optimizer_are_left_out():
    tested = SignSGD(Net())
    tested.load_state_dict(Signum(Net(), lr=0.5).state_dict())
    assert "momentum" not in tested.param_groups[0]
    assert tested.param_groups[0]["lr"] == 0.5
    plain = trained(Muon, Net())
    stacked = TEON(Net(), stack=1)
    stacked.load_state_dict(plain.state_dict())  # which keeps the same memory
    plain.load_state_dict(stacked.state_dict())
    assert plain.param_groups[0].keys() == Muon(Net()).param_groups[0].keys()


@every_optimizer
def test_wrong_settings_in_a_state_are_refused(optimizer):
    tested = trained(optimizer, Net())
    for key, value in (("lr", float("nan")), ("betas", (0.9,)), ("maximize", "no")):
        state = copy.deepcopy(tested.state_dict())
        state["param_groups"][1][key] = value
        refused(tested, state, f"got {key}=")
    refused(tested, Net().state_dict(), "got no state of an optimizer")


# What loads: own keys of any time, what torch converts


def test_memory_that_an_earlier_setting_left_is_own():
    tested = trained(Muon, Net())
    tested.param_groups[0]["momentum"] = 0.0
    resumed = Muon(Net())
    resumed.load_state_dict(tested.state_dict())
    assert len(resumed.state) == len(tested.state)
    later = trained(Muon, Net(), momentum=0.0)
    later.param_groups[0]["momentum"] = 0.9  # memory is made in the next step
    resumed.load_state_dict(later.state_dict())
    model = Net()
    shampoo = trained(Shampoo, model)
    shampoo.param_groups[0].update(length="muon", sides="left")
    Shampoo(Net()).load_state_dict(shampoo.state_dict())


def test_a_parameter_without_a_step_has_no_state_even_if_it_was_looked_at():
    model = Net()
    tested = Muon(model)
    gradients(model)
    model.b.weight.grad = None
    tested.step()
    assert tested.state[model.b.weight] == {}
    resumed = Muon(Net())
    resumed.load_state_dict(tested.state_dict())
    assert len(resumed.state) == len(tested.state) == 7


class Counting(Muon):
    """Keeps a counter for each matrix, and a tensor for each parameter, made when it is needed."""

    def remember(self, group, batch):
        for state in batch.states:
            state["seen"] = state["seen"] + 1 if "seen" in state else torch.tensor(1)
            self.state[state.parameter].setdefault("slow", torch.zeros(4, 4)).add_(1)
        return super().remember(group, batch)


class Started(SignSGD):
    """Makes what it keeps at the start, and looks at numbers for it."""

    def start(self, group, matrices):
        for state, G in zip(matrices.states(self.state), matrices.gradients, strict=True):
            if "first" not in state:
                state["first"] = torch.full((2,), G.abs().max().item())


@pytest.mark.parametrize("optimizer", [Counting, Started])
def test_subclasses_keep_what_they_like(optimizer):
    model, other = Net(), Net()
    tested, resumed = trained(optimizer, model), optimizer(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(tested.state_dict()))
    for step in range(2):
        for each, net in ((tested, model), (resumed, other)):
            gradients(net, 5 + step)
            each.step()
    assert equal(everything(tested), everything(resumed))
    state = tested.state[model.a.weight]
    assert ("seen.0" in state and state["seen.0"] == 4) or "first.0" in state


@every_optimizer
@pytest.mark.parametrize("kind", [float, int, lambda t: t.double(), lambda t: t.reshape(1)])
def test_counters_of_any_type_are_converted(optimizer, kind):
    model, other = Net(), Net()
    tested = trained(optimizer, model)
    state = copy.deepcopy(tested.state_dict())
    for kept in state["state"].values():
        for key, value in kept.items():
            if value.numel() == 1:
                kept[key] = kind(value)
    other.load_state_dict(model.state_dict())
    resumed = optimizer(other)
    resumed.load_state_dict(state)
    assert equal(everything(tested), everything(resumed))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in tested.state[p].items():
            assert resumed.state[q][key].dtype == value.dtype


@every_optimizer
def test_a_loaded_state_shares_no_memory(optimizer):
    tested, resumed = trained(optimizer, Net()), optimizer(Net())
    resumed.load_state_dict(tested.state_dict())
    here = {t.data_ptr() for state in tested.state.values() for t in state.values()}
    there = {t.data_ptr() for state in resumed.state.values() for t in state.values()}
    assert not here & there


@every_optimizer
def test_hooks_decide_what_is_loaded_as_in_torch(optimizer):
    model = Net()
    tested = trained(optimizer, model)
    first_bias = 3

    def doubled(_, state):
        new = copy.deepcopy(state)
        new["state"][first_bias]["exp_avg"] *= 2
        new["param_groups"][0]["lr"] = 0.25
        return new

    def in_place(_, state):
        state["state"] = {k: v for k, v in state["state"].items() if k != 0}

    def after(made):
        made.state[made.param_groups[1]["params"][1]]["exp_avg_sq"] += 7
        made.param_groups[1]["lr"] = 0.125
        made.state["note"] = "any"

    expected = [2 * tested.state[model.a.bias]["exp_avg"]]
    expected.append(7 + tested.state[tested.param_groups[1]["params"][1]]["exp_avg_sq"])
    handles = [
        tested.register_load_state_dict_pre_hook(doubled),
        tested.register_load_state_dict_pre_hook(in_place),
        tested.register_load_state_dict_post_hook(after),
    ]
    tested.load_state_dict(tested.state_dict())
    assert torch.equal(tested.state[model.a.bias]["exp_avg"], expected[0])
    assert torch.equal(tested.state[tested.param_groups[1]["params"][1]]["exp_avg_sq"], expected[1])
    assert [group["lr"] for group in tested.param_groups] == [0.25, 0.125]
    assert model.a.weight not in tested.state
    assert tested.state["note"] == "any"
    tested.load_state_dict(tested.state_dict())  # with a state that is of no parameter
    for handle in handles:
        handle.remove()
    assert not tested._optimizer_load_state_dict_pre_hooks
    gradients(model)
    tested.step()


def test_what_a_hook_returns_is_checked():
    tested = trained(Muon, Net())

    def shortened(_, state):
        new = copy.deepcopy(state)
        new["state"][1]["momentum_buffer"] = torch.zeros(3)
        return new

    tested.register_load_state_dict_pre_hook(shortened)
    refused(tested, tested.state_dict(), "parameter b.weight has the shape")
    assert len(tested._optimizer_load_state_dict_pre_hooks) == 1


def test_strings_and_other_things_in_a_state_stay():
    tested = trained(Muon, Net())
    state = copy.deepcopy(tested.state_dict())
    state["state"][0] |= {"note": "warm", "pair": [1, torch.ones(2)], "none": None}
    state["state"]["of all"] = {"x": 1}
    tested.load_state_dict(state)
    kept = tested.state[tested.param_groups[0]["params"][0]]
    assert (kept["note"], kept["pair"][0], kept["none"]) == ("warm", 1, None)
    assert tested.state["of all"] == {"x": 1}


# torch.distributed.checkpoint


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(each, {}) for each in OPTIMIZERS]
    + [(Muon, {"momentum": 0.0}), (Signum, {"momentum": 0.0}), (SOAP, {"momentum": 0.0})],
    ids=str,
)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_distributed_checkpoints_load_strictly(optimizer, settings, flat, fresh):
    model, other = Net(), Net("cab")
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    tested = trained(optimizer, model, **settings)
    resumed = optimizer(other, **settings)
    if not fresh:
        gradients(other, 3)
        resumed.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group, which is meant
        state = get_optimizer_state_dict(model, tested, options=options)
        set_optimizer_state_dict(other, resumed, copy.deepcopy(state), options=options)
    for name, p in model.named_parameters():
        ours, theirs = tested.state[p], resumed.state[other.get_parameter(name)]
        assert ours.keys() == theirs.keys()
        assert equal(list(ours.values()), list(theirs.values()))
    assert resumed.param_groups[0]["param_names"] == ["c.weight", "a.weight", "b.weight"]
    assert resumed.param_groups[0]["lr"] == tested.param_groups[0]["lr"]


# A step checks all groups before anything moves


def double(p: Tensor) -> None:
    p.data = p.data.double()
    p.grad = torch.randn_like(p)


def reshape(*shape: int) -> Callable[[Tensor], None]:
    def change(p: Tensor) -> None:
        p.data = torch.randn(shape)
        p.grad = torch.randn(shape)

    return change


def outgrow(p: Tensor) -> None:
    p.data = torch.randn(50, *p.shape[1:])  # and keep the gradient


DATA = [
    ("c.weight", reshape(8, 4), r"parameter c.weight with the shape \(8, 4\), which had"),
    ("c.weight", reshape(2, 8), r"parameter c.weight with the shape \(2, 8\), which had"),
    ("c.weight", outgrow, r"gradient of shape \(4, 4\) for the parameter c.weight"),
    ("head.weight", reshape(50, 4), r"'exp_avg' of the parameter head.weight has the shape"),
    ("head.bias", outgrow, r"gradient of shape \(3,\) for the parameter head.bias"),
    ("head.bias", double, "'exp_avg' of the parameter head.bias is of torch.float32"),
]


@every_optimizer
@pytest.mark.parametrize(("name", "change", "message"), DATA)
def test_new_data_of_a_parameter_is_checked(optimizer, name, change, message):
    model = Net()
    tested = trained(optimizer, model)
    gradients(model, 5)
    change(model.get_parameter(name))
    before = everything(tested)
    with pytest.raises(ValueError, match=message):
        tested.step()
    assert equal(everything(tested), before)


@pytest.mark.parametrize("optimizer", [Muon, SOAP])
def test_a_new_type_goes_on_after_the_remedy(optimizer):
    model = Net()
    tested = trained(optimizer, model)
    model.double()
    gradients(model, 5)
    with pytest.raises(ValueError, match=r"state_dict\(optimizer"):
        tested.step()
    tested.load_state_dict(tested.state_dict())
    before = everything(tested)
    tested.step()
    assert not equal(everything(tested), before)


STATES = [
    (1, lambda kept: kept.pop("exp_avg_sq"), "has lost its memory 'exp_avg_sq'"),
    (1, lambda kept: kept.pop("step"), "has lost its memory 'step'"),
    (1, lambda kept: kept.update(exp_avg=torch.zeros(2)), "'exp_avg' of the parameter"),
    (1, lambda kept: kept.update(exp_avg_sq=None), "'exp_avg_sq' of the parameter .* is None"),
    (1, lambda kept: kept.update(exp_avg=kept["exp_avg"].half()), "is of torch.float16"),
    (1, lambda kept: setattr(kept["exp_avg"], "data", torch.zeros(1)), "has the shape"),
    (1, lambda kept: kept["exp_avg_sq"].resize_(1), "has the shape"),
    (0, lambda kept: kept.update(momentum_buffer=torch.zeros(8, 4)), "'momentum_buffer' of the"),
]


@pytest.mark.parametrize("optimizer", [Signum, Muon, *KRONECKER])
@pytest.mark.parametrize(("i", "spoil", "message"), STATES)
def test_memory_is_checked_in_every_step(optimizer, i, spoil, message):
    model = Net()
    tested = trained(optimizer, model)
    gradients(model, 5)
    spoil(tested.state[tested.param_groups[i]["params"][-1]])
    before = everything(tested)
    with pytest.raises(ValueError, match=message):
        tested.step()
    assert equal(everything(tested), before)


@pytest.mark.parametrize("optimizer", KRONECKER)
@pytest.mark.parametrize("key", ["left.0", "right_root.0", "steps.0", "momentum_buffer"])
def test_lost_factors_are_noticed(optimizer, key):
    model = Net()
    tested = trained(optimizer, model)
    gradients(model, 5)
    del tested.state[model.c.weight][key]
    before = everything(tested)
    with pytest.raises(ValueError, match=rf"c\.weight .*'{key}'"):
        tested.step()
    assert equal(everything(tested), before)


@every_optimizer
def test_replaced_and_appended_parameters_are_checked(optimizer):
    model = Net()
    tested = trained(optimizer, model)
    matrices, others = (group["params"] for group in tested.param_groups)

    def new(*shape: int) -> nn.Parameter:
        p = nn.Parameter(torch.randn(shape))
        p.grad = torch.randn(shape)
        return p

    gradients(model, 5)
    old = matrices[0]
    matrices[0] = new(8, 2)
    with pytest.raises(ValueError, match=r"a\.weight .* \(8, 2\)"):
        tested.step()
    matrices[0] = new(4, 4)  # starts afresh
    tested.state.pop(old, None)
    tested.step()
    others.append(new(5))
    before = others[-1].detach().clone()
    tested.step()
    assert not torch.equal(others[-1], before)
    matrices.append(new(4, 4))
    before = everything(tested)
    with pytest.raises(ValueError, match=r"4 parameters .* with 3"):
        tested.step()
    assert equal(everything(tested), before)


LATER = [
    ("lr", float("nan")),
    ("lr", torch.tensor(-1.0)),
    ("betas", (0.9, 0.95, 0.99)),
    ("weight_decay", "0.1"),
    ("maximize", 1),
    ("eps", None),
]


@every_optimizer
@pytest.mark.parametrize(("key", "value"), LATER)
def test_settings_changed_later_are_checked_over_all_groups_first(optimizer, key, value):
    model = Net()
    tested = trained(optimizer, model)
    gradients(model, 5)
    tested.param_groups[1][key] = value
    before = everything(tested)
    with pytest.raises(ValueError, match=f"got {key}="):
        tested.step()
    del tested.param_groups[1][key]
    with pytest.raises(ValueError, match=rf"without \['{key}'\]"):
        tested.step()
    assert equal(everything(tested), before)


def test_a_rate_in_a_tensor_is_checked_in_every_step():
    model, rate = Net(), torch.tensor(0.02)
    tested = trained(Muon, model, lr=rate)
    rate.fill_(torch.nan)
    with pytest.raises(ValueError, match="got lr="):
        tested.step()


@pytest.mark.parametrize("optimizer", [Muon, Signum, *KRONECKER])
def test_momentum_can_be_switched_on_in_the_middle(optimizer):
    model = Net()
    tested = trained(optimizer, model, momentum=0.0)
    tested.param_groups[0]["momentum"] = 0.9
    for step in range(3):
        gradients(model, step)
        tested.step()
    assert tested.state[model.a.weight]["momentum_buffer"].any()


# An exception in the middle


class Failing(Muon):
    def direction(self, group, batch, N):
        if batch.outputs == 6:
            raise self.error
        return super().direction(group, batch, N)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.linalg.LinAlgError("no convergence"),
        KeyError("key"),
        UnicodeDecodeError("ascii", b"a", 0, 1, "why"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_says_which_parameters_have_moved(error):
    shapes = {"first": (4, 4), "second": (6, 4), "third": (4, 4), "last": (4, 6)}
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    alone = nn.Parameter(torch.randn(3))
    groups = [
        {"params": [("alone", alone)], "geometry": "adamw"},
        {"params": list(named.items())},
    ]
    tested = Failing(groups)
    tested.error = error
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in (alone, *named.values()):
        p.grad = torch.randn_like(p)
    with pytest.raises(type(error)) as caught:
        tested.step()
    assert caught.value is error
    text = str(error) + " ".join(getattr(error, "__notes__", []))
    assert "in group 1 (spectral), at 1 matrices of 6 x 4" in text
    assert "that is parameter first, parameter third, and all groups before it" in text
    moved = [name for name, p in named.items() if not torch.equal(p, before[name])]
    assert moved == ["first", "third"]


def test_memory_of_all_groups_is_made_before_anything_moves(monkeypatch):
    model = Net()
    tested = Muon(model)
    gradients(model)
    before = [p.detach().clone() for p in model.parameters()]

    zeros_like = torch.zeros_like

    def out_of_memory(like, **settings):
        if like.is_meta:
            return zeros_like(like, **settings)
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch, "zeros_like", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match=r"no memory left"):
        tested.step()
    assert equal([p.detach() for p in model.parameters()], before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("make", [Muon, Signum, SOAP, KLShampoo])
@pytest.mark.parametrize("key", ["momentum_buffer", "exp_avg"])
def test_broken_memory_is_refused_by_name_before_anything_moves(make, key, value):
    optimizer = trained(make, model := Net())
    gradients(model)
    state = copy.deepcopy(optimizer.state_dict())
    broken = next(kept for kept in state["state"].values() if key in kept)
    broken[key].view(-1)[0] = value
    optimizer.load_state_dict(state)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=f"memory '{key}' .* NaN"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "write",
    [
        lambda memory: memory.fill_(float("nan")),
        lambda memory: memory.view(-1)[:1].mul_(float("inf")),
        lambda memory: torch._foreach_div_([memory], 0.0),
    ],
    ids=["fill", "a view", "foreach"],
)
@pytest.mark.parametrize("make", [Muon, Signum, SOAP, KLShampoo])
@pytest.mark.parametrize("key", ["momentum_buffer", "exp_avg"])
def test_memory_that_was_written_to_in_place_is_checked_again(make, key, write):
    optimizer = trained(make, model := Net())
    gradients(model)
    write(next(kept[key] for kept in optimizer.state.values() if key in kept))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=f"memory '{key}' .* NaN"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("make", [Muon, Signum, SOAP, KLShampoo])
def test_a_plain_dictionary_in_place_of_the_state_starts_it_anew(make):
    optimizer = trained(make, model := Net())
    gradients(model)
    optimizer.state = {}
    other = Net()
    other.load_state_dict(model.state_dict())
    fresh = make(other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    for group in fresh.param_groups:
        group["step_count"] = optimizer.param_groups[0]["step_count"]
    optimizer.step()
    fresh.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_memory_as_a_step_left_it_is_not_looked_at_again(monkeypatch):
    optimizer = trained(Muon, model := Net())
    gradients(model)
    looks = []
    look = Fit._look
    monkeypatch.setattr(Fit, "_look", lambda *args: looks.append(args) or look(*args))
    optimizer.step()
    assert not looks


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_model_may_have_a_part_that_is_called_module(prefix):
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.module = nn.Linear(4, 4), nn.ModuleDict({"a": nn.Linear(4, 4)})

    old, new = Wrapper(), Wrapper()
    first, second = trained(Muon, old), Muon(new)
    state = first.state_dict()
    for group in state["param_groups"]:
        group["param_names"] = [prefix + name for name in group["param_names"]]
    second.load_state_dict(state)
    for p, q in zip(old.parameters(), new.parameters(), strict=True):
        for key, value in first.state[p].items():
            assert torch.equal(value, second.state[q][key])
