"""More than one process: what is equal, what is saved, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import steepest
from steepest import Muon

NAMES = ["Signum", "Muon", "TEON", "Shampoo", "KLShampoo", "SOAP"]
NAMES = [name for name in NAMES if hasattr(steepest, name)]

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
    ),
    pytest.mark.filterwarnings("ignore:TEON found nothing to stack"),
]


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4)
    )


def half_of_the_loss(model, step, half):
    """The mean over half a batch."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    y = x.roll(1, 1) * x
    part = slice(8 * half, 8 * half + 8)
    return nn.functional.mse_loss(model(x[part]), y[part])


def train_alone(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        for half in (0, 1):
            (half_of_the_loss(model, step, half) / 2).backward()
        optimizer.step()


WORKER = """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    import steepest
    from test_distributed import NAMES, half_of_the_loss, network

    for name in NAMES:
        model = torch.nn.parallel.DistributedDataParallel(network())
        optimizer = getattr(steepest, name)(model, lr=0.02, weight_decay=0.1)
        for step in range(4):
            optimizer.zero_grad()
            half_of_the_loss(model, step, rank).backward()
            optimizer.step()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"m": model_state, "o": optimizer_state}, checkpoint_id=f"{folder}/{name}")
"""


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory, run_in_two):
    """A folder with a distributed checkpoint for each optimizer, written by two processes."""
    folder = tmp_path_factory.mktemp("two")
    run_in_two(WORKER, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_one_process_goes_on_with_what_two_have_trained(name, trained_by_two):
    straight, model = network(), network()
    reference = getattr(steepest, name)(straight, lr=0.02, weight_decay=0.1)
    train_alone(straight, reference, range(4))

    tested = getattr(steepest, name)(model, lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group here, which is meant
        model_state, optimizer_state = get_state_dict(model, tested)
        loaded = {"m": model_state, "o": optimizer_state}
        dcp.load(loaded, checkpoint_id=trained_by_two / name)
        set_state_dict(
            model, tested, model_state_dict=loaded["m"], optim_state_dict=loaded["o"]
        )  # fmt: skip
    assert tested.param_groups[0]["lr"] == 0.02
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    train_alone(straight, reference, range(4, 7))
    train_alone(model, tested, range(4, 7))
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.fixture
def _one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["SignSGD", "SpectralDescent", *NAMES])
@pytest.mark.parametrize("sharded", ["2", "5"], ids=["a matrix", "the head"])
@pytest.mark.usefixtures("_one_process")
def test_tensor_parallel_layers_are_refused_and_nothing_changes(name, sharded):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = network()
    mesh = init_device_mesh("cpu", (1,))
    parallelize_module(model, mesh, {sharded: ColwiseParallel()})
    tested = getattr(steepest, name)(model, lr=0.02, weight_decay=0.1)
    half_of_the_loss(model, 0, 0).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match=rf"{sharded}\.weight"):
        tested.step()
    after = model.state_dict()
    for key, value in before.items():
        full = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (value, after[key])]
        assert torch.equal(*full)
    assert not any(tested.state.values())


@pytest.mark.usefixtures("_one_process")
def test_flattened_parameters_are_never_a_silent_adamw():
    # The first FullyShardedDataParallel turns all weights into one long vector by default.
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with (
        pytest.warns(UserWarning, match="none of the .* matrix"),
        pytest.raises(NotImplementedError, match="FullyShardedDataParallel"),
    ):
        Muon(model)
