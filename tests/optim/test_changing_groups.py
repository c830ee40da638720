"""Groups that change between steps, groups of another geometry, and old names of options."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from steepest import SOAP, TEON, KLShampoo, Muon, Shampoo, SignSGD, Signum, SpectralDescent

OPTIMIZERS = [SignSGD, Signum, SpectralDescent, Muon, TEON, Shampoo, KLShampoo, SOAP]
KRONECKER = [Shampoo, KLShampoo, SOAP]
every = pytest.mark.parametrize("make", OPTIMIZERS)
pytestmark = pytest.mark.filterwarnings("ignore:TEON found nothing to stack")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def stepped(optimizer, *params, steps=2):
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()


@every
@pytest.mark.parametrize("geometry", [{}, {"geometry": "adamw"}])
def test_a_parameter_that_was_replaced_rests(make, geometry):
    old, other, new = parameter(4, 6), parameter(4, 6), parameter(4, 6)
    optimizer = make([{"params": [old, other], **geometry}])
    stepped(optimizer, old, other)
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state.pop(old, None)
    before = old.detach().clone(), new.detach().clone()
    optimizer.step()  # old has a gradient still, new has none yet
    assert torch.equal(old, before[0])
    assert torch.equal(new, before[1])
    stepped(optimizer, new, other, steps=1)
    assert torch.equal(old, before[0])
    assert not torch.equal(new, before[1])


@every
def test_a_refused_step_after_loading_leaves_no_memory_of_before(make):
    first, second = parameter(4, 6), parameter(4, 6)
    optimizer = make([first, second])
    stepped(optimizer, first, steps=1)
    state = copy.deepcopy(optimizer.state_dict())
    weights = first.detach().clone()
    stepped(optimizer, first, steps=3)
    optimizer.load_state_dict(copy.deepcopy(state))
    with torch.no_grad():
        first.copy_(weights)
    second.grad = torch.ones(4, 6)
    second.data = second.data.double()
    with pytest.raises(ValueError, match="float"):
        optimizer.step()
    second.data, second.grad = second.data.float(), None
    other = nn.Parameter(weights.clone())
    fresh = make([other, parameter(4, 6)])
    fresh.load_state_dict(copy.deepcopy(state))
    other.grad = first.grad.clone()
    optimizer.step()
    fresh.step()
    assert torch.equal(first, other)


@pytest.mark.parametrize("make", [Muon, Shampoo])
def test_a_parameter_of_another_shape_can_leave_its_group(make):
    first, second = parameter(4, 6), parameter(3, 5)
    optimizer = make([first, second])
    stepped(optimizer, first, second)
    group = optimizer.param_groups[0]
    group["params"], group["views"] = [second], group["views"][1:]
    optimizer.state.pop(first)
    stepped(optimizer, second, steps=1)


@pytest.mark.parametrize("make", KRONECKER)
@pytest.mark.parametrize("geometry", ["sign", "euclidean", "spectral"])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 3, 3)])
def test_a_group_of_another_geometry_takes_its_step(make, geometry, shape):
    ours, theirs = parameter(*shape), parameter(*shape)
    theirs.data.copy_(ours.data)
    settings = {"momentum": 0.9, "scale": "none", "nesterov": False, "method": "svd"}
    first = make([{"params": [ours], "geometry": geometry, **settings}], 0.1)
    second = Muon([{"params": [theirs], "geometry": geometry, **settings}], 0.1)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
    assert torch.equal(ours, theirs)
    assert first.state[ours].keys() == second.state[theirs].keys()
    assert geometry in repr(first)


def test_a_vector_may_have_signs_beside_soap():
    vector = parameter(5)
    optimizer = SOAP([{"params": [vector], "geometry": "sign", "length": "spectral"}], 0.1)
    before = vector.detach().clone()
    stepped(optimizer, vector, steps=1)
    torch.testing.assert_close((vector.detach() - before).abs(), torch.full((5,), 0.1))


def test_kl_shampoo_has_both_sides():
    with pytest.raises(ValueError, match="sides"):
        KLShampoo([{"params": [parameter(4, 6)], "sides": "left"}])
    optimizer = KLShampoo([W := parameter(4, 6)])
    stepped(optimizer, W)
    optimizer.param_groups[0]["sides"] = "left"
    with pytest.raises(ValueError, match="sides"):
        stepped(optimizer, W)


def test_a_stack_of_two_types_is_refused():
    two = [parameter(4, 4), nn.Parameter(torch.randn(4, 4).bfloat16())]
    with pytest.raises(ValueError, match=r"stack 0.*equal shapes and types"):
        TEON([{"params": two, "stacks": [[0], [0]]}])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


OLD = [
    (Shampoo, {"graft": "muon"}, {"length": "muon"}),
    (Shampoo, {"graft": "none"}, {"length": "own"}),
    (KLShampoo, {"graft": "adam"}, {"length": "adam"}),
    (SOAP, {"normalize": "spectral"}, {"length": "spectral"}),
    (TEON, {"compensate": True}, {"length": "muon"}),
    (SpectralDescent, {"length": "constant"}, {"length": "own"}),
]


@pytest.mark.parametrize(("make", "old", "new"), OLD)
def test_old_names_of_the_length_do_the_same_everywhere(make, old, new):
    net = Net()
    with pytest.warns(DeprecationWarning, match="length="):
        optimizer = make(net, 0.1, **old)
    assert optimizer.param_groups[0]["length"] == new["length"]
    assert optimizer.param_groups[1]["lr"] == make(net, 0.1, **new).param_groups[1]["lr"]
    with pytest.warns(DeprecationWarning, match="length="):
        optimizer = make(net, roles={"hidden": old})
    assert optimizer.param_groups[-1]["length"] == new["length"]
    optimizer = make(net)
    optimizer.param_groups[0].update(old)
    with pytest.warns(DeprecationWarning, match="length="):
        stepped(optimizer, *net.parameters(), steps=1)
    assert optimizer.param_groups[0]["length"] == new["length"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_old_name_and_another_length_are_refused():
    with pytest.raises(ValueError, match="length='muon'"):
        Shampoo(Net(), graft="none", length="muon")


@pytest.mark.parametrize("make", [Muon, Signum])
def test_an_old_name_that_an_optimizer_never_had_is_unknown(make):
    with pytest.raises(TypeError, match="graft"):
        make(Net(), graft="muon")


@every
def test_a_geometry_that_is_none_is_refused_after_loading_too(make):
    optimizer = make([W := parameter(4, 6)])
    stepped(optimizer, W)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["geometry"] = "foo"
    with pytest.raises(ValueError, match="geometry='foo'"):
        stepped(optimizer, W)


def test_betas_of_a_group_do_not_change_unseen():
    optimizer = Muon([{"params": [parameter(4)], "geometry": "adamw", "betas": [0.9, 0.95]}])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
