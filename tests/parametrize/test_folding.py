"""The abc symmetry: a multiplier in front of a weight, or folded into weight, rate and epsilon."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.parametrize.rules import Factors, update_of
from steepest.transfer import parametrize

CLASSES: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.Adam,
    "signum": steepest.Signum,
    "muon": steepest.Muon,
    "shampoo": steepest.Shampoo,
    "kl-shampoo": steepest.KLShampoo,
    "soap": steepest.SOAP,
}
EXACT = {"eps": 0.0, "interval": 2}  # no damping: the powers of gradients are exact


class Multiplied(nn.Module):
    """A linear layer times a number."""

    def __init__(self, weight: Tensor, multiplier: float):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        return self.multiplier * (x @ self.weight.mT)


@pytest.mark.parametrize(
    ("name", "settings", "own"),
    [
        ("sgd", {}, {"momentum": 0.9}),
        ("adamw", {}, {"eps": 1e-3}),
        ("signum", {}, {}),
        ("muon", {}, {"method": "svd"}),
        ("shampoo", {"length": "own", "exponent": 1 / 2}, EXACT),
        ("shampoo", {"length": "own", "exponent": 1 / 4}, EXACT),
        ("shampoo", {}, {"graft_eps": 1e-3, "interval": 2}),
        ("kl-shampoo", {}, {"graft_eps": 1e-3, "interval": 2}),
        ("soap", {}, {"eps": 1e-3, "interval": 2}),
        ("soap", {"length": "spectral"}, {"eps": 1e-3, "interval": 2}),
    ],
)
def test_a_folded_multiplier_is_the_same_function(
    name: str, settings: dict[str, Any], own: dict[str, Any]
) -> None:
    """Trained for five steps in float64, with the multiplier outside and inside."""
    a, lr = 0.25, 0.02
    torch.manual_seed(0)
    W, x, y = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 6), (40, 6), (40, 5)))
    update = update_of(name, settings, "sp")
    folded = Factors(lr=lr).fold(a, update.degree)
    key = next((k for k in ("graft_eps", "eps") if own.get(k)), None)
    inside = own if key is None else {**own, key: own[key] * folded.eps}

    losses = []
    for model, rate, more in (
        (Multiplied(W, a), lr, own),
        (Multiplied(a * W, 1.0), folded.lr, inside),
    ):
        optimizer = CLASSES[name](model.parameters(), lr=rate, **settings, **more)
        trace = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            trace.append(loss.item())
        losses.append(trace)
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert abs(losses[0][-1] - losses[0][0]) > 1e-4  # something happened


class Attention(nn.Module):
    """Self-attention with query, key and value fused, or not, and logits times a number."""

    def __init__(self, width: int, fused: bool, logits: float = 1.0, norm: bool = False):
        super().__init__()
        self.head_dim, self.logits, self.fused = width // 2, logits, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.q_norm = nn.RMSNorm(width) if norm else None
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(x).chunk(3, -1) if self.fused else (self.query(x), self.key(x), self.value(x))
        )
        q = q if self.q_norm is None else self.q_norm(q)
        heads = (each.unflatten(-1, (2, -1)).transpose(-2, -3) for each in (q, k, v))
        q, k, v = heads
        weights = (q @ k.mT * self.logits / math.sqrt(self.head_dim)).softmax(-1)
        mixed: Tensor = self.output((weights @ v).transpose(-2, -3).flatten(-2))
        return mixed


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("fused", "norm"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_the_attention_scale_is_exact(optimizer: str, fused: bool, norm: bool) -> None:
    """With 1/d in the model and with it folded into weights: the same training, in float64."""

    def build(width: int, logits: float = 1.0) -> nn.Module:
        parts = {"attention": Attention(width, fused, logits, norm), "head": nn.Linear(width, 3)}

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = nn.ModuleDict(parts)

            def forward(self, x: Tensor) -> Tensor:
                h: Tensor = self.parts["head"](self.parts["attention"](x))
                return h

        return Model().double()

    base, target = {"width": 8}, {"width": 32}
    torch.manual_seed(1)
    folded = parametrize(build, base, target, optimizer=optimizer)  # type: ignore[arg-type]
    torch.manual_seed(1)
    explicit = parametrize(
        lambda width: build(width, math.sqrt(8 / width)),
        base,
        target,
        optimizer=optimizer,  # type: ignore[arg-type]
        head_size=lambda model: 1,
    )
    x, y = torch.randn(6, 5, 32, dtype=torch.float64), torch.randn(6, 5, 3, dtype=torch.float64)
    assert any(row.multiplier != 1 for row in folded.rows)
    assert all(row.multiplier == 1 for row in explicit.rows)
    losses = []
    for made in (folded, explicit):
        stepper, trace = made.optimizer(lr=0.01, eps=1e-4), []
        for _ in range(5):
            stepper.zero_grad()
            loss = (made.model(x) - y).square().mean()
            loss.backward()
            stepper.step()
            trace.append(loss.item())
        losses.append(trace)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


class Residual(nn.Module):
    def __init__(self, width: int, scale: float):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.scale * self.down(self.up(x).tanh())
        return out


@pytest.mark.parametrize("rule", ["depth-mup", "completep"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_the_branch_multiplier_is_exact(rule: Any, optimizer: Any) -> None:
    """Folded, and with x + L^-alpha f(x) in the model and the rates of the table by hand."""
    width, depth, alpha, n = 8, 6, {"depth-mup": 0.5, "completep": 1.0}[rule], 6 / 2

    def build(depth: int, scale: float = 1.0) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, width),
            nn.Sequential(*(Residual(width, scale) for _ in range(depth))),
            nn.Linear(width, 3),
        ).double()

    made = parametrize(
        build, {"depth": 2}, {"depth": depth}, rule=rule, optimizer=optimizer, branches=["*.down"]
    )
    explicit = build(depth, n**-alpha)
    with torch.no_grad():
        for (name, p), row in zip(explicit.named_parameters(), made.rows, strict=True):
            p.copy_(made.model.get_parameter(name) / row.multiplier)
    degree = 1 if optimizer == "sgd" else 0
    lr, own = 0.01, {"method": "svd"} if optimizer == "muon" else {}
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)

    inside = [p for name, p in explicit.named_parameters() if name.startswith("1.")]
    outside = [p for name, p in explicit.named_parameters() if not name.startswith("1.")]
    rate = lr * n ** (alpha * (1 + degree) - 1)
    groups: list[dict[str, Any]] = [
        {"params": inside, "lr": rate, "eps": 1e-8 * n**-alpha},
        {"params": outside, "lr": lr, "eps": 1e-8},
    ]
    if optimizer == "muon":
        vectors = [p for p in inside if p.ndim == 1]
        small = n ** (alpha - 1) * 0.15 * lr
        adamw = {"geometry": "adamw", "weight_decay": 0.0}
        head = [explicit.get_parameter(k) for k in ("0.bias", "2.weight", "2.bias")]
        groups = [
            {"params": [p for p in inside if p.ndim == 2], "lr": rate},
            {"params": [explicit.get_parameter("0.weight")], "lr": lr},
            {"params": vectors, "lr": small, "eps": 1e-8 * n**-alpha, **adamw},
            {"params": head, "lr": 0.15 * lr, "eps": 1e-8, **adamw},
        ]
    elif optimizer == "sgd":
        groups = [{k: v for k, v in group.items() if k != "eps"} for group in groups]
    hand = {"sgd": torch.optim.SGD, "adamw": torch.optim.Adam, "muon": steepest.Muon}
    steppers = made.optimizer(lr, **own), hand[optimizer](groups, lr=lr, **own)
    traces = []
    for model, stepper in zip((made.model, explicit), steppers, strict=True):
        trace = []
        for _ in range(5):
            stepper.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            stepper.step()
            trace.append(loss.item())
        traces.append(trace)
    assert traces[0] == pytest.approx(traces[1], rel=1e-9)


class Normed(nn.Module):
    """Attention with norms of queries and keys, under any names, and logits times a number."""

    def __init__(self, width: int, names: tuple[str, str], logits: float = 1.0):
        super().__init__()
        self.num_heads, self.names, self.logits = 2, names, logits
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        for name in names:
            self.add_module(name, nn.RMSNorm(width))
        self.o_proj = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        norm_q, norm_k = (self.get_submodule(name) for name in self.names)
        parts = norm_q(self.q_proj(x)), norm_k(self.k_proj(x)), self.v_proj(x)
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(-2, -3) for each in parts)
        weights = (q @ k.mT * self.logits / math.sqrt(q.shape[-1])).softmax(-1)
        mixed: Tensor = self.o_proj((weights @ v).transpose(-2, -3).flatten(-2))
        return mixed


@pytest.mark.parametrize(
    "names",
    [("norm_q", "norm_k"), ("ln_q", "ln_k"), ("q_rmsnorm", "k_rmsnorm"), ("qk_norm", "qk_norm")],
)
def test_norms_of_queries_under_any_name(names: tuple[str, str]) -> None:
    base, target = {"width": 8}, {"width": 32}
    torch.manual_seed(0)
    made = parametrize(lambda width: Normed(width, names), base, target)
    torch.manual_seed(0)
    explicit = parametrize(
        lambda width: Normed(width, names, logits=0.5), base, target, head_size=lambda model: 1
    )
    assert {row.name for row in made.rows if row.multiplier != 1} == {f"{names[0]}.weight"}
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(made.model(x), explicit.model(x))


class SubNormed(nn.Module):
    """A fused attention with a norm before or after it, or between values and output."""

    def __init__(self, width: int, place: str):
        super().__init__()
        self.head_dim = width // 2
        if place == "before":
            self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        if place == "between":
            self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)
        if place == "after":
            self.norm = nn.LayerNorm(width)


def test_a_norm_between_values_and_output() -> None:
    def build(width: int, place: str) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), SubNormed(width, place), nn.Linear(width, 3))

    for place in ("before", "after"):
        made = parametrize(lambda width, at=place: build(width, at), {"width": 8}, {"width": 32})
        assert made["1.proj.weight"].multiplier == pytest.approx(4**0.25)
    with pytest.raises(ValueError, match=r"norm 1\.norm after it"):
        parametrize(lambda width: build(width, "between"), {"width": 8}, {"width": 32})


class TorchAttention(nn.Module):
    """torch's own, with logits times a number: through the query, whose parameters are split."""

    def __init__(self, width: int, **more: Any):
        super().__init__()
        self.up = nn.Linear(8, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, **more)
        for name, p in self.attention.named_parameters():
            if "bias" in name:
                nn.init.normal_(p)

    def forward(self, x: Tensor, logits: float = 1.0) -> Tensor:
        own, h = self.attention, self.up(x)
        keys = x if own.kdim != own.embed_dim else h
        if logits != 1:  # the same with the query's rows by hand
            names = {"q_proj_weight" if own.in_proj_weight is None else "in_proj_weight"}
            with torch.no_grad():
                for name in names | {"in_proj_bias"}:
                    getattr(own, name)[: own.embed_dim] *= logits
        out: Tensor = own(h, keys, keys, need_weights=False)[0]
        return out


@pytest.mark.parametrize("more", [{}, {"kdim": 8, "vdim": 8}, {"add_bias_kv": True}])
def test_torch_s_attention_with_biases(more: dict[str, Any]) -> None:
    base, target = {"width": 16}, {"width": 64}

    def build(width: int) -> nn.Module:
        return TorchAttention(width, **more).double()

    torch.manual_seed(0)
    folded = parametrize(build, base, target)
    torch.manual_seed(0)
    plain: Any = parametrize(build, base, target, head_size=lambda model: 1).model
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    before = plain(x)
    after = plain(x, 0.5)
    torch.testing.assert_close(folded.model(x), after)
    assert not torch.allclose(before, after)


def test_a_norm_of_queries_that_is_switched_off() -> None:
    """As in timm, where it is the identity."""

    class Attention(SubNormed):
        def __init__(self, width: int):
            super().__init__(width, "nowhere")
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), Attention(width), nn.Linear(width, 3))

    made = parametrize(build, {"width": 8}, {"width": 32})
    assert made["1.qkv.weight"].multiplier == pytest.approx(4**-0.25)
