"""Hessian, Gauss-Newton and NTK of every kind of network, against dense references.

The references differentiate a copy of the network itself, twice, without any of our code; products
are checked against finite differences of plain gradients too, which know of no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from steepest.curvature import NTK, Batches, GaussNewton, Hessian
from steepest.lab.models import GPT, GPTConfig

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Kind:
    """A network, a batch (inputs, targets), its outputs, the loss of them, and a small block."""

    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Any]]
    rows: list[str]
    columns: list[str]
    outputs: Callable[[Any, Any], Tensor] = lambda model, x: model(x)
    criterion: Callable[[Tensor, Any], Tensor] = F.mse_loss
    loss: Loss | None = None
    how: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-10
    """Relative; larger where the network itself rounds to float32 on the way."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        if self.loss is not None:
            return self.loss(model, batch)
        return self.criterion(self.outputs(model, batch[0]), batch[1])


# ------------------------------------------------------------------------------------ the networks


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _classes(*shape: int, count: int = 3) -> Tensor:
    return torch.randint(count, shape)


def _tokens(*shape: int, count: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randint(count, shape), torch.randint(count, shape)


def _per_token(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _shifted(logits: Tensor, targets: Tensor) -> Tensor:
    return _per_token(logits[:, :-1], targets[:, 1:])


def _mlp(activation: type[nn.Module], bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6, bias), activation(), nn.Linear(6, 3, bias))


def _cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding=1),
        nn.GELU(),
        nn.Conv2d(4, 4, 3, groups=4, stride=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).to(memory_format=torch.channels_last)


def _normalized(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def _with_statistics() -> nn.Sequential:
    model = _normalized(nn.BatchNorm1d(6))
    with torch.no_grad():
        for _ in range(3):
            model(2 * torch.randn(9, 4) + 1)
        model[1].weight.uniform_(0.5, 1.5)
    return model


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells = kind(3, 4, num_layers=2, dropout=0.5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


class Attention(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.qkv = nn.Linear(4, 12)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        if not self.causal:
            return self.inner(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


def _encoder() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.5, activation="gelu", batch_first=True)


def _gpt(**how: Any) -> GPT:
    return GPT(GPTConfig(width=8, heads=2, depth=2, context=8, **how), vocabulary=7)


def _partly_frozen() -> nn.Sequential:
    model = _mlp(nn.Tanh)
    model[0].weight.requires_grad_(False)
    return model


def _partly_unused() -> nn.Module:
    model = _mlp(nn.Tanh)
    model.register_parameter("spare", nn.Parameter(torch.randn(3)))
    return model


def _hugging_face(name: str, experts: str = "batched_mm") -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": 7,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 8,
    }
    group: dict[str, Any] = {"num_key_value_heads": 2, "attention_dropout": 0.5}
    configs: dict[str, Callable[[], Any]] = {
        "GPT2LMHeadModel": lambda: transformers.GPT2Config(
            vocab_size=7, n_positions=8, n_embd=8, n_layer=2, n_head=2
        ),
        "LlamaForCausalLM": lambda: transformers.LlamaConfig(**sizes, **group),
        "MixtralForCausalLM": lambda: transformers.MixtralConfig(
            **sizes, **group, num_local_experts=3, num_experts_per_tok=2
        ),
        "ViTForImageClassification": lambda: transformers.ViTConfig(
            hidden_size=8,
            intermediate_size=10,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=3,
            hidden_dropout_prob=0.5,
        ),
    }
    config = configs[name]()
    if name == "MixtralForCausalLM":
        config._experts_implementation = experts
    model: nn.Module = getattr(transformers, name)(config)
    with torch.no_grad():  # the usual ones are so small that curvature would hide behind rounding
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def _lora() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5)
    model: nn.Module = peft.get_peft_model(_mlp(nn.Tanh), config)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return model


def _regression(*inputs: int, targets: tuple[int, ...]) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (_numbers(*inputs), _numbers(*targets))


def _language(name: str, rows: list[str], columns: list[str], inside: bool) -> Kind:
    def loss(model: Any, batch: Any) -> Tensor:
        return model(batch[0], labels=batch[1]).loss

    return Kind(
        lambda: _hugging_face(name),
        lambda: _tokens(2, 4),
        rows,
        columns,
        outputs=lambda model, x: model(x).logits,
        criterion=_shifted,
        loss=loss if inside else None,
        tolerance=3e-5,
    )


VECTORS = _regression(5, 4, targets=(5, 3))
SEQUENCES = _regression(2, 3, 4, targets=(2, 3, 4))
RECURRENT = _regression(2, 3, 3, targets=(2, 3, 2))
KINDS = {
    "relu": Kind(lambda: _mlp(nn.ReLU), VECTORS, ["*"], ["0.weight"]),
    "gelu": Kind(
        lambda: _mlp(nn.GELU),
        lambda: (_numbers(5, 4), _classes(5)),
        ["*"],
        ["2.*"],
        criterion=F.cross_entropy,
    ),
    "tanh": Kind(lambda: _mlp(nn.Tanh), VECTORS, ["0.*"], ["2.*"]),
    "cnn": Kind(
        _cnn,
        lambda: (_numbers(3, 2, 6, 6).to(memory_format=torch.channels_last), _classes(3)),
        ["0.weight", "4.weight"],
        ["2.*"],
        criterion=F.cross_entropy,
    ),
    "batch norm": Kind(_with_statistics, VECTORS, ["1.*", "0.bias"], ["0.weight"]),
    "batch norm of the batch": Kind(
        _with_statistics, VECTORS, ["*"], ["0.weight"], how={"batch_norm": "batch"}
    ),
    "layer norm": Kind(lambda: _normalized(nn.LayerNorm(6)), VECTORS, ["1.*", "0.bias"], ["4.*"]),
    "rms norm": Kind(lambda: _normalized(nn.RMSNorm(6)), VECTORS, ["1.*", "0.bias"], ["4.*"]),
    "group norm": Kind(lambda: _normalized(nn.GroupNorm(2, 6)), VECTORS, ["1.*"], ["0.*"]),
    "lstm": Kind(
        lambda: Recurrent(nn.LSTM), RECURRENT, ["cells.bias_ih_l0", "head.*"], ["cells.*_l1"]
    ),
    "gru": Kind(
        lambda: Recurrent(nn.GRU), RECURRENT, ["cells.bias_ih_l0", "head.*"], ["cells.*_l1"]
    ),
    "encoder layer": Kind(_encoder, SEQUENCES, ["norm1.*", "linear1.*"], ["self_attn.in*"]),
    "multihead attention": Kind(
        Attention, SEQUENCES, ["inner.in_proj_bias"], ["inner.out*", "qkv.bias"]
    ),
    "causal attention": Kind(
        lambda: Attention(causal=True), SEQUENCES, ["qkv.*"], ["qkv.bias", "inner.in_proj_bias"]
    ),
    "frozen": Kind(_partly_frozen, VECTORS, ["0.bias", "2.*"], ["2.bias"]),
    "unused": Kind(_partly_unused, VECTORS, ["spare", "0.bias", "2.bias"], ["2.weight", "spare"]),
    "lora": Kind(_lora, VECTORS, ["*lora_*"], ["*lora_B*"]),
    "gpt": Kind(
        lambda: _gpt(mlp="swiglu"),
        lambda: _tokens(2, 4),
        ["*norm*.weight"],
        ["blocks.0.attention.query.weight"],
        criterion=_per_token,
    ),
    "gpt, its own loss": Kind(
        lambda: _gpt(tied=True, bias=True, positions="learned"),
        lambda: _tokens(2, 4),
        ["embedding.weight"],
        ["*norm*.weight"],
        criterion=_per_token,
        loss=lambda model, batch: model.loss(*batch),
        tolerance=3e-6,
    ),
    "gpt-2": _language("GPT2LMHeadModel", ["*ln*"], ["transformer.h.0.attn.c_attn.bias"], False),
    "gpt-2, loss inside": _language(
        "GPT2LMHeadModel", ["transformer.wte.weight"], ["*ln_1*"], True
    ),
    "llama": _language("LlamaForCausalLM", ["*norm*"], ["*0.self_attn.k_proj.weight"], False),
    "llama, loss inside": _language("LlamaForCausalLM", ["lm_head.weight"], ["*norm*"], True),
    "mixtral": _language("MixtralForCausalLM", ["*norm*"], ["*0.mlp.gate*"], False),
    "mixtral, loss inside": _language("MixtralForCausalLM", ["*norm*"], ["*0.mlp.gate*"], True),
    "vit": Kind(
        lambda: _hugging_face("ViTForImageClassification"),
        lambda: (_numbers(2, 3, 8, 8), _classes(2)),
        ["*bias"],
        ["vit.embeddings.*token"],
        outputs=lambda model, x: model(x).logits,
        criterion=F.cross_entropy,
        tolerance=1e-6,
    ),
}
ROUNDED = {name for name, kind in KINDS.items() if kind.tolerance > 1e-10}


# ----------------------------------------------------------------------------------- the references


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


@pytest.fixture
def given(request: pytest.FixtureRequest) -> tuple[Kind, nn.Module, Any]:
    """A network in training mode, with gradients, and a batch."""
    kind: Kind = KINDS[request.param]
    torch.manual_seed(1)
    model, batch = kind.build(), kind.batch()
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    return kind, model.train(), batch


def _twin(kind: Kind, model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy in float64, and in the mode that is meant."""
    twin = deepcopy(model).double().eval()
    for module in twin.modules():
        if isinstance(module, _BatchNorm) and kind.how:
            module.train()
    return twin, {name: p for name, p in twin.named_parameters() if p.requires_grad}


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _jacobian(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """The derivatives of all entries, one by one: `(entries, n)`."""
    options: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    with sdpa_kernel([SDPBackend.MATH]):
        return torch.stack([_flat(grad(v, parameters, **options)) for v in value.reshape(-1)])


def _gradient(kind: Kind, model: nn.Module, batch: Any, parameters: list[Tensor]) -> Tensor:
    with sdpa_kernel([SDPBackend.MATH]):
        value = kind(model, tree_map(_double, batch))
        return _flat(grad(value, parameters, create_graph=True, materialize_grads=True))


def _differences(kind: Kind, model: nn.Module, batch: Any, v: Tensor) -> Tensor:
    """The change of the plain gradient along v, by whatever kernels torch takes for it."""
    twin, named = _twin(kind, model)
    parameters, sides = list(named.values()), []
    step = 1e-5 / float(v.norm())
    for change in (step * v, -2 * step * v):
        with torch.no_grad():
            for p, piece in zip(
                parameters, change.split([p.numel() for p in parameters]), strict=True
            ):
                p += piece.view(p.shape)
        value = kind(twin, tree_map(_double, batch))
        sides.append(_flat(grad(value, parameters, materialize_grads=True)))
    return (sides[0] - sides[1]) / (2 * step)


def _chosen(named: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    """Those that an operator was asked for, in its order: by its own names."""
    return [named[name] for name in names]


def _same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found.to(expected), expected, rtol=0, atol=tolerance * scale)


def _state_of(model: nn.Module) -> dict[str, Any]:
    named = dict(model.named_parameters())
    return {
        "weights": {name: t.clone() for name, t in model.state_dict().items()},
        "identities": {name: id(p) for name, p in named.items()},
        "gradients": {name: (id(p.grad), deepcopy(p.grad)) for name, p in named.items()},
        "trained": {name: p.requires_grad for name, p in named.items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "grad enabled": torch.is_grad_enabled(),
    }


def _settings() -> list[bool]:
    return [
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.conv.fp32_precision == "ieee",
        torch.backends.cudnn.rnn.fp32_precision == "ieee",
    ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Weights bit for bit, buffers, gradients, modes, hooks, and what is set in torch."""
    torch.backends.mha.set_fastpath_enabled(True)
    kinds = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    precisions = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # not the default, so that a reset shows
    before, set_before = _state_of(model), _settings()
    try:
        yield
        after = _state_of(model)
        assert _settings() == set_before
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        for kind, precision in zip(kinds, precisions, strict=True):
            kind.fp32_precision = precision
    for key in before:
        assert _equal(before[key], after[key]), key


every_kind = pytest.mark.parametrize("given", KINDS, indirect=True)
Given = tuple[Kind, nn.Module, Any]


# -------------------------------------------------------------------------------------- exactness


@every_kind
def test_hessian_of_a_block(given: Given) -> None:
    kind, model, batch = given
    with _unchanged(model):
        H = Hessian(model, kind, batch, kind.rows, dtype=torch.float64, **kind.how)
        dense = H.to_dense()
    twin, named = _twin(kind, model)
    parameters = _chosen(named, list(H.parameters))
    g = _gradient(kind, twin, batch, parameters)
    _same(H.gradient(), g.detach(), kind.tolerance)
    _same(dense, _jacobian(g, parameters), kind.tolerance)
    assert H.loss() == pytest.approx(kind(twin, tree_map(_double, batch)).item(), rel=1e-6)
    assert H.products == len(dense)


@every_kind
def test_cross_block(given: Given) -> None:
    kind, model, batch = given
    how: dict[str, Any] = {"dtype": torch.float64, **kind.how}
    with _unchanged(model):
        cross = Hessian(model, kind, batch, kind.rows, columns=kind.columns, **how)
        dense = cross.to_dense()
    twin, named = _twin(kind, model)
    rows, columns = (
        _chosen(named, list(Hessian(model, kind, batch, names, **how).parameters))
        for names in (kind.rows, kind.columns)
    )
    g = _gradient(kind, twin, batch, columns)
    _same(dense, _jacobian(g, rows).T, kind.tolerance)
    assert not cross.is_symmetric


@every_kind
def test_product_with_the_whole_hessian(given: Given) -> None:
    kind, model, batch = given
    with _unchanged(model):
        H = Hessian(model, kind, batch, dtype=torch.float64, **kind.how)
        v = torch.randn(H.shape[1], dtype=torch.float64)
        v /= v.norm()
        product = H @ v
    twin, named = _twin(kind, model)
    assert list(H.parameters) == list(named)
    parameters = list(named.values())
    g = _gradient(kind, twin, batch, parameters)
    _same(product, _jacobian(g @ v, parameters)[0], kind.tolerance)


@pytest.mark.parametrize("given", sorted(KINDS.keys() - ROUNDED), indirect=True)
def test_product_is_the_change_of_the_gradient(given: Given) -> None:
    kind, model, batch = given
    H = Hessian(model, kind, batch, dtype=torch.float64, **kind.how)
    v = torch.randn(H.shape[1], dtype=torch.float64)
    _same(H @ v, _differences(kind, model, batch, v), 1e-6)


@every_kind
def test_gauss_newton(given: Given) -> None:
    kind, model, batch = given
    with _unchanged(model):
        block = GaussNewton(model, kind, batch, kind.rows, dtype=torch.float64, **kind.how)
        dense = block.to_dense()
        whole = GaussNewton(model, kind, batch, dtype=torch.float64, **kind.how)
        v = torch.randn(whole.shape[1], dtype=torch.float64)
        product = whole @ v
    twin, named = _twin(kind, model)
    inputs, targets = tree_map(_double, batch)
    with sdpa_kernel([SDPBackend.MATH]):
        outputs = kind.outputs(twin, inputs)
    curved = torch.autograd.functional.hessian(
        lambda z: kind.criterion(z.view(outputs.shape), targets), outputs.detach().reshape(-1)
    )
    J = _jacobian(outputs, _chosen(named, list(block.parameters)))
    _same(dense, J.T @ curved @ J, kind.tolerance)
    J = _jacobian(outputs, list(named.values()))
    _same(product, J.T @ (curved @ (J @ v)), kind.tolerance)


@every_kind
def test_ntk(given: Given) -> None:
    kind, model, batch = given
    with _unchanged(model):
        kernel = NTK(model, kind, batch, dtype=torch.float64, **kind.how)
        v = torch.randn(kernel.shape[1], dtype=torch.float64)
        product, dense = kernel @ v, kernel.to_dense()
    twin, named = _twin(kind, model)
    with sdpa_kernel([SDPBackend.MATH]):
        outputs = kind.outputs(twin, _double(batch[0]))
    J = _jacobian(outputs, list(named.values()))
    _same(dense, J @ J.T, kind.tolerance)
    _same(product, J @ (J.T @ v), kind.tolerance)


def test_against_functional_hessian() -> None:
    """Another way to the same matrix: forward over reverse, of a plain function of one vector."""
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    model = _mlp(nn.Tanh).double()

    def loss_of(w: Tensor) -> Tensor:
        first, b, last, c = w.split([24, 6, 18, 3])
        return F.mse_loss((x @ first.view(6, 4).T + b).tanh() @ last.view(3, 6).T + c, y)

    expected = torch.func.hessian(loss_of)(_flat(model.parameters()).detach())
    H = Hessian(model, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), (x, y))
    torch.testing.assert_close(H.to_dense(), expected, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------- precisions


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, NTK])
def test_bfloat16_models_are_computed_in_float32(kind: type[Hessian]) -> None:
    case = KINDS["layer norm"]
    model, batch = case.build().bfloat16(), tree_map(lambda t: t.bfloat16(), VECTORS())
    with _unchanged(model):
        found = kind(model, case, batch)
        dense = found.to_dense()
    assert dense.dtype == found.dtype == torch.float32
    exact = kind(deepcopy(model).double(), case, tree_map(_double, batch)).to_dense()
    _same(dense, exact, 1e-6)


@pytest.mark.parametrize("name", ["relu", "cnn", "lstm", "gru", "encoder layer", "gpt"])
def test_float32_agrees_with_float64(name: str) -> None:
    kind = KINDS[name]
    model, batch = kind.build(), kind.batch()
    single = Hessian(model, kind, batch)
    double = Hessian(model, kind, batch, dtype=torch.float64)
    v = torch.randn(single.shape[1])
    assert single.dtype == torch.float32
    _same(single @ v, double @ v, 1e-4)


@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
@pytest.mark.parametrize("name", ["gelu", "cnn", "lstm", "encoder layer", "unused", "gpt-2"])
def test_the_block_of_some_parameters(name: str, operator: Any) -> None:
    kind = KINDS[name]
    H = operator(kind.build(), kind, kind.batch(), dtype=torch.float64)
    pieces = [p.numel() for p in H.parameters.values()]
    names = list(H.parameters)
    for chosen in ([0], [len(names) - 1], [1, len(names) // 2]):
        steps = {names[k]: torch.randn_like(H.parameters[names[k]]) for k in chosen}
        v = H.vector()
        for k, D in zip(chosen, steps.values(), strict=True):
            v.split(pieces)[k].copy_(D.flatten())
        expected = (H @ v).split(pieces)
        block = H.block(list(steps))
        assert list(block.parameters) == list(steps)
        images = block @ torch.cat([D.flatten() for D in steps.values()])
        wanted = torch.cat([expected[k] for k in chosen])
        torch.testing.assert_close(images, wanted, rtol=1e-9, atol=kind.tolerance)
        assert (block.products, block.shape) == (1, (len(images), len(images)))
    with pytest.raises(ValueError, match="'none', which no param"):
        H.block(["none"])


def test_grouped_products_of_experts() -> None:
    """What transformers takes for experts by default; torch has it in float32 and less."""
    losses = KINDS["mixtral"], KINDS["mixtral, loss inside"]
    torch.manual_seed(0)
    one_by_one = _hugging_face("MixtralForCausalLM", "eager")
    grouped = _hugging_face("MixtralForCausalLM", "grouped_mm")
    grouped.load_state_dict(one_by_one.state_dict())
    batch = _tokens(2, 4)
    for operator in (Hessian, GaussNewton):
        expected = operator(one_by_one, losses[0], batch, dtype=torch.float64)
        found = operator(grouped, losses[1], batch)
        v = torch.randn(expected.shape[1])
        _same(found @ v, expected @ v, 1e-4)


def test_the_most_precise_parameter_decides() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).double())

    def loss(model: Any, x: Tensor) -> Tensor:
        return model[1](model[0](x).double()).square().mean()

    assert Hessian(model, loss, torch.randn(2, 4)).dtype == torch.float64


# -------------------------------------------------------------------------- wrapped and compiled


def _wrapped(model: nn.Module, how: str) -> tuple[nn.Module, nn.Module]:
    """The model, and what the user holds."""
    if how == "compiled":
        return model, torch.compile(model)  # type: ignore[return-value]
    if how == "compile()":
        model.compile()
    if how == "compiled submodule":
        model[0] = torch.compile(model[0])  # type: ignore[operator]
    if how == "data parallel":
        return model, nn.DataParallel(model)
    return model, model


@pytest.mark.parametrize("operator", [Hessian, GaussNewton, NTK])
@pytest.mark.parametrize("how", ["compiled", "compile()", "compiled submodule", "data parallel"])
def test_compiled_and_wrapped_models(how: str, operator: type[Hessian]) -> None:
    batch = VECTORS()
    plain = nn.Sequential(_mlp(nn.Tanh), nn.Linear(3, 3))
    model, held = _wrapped(deepcopy(plain), how)
    kind = KINDS["tanh"]
    expected = operator(plain, kind, batch).to_dense()
    with _unchanged(model):
        assert torch.equal(operator(held, kind, batch).to_dense(), expected)
        closed = operator(held, lambda _, batch: kind(held, batch), batch)  # a loss that ignores it
    if how != "data parallel":
        assert torch.equal(closed.to_dense(), expected)


def test_model_that_was_compiled_and_ran() -> None:
    """Code for other weights is there; it is not used."""
    kind, batch = KINDS["tanh"], VECTORS()
    model = _mlp(nn.Tanh)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batch[0]).sum().backward()
    expected = Hessian(deepcopy(model), kind, batch).to_dense()
    assert torch.equal(Hessian(compiled, kind, batch).to_dense(), expected)
    calls = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled(batch[0]).sum().backward()  # and it still is, without being compiled again
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == calls > 0


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_parametrized_weights(norm: str) -> None:
    """Torch's own second derivative of weight norm is wrong: differences are the reference."""
    model = _mlp(nn.Tanh).double().eval()  # while training, spectral norm changes as it is used
    getattr(nn.utils.parametrizations, norm)(model[0])
    kind, batch = KINDS["tanh"], tree_map(_double, VECTORS())
    with _unchanged(model):
        H = Hessian(model, kind, batch)
        dense = H.to_dense()
    assert any("original" in name for name in H.parameters)
    _same(dense, dense.T, 1e-12)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    _same(dense @ v, _differences(kind, model, batch, v), 1e-6)


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_by_hand(dim: int) -> None:
    class ByHand(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            weights = model.parametrizations.weight
            self.bias, self.g, self.v = model.bias, weights.original0, weights.original1

        def forward(self, x: Tensor) -> Tensor:
            length = self.v.square().sum(1 - dim, keepdim=True).sqrt()
            return F.linear(x, self.v * self.g / length, self.bias).tanh()

    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3).double(), dim=dim)
    kind, batch = KINDS["tanh"], tree_map(_double, VECTORS())
    expected = Hessian(ByHand(model), kind, batch).to_dense()
    found = Hessian(nn.Sequential(model, nn.Tanh()), kind, batch).to_dense()
    _same(found, expected, 1e-12)


# ----------------------------------------------------------------- what stays, and what goes on


@pytest.mark.parametrize("operator", [Hessian, GaussNewton, NTK])
@pytest.mark.parametrize("keep", [True, False])
def test_the_weights_are_those_at_construction(operator: type[Hessian], keep: bool) -> None:
    kind, batch = KINDS["batch norm"], VECTORS()
    model = _with_statistics()
    G = operator(model, kind, batch, keep_graphs=keep)
    untouched = operator(deepcopy(model), kind, batch)
    v = torch.randn(G.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        kind(model, batch).backward()
        optimizer.step()
    assert torch.equal(G @ v, untouched @ v)
    assert not torch.equal(G @ v, operator(model, kind, batch) @ v)
    model.half()
    assert torch.equal(G @ v, untouched @ v)


@pytest.mark.parametrize("operator", [Hessian, GaussNewton, NTK])
def test_all_is_put_back_when_the_loss_raises(operator: type[Hessian]) -> None:
    class Stop(Exception):
        pass

    seen: list[Any] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        seen.append([module.training for module in model.modules()])
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        model(x)
        raise Stop

    model = _encoder().train()
    model.norm1.eval()
    with _unchanged(model), pytest.raises(Stop):
        operator(model, loss, torch.randn(2, 3, 4)).to_dense()
    assert seen[0] == [
        not isinstance(module, nn.Dropout) and module is not model.norm1
        for module in model.modules()
    ]
    assert seen[1] is False


def test_batch_norm_statistics_of_several_batches() -> None:
    """Neither the model's nor, from one product to the next, those of the operator."""
    kind, model = KINDS["batch norm of the batch"], _with_statistics()
    batches = Batches([_regression(size, 4, targets=(size, 3))() for size in (5, 3)])
    with _unchanged(model):
        kept = Hessian(model, kind, batches, batch_norm="batch", keep_graphs=True)
        anew = Hessian(model, kind, batches, batch_norm="batch", keep_graphs=False)
        v = torch.randn(kept.shape[1])
        first = kept @ v
        kept.loss()
        assert torch.equal(first, kept @ v)
        assert torch.equal(anew @ v, first)
        assert torch.equal(anew @ v, first)


def test_batch_norm_modes_differ() -> None:
    model, batch = _with_statistics(), VECTORS()
    kind = KINDS["batch norm"]
    evaluated = Hessian(model, kind, batch).to_dense()
    of_batch = Hessian(model, kind, batch, batch_norm="batch").to_dense()
    assert float((evaluated - of_batch).norm() / evaluated.norm()) > 0.1


@pytest.mark.parametrize("operator", [Hessian, GaussNewton, NTK])
def test_without_grad_mode(operator: type[Hessian]) -> None:
    """As in a function for evaluation."""
    kind, batch = KINDS["tanh"], VECTORS()
    model = _mlp(nn.Tanh)
    expected = operator(model, kind, batch).to_dense()
    with torch.no_grad():
        found = operator(model, kind, batch).to_dense()
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_products_have_no_graph() -> None:
    for operator in (Hessian, GaussNewton, NTK):
        found = operator(_mlp(nn.Tanh), KINDS["tanh"], VECTORS())
        product = found @ torch.randn(found.shape[1], requires_grad=True)
        assert not product.requires_grad
        assert product.shape == (found.shape[0],)


# --------------------------------------------------------------------------- outputs of the model


class Several(nn.Module):
    """Returns what its features are, its outputs, and perhaps the loss of them."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.features, self.head, self.inside = nn.Linear(4, 3), nn.Linear(3, 3), inside

    def forward(self, x: Tensor, y: Tensor) -> Any:
        features = self.features(x).tanh()
        outputs = self.head(features)
        if self.inside:
            return outputs, F.mse_loss(outputs, y)
        return {"features": features, "outputs": outputs, "shape": torch.tensor(x.shape)}


@pytest.mark.parametrize("inside", [True, False])
def test_outputs_are_the_tensor_that_the_loss_takes(inside: bool) -> None:
    model = Several(inside).double()
    x, y = tree_map(_double, VECTORS())

    def loss(model: Any, batch: Any) -> Tensor:
        found = model(*batch)
        return found[1] if inside else F.mse_loss(found["outputs"], batch[1])

    J = _jacobian(model.head(model.features(x).tanh()), list(model.parameters()))
    _same(GaussNewton(model, loss, (x, y)).to_dense(), 2 / y.numel() * J.T @ J, 1e-12)
    _same(NTK(model, loss, (x, y)).to_dense(), J @ J.T, 1e-12)


def test_penalties_have_no_part_in_gauss_newton() -> None:
    model, kind, batch = _mlp(nn.Tanh), KINDS["tanh"], VECTORS()

    def penalized(model: Any, batch: Any) -> Tensor:
        return kind(model, batch) + sum(p.square().sum() for p in model.parameters())

    plain = GaussNewton(model, kind, batch).to_dense()
    torch.testing.assert_close(GaussNewton(model, penalized, batch).to_dense(), plain)
    both = Hessian(model, penalized, batch).to_dense() - Hessian(model, kind, batch).to_dense()
    torch.testing.assert_close(both, 2 * torch.eye(51), rtol=0, atol=1e-5)
