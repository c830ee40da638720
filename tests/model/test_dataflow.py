"""Roles by one forward pass: what it shows, and that it leaves everything as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steepest import MatrixView, roles
from steepest.model.parameter_roles import RoleTable, all_roles, roles_in_loss


def _heads(table: RoleTable) -> list[str]:
    return [row.name.removesuffix(".weight") for row in table if row.role == "head"]


class Function(nn.Module):
    """Bare parameters `w...`, a body, and a function of them."""

    def __init__(self, forward: Callable[..., Any], *shapes: tuple[int, ...], **modules: Any):
        super().__init__()
        self._forward = forward
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape)))
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._forward(self, *inputs, **named)


# ------------------------------------------------------------------- how a parameter is multiplied


def _rows(W: Tensor, size: int) -> list[Tensor]:
    return list(W.split(size))


@pytest.mark.parametrize(
    ("shape", "product", "view"),
    [
        ((8, 5), lambda x, W: x @ W, "(5, 8)"),
        ((5, 8), lambda x, W: F.linear(x, W), "(5, 8)"),
        ((5, 8), lambda x, W: (W @ x.mT).mT, "(5, 8)"),
        ((5, 8), lambda x, W: torch.einsum("oi,bi->bo", W, x), "(5, 8)"),
        ((8, 5), lambda x, W: torch.einsum("bi,io->bo", x, W), "(5, 8)"),
        ((8, 5), lambda x, W: torch.stack([row @ W for row in x]), "(5, 8)"),
        ((8, 5), lambda x, W: (x.double() @ W.double()).float(), "(5, 8)"),
        ((8, 5), lambda x, W: x @ (W * torch.ones(8, 5).tril() / 3), "(5, 8)"),
        ((8, 5), lambda x, W: x @ (W - W.mean(0)) / W.std(), "(5, 8)"),
        ((8, 5), lambda x, W: x @ W.mT.contiguous().mT, "(5, 8)"),
        ((8, 5), lambda x, W: x[None].expand(3, -1, -1).matmul(W)[0], "(5, 8)"),
        ((8, 5), lambda x, W: F.linear(x, F.dropout(W, 0.5).mT), "(5, 8)"),
        ((2, 4, 5), lambda x, W: x @ W.flatten(0, 1), "(5, 8)"),
        ((8, 2, 3), lambda x, W: torch.einsum("bi,inh->bnh", x, W).flatten(1), "(6, 8)"),
        ((2, 3, 8), lambda x, W: torch.einsum("bi,nhi->bnh", x, W).flatten(1), "(6, 8)"),
        ((8, 10), lambda x, W: torch.cat([x @ W[:, :4], x @ W[:, 4:]], 1), "(4+6, 8)"),
        ((9, 8), lambda x, W: sum(F.linear(x, part) for part in W.chunk(3)), "(3 x 3, 8)"),
        ((10, 8), lambda x, W: torch.cat([F.linear(x, p) for p in W.split([4, 6])], 1), "(4+6, 8)"),
        ((3, 5, 8), lambda x, W: torch.bmm(x[None].expand(3, -1, -1), W.mT).sum(0), "3 x (5, 8)"),
        ((3, 8, 5), lambda x, W: torch.einsum("bi,eio->beo", x, W).sum(1), "3 x (5, 8)"),
        ((3, 8, 5), lambda x, W: sum(x @ each for each in W.unbind()), "3 x (5, 8)"),
        ((3, 8, 5), lambda x, W: x @ W[1], "3 x (5, 8)"),
        ((3, 8, 5), lambda x, W: x @ W[torch.tensor(1)], "3 x (5, 8)"),
        ((3, 8, 5), lambda x, W: torch.bmm(x[:, None], W[torch.tensor([0, 2, 1, 0])])[:, 0],
         "3 x (5, 8)"),
        ((24, 5), lambda x, W: sum(x @ W[8 * e : 8 * e + 8] for e in range(3)), "3 x (5, 8)"),
        ((24, 5), lambda x, W: (x @ W.view(3, 8, 5)).sum(0), "3 x (5, 8)"),
        ((5, 2, 2, 2), lambda x, W: F.conv2d(x.view(4, 2, 2, 2), W).flatten(1), "(5, 8)"),
        ((6, 1, 3), lambda x, W: F.conv1d(x.view(4, 2, 4), W, groups=2).flatten(1), "2 x (3, 3)"),
    ],
)  # fmt: skip
def test_how_a_bare_parameter_is_multiplied(shape: Any, product: Any, view: str) -> None:
    torch.manual_seed(0)
    head = nn.LazyLinear(3)
    head(product(torch.randn(4, 8), torch.randn(shape)))
    model = Function(lambda self, x: self.out(torch.relu(product(x, self.w0))), shape, out=head)
    row = roles(model, example=torch.randn(4, 8))["w0"]
    assert (str(row.view), row.is_matrix, row.axes_known) == (view, True, True)
    assert "a guess" not in row.reason
    assert row.view is not None
    row.view.check(shape)


def test_the_matrices_are_those_of_the_forward_pass() -> None:
    """What `view` returns, multiplied, gives what the model gives."""
    x, W = torch.randn(4, 8), torch.randn(24, 5)
    model = Function(
        lambda self, x: [x @ part for part in self.w0.view(3, 8, 5)] + [self.out(x)],
        (24, 5),
        out=nn.Linear(8, 2),
    )
    with torch.no_grad():
        model.w0.copy_(W)
    view = all_roles(model, example=x)["w0"].view
    assert view is not None
    for mine, own in zip(view.matrices(W), model(x), strict=False):
        assert torch.equal(x @ mine.mT, own)


@pytest.mark.parametrize(
    ("use", "role"),
    [
        (lambda self, x: self.out(x + self.w0), "vector"),
        (lambda self, x: self.out(x * self.w0.exp()), "vector"),
        (lambda self, x: self.out(x + self.w0[torch.tensor([0, 1, 2, 2])]), "embedding"),
        (lambda self, x: self.out(x + F.embedding(torch.zeros(4).long(), self.w0)), "embedding"),
        (lambda self, x: self.out(torch.cat([x, self.w0])), "embedding"),
        (lambda self, x: (self.out(self.w0) * x).sum(), "embedding"),
        (lambda self, x: self.out(x @ torch.linalg.matrix_exp(self.w0 @ self.w0.mT)[:, :8]),
         "hidden"),
    ],
)  # fmt: skip
def test_bare_parameters_that_no_input_is_multiplied_by(use: Any, role: str) -> None:
    shape = (8, 8) if role == "hidden" else (4, 8)
    model = Function(use, shape, out=nn.Linear(8, 8))
    row = all_roles(model, example=torch.randn(4, 8))["w0"]
    assert row.role == role or (role == "hidden" and row.role == "vector")
    assert row.is_matrix or "a guess" not in row.reason


OUTPUT = "; one of the two gives the model's output"


@pytest.mark.parametrize(
    ("shape", "use", "role", "view", "reason"),
    [
        ((5, 8), lambda w, x: (x @ w.T).relu() @ w, "hidden", "(5, 8)",
         f"multiplied as (out, in), also multiplied transposed{OUTPUT}"),
        ((8, 5), lambda w, x: F.linear((x @ w).relu(), w), "hidden", "(5, 8)",
         f"multiplied as (in, out), also multiplied transposed{OUTPUT}"),
        ((8, 8), lambda w, x: x + (x @ w.T).relu() @ w, "hidden", "(8, 8)",
         f"multiplied as (out, in), also multiplied transposed{OUTPUT}"),
        ((2, 8, 3), lambda w, x: torch.einsum(
            "bhk,hik->bi", torch.einsum("bi,hik->bhk", x, w).relu(), w),
         "experts", "2 x (3, 8)",
         f"multiplied as 2 matrices of (in, out), as of heads or experts, also multiplied "
         f"transposed{OUTPUT}"),
        ((9, 8), lambda w, x: (w[torch.tensor([1, 3])].mean(0) * x) @ w.T, "embedding", "(9, 8)",
         "a table that is read by index, also multiplied to give the model's output"),
        ((5, 8), lambda w, x: (x @ w.T).relu() @ torch.ones(5, 2), "head", "(5, 8)",
         "multiplied as (out, in), the model's output"),
    ],
)  # fmt: skip
def test_a_reason_names_both_uses_of_a_bare_parameter(
    shape: Any, use: Any, role: str, view: str, reason: str
) -> None:
    row = all_roles(Function(lambda self, x: use(self.w0, x), shape), example=torch.randn(4, 8))[0]
    assert (row.role, str(row.view), row.reason) == (role, view, reason)
    assert not row.guessed


def test_a_reason_names_the_second_use_of_a_layers_weight() -> None:
    x = torch.randn(4, 8)
    cases: list[tuple[nn.Module, Any, Tensor, str]] = [
        (nn.Linear(8, 5), lambda m, x: F.linear(m(x).relu(), m.weight.T), x,
         f"Linear, also multiplied transposed{OUTPUT}"),
        (nn.Conv2d(2, 3, 3), lambda m, x: F.conv_transpose2d(m(x), m.weight),
         torch.randn(1, 2, 6, 6), f"Conv2d, also convolved with transposed{OUTPUT}"),
        (nn.Embedding(6, 8), lambda m, x: m(x) @ m.weight.T, torch.tensor([1, 2]),
         "Embedding, also multiplied to give the model's output"),
        (nn.Linear(8, 8, bias=False), lambda m, x: m(m(x).relu()), x, "Linear, the model's output"),
    ]  # fmt: skip
    for layer, use, given, reason in cases:
        model = Function(lambda self, x, use=use: use(self.layer, x), layer=layer)
        row = all_roles(model, example=given)["layer.weight"]
        assert row.reason == reason
        assert (row.role == "head") == ("also" not in reason)  # twice in the same way is one use


def test_both_uses_are_told_beside_the_layers_between_them() -> None:
    """A Hopfield layer in the middle of a network gives no output."""
    model = Function(
        lambda self, x: self.out((self.inside(x) @ self.w0.T).relu() @ self.w0),
        (8, 8), inside=nn.Linear(4, 8), out=nn.Linear(8, 2),
    )  # fmt: skip
    row = roles(model, example=torch.randn(3, 4))["w0"]
    assert row.reason == "multiplied as (out, in), also multiplied transposed"


# ------------------------------------------------------------------------------ heads and experts


def _einsum_heads(self: Any, x: Tensor) -> Tensor:
    """Attention with weights as (heads, in, size) and (heads, size, out)."""
    q, k, v = (torch.einsum("bsi,hik->bshk", x, w) for w in (self.w0, self.w1, self.w2))
    z = torch.einsum("bhst,bthk->bshk", torch.einsum("bshk,bthk->bhst", q, k).softmax(-1), v)
    return self.out(torch.einsum("bshk,hko->bso", z, self.w3))


def _fused_kernel(self: Any, x: Tensor) -> Tensor:
    """Weights as (heads, size, in), multiplied head by head, in the attention of torch."""
    q, k, v = (x[:, None] @ w.mT for w in (self.w0, self.w1, self.w2))
    z = F.scaled_dot_product_attention(q, k, v)
    return self.out((z @ self.w3).sum(1))


@pytest.mark.parametrize(
    ("attention", "shape", "view", "order"),
    [(_einsum_heads, (4, 8, 3), "4 x (3, 8)", "(in, out)"),
     (_fused_kernel, (4, 3, 8), "4 x (3, 8)", "(out, in)")],
)  # fmt: skip
def test_matrices_of_heads_are_no_experts(
    attention: Any, shape: Any, view: str, order: str
) -> None:
    model = Function(attention, *(shape,) * 3, (4, 3, 8), out=nn.Linear(8, 2))
    table = roles(model, example=torch.randn(2, 5, 8))
    for row in table[:3]:
        assert (row.role, str(row.view)) == ("hidden", view)
        assert row.reason == f"multiplied as 4 matrices of {order}, one for each head"
    summed = {  # over the heads in one product, or after it
        _einsum_heads: ("hidden", "(8, 12)", "multiplied as (in, out)"),
        _fused_kernel: (
            "experts", "4 x (8, 3)", "multiplied as 4 matrices of (in, out), as of heads or experts"
        ),
    }  # fmt: skip
    assert (table[3].role, str(table[3].view), table[3].reason) == summed[attention]


def test_a_dense_mixture_of_experts_is_not_taken_for_heads() -> None:
    """Its gates meet the results of the experts in a product too."""

    def mixture(self: Any, x: Tensor) -> Tensor:
        inside = torch.einsum("bi,eif->bef", x, self.w0).relu()
        results = torch.einsum("bef,efo->beo", inside, self.w1)
        gates = self.gate(x).softmax(-1)
        return self.out(torch.einsum("be,beo->bo", gates, results))

    model = Function(
        mixture, (4, 8, 6), (4, 6, 8), gate=nn.Linear(8, 4), out=nn.Linear(8, 2)
    )  # fmt: skip
    table = roles(model, example=torch.randn(5, 8))
    reason = "multiplied as 4 matrices of (in, out), as of heads or experts"
    assert [(row.role, row.reason) for row in table[:2]] == [("experts", reason)] * 2
    named = Function(
        lambda self, x: self.out(torch.einsum("bi,eif->bef", x, self.experts_in).relu().sum(1)),
        out=nn.Linear(6, 2),
    )
    named.experts_in = nn.Parameter(torch.randn(4, 8, 6))
    row = roles(named, example=torch.randn(5, 8))["experts_in"]
    assert row.reason == "multiplied as 4 matrices of (in, out), named as experts"


# ---------------------------------------------------------------------------- parts of a result


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x + torch.cat([-x[..., half:], x[..., :half]], -1)


def _by_heads(y: Tensor) -> Tensor:
    q, k, v = y.unflatten(-1, (2, 3, 4)).unbind(-2)
    return _attend(q.mT, k.mT, v.mT).mT.flatten(-2)


@pytest.mark.parametrize(
    ("outputs", "use", "view"),
    [
        (24, lambda y: _attend(*y.chunk(3, -1)), "(3 x 8, 8)"),
        (24, lambda y: _attend(*y.split(8, -1)), "(3 x 8, 8)"),
        (24, lambda y: _attend(y[..., :8], y[..., 8:16], y[..., 16:]), "(3 x 8, 8)"),
        (24, lambda y: _attend(*y.unflatten(-1, (3, 8)).unbind(-2)), "(3 x 8, 8)"),
        (24, lambda y: _attend(*y.reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)).flatten(1),
         "(3 x 8, 8)"),
        (24, lambda y: _attend(*map(_rotated, y.chunk(3, -1))), "(3 x 8, 8)"),
        (24, _by_heads, "(24, 8)"),
        (24, lambda y: y.split([4, 8, 12], -1)[2] * y.split([4, 8, 12], -1)[0].sum()
         + y.split([4, 8, 12], -1)[1].sum(), "(4+8+12, 8)"),
        (16, lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1], "(2 x 8, 8)"),
        (16, lambda y: F.silu(y[..., ::2]) * y[..., 1::2], "(2 x 8, 8)"),
        (16, lambda y: F.glu(y), "(2 x 8, 8)"),
        (16, lambda y: F.glu(F.dropout(y * 2, 0.1)), "(2 x 8, 8)"),
        (16, lambda y: y, "(16, 8)"),
        (16, lambda y: y[..., :4], "(16, 8)"),
        (16, lambda y: torch.cat(y.split(4, -1), 0), "(16, 8)"),
        (16, lambda y: torch.stack(y.chunk(4, -1)), "(16, 8)"),
        (16, lambda y: _rotated(y.unflatten(-1, (1, 16)).transpose(1, 2)), "(16, 8)"),
        (16, lambda y: y.chunk(2, 1)[0], "(16, 8)"),
    ],
)  # fmt: skip
def test_a_layer_whose_result_is_split(outputs: int, use: Any, view: str) -> None:
    torch.manual_seed(0)
    head, layer = nn.LazyLinear(3), nn.Linear(8, outputs)
    head(use(torch.randn(2, 5, outputs)))
    model = Function(lambda self, x: self.out(use(self.fused(x))), fused=layer, out=head)
    row = roles(model, example=torch.randn(2, 5, 8))["fused.weight"]
    assert (row.role, str(row.view)) == ("hidden", view)
    assert "a guess" not in row.reason


def test_interleaved_halves_are_the_matrices_that_the_forward_pass_uses() -> None:
    model = Function(
        lambda self, x: self.out(self.fused(x)[..., ::2] * self.fused(x)[..., 1::2]),
        fused=nn.Linear(8, 16, bias=False),
        out=nn.Linear(8, 2),
    )
    x = torch.randn(5, 8)
    view = roles(model, example=x)["fused.weight"].view
    assert view is not None
    first, second = view.matrices(model.fused.weight.detach())
    assert torch.allclose(x @ first.mT, model.fused(x)[..., ::2])
    assert torch.allclose(x @ second.mT, model.fused(x)[..., 1::2])


# ------------------------------------------------------------------------------------ the output


class Block(nn.Module):
    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.up, self.down, self.reentrant = nn.Linear(8, 12), nn.Linear(12, 8), reentrant

    def inner(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))

    def forward(self, x: Tensor) -> Any:
        if self.reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def _network(reentrant: bool | None = None) -> nn.Module:
    blocks = [Block(reentrant) for _ in range(2)]
    return nn.Sequential(nn.Linear(4, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 3))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_head_behind_blocks_also_with_checkpoints(reentrant: bool | None) -> None:
    x = torch.randn(2, 4, requires_grad=reentrant is True)
    assert _heads(roles(_network(reentrant), example=x)) == ["4"]


def test_a_sum_of_blocks_has_no_output_layer() -> None:
    body = nn.Sequential(Block(), Block(), nn.LayerNorm(8))
    assert _heads(roles(body, example=torch.randn(2, 8))) == []


def test_a_plain_last_layer_is_one_also_behind_norms_and_scales() -> None:
    model = Function(
        lambda self, x: self.norm(self.last(self.first(x))) * self.w0 + x.mean(),
        (3,),
        last=nn.Linear(8, 3),
        first=nn.Linear(4, 8),
        norm=nn.LayerNorm(3),
    )
    assert _heads(roles(model, example=torch.randn(2, 4))) == ["last"]


def test_what_feeds_another_layer_is_hidden_although_it_is_returned_as_well() -> None:
    model = Function(
        lambda self, x: {"h": (h := self.body(x)), "y": (self.head(h), self.other(h.detach()))},
        head=nn.Linear(8, 3),
        body=nn.Linear(4, 8),
        other=nn.Linear(8, 1),
    )
    assert _heads(roles(model, example=torch.randn(2, 4))) == ["head", "other"]


def test_a_refined_result_that_is_detached_stays_an_output() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        h, flow, flows = self.body(x), x.new_zeros(2, 2), []
        for _ in range(2):
            h = torch.tanh(self.update(torch.cat([h, flow.detach()], 1)))
            flow = flow + self.delta(h)
            flows.append(flow)
        return flows

    layers = {"delta": nn.Linear(8, 2), "body": nn.Linear(4, 8), "update": nn.Linear(10, 8)}
    assert _heads(roles(Function(forward, **layers), example=torch.randn(2, 4))) == ["delta"]


def test_queries_keys_and_values_of_bare_attention_are_hidden() -> None:
    model = Function(
        lambda self, x: _attend(self.query(x), self.key(x), self.value(x)),
        query=nn.Linear(8, 8),
        key=nn.Linear(8, 8),
        value=nn.Linear(8, 8),
    )
    assert _heads(roles(model, example=torch.randn(2, 5, 8))) == []


def test_a_loss_a_tuple_and_keyword_arguments() -> None:
    model, x = _network(), torch.randn(2, 4)
    double = Function(lambda self, *, a, b: self.net(a + b), net=_network())
    assert _heads(roles(model, example=(x,))) == ["4"]
    assert _heads(roles(model, example=lambda model: model(x).square().mean())) == ["4"]
    assert _heads(roles(double, example={"a": x, "b": x})) == ["net.4"]


def test_loss_with_a_penalty_on_the_gradient_and_on_the_weights() -> None:
    def loss(model: nn.Module) -> Tensor:
        x = torch.randn(2, 4, requires_grad=True)
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.mean() + slope.square().sum() + sum(p.square().sum() for p in model.parameters())

    assert _heads(roles(_network(), example=loss)) == ["4"]


@pytest.mark.parametrize("frozen", ["all", "body"])
def test_frozen_weights_and_a_caller_without_gradients(frozen: str) -> None:
    model = _network()
    for name, p in model.named_parameters():
        p.requires_grad_(frozen == "body" and name.startswith("4"))
    with torch.no_grad():
        table = all_roles(model, example=torch.randn(2, 4))
        assert not torch.is_grad_enabled()
    assert _heads(table) == ["4"]


def test_compiled_models_and_compiled_parts() -> None:
    model = _network()
    whole = roles(torch.compile(model), example=torch.randn(2, 4))
    assert [row.name for row in whole] == [name for name, _ in model.named_parameters()]
    assert _heads(whole) == ["4"]
    parts = nn.Sequential(*[torch.compile(part) for part in model])
    assert _heads(all_roles(parts, example=torch.randn(2, 4))) == ["4._orig_mod"]


def test_shared_layers_and_tied_weights() -> None:
    embed, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, Block(), head)
    table = roles(model, example=torch.randint(20, (2, 5)))
    assert table["0.weight"].role == "embedding"
    assert _heads(table) == []


def test_routers_by_what_they_choose_from() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        scores, chosen = self.pick(x).softmax(-1).topk(1)
        y = torch.stack([self.branches[int(i)](row) for row, i in zip(x, chosen, strict=True)])
        return self.out(scores * y)

    model = Function(
        forward,
        out=nn.Linear(8, 2),
        pick=nn.Linear(8, 3),
        branches=nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]),
    )
    assert _heads(roles(model, example=torch.randn(4, 8))) == ["out", "pick"]


# ------------------------------------------------------------------------------ nothing is changed


class Restless(nn.Module):
    """Changes whatever a forward pass can change."""

    def __init__(self, fails: bool):
        super().__init__()
        self.embed = nn.Embedding(10, 4, max_norm=0.1)
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.fails = 0, fails
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.count = self.count + 1
        self.mean.add_(1)
        self.eval()
        noise.mul_(0).add_(random.random() + np.random.rand())  # noqa: NPY002
        self.out.weight.data.clamp_(-0.01, 0.01)
        h = self.norm(self.embed(x)) + torch.rand(4) + torch.rand(4, generator=self.generator)
        torch.set_grad_enabled(True)
        self.out(h).sum().backward()
        if self.fails:
            raise KeyError("nothing")
        return self.out(h)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(fails: bool) -> None:
    model = Restless(fails)
    model.out.weight.grad = torch.ones(2, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = {name: id(p) for name, p in model.named_parameters()}
    noise = torch.randn(5)
    kept, mean = noise.clone(), model.mean
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]  # noqa: NPY002
    states.append(model.generator.get_state())
    hooks = [len(m._forward_hooks) for m in model.modules()]
    inputs = (torch.arange(6), noise)
    if fails:
        with pytest.raises(ValueError, match="KeyError from Restless") as info:
            roles(model, example=inputs)
        assert isinstance(info.value.__cause__, KeyError)
    else:
        all_roles(model, example=inputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.mean is mean
    assert {name: id(p) for name, p in model.named_parameters()} == weights
    assert torch.equal(noise, kept)
    assert torch.equal(model.out.weight.grad, torch.ones(2, 4))
    assert model.out.bias.grad is None
    assert (model.calls, hasattr(model, "last")) == (0, False)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert torch.equal(model.generator.get_state(), states[3])
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_training_goes_on_as_without() -> None:
    torch.manual_seed(0)
    losses = []
    for looks in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            x = torch.randn(16, 4)
            if looks:
                roles(model, example=x)
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_a_loss_that_cannot_be_followed_leaves_guesses_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    table = roles_in_loss(model, lambda model, batch: model(batch)["logits"], torch.randn(2, 4))
    assert table["0.weight"].reason == "Linear, a guess (IndexError in the forward pass)"
    assert table["0.bias"].reason == "1-dimensional"
    table = roles_in_loss(model, lambda model, batch: model(batch).sum(), torch.randn(2, 4))
    assert table["0.weight"].reason == "Linear"


def test_an_override_stands_above_the_example() -> None:
    model = Function(lambda self, x: self.out(x @ self.w0), (8, 5), out=nn.Linear(5, 2))
    view = MatrixView.of((8, 5))
    table = roles(model, {"w0": view, "out.weight": "hidden"}, example=torch.randn(2, 8))
    assert (table["w0"].view, table["out.weight"].role) == (view, "hidden")


def test_examples_that_say_nothing() -> None:
    with pytest.raises(ValueError, match="NoneType without a tensor"):
        roles(_network(), example=lambda model: None)
    with pytest.raises(ValueError, match=r"0\.weight .* lazy module"):
        roles(nn.Sequential(nn.LazyLinear(3)), example=torch.randn(2, 4))


def test_an_example_without_gradients_and_kernels_of_their_own() -> None:
    x = torch.randn(2, 4)
    assert _heads(roles(_network(), example=lambda model: torch.no_grad()(model)(x))) == ["4"]
    model = Function(
        lambda self, x: self.out(self.both(x, x)), out=nn.Linear(3, 2), both=nn.Bilinear(4, 4, 3)
    )
    assert _heads(all_roles(model, example=x)) == ["out"]


def test_a_head_of_several_bare_matrices_says_how_it_is_multiplied() -> None:
    model = Function(
        lambda self, x: torch.einsum("bi,eio->beo", self.body(x), self.w0),
        (3, 8, 5),
        body=nn.Linear(4, 8),
    )
    row = roles(model, example=torch.randn(2, 4))["w0"]
    assert row.reason == "multiplied as 3 matrices of (in, out), the model's output"
