from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from steepest.lab.errors import InputError
from steepest.lab.memory import bytes_of
from steepest.lab.models import GPT, GPTConfig
from steepest.lab.train import flops
from steepest.lab.train.cost import check_memory, state_bytes
from steepest.lab.train.flops import flops_of, mfu, peak_flops
from steepest.lab.train.memory_plan import kept_bytes, memory_plan, parameters_by_role
from steepest.lab.train.optimizers import build
from steepest.optim.family import study_names

VOCABULARY = 11
SHARED = {"momentum": 0.9, "weight_decay": 0.0, "adamw_lr": 0.1}


def loss(model: Any, batch: Any) -> Tensor:
    return model.loss(*batch)


def gpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "heads": 2, "context": 12, **changes}
    return GPT(GPTConfig(**sizes), VOCABULARY)


def tokens(sequences: int = 3, context: int = 12) -> tuple[Tensor, Tensor]:
    return (torch.arange(sequences * context).view(sequences, context) % VOCABULARY,) * 2


class Looks(nn.Module):
    """A model that looks at numbers, draws random ones, counts its calls and keeps means."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.norm(self.layer(x))
        h = F.dropout(h, 0.5) * random.random()
        return h if float(h.detach().sum()) > 1e9 else -h


def image(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sum()


# operations


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True}, {"mlp": "swiglu", "width": 24}, {"positions": "learned", "bias": True}],
)
def test_the_operations_of_a_gpt_are_six_for_each_weight_and_token_and_attention(
    changes: dict[str, Any],
) -> None:
    """6 N per token, and 12 T D per token and block, N without tables, biases and gains."""
    model = gpt(**changes)
    width, depth = model.config.width, model.config.depth
    N = sum(p.numel() for n, p in model.blocks.named_parameters() if p.dim() == 2)
    N += VOCABULARY * width
    for sequences, context in ((1, 12), (3, 7)):
        count = sequences * context
        expected = 6 * N * count + 12 * count * context * width * depth
        assert flops_of(model, tokens(sequences, context), loss) == expected


def test_the_operations_of_convolutions_and_frozen_layers() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    x = torch.ones(2, 3, 8, 8)
    once = 2 * (5 * 3 * 9) * (2 * 64)
    assert flops_of(conv, x, image) == 2 * once  # the input needs no gradient
    net = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 2))
    forward = 2 * 4 * (6 * 7 + 7 * 2)
    backward = 2 * 4 * (6 * 7 + 2 * 7 * 2)
    assert flops_of(net, torch.ones(4, 6), image) == forward + backward
    net[0].requires_grad_(False)
    assert flops_of(net, torch.ones(4, 6), image) == forward + 2 * 4 * 7 * 2
    net.requires_grad_(False)
    assert flops_of(net, torch.ones(4, 6), image) == forward


def test_counting_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model.register_forward_hook(lambda *_: seen.append(1))
    seen: list[int] = []
    image(model, torch.randn(5, 4)).backward()
    seen.clear()
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    values = [g.clone() for g in gradients if g is not None]
    states = torch.get_rng_state(), random.getstate()
    assert flops_of(model, torch.randn(5, 4, generator=torch.Generator()), image)
    assert memory_plan(model, torch.ones(5, 4), image).activations
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(map(torch.equal, values, (p.grad for p in model.parameters())))
    assert not seen


def test_a_model_that_looks_at_numbers_has_no_count_and_is_left_as_it_was() -> None:
    model = Looks()
    before, states = copy.deepcopy(model.state_dict()), (torch.get_rng_state(), random.getstate())
    x = torch.arange(8.0).view(2, 4)
    assert flops_of(model, x, image) is None
    plan = memory_plan(model, x, image)  # from a real pass
    assert plan.activations >= 2 * 6 * 4
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert model.calls == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_model_on_the_meta_device_is_counted() -> None:
    with torch.device("meta"):
        empty = gpt()
    assert flops_of(empty, tokens(), loss) == flops_of(gpt(), tokens(), loss)
    plan = memory_plan(empty, tokens(), loss, device="cpu")
    assert plan == memory_plan(gpt(), tokens(), loss)


def test_gpus_are_known_by_their_names() -> None:
    half, single = torch.bfloat16, torch.float32
    known = flops._of_gpu
    assert known("NVIDIA H200", half, False) == 989.5e12
    assert known("NVIDIA H100 80GB HBM3", half, False) == 989.5e12
    assert known("NVIDIA H100 PCIe", single, True) == 378e12
    assert known("NVIDIA A100-SXM4-40GB", single, True) == 156e12
    assert known("NVIDIA A100-PCIE-40GB", single, False) == 19.5e12
    assert known("NVIDIA A10", half, False) == 125e12
    assert known("NVIDIA L40S", half, False) == 362e12
    assert known("NVIDIA GeForce RTX 4090", half, False) == 165.2e12
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H200 MIG 1g.18gb", "Tesla T4"):
        assert known(other, half, False) is None
    assert known("NVIDIA H200", torch.float64, False) is None
    for peak in flops.PEAKS:  # tensor cores are no slower, and half precision is twice as fast
        assert peak.full <= peak.tf32 <= peak.half
        assert peak.half == pytest.approx(2 * peak.tf32, rel=0.02)


def test_the_operations_of_a_cpu_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "SIDE", 64)
    flops._measured.cache_clear()
    first = peak_flops("cpu", torch.float32)
    assert first is not None
    assert first > 0
    assert peak_flops(torch.device("cpu"), "float32") == first
    assert flops._measured.cache_info().misses == 1
    flops._measured.cache_clear()
    assert peak_flops("meta", "float32") is None
    assert mfu(10.0, 2.0, 20.0) == 0.25


# memory


@pytest.mark.parametrize("half", [False, True])
def test_activations_are_what_a_real_pass_keeps(half: bool) -> None:
    model, batch = gpt(), tokens()

    def forward(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model.loss(*batch)

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        value = forward(model, batch)
    real = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    assert value.requires_grad
    plan = memory_plan(model, batch, forward)
    assert plan.activations == real > 0
    assert plan.batch == 8 * 2 * 36
    assert plan.weights == bytes_of([*model.parameters(), *model.buffers()])
    assert plan.gradients == bytes_of(list(model.parameters()))
    assert plan.optimizer == 0
    assert plan.total == plan.weights + plan.gradients + plan.activations + plan.batch


def test_activations_grow_with_the_batch() -> None:
    model = gpt()
    one, two, four = (memory_plan(model, tokens(n), loss).activations for n in (1, 2, 4))
    assert four - two == 2 * (two - one)


OTHERS = ("torch.optim:SGD", "torch.optim:Adam", "torch.optim:Adagrad", "torch.optim:RMSprop")


@pytest.mark.parametrize("name", [*study_names(), *OTHERS, "shampoo:block=8"])
def test_what_an_optimizer_keeps_is_known_before_its_first_step(name: str) -> None:
    model = gpt(depth=2)
    optimizer = build(name, model, 0.01, **SHARED)
    before = copy.deepcopy(model.state_dict())
    planned = kept_bytes(optimizer)
    assert memory_plan(model, tokens(), loss, optimizer).optimizer == planned
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    loss(model, tokens()).backward()
    optimizer.step()
    assert planned == state_bytes(optimizer) == kept_bytes(optimizer) > 0


def test_an_optimizer_that_looks_at_numbers_first_is_not_guessed() -> None:
    class Looking(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            float(self.param_groups[0]["params"][0].sum())

    model = nn.Linear(3, 3)
    assert kept_bytes(Looking(model.parameters(), 0.1)) is None
    plan = memory_plan(model, torch.ones(2, 3), image, Looking(model.parameters(), 0.1))
    assert plan.optimizer is None
    assert plan.total == 48 + 48 + plan.activations + 24


def test_parameters_by_role_are_all_parameters() -> None:
    counts = parameters_by_role(gpt())
    assert counts == {"hidden": 2 * 12 * 16 * 16, "embedding": 176, "head": 176, "vector": 80}


def test_what_does_not_fit_is_said_with_both_parts() -> None:
    check_memory("a net", "5 images", parameters=10, activations=10**6, device="cpu")
    with pytest.raises(InputError, match=r"got a net; that takes .* choose a smaller width$"):
        check_memory("a net", "5 images", parameters=10**15, device="cpu", remedy="width")
    said = r"got 5 images in a net; that takes .* 1,000 TB .* choose a smaller batch, width$"
    with pytest.raises(InputError, match=said):
        check_memory(
            "a net", "5 images", parameters=9, activations=10**15, device="cpu", remedy="width"
        )
