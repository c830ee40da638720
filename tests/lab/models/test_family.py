"""Every model of the lab: built by name, counted, trained, and seen rightly by the library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import Muon, roles
from steepest.lab.data.shapes import ImageShape, Shape, TextShape
from steepest.lab.errors import InputError
from steepest.lab.models import (
    GPT,
    PRESETS,
    GPTConfig,
    build_model,
    logits_of,
    loss_of,
    sizes_of,
    smaller,
)
from steepest.lab.models.convnet import ConvNet, ConvNetConfig
from steepest.lab.models.family import _MODELS, MODELS, add_model
from steepest.lab.models.mlp import MLP, MLPConfig
from steepest.lab.models.model_record import ModelRecord
from steepest.lab.models.theory import Linear, LinearConfig, RandomFeatures, RandomFeaturesConfig

TEXT, IMAGES = TextShape(vocabulary=23, context=12), ImageShape(channels=2, side=8, classes=5)
NAMES = [*MODELS, "gpt-124m", "llama-60m"]
VARIANTS = [
    ("gpt", ["mlp=gelu-tanh", "positions=learned", "norm=layer", "bias=true", "tied=true"]),
    ("llama", ["heads=4", "kv_heads=2", "inner=24", "tied=true"]),
    ("llama", ["heads=2", "kv_heads=1"]),
    ("mlp", ["bias=false"]),
    ("residual-mlp", ["layers_per_block=2"]),
    ("residual-convnet", ["layers_per_block=2"]),
    ("random-features", ["features=swiglu"]),
]

NO_MATRIX = pytest.mark.filterwarnings("ignore:none of the 0 entries")  # of random features


def _shape(name: str) -> Shape:
    record = MODELS[PRESETS[name].family if name in PRESETS else name]
    return TEXT if record.takes is TextShape else IMAGES


def _small(name: str, options: Any = (), **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 3} | sizes
    return build_model(name, _shape(name), **sizes, options=options)


def _batch(name: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if _shape(name) is TEXT:
        tokens = torch.randint(23, (4, 13), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    images = torch.randn(12, 2, 8, 8, generator=generator)
    return images, torch.randint(5, (12,), generator=generator)


@pytest.mark.parametrize(("name", "options"), [*((name, []) for name in NAMES), *VARIANTS])
def test_the_formula_counts_parameters_and_constants(name: str, options: list[str]) -> None:
    shape = _shape(name)
    for width, depth in ((16, 3), (24, 1), (32, 5)):
        how_large = {"width": width, "depth": depth, "options": options}
        model = build_model(name, shape, **how_large)
        sizes = sizes_of(name, shape, **how_large)
        tensors = (model.parameters(), model.buffers())
        assert sizes is not None
        assert sizes.count(shape) == tuple(sum(t.numel() for t in kind) for kind in tensors)
        assert (sizes.width, sizes.depth) == (width, depth)
        inputs, _ = _batch(name)
        classes = 23 if shape is TEXT else 5
        outside = inputs.shape if shape is TEXT else inputs.shape[:1]
        assert logits_of(model, inputs).shape == (*outside, classes)


@NO_MATRIX
@pytest.mark.parametrize(("name", "options"), [*((name, []) for name in NAMES), *VARIANTS])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_model_learns(name: str, options: list[str], optimizer: str) -> None:
    model, batch = _small(name, options), _batch(name)
    matrices = roles(model).matrices
    if optimizer == "muon" and matrices:
        step: Any = Muon(model, lr=0.01, adamw_lr=0.003)
    else:
        step = torch.optim.AdamW(model.parameters(), lr=0.003)
    losses = []
    for _ in range(5):
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        step.step()
        step.zero_grad()
    assert all(torch.tensor(losses).isfinite())
    assert losses[-1] < losses[0]


MATRICES = {
    "gpt": 18, "gpt-124m": 18, "llama": 21, "llama-60m": 21, "mlp": 4, "residual-mlp": 4,
    "convnet": 6, "residual-convnet": 6, "random-features": 0, "linear": 2,
}  # fmt: skip


@NO_MATRIX
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_example", [False, True])
def test_the_library_sees_what_each_parameter_does(name: str, with_example: bool) -> None:
    model, batch = _small(name), _batch(name)
    example = {"example": lambda model: loss_of(model, batch)} if with_example else {}
    table = roles(model, **example)
    assert len(table.matrices) == MATRICES[name]
    others = {row.name: row.role for row in table.others if row.parameter.ndim > 1}
    head = "embedding.weight" if name == "gpt-124m" else "head.weight"
    assert {n for n, role in others.items() if role in ("head", "embedding")} == others.keys()
    assert head in others
    assert set(others) <= {"embedding.weight", "position.weight", "head.weight"}
    for row in table.matrices:
        if row.parameter.ndim == 4:
            assert row.role == "conv"
            assert row.view is not None
            assert (row.view.outputs, row.view.inputs) == (16, row.parameter[0].numel())
        kind = row.name.split(".")[-2]
        if kind in ("query", "key", "value"):
            assert row.attention == (kind[0],)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_batch_is_that_of_every_example(name: str) -> None:
    model, (inputs, classes) = _small(name).double(), _batch(name)
    inputs = inputs if _shape(name) is TEXT else inputs.double()
    together = loss_of(model, (inputs, classes))
    alone = [loss_of(model, (x[None], y[None])) for x, y in zip(inputs, classes, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-6, rtol=1e-6)


def test_the_loss_has_the_bits_of_the_models_own() -> None:
    model, (inputs, targets) = GPT(GPTConfig(width=32, context=12), 23), _batch("gpt")
    assert torch.equal(loss_of(model, (inputs, targets)), model.loss(inputs, targets))
    model = model.bfloat16()
    loss = loss_of(model, [inputs, targets])
    assert torch.equal(loss, model.loss(inputs, targets))
    assert loss.dtype == torch.float32
    assert loss_of(model.double(), (inputs, targets)).dtype == torch.float64


def test_the_loss_of_other_outputs_and_batches() -> None:
    @dataclass
    class Output:
        logits: Tensor
        loss: Tensor

    class Model(nn.Module):
        def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Output:
            return Output(pixels, pixels.sum())

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.equal(loss_of(Model(), (x, y)), nn.functional.cross_entropy(x, y))
    assert torch.equal(loss_of(Model(), {"pixels": x, "labels": y}), x.sum())
    assert logits_of(Model(), x) is x
    with pytest.raises(ValueError, match="tensor of logits"):
        logits_of(lambda x: "text", x)


# ------------------------------------------------------------------------------ sizes and options


def test_the_default_gpt_is_the_one_by_name() -> None:
    torch.manual_seed(3)
    model = GPT(GPTConfig(context=12), 23)
    torch.manual_seed(3)
    named = build_model("gpt", TEXT)
    pairs = zip(model.state_dict().items(), named.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(
    ("name", "width", "options", "expected"),
    [
        ("gpt", 256, [], {"heads": 8}),
        ("gpt", 64, [], {"heads": 2}),
        ("gpt", 40, [], {"heads": 4}),  # 40 = 4 heads of 10
        ("gpt", 36, [], {"heads": 1}),
        ("gpt", 36, ["heads=2"], {"heads": 2}),
        ("llama", 256, [], {"heads": 8, "inner": 688, "kv_heads": None}),
        ("llama", None, ["heads=8"], {"heads": 8, "inner": 344}),
        ("llama", 64, ["inner=100"], {"heads": 2, "inner": 100}),
        ("llama-1b", 512, [], {"heads": 8, "inner": 1368, "depth": 24}),
        ("llama-1b", 2048, [], {"heads": 32, "inner": 5461}),
        ("gpt-124m", 128, [], {"heads": 2, "inner": 512, "tied": True}),
    ],
)
def test_what_follows_from_the_width(
    name: str, width: int | None, options: list[str], expected: dict[str, Any]
) -> None:
    sizes = sizes_of(name, TEXT, width=width, options=options)
    assert {key: getattr(sizes, key) for key in expected} == expected
    assert sizes.context == TEXT.context


def test_shared_keys_keep_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    record = MODELS["llama"]
    monkeypatch.setitem(_MODELS, "llama", replace(record, sizes=replace(record.sizes, kv_heads=2)))
    for width, expected in ((256, (8, 4)), (64, (2, 1)), (32, (1, 1))):
        sizes = sizes_of("llama", TEXT, width=width)
        assert (sizes.heads, sizes.kv_heads) == expected


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "sentence"),
    [
        ("gtp", TEXT, {}, r"got the model 'gtp'.* \(did you mean gpt\?\).*hf:gpt2"),
        ("lama-60m", TEXT, {}, "did you mean llama-60m"),
        ("gpt", IMAGES, {}, "takes text, for images; expected one of mlp, residual-mlp"),
        ("convnet", TEXT, {}, "takes images, for text; expected one of gpt, llama"),
        ("gpt", None, {}, "the shape of the data.* or a preset"),
        ("gpt", TEXT, {"options": ["head=8"]}, r"has no head \(did you mean heads\?\)"),
        ("gpt", TEXT, {"options": ["heads"]}, "expected name=value"),
        ("gpt", TEXT, {"options": ["heads=many"]}, "'heads=many', expected a whole number"),
        ("gpt", TEXT, {"options": ["tied=yes"]}, "expected one of true, false"),
        ("gpt", TEXT, {"options": ["mlp=swigl"]}, r"did you mean swiglu\?.*gelu-tanh"),
        ("gpt", TEXT, {"options": ["width=8"]}, "expected it as --width 8"),
        ("gpt", TEXT, {"options": ["context=8"]}, "has no context"),
        ("gpt", TEXT, {"width": 0}, "width=0"),
        ("llama", TEXT, {"options": ["kv_heads=3"]}, "kv_heads to divide the heads"),
        ("llama", TEXT, {"options": ["eps=0"]}, "eps=0.0, expected a number above 0"),
        ("mlp", IMAGES, {"depth": 0}, "depth=0, expected at least 1"),
        ("mlp", IMAGES, {"options": ["layers_per_block=2"]}, "has no branches"),
        ("convnet", ImageShape(1, 7, 3), {}, "side 7.*at least 8"),
    ],
)
def test_what_cannot_be_is_a_sentence(
    name: str, shape: Shape, arguments: dict[str, Any], sentence: str
) -> None:
    for function in (build_model, sizes_of):
        with pytest.raises(InputError, match=sentence):
            function(name, shape, **arguments)


def test_the_next_smaller_gpt_is_that_of_studies() -> None:
    def halved(width: int, depth: int, heads: int) -> tuple[int, int] | None:
        if width >= 16 * heads and width % (4 * heads) == 0:
            return width // 2, depth
        return (width, depth // 2) if depth > 1 else None

    for heads in (1, 2, 4):
        for width in range(8 * heads, 130, 4 * heads):
            for depth in (1, 2, 5):
                options = [f"heads={heads}"]
                expected = halved(width, depth, heads)
                assert smaller("gpt", TEXT, width, depth, options) == expected


@pytest.mark.parametrize("name", NAMES)
def test_models_shrink_until_there_is_no_smaller_one(name: str) -> None:
    shape, sizes = _shape(name), smaller(name, _shape(name))
    numbers = [sizes_of(name, shape).count(shape)]
    while sizes is not None:
        width, depth = sizes
        numbers.append(sizes_of(name, shape, width=width, depth=depth).count(shape))
        sizes = smaller(name, shape, width, depth)
    assert numbers == sorted(numbers, reverse=True)
    assert 3 < len(numbers) < 16
    build_model(name, shape, width=width, depth=depth)


@pytest.fixture
def own() -> Iterator[type[nn.Module]]:
    @dataclass(frozen=True, kw_only=True)
    class Sizes:
        width: int = 4

        def count(self, shape: ImageShape) -> tuple[int, int]:
            return self.width, 0

    class Own(nn.Module):
        records = (
            ModelRecord(
                name="own",
                label="own",
                sizes=Sizes(),
                takes=ImageShape,
                build=lambda sizes, shape: nn.Linear(sizes.width, shape.classes),
            ),
        )

    yield Own
    _MODELS.pop("own", None)


def test_a_model_from_elsewhere_joins(own: type[nn.Module]) -> None:
    assert add_model(own) is own
    assert isinstance(build_model("own", IMAGES, width=7), nn.Linear)
    assert sizes_of("own", IMAGES, width=7).width == 7
    with pytest.raises(InputError, match="has no depth"):
        build_model("own", IMAGES, depth=7)
    with pytest.raises(ValueError, match="a model has already"):
        add_model(own)


# ---------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize("kind", ["residual-mlp", "residual-convnet"])
def test_depth_does_not_change_the_size_of_the_signal(kind: str) -> None:
    def variance(depth: int, scale: float | None = None) -> float:
        torch.manual_seed(0)
        shape = ImageShape(channels=3, side=8, classes=64)
        model: Any = build_model(kind, shape, width=64, depth=depth).double()
        model.scale = scale or model.scale
        with torch.no_grad():
            return model(torch.randn(64, 3, 8, 8, dtype=torch.float64)).var().item()

    values = [variance(depth) for depth in (3, 12, 48)]
    assert max(values) / min(values) < 2.0
    assert variance(12, scale=1.0) > 50 * values[1]


def test_a_residual_branch_of_weight_zero_is_the_identity() -> None:
    for model in (_small("residual-mlp"), _small("residual-convnet")):
        shallow: Any = model
        inputs = torch.randn(3, 2, 8, 8)
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "stages")):
                nn.init.zeros_(parameter)
        before = model(inputs)
        for name in ("blocks", "stages"):
            if hasattr(shallow, name):
                empty = [] if name == "blocks" else [nn.ModuleList()] * 3
                setattr(shallow, name, nn.ModuleList(empty))
        torch.testing.assert_close(shallow(inputs), before)


def test_a_linear_network_is_linear_and_random_features_are_never_trained() -> None:
    x = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    linear = Linear(LinearConfig(width=10, depth=3), IMAGES).double()
    torch.testing.assert_close(linear(2 * x[0] - x[1]), 2 * linear(x[0]) - linear(x[1]))
    model = RandomFeatures(RandomFeaturesConfig(width=10, depth=2), IMAGES)
    features = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert not model(torch.randn(3, 2, 8, 8)).any()  # starts at zero, as in the theory
    loss_of(model, _batch("random-features")).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(buffer, features[name]) for name, buffer in model.named_buffers())
    assert model.head.weight.any()


def test_relu_networks_are_homogeneous_in_their_input() -> None:
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    models: list[nn.Module] = [
        MLP(MLPConfig(width=8, bias=False), IMAGES),
        MLP(MLPConfig(width=8, bias=False, residual=True), IMAGES),
        ConvNet(ConvNetConfig(width=8), IMAGES),
        ConvNet(ConvNetConfig(width=8, residual=True, depth=4), IMAGES),
    ]
    for model in models:
        model = model.double()
        torch.testing.assert_close(model(3 * x), 3 * model(x))


def test_blocks_of_a_convnet_are_shared_out_between_its_stages() -> None:
    for depth, blocks in ((1, [1, 0, 0]), (5, [2, 2, 1]), (6, [2, 2, 2])):
        assert ConvNetConfig(depth=depth).blocks == blocks


def test_heads_that_share_keys_are_those_with_repeated_keys() -> None:
    shared: Any = _small("llama", ["heads=4", "kv_heads=2"]).double()
    full: Any = _small("llama", ["heads=4"]).double()
    state = shared.state_dict()
    for name in [n for n in state if ".key." in n or ".value." in n]:
        state[name] = state[name].unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    tokens, _ = _batch("llama")
    torch.testing.assert_close(full(tokens), shared(tokens))
