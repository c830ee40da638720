"""The audit: its numbers are those of a real step, and each warning fires on its mistake alone."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_leaves

import steepest
from steepest.diagnosis import Plan
from steepest.diagnosis.audit import Audit, audit
from steepest.diagnosis.audit_warnings import AuditWarning
from steepest.lab.models import GPT, GPTConfig
from steepest.model.matrix_view import MatrixView
from steepest.model.parameter_roles import roles

Torch = torch.optim


class Net(nn.Module):
    """Convolution, batch norm, fused projection, experts, hidden matrices; tied table and head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.batch_norm = nn.BatchNorm2d(4)
        self.qkv = nn.Linear(4, 12)
        self.experts = nn.Parameter(0.3 * torch.randn(3, 4, 4))
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.batch_norm(self.conv(x)).flatten(2).mT
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        y = y + (q @ k.mT).softmax(-1) @ v
        y = y + torch.einsum("bti,eoi->bto", y, self.experts)
        return self.head(y + self.down(self.up(y).relu())).mean(1)


def _net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def _mlp(**linear: Any) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = ((8, 16), (16, 16), (16, 4))
    a, b, c = (nn.Linear(*size, bias=False, **linear) for size in sizes)
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c)


def _batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 1, 6, 6, generator=seeded, dtype=torch.float64)
    return x, torch.randint(5, (6,), generator=seeded)


def _rows(seed: int = 1) -> tuple[Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(seed)
    return torch.randn(6, 8, generator=seeded), torch.randint(4, (6,), generator=seeded)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _kinds(found: Audit) -> list[str]:
    return [each.kind for each in found.warnings]


def _only(found: Audit, kind: str) -> AuditWarning:
    """The one warning that there is."""
    assert _kinds(found) == [kind], found
    assert "{" not in found.warnings[0].message
    return found.warnings[0]


def _split(model: nn.Module, lr: float = 0.02, adamw_lr: float = 3e-3) -> list[Optimizer]:
    """Muon of torch and AdamW, as people use them."""
    table = roles(model)
    muon = [row.parameter for row in table.matrices if row.parameter.ndim == 2]
    rest = [row.parameter for row in table if all(row.parameter is not p for p in muon)]
    return [Torch.Muon(muon, lr=lr), Torch.AdamW(rest, lr=adamw_lr)]


# The numbers


def _by_hand(model: nn.Module, build: Callable[[nn.Module], Iterable[Optimizer]]) -> dict[str, Any]:
    """A step of a copy without weight decay: what each parameter, also a tied one, moves by."""
    moved = copy.deepcopy(model)
    optimizers = list(build(moved))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
    loss(moved, _batch()).backward()
    for optimizer in optimizers:
        optimizer.step()
    before = dict(model.named_parameters())
    return {name: (p - before[name]).detach() for name, p in moved.named_parameters()}


BUILDS: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    "muon": lambda m: [steepest.Muon(m, weight_decay=0.1)],
    "signum": lambda m: [steepest.Signum(m, lr=1e-3)],
    "soap": lambda m: [steepest.SOAP(m, lr=1e-3)],
    "dual length": lambda m: [steepest.SpectralDescent(m, lr=1e-3, length="dual")],
    "sgd": lambda m: [Torch.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)],
    "adam": lambda m: [Torch.Adam(m.parameters(), weight_decay=0.01)],
    "adagrad": lambda m: [Torch.Adagrad(m.parameters())],
    "adafactor": lambda m: [Torch.Adafactor(m.parameters())],
    "tensor rate": lambda m: [Torch.AdamW(m.parameters(), lr=torch.tensor(1e-3))],
    "two": _split,
    "plan": lambda m: [Plan.default(m).optimizer(m, lr=0.02)],
}


@pytest.mark.parametrize("name", BUILDS)
def test_numbers_are_those_of_a_real_step(name: str) -> None:
    model = _net()
    found = audit(model, BUILDS[name](model), loss, [_batch()])
    expected = _by_hand(model, BUILDS[name])
    table = roles(model)
    assert [row.parameter for row in found.rows] == [row.name for row in table]
    for row in found.rows:
        U, W = expected[row.parameter], table[row.parameter].parameter.detach()
        assert row.rms == pytest.approx(float(U.square().mean().sqrt()), rel=1e-6, abs=1e-12)
        assert row.weight_rms == pytest.approx(float(W.square().mean().sqrt()))
        if row.weight_rms:
            assert row.relative_rms == pytest.approx(row.rms / row.weight_rms)
        assert row.against_adamw == pytest.approx(row.rms / row.lr)
        view = table[row.parameter].view
        if view is None:
            assert row.spectral_norm is row.relative_spectral_norm is None
            continue
        pairs = list(zip(view.matrices(U), view.matrices(W), strict=True))
        norms = [float(torch.linalg.matrix_norm(u, 2)) for u, _ in pairs]
        ratios = [
            n / float(torch.linalg.matrix_norm(w, 2))
            for n, (_, w) in zip(norms, pairs, strict=True)
        ]
        assert row.spectral_norm == pytest.approx(max(norms), rel=1e-6)
        assert row.relative_spectral_norm == pytest.approx(max(ratios), rel=1e-6)


def test_state_counts_in_the_next_update() -> None:
    model, rate = _mlp(), 1e-2
    optimizer = Torch.SGD(model.parameters(), lr=rate, momentum=0.5)
    loss(model, _rows(5)).backward()
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    optimizer.zero_grad()
    found = audit(model, optimizer, loss, [_rows()])
    grads = torch.autograd.grad(loss(model, _rows()), list(model.parameters()))
    for row, before, G in zip(found.rows, first, grads, strict=True):
        expected = rate * float((G + 0.5 * before).square().mean().sqrt())
        assert row.rms == pytest.approx(expected, rel=1e-4)


def test_closed_forms_without_a_batch() -> None:
    model = _mlp()
    adamw = audit(model, Torch.AdamW(model.parameters(), lr=2e-3))
    assert [row.against_adamw for row in adamw.rows] == pytest.approx([1.0] * 3, rel=1e-4)
    sign = audit(model, steepest.SignSGD(list(model.parameters()), lr=2e-3))
    assert [row.rms for row in sign.rows] == pytest.approx([2e-3] * 3, rel=1e-4)
    muon = audit(model, steepest.Muon(model, lr=0.02, method="svd"))
    assert list(muon) == list(muon.rows)
    row = muon["0.weight"]  # 16 x 8: sqrt(16 / 8) times a matrix of spectral norm 1
    assert row.spectral_norm == pytest.approx(0.02 * math.sqrt(2), rel=1e-4)
    assert row.rms == pytest.approx(0.02 * math.sqrt(2) / math.sqrt(16), rel=1e-4)
    assert muon.measured_on == "Gaussian gradients"
    assert muon.gradient_norm is None


def test_what_depends_on_the_gradient_is_unknown_without_one() -> None:
    model = _mlp()
    optimizer = Torch.SGD(model.parameters(), lr=0.1)
    without, found = audit(model, optimizer), audit(model, optimizer, loss, [_rows()])
    assert {(r.rms, r.spectral_norm, r.scale_free) for r in without.rows} == {(None, None, False)}
    assert all(row.rms and not row.scale_free for row in found.rows)
    grads = torch.autograd.grad(loss(model, _rows()), list(model.parameters()))
    assert found.gradient_norm == pytest.approx(math.hypot(*(float(G.norm()) for G in grads)))
    assert [r.gradient_rms for r in found.rows] == pytest.approx(
        [float(G.square().mean().sqrt()) for G in grads]
    )


@pytest.mark.parametrize("decay", ["decoupled", "independent"])
def test_decay_is_the_part_of_a_weight_that_goes(decay: Any) -> None:
    model = _mlp()
    optimizer = steepest.Muon(model, lr=0.02, weight_decay=0.05, decay=decay)
    optimizer.param_groups[0]["lr"] = 0.01  # as a schedule does
    found = audit(model, optimizer)
    expected = 0.01 * 0.05 if decay == "decoupled" else 0.05 / 2
    assert found["2.weight"].decay == pytest.approx(expected, rel=1e-3)
    assert found["4.weight"].decay == 0


def test_geometries_have_the_names_of_the_house() -> None:
    model = _net().float()
    params = [p for p in model.parameters() if p.ndim == 2]

    class Own(Torch.Optimizer):
        def __init__(self, params: Any):
            super().__init__(params, {"lr": 0.1})
            self.factor = 2.0  # which torch's own copies forget

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p -= self.param_groups[0]["lr"] * self.factor * p.grad.sign()

    expected = {
        "spectral": [Torch.Muon(params), steepest.Muon(params), steepest.Shampoo(params)],
        "adamw": [Torch.AdamW(params), Torch.RMSprop(params), Torch.Adafactor(params)],
        "euclidean": [Torch.SGD(params)],
        "sign": [steepest.Signum(params, lr=0.1)],
        "unknown": [Own(params)],
    }
    for geometry, optimizers in expected.items():
        for optimizer in optimizers:
            row = audit(model, optimizer)["up.weight"]
            assert row.geometry == geometry
            assert geometry == "euclidean" or row.rms
    assert row.against_adamw == pytest.approx(2.0, rel=1e-3)
    jordan = Own([{"params": params, "use_muon": True}])
    assert audit(model, jordan)["up.weight"].geometry == "spectral"


def test_stacks_are_named_and_others_are_not() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=8, depth=2, heads=2, context=4), 7)
    found = audit(model, steepest.TEON(model))
    assert found.ok
    assert {row.geometry for row in found.rows} == {"stacked", "spectral", "adamw"}


def test_long_matrices_take_the_power_method() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 270, bias=False), nn.ReLU(), nn.Linear(270, 2))
    row = audit(model, Torch.AdamW(model.parameters(), lr=1e-3))["0.weight"]
    gradient = torch.randn(270, 300, generator=torch.Generator().manual_seed(0))
    exact = 1e-3 * float(torch.linalg.matrix_norm(gradient.sign(), 2))
    assert 0.95 * exact <= row.spectral_norm <= exact * 1.0001  # type: ignore[operator]


# Nothing changes


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", BUILDS)
def test_nothing_is_changed(name: str, warm: bool) -> None:
    model = _net()
    optimizers = BUILDS[name](model)
    calls: list[int] = []
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        Torch.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # wraps step
    loss(model, _batch(3)).backward()
    if warm:
        for optimizer in optimizers:
            optimizer.step()

    def state() -> list[Any]:
        kept = [list(model.state_dict().values()), [p.grad for p in model.parameters()]]
        states = [copy.deepcopy(each.state_dict()) for each in optimizers]
        return tree_leaves(copy.deepcopy([*kept, states, torch.get_rng_state(), model.training]))

    def random_loss(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) + 0 * torch.rand(())

    before, called = state(), len(calls)
    shuffled = torch.utils.data.DataLoader([_batch()], batch_size=None, shuffle=True)
    audit(model, optimizers, random_loss, shuffled)
    if not warm:
        audit(model, optimizers)
    after = state()
    assert len(after) == len(before)
    for mine, own in zip(after, before, strict=True):
        same = torch.equal(mine, own) if isinstance(mine, Tensor) else mine == own
        assert same
    assert len(calls) == called


# The warnings


def _clean() -> dict[str, tuple[nn.Module, Any]]:
    gpt = GPT(GPTConfig(width=16, depth=2, heads=2, context=8, positions="learned"), 11)
    tied = GPT(GPTConfig(width=16, depth=2, heads=2, context=8, tied=True, mlp="swiglu"), 11)
    net, mlp = _net(), _mlp()
    frozen = _net()
    frozen.conv.requires_grad_(False)
    return {
        "Muon on a GPT": (gpt, steepest.Muon(gpt, weight_decay=0.1)),
        "Muon on a tied GPT": (tied, steepest.Muon(tied)),
        "Muon on a network of everything": (net, steepest.Muon(net)),
        "Muon at AdamW's rate": (gpt, steepest.Muon(gpt, lr=3e-3, scale="match-rms-adamw")),
        "Signum": (net, steepest.Signum(net, lr=1e-3)),
        "SOAP": (net, steepest.SOAP(net, lr=1e-3)),
        "AdamW": (gpt, Torch.AdamW(gpt.parameters(), lr=1e-3, weight_decay=0.1)),
        "SGD": (net, Torch.SGD(net.parameters(), lr=0.1)),
        "Muon and AdamW": (gpt, _split(gpt)),
        "a plan": (net, Plan.default(net).optimizer(net, lr=0.02)),
        "Muon on a frozen part": (frozen, steepest.Muon(frozen)),
        "one rate of AdamW's size": (mlp, _split(mlp, 1e-3, 1e-3)),
    }


@pytest.mark.parametrize("name", _clean())
def test_right_setups_get_no_warning(name: str) -> None:
    model, optimizer = _clean()[name]
    found = audit(model, optimizer)
    assert found.ok, found
    assert found
    tokens = torch.randint(11, (3, 8))
    if isinstance(model, GPT):
        found = audit(model, optimizer, lambda model, batch: model.loss(*batch), [(tokens, tokens)])
    elif isinstance(model, Net):
        found = audit(model, optimizer, loss, [_batch()])
    assert found, found


def test_adapters_get_no_warning() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 8).requires_grad_(False)
            self.lora_A = nn.Linear(8, 2, bias=False)
            self.lora_B = nn.Linear(2, 8, bias=False)
            nn.init.zeros_(self.lora_B.weight)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.base(x) + self.lora_B(self.lora_A(x)))

    model = Adapted()
    found = audit(model, steepest.Muon(model), loss, [_rows()])
    assert found.ok, found
    assert found["base.weight"].rms is None
    assert found["lora_A.weight"].gradient_rms == 0
    assert found["lora_B.weight"].relative_rms is None


def test_not_trained() -> None:
    model = _mlp()
    found = audit(model, steepest.Muon([model[0].weight, model[2].weight]))
    assert _only(found, "not trained").parameters == ("4.weight",)
    assert found["4.weight"].geometry == "not trained"
    assert found["4.weight"].rms is found["4.weight"].lr is None
    model[4].requires_grad_(False)
    assert audit(model, steepest.Muon([model[0].weight, model[2].weight])).ok


def test_trained_twice() -> None:
    model = _net()
    tables = [model.embedding.weight, model.head.weight]  # one parameter
    hidden = [p for p in model.parameters() if p is not tables[0]]
    halves = [Torch.AdamW([*hidden, tables[0]]), Torch.AdamW([tables[1]])]
    found = audit(model, halves)
    assert _only(found, "trained twice").parameters == ("embedding.weight",)
    assert found["embedding.weight"].against_adamw == pytest.approx(2.0, rel=1e-4)
    assert audit(model, [Torch.AdamW(hidden), Torch.AdamW([tables[0]])]).ok


def test_parameters_that_the_model_does_not_have() -> None:
    with torch.device("meta"):
        model = _mlp()
    early = Torch.AdamW(model.named_parameters())
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p)
    # Filled in place or not depends on torch: make it new parameters, as loading with assign does.
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    found = audit(model, early)
    assert _kinds(found) == ["not trained", "not in the model"]
    assert found.warnings[1].parameters == ("0.weight", "2.weight", "4.weight")
    assert audit(model, Torch.AdamW(model.parameters())).ok
    unnamed = audit(model, Torch.AdamW([*model.parameters(), nn.Parameter(torch.ones(2, 3))]))
    assert _only(unnamed, "not in the model").parameters == ("a parameter of shape (2, 3)",)


def test_frozen_but_moved() -> None:
    model = _mlp()
    optimizer = Torch.AdamW(model.parameters())
    loss(model, _rows()).backward()
    model[0].requires_grad_(False)
    assert _only(audit(model, optimizer), "frozen but moved").parameters == ("0.weight",)
    optimizer.zero_grad()
    assert audit(model, optimizer).ok


def test_tables_heads_and_vectors_among_the_spectral_ones() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 8)
            self.positions = nn.Parameter(torch.randn(6, 8))
            self.hidden = nn.Linear(8, 8, bias=False)
            self.bias_table = nn.Parameter(torch.randn(3, 8))
            self.head = nn.Linear(8, 9, bias=False)

    model = Language()
    found = audit(model, Torch.Muon(model.parameters()))
    assert {each.kind: each.parameters for each in found.warnings} == {
        "embedding": ("positions", "embedding.weight"),
        "head": ("head.weight",),
        "vector": ("bias_table",),
    }
    assert audit(model, _split(model)).ok


def test_matrices_left_out() -> None:
    model = _net().float()
    spectral = [model.up.weight, model.down.weight]
    rest = [p for p in model.parameters() if all(p is not q for q in spectral)]
    found = audit(model, [Torch.Muon(spectral, lr=0.02), Torch.AdamW(rest)])
    assert _kinds(found) == ["left out", "left out"]
    assert [each.parameters for each in found.warnings] == [
        ("conv.weight",),
        ("experts", "qkv.weight"),
    ]
    assert "2 matrices get" in found.warnings[0].message
    assert audit(model, Torch.AdamW(model.parameters())).ok  # none is left out if all are
    plan = Plan.default(model)
    chosen = [row if row.parameter != "up.weight" else _adaptive(row) for row in plan]
    assert audit(model, Plan(chosen).optimizer(model, lr=0.02)).ok  # it has its reasons


def _adaptive(row: Any) -> Any:
    return type(row)(row.parameter, row.shape, "adamw")


def test_several_matrices_as_one() -> None:
    model = _net().float()
    one = [("qkv.weight", model.qkv.weight), ("experts", model.experts)]
    rest = [(n, p) for n, p in model.named_parameters() if n not in ("qkv.weight", "experts")]
    adamw = {"params": rest, "geometry": "adamw"}

    def built(*views: MatrixView) -> Audit:
        spectral = {"params": one, "views": list(views)}
        found = audit(model, steepest.Muon([spectral, adamw]))
        return Audit(
            found.rows,
            tuple(each for each in found.warnings if each.kind != "left out"),
            found.measured_on,
            found.gradient_norm,
        )

    found = built(MatrixView.of((12, 4)), MatrixView.of((12, 4)))
    assert [each.parameters for each in found.warnings] == [("experts",), ("qkv.weight",)]
    assert all("as 1 where there are 3 matrices" in str(each) for each in found.warnings)
    assert built(MatrixView.of((12, 4), splits=(4, 4, 4)), MatrixView.of((3, 4, 4), batch=3)).ok
    fused = audit(model, [Torch.Muon([model.qkv.weight])])
    assert "several as one" in _kinds(fused)
    assert fused["qkv.weight"].matrices == 3


def test_zero_matrices() -> None:
    model = _mlp()
    nn.init.zeros_(model[2].weight)
    optimizer = steepest.Muon(model)
    found = audit(model, optimizer)
    assert _only(found, "zero weight").parameters == ("2.weight",)
    row = found["2.weight"]
    assert row.rms
    assert row.relative_rms is row.relative_spectral_norm is row.decay is None
    found = audit(model, optimizer, loss, [_rows()])
    assert _kinds(found) == ["zero weight", "zero gradient"]
    assert found.warnings[1].parameters == ("0.weight", "2.weight", "4.weight")  # a dead ReLU
    assert "2.weight is all zero" in found.warnings[1].message
    assert found["0.weight"].rms == 0


def test_what_the_loss_does_not_use() -> None:
    model = _mlp()

    def first(model: Any, batch: Any) -> Tensor:
        return model[0](batch[0]).square().mean()

    optimizer = Torch.AdamW(model.parameters())
    found = audit(model, optimizer, first, [_rows()])
    assert _only(found, "zero gradient").parameters == ("2.weight", "4.weight")
    assert found["2.weight"].gradient_rms == found["2.weight"].rms == 0


def test_clipping() -> None:
    model = _mlp()
    muon, sgd = steepest.Muon(model), Torch.SGD(model.parameters(), lr=0.1)
    assert audit(model, sgd, loss, [_rows()], clip_norm=1.0).ok  # whose steps it does shorten
    found = audit(model, muon, loss, [_rows()], clip_norm=0.5)
    warning = _only(found, "clipping")
    assert warning.parameters == ("0.weight", "2.weight", "4.weight")
    assert f"norm is {found.gradient_norm:.3g}" in warning.message
    # What is left of it, if the spectral updates are clipped instead.
    spectral = [(found[n].against_adamw or 0.0, n) for n in ("0.weight", "2.weight")]
    length = math.hypot(*(r * math.sqrt(math.prod(found[n].shape)) for r, n in spectral))
    assert f"would shrink it {length / 0.5:.3g} times" in warning.message
    assert "clipping" in _kinds(audit(model, Torch.AdamW(model.parameters()), clip_norm=1.0))
    dual = steepest.SpectralDescent(
        [model[0].weight, model[2].weight], lr=1e-3, length="dual"
    )  # a step as long as the gradient
    others = Torch.SGD([model[4].weight], lr=0.1)
    assert audit(model, [dual, others], loss, [_rows()], clip_norm=1.0).ok


def test_weight_decay_that_eats_the_weight() -> None:
    model = _mlp()
    found = audit(model, Torch.SGD(model.parameters(), lr=1.0, weight_decay=0.3))
    assert "30%" in _only(found, "decay").message
    assert audit(model, Torch.SGD(model.parameters(), lr=1.0, weight_decay=0.01)).ok


def test_a_step_that_overwrites_the_weight() -> None:
    model = _mlp()
    found = audit(model, steepest.Muon(model, lr=2.0, adamw_lr=1e-3))
    assert _only(found, "overwritten").parameters == ("0.weight", "2.weight")
    assert audit(model, steepest.Muon(model, lr=0.02, adamw_lr=1e-3)).ok


def test_rates_far_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    weights = list(model.parameters())

    def built(last: float) -> Audit:
        groups = [
            {"params": weights[:2]},
            {"params": weights[2:3], "lr": last},
            {"params": weights[3:], "geometry": "adamw"},
        ]
        return audit(model, steepest.Muon(groups, lr=0.02))

    warning = _only(built(0.02 / 200), "rates apart")
    assert warning.parameters[0] == "2.weight"
    assert "differ 2" in warning.message
    assert built(0.02 / 20).ok


def test_one_rate_for_muon_and_adamw() -> None:
    model = _mlp()
    assert _only(audit(model, _split(model, 0.02, 0.02)), "one rate").parameters == ("4.weight",)
    assert audit(model, _split(model, 0.02, 3e-3)).ok
    optimizer = steepest.Muon(model, lr=0.02, adamw_lr=0.02, scale="original")
    assert _kinds(audit(model, optimizer)) == ["one rate"]
    optimizer = steepest.Muon(model, lr=0.02, adamw_lr=0.02, scale="match-rms-adamw")
    assert audit(model, optimizer).ok


# What comes back, and what is refused


def test_the_report() -> None:
    model = _mlp()
    good, bad = audit(model, Torch.AdamW(model.parameters())), audit(model, _split(model, 0.1, 0.1))
    assert "no warnings" in str(good)
    assert "one rate: AdamW moves 4.weight" in str(bad)
    assert not bad
    content = json.loads(json.dumps(bad.as_dict(), allow_nan=False))
    assert content["kind"] == "audit"
    assert content["ok"] is False
    assert content["rows"][0]["parameter"] == "0.weight"
    assert content["warnings"][0]["kind"] == "one rate"


def test_a_compiled_model_has_the_names_of_the_original() -> None:
    model = _mlp()
    found = audit(torch.compile(model), steepest.Muon(model), loss, [_rows()])
    assert found.ok
    assert found.rows[0].parameter == "0.weight"


def test_an_optimizer_behind_another() -> None:
    class Wrapper(Torch.Optimizer):  # such as Accelerate's
        def __init__(self, optimizer: Optimizer):
            self.optimizer = optimizer

    model = _mlp()
    found = audit(model, Wrapper(steepest.Muon(model)))
    assert [row.geometry for row in found.rows] == ["spectral", "spectral", "adamw"]


def test_half_precision() -> None:
    model = _mlp(dtype=torch.bfloat16)
    found = audit(model, steepest.Muon(model), loss, [_rows()])
    assert found.ok
    assert found["0.weight"].spectral_norm == pytest.approx(0.02 * math.sqrt(2), rel=0.2)


def test_impossible_requests() -> None:
    model = _mlp()
    optimizer = Torch.AdamW(model.parameters())
    with pytest.raises(ValueError, match="LBFGS"):
        audit(model, Torch.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match="of type int"):
        audit(model, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="of type Parameter"):
        audit(model, model.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no optimizer"):
        audit(model, [])
    with pytest.raises(ValueError, match="loss without batches"):
        audit(model, optimizer, loss)
    with pytest.raises(ValueError, match="got no batches"):
        audit(model, optimizer, loss, [])
    with pytest.raises(ValueError, match="got clip_norm=0"):
        audit(model, optimizer, clip_norm=0)
    with pytest.raises(ValueError, match="on the meta device"):
        audit(copy.deepcopy(model).to("meta"), optimizer)
    loss(model, _rows()).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"AdamW .* steps.* no batch"):
        audit(model, optimizer)
