"""What grows is learnt from the user's own `build`, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.model.matrix_view import MatrixView
from steepest.parametrize.dimensions import growth
from steepest.transfer import parametrize


def gpt(width: int = 16, depth: int = 2, heads: int = 2, **more: Any) -> nn.Module:
    return GPT(GPTConfig(width=width, depth=depth, heads=heads, context=8, **more), vocabulary=11)


class ConvNet(nn.Module):
    """Convolutions of all kinds, a norm, and a head behind a flattened map."""

    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.grouped = nn.Conv2d(width, 2 * width, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(2 * width, width, 2)
        self.head = nn.Linear(25 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(self.norm(self.stem(x)).relu())
        h = self.up(self.grouped(h).relu()).relu()
        out: Tensor = self.head(h.flatten(1))
        return out


def _kinds(build: Any, base: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    found = growth(build, base, {**base, **target}, None).sizes
    return {name: (size.kind, size.fan_in, size.fan_out) for name, size in found.items()}


def test_a_gpt() -> None:
    kinds = _kinds(gpt, {"width": 16, "heads": 2}, {"width": 64, "heads": 4})
    assert kinds["embedding.weight"] == ("input", 1, 4)
    assert kinds["blocks.0.attention.query.weight"] == ("hidden", 4, 4)
    assert kinds["blocks.1.norm_mlp.weight"] == ("vector", 1, 4)
    assert kinds["head.weight"] == ("output", 4, 1)


def test_convolutions() -> None:
    kinds = _kinds(ConvNet, {"width": 8}, {"width": 24})
    assert kinds["stem.weight"] == ("input", 1, 3)
    assert kinds["depthwise.weight"] == ("input", 1, 3)  # each channel has a finite fan-in
    assert kinds["grouped.weight"] == ("hidden", 3, 3)
    assert kinds["up.weight"] == ("hidden", 3, 3)
    assert kinds["norm.bias"] == ("vector", 1, 3)
    assert kinds["head.weight"] == ("output", 3, 1)
    assert kinds["head.bias"] == ("fixed", 1, 1)


def test_rounded_sizes_count_as_proportional() -> None:
    kinds = _kinds(lambda width: gpt(width, mlp="swiglu"), {"width": 16}, {"width": 80})
    assert kinds["blocks.0.mlp.gate.weight"] == ("hidden", 5, 213 / 42)


def test_transposed_and_fused_matrices() -> None:
    layer = lambda width: nn.Sequential(  # noqa: E731
        nn.Linear(3, width), nn.TransformerEncoderLayer(width, 2, 4 * width), nn.Linear(width, 2)
    )
    kinds = _kinds(layer, {"width": 8}, {"width": 32})
    assert kinds["1.self_attn.in_proj_weight"] == ("hidden", 4, 4)
    assert kinds["1.self_attn.in_proj_bias"] == ("vector", 1, 4)


def test_depth_is_the_number_of_blocks() -> None:
    found = growth(gpt, {"depth": 2}, {"depth": 6}, None)
    assert found.lists == {"blocks": (2, 6)}
    assert found.deepening == ("depth",)
    assert found.sizes["blocks.5.mlp.up.weight"].blocks == 3
    assert found.sizes["head.weight"].blocks == 1
    assert found.counterparts["blocks.5.mlp.up.weight"] == [
        "blocks.0.mlp.up.weight",
        "blocks.1.mlp.up.weight",
    ]


def test_blocks_in_a_sequential_of_their_own_grow() -> None:
    def build(depth: int, head: int = 2) -> nn.Module:
        blocks = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(depth))
        return nn.Sequential(nn.Linear(3, 8), nn.Sequential(*blocks), nn.Linear(8, head))

    assert growth(build, {"depth": 2}, {"depth": 5}, None).lists == {"1": (2, 5)}


def test_a_smaller_target() -> None:
    found = growth(gpt, {"width": 16, "depth": 4}, {"width": 8, "depth": 2}, None)
    assert found.sizes["blocks.1.mlp.up.weight"].fan_in == 0.5
    assert found.lists == {"blocks": (4, 2)}


def test_sizes_that_only_fit_together() -> None:
    """Heads of size 1 would be odd: alone, more heads cannot be built."""
    with pytest.raises(ValueError, match="even size"):
        growth(gpt, {"heads": 2}, {"heads": 16}, None)
    kinds = _kinds(gpt, {"heads": 2, "width": 16}, {"heads": 16, "width": 64})
    assert kinds["blocks.0.attention.query.weight"] == ("hidden", 4, 4)


class Tabular(nn.Module):
    def __init__(self, width: int, extra: int = 0, kind: str = "", experts: int = 2):
        super().__init__()
        self.up = nn.Linear(5, width + extra)
        if kind == "list":
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))
        if kind == "tensor":
            self.experts_weight = nn.Parameter(torch.empty(experts, 4, 4))
        if width > 10 and kind == "new":
            self.surprise = nn.Linear(width, width)
        self.head = nn.Linear(width + extra, 2)


@pytest.mark.parametrize(
    ("build", "target", "message"),
    [
        (lambda width: Tabular(width, extra=10), {"width": 64}, "axis 0 of up.weight"),
        (lambda width: Tabular(width, kind="new"), {"width": 64}, "surprise.weight .* target"),
        (lambda width: Tabular(8, kind=width), {"width": "list"}, "expected positive numbers"),
        (
            lambda width: Tabular(8, kind="list", experts=width // 2),
            {"width": 64},
            "experts with 4 members",
        ),
        (
            lambda width: Tabular(8, kind="tensor", experts=width // 2),
            {"width": 64},
            "axis 0 of experts_weight",
        ),
        (
            lambda width: nn.Sequential(
                nn.Linear(3, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, width))
            ),
            {"width": 64},
            "original0, .* of a weight",
        ),
        (lambda width: nn.Linear(3, 1 + width // 8), {"width": 32}, "from 2 to 5 with"),
        (lambda width: nn.Linear(3, width).weight, {"width": 64}, "expected an nn.Module"),
        (lambda width: nn.LazyLinear(width), {"width": 64}, "of a lazy module"),
        (
            lambda width: nn.Sequential(
                *(nn.Linear(8, 8) for _ in range(width // 8)), nn.Linear(8, 1)
            ),
            {"width": 16},
            "the model, .*Sequential",
        ),
        (
            lambda width: nn.ModuleDict(
                {
                    "net": nn.Sequential(
                        nn.Linear(3, 8),
                        *(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(width)),
                        nn.LayerNorm(8),
                        nn.ReLU(),
                    )
                }
            ),
            {"width": 6},
            "net, .*Sequential .* 10 ",
        ),
    ],
)
def test_what_cannot_be_inferred_is_named(build: Any, target: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parametrize(build, {"width": 8}, target)


def test_a_build_that_reads_values() -> None:
    def build(width: int) -> nn.Module:
        layer = nn.Linear(width, width)
        if layer.weight.sum().item() > 1e9:
            raise AssertionError
        return layer

    with pytest.raises(ValueError, match="on the meta device"):
        parametrize(build, {"width": 8}, {"width": 16})


def test_fused_parts_that_grow_differently() -> None:
    def build(heads: int) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = nn.Linear(3, 4 * heads)
                self.qkv = nn.Linear(4 * heads, 4 * heads + 8)  # one head for keys and values
                self.num_heads, self.num_key_value_heads, self.head_dim = heads, 1, 4

        return Model()

    with pytest.raises(ValueError, match=r"qkv\.weight"):
        parametrize(build, {"heads": 2}, {"heads": 8})


def test_roles_can_be_overridden() -> None:
    class Stored(nn.Module):  # (in, out), which nothing says
        def __init__(self, width: int):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(7, width))
            self.head = nn.Linear(width, 2)

    with pytest.raises(ValueError, match=r"matrix, .* which axis"):
        parametrize(Stored, {"width": 8}, {"width": 16})
    view = MatrixView.of((7, 16), transposed=True)
    with pytest.raises(ValueError, match="same number of entries"):  # views have a size
        parametrize(Stored, {"width": 8}, {"width": 16}, roles={"matrix": view})
    for role, kind in (("embedding", "input"), ("transposed", "input"), ("hidden", "output")):
        told = parametrize(Stored, {"width": 8}, {"width": 16}, roles={"matrix": role})  # type: ignore[dict-item]
        assert told["matrix"].kind == kind


class Head(nn.Module):
    """One attention head, as many write it."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, size, bias=False) for _ in range(3))


class HeadByHead(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, name: str = "heads"):
        super().__init__()
        self.up = nn.Linear(3, width)
        parts = nn.ModuleList(Head(width, width // heads) for _ in range(heads))
        self.attention = nn.ModuleDict({name: parts, "proj": nn.Linear(width, width)})


@pytest.mark.parametrize("name", ["heads", "parts"])
@pytest.mark.parametrize("target", [{"width": 64, "heads": 8}, {"heads": 4}])
def test_a_list_of_heads_is_no_list_of_layers(name: str, target: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="one Linear for all"):
        growth(
            lambda width, heads: HeadByHead(width, heads, name),
            {"width": 16, "heads": 2},
            {"width": 16, **target},
            None,
        )


def test_readouts_of_every_layer_are_layers() -> None:
    def build(width: int, depth: int) -> nn.Module:
        return nn.ModuleDict(
            {
                "blocks": nn.ModuleList(nn.Linear(width, width) for _ in range(depth)),
                "readouts": nn.ModuleList(nn.Linear(width, 3) for _ in range(depth)),
            }
        )

    found = growth(build, {"width": 8, "depth": 2}, {"width": 32, "depth": 4}, None)
    assert found.sizes["readouts.3.weight"].kind == "output"


class Shared(nn.Module):
    """Depth that shows in no parameter: a block used again, in a list or in a loop."""

    def __init__(self, width: int = 8, depth: int = 2, loop: bool = False):
        super().__init__()
        self.up, block = nn.Linear(3, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList([block] * (1 if loop else depth))
        self.count = depth


@pytest.mark.parametrize(("loop", "message"), [(False, "used 2 times"), (True, "no list of layer")])
def test_depth_of_shared_blocks_has_no_rule(loop: bool, message: str) -> None:
    def build(depth: int) -> nn.Module:
        return Shared(depth=depth, loop=loop)

    with pytest.raises(ValueError, match=message):
        parametrize(build, {"depth": 2}, {"depth": 8}, rule="completep", branches=["blocks.*"])
    assert parametrize(build, {"depth": 2}, {"depth": 8})["blocks.0.weight"].multiplier == 1


def test_branches_without_depth() -> None:
    """As in a check over widths, or over the number of heads."""
    settings: dict[str, Any] = {"rule": "completep", "branches": ["blocks.*.mlp.down"]}
    for size in ({"width": 32}, {"heads": 4}):
        assert parametrize(gpt, {"width": 16, "heads": 2}, size, **settings)
    with pytest.raises(ValueError, match="no list of layers"):
        parametrize(
            lambda n: Shared(depth=n, loop=True), {"n": 2}, {"n": 4}, rule="completep", branches=[]
        )


def test_a_size_that_changes_nothing() -> None:
    def build(width: int, dept: int = 2) -> nn.Module:
        return nn.Linear(3, width)

    with pytest.raises(ValueError, match=r"dept=2 .* same model"):
        parametrize(build, {"width": 8, "dept": 2}, {"width": 32, "dept": 64})
    found = growth(
        lambda heads: gpt(heads=heads, positions="learned"), {"heads": 2}, {"heads": 4}, None
    )
    assert "heads" in found.numbers["heads"]  # shapes stay


class Placed(nn.Module):
    def __init__(self, width: int = 8, tokens: int = 4, **more: Any):
        super().__init__()
        self.up = nn.Linear(3, width)
        self.hidden = nn.Linear(width, width)
        self.cell = nn.GRUCell(5, width)  # stored as torch stores everything
        self.w = nn.Parameter(torch.randn(width, 4 * width))  # both axes grow alike
        self.latents = nn.Parameter(torch.randn(1, tokens, width))
        for name, shape in more.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.out = nn.Linear(width, 2)


def test_what_can_and_what_cannot_be_placed() -> None:
    kinds = _kinds(Placed, {"width": 8, "tokens": 4}, {"width": 32, "tokens": 8})
    assert [kinds[n][0] for n in ("w", "latents", "cell.weight_ih")] == ["hidden", "input", "input"]
    assert _kinds(Placed, {"tokens": 4}, {"tokens": 8})["latents"][0] == "fixed"  # positions
    base, target = {"width": 8}, {"width": 32}

    def channels_first(width: int) -> nn.Module:
        return Placed(width, pos_embed=(1, width, 8, 8))

    def named_head(width: int) -> nn.Module:
        return Placed(width, lm_head=(width, 5))

    with pytest.raises(ValueError, match=r"pos_embed .* last axis"):
        parametrize(channels_first, base, target)
    with pytest.raises(ValueError, match=r"gain, .* entry by entry"):
        parametrize(lambda width: Placed(width, gain=(1, width)), base, target)
    with pytest.raises(ValueError, match="got lm_head"):
        parametrize(named_head, base, target)
    made = parametrize(named_head, base, target, roles={"lm_head": "transposed"})
    assert made["lm_head"].kind == "output"
    with pytest.raises(ValueError, match="Bilinear"):
        parametrize(lambda width: nn.Bilinear(width, width, 1), base, target)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "normalized", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
def test_spectral_norm_is_refused_in_both_forms(normalized: Any) -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), normalized(nn.Linear(width, width)))

    with pytest.raises(ValueError, match="normalized or computed"):
        parametrize(build, {"width": 8}, {"width": 16})
