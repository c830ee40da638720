"""Which branches and heads are found, and what is folded into their parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from steepest.transfer import parametrize


def test_unknown_blocks_need_branches() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.end = nn.Linear(4, 4), nn.Linear(4, 4)

    def build(depth: int) -> nn.Module:
        layers = nn.ModuleList(Layer() for _ in range(depth))
        return nn.ModuleDict({"layers": layers, "head": nn.Linear(4, 1)})

    with pytest.raises(ValueError, match=r"branches=\[...\]"):
        parametrize(build, {"depth": 2}, {"depth": 4}, rule="completep")
    made = parametrize(
        build, {"depth": 2}, {"depth": 4}, rule="completep", branches=["layers.*.end"]
    )
    assert made["layers.3.end.weight"].multiplier == 0.5
    assert made["layers.3.inner.weight"].multiplier == 1


def test_an_unknown_head_size_is_an_error() -> None:
    class Attention(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.up = nn.Linear(3, width)
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
            self.out = nn.Linear(width, 3)

    with pytest.raises(ValueError, match="expected head_size="):
        parametrize(Attention, {"width": 16}, {"width": 64})
    made = parametrize(
        Attention, {"width": 16}, {"width": 64}, head_size=lambda model: model.query.in_features
    )
    assert made["query.weight"].multiplier == 0.5
    assert parametrize(Attention, {"width": 16}, {"width": 64}, rule="sp")

    class Counted(Attention):  # the number of heads is enough where the query is a layer
        heads = 4

    assert parametrize(Counted, {"width": 16}, {"width": 64})["query.weight"].multiplier == 0.5


def test_attention_with_unknown_names_is_an_error() -> None:
    class OwnAttention(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(width, width) for _ in range(3))

    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), OwnAttention(width), nn.Linear(width, 2))

    with pytest.raises(ValueError, match=r"OwnAttention .* no query"):
        parametrize(build, {"width": 16}, {"width": 64})
    assert parametrize(build, {"width": 16}, {"width": 64}, head_size=lambda model: 1)


def test_what_is_folded_into_frozen_parameters() -> None:
    """A frozen query, key and value whose output layer is trained; and frozen branches."""

    def attention(width: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        layer.self_attn.in_proj_weight.requires_grad_(False)
        return nn.Sequential(nn.Linear(8, width), layer, nn.Linear(width, 3))

    def residual(depth: int) -> nn.Module:
        model = nn.Sequential(nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth))))
        return model.requires_grad_(False).append(nn.Linear(8, 2))

    more: dict[str, Any] = {"rule": "completep", "branches": ["0.*"]}
    for build, base, target, name, expected, how in (
        (attention, {"width": 8}, {"width": 32}, "1.self_attn.in_proj_weight", 4**-0.25, {}),
        (residual, {"depth": 2}, {"depth": 8}, "0.7.weight", 1 / 4, more),
    ):
        torch.manual_seed(0)
        own = build(**target).get_parameter(name)
        torch.manual_seed(0)
        made = parametrize(build, base, target, **how)
        assert made[name].multiplier == pytest.approx(expected)
        torch.testing.assert_close(
            made.model.get_parameter(name), own * expected, check_stride=False
        )


def test_a_query_of_an_inner_size_of_its_own() -> None:
    class Attention(nn.Module):
        def __init__(self, d_model: int, n_heads: int, dim_head: int):
            super().__init__()
            self.d_model, self.n_heads = d_model, n_heads
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(d_model, n_heads * dim_head) for _ in range(3)
            )
            self.o_proj = nn.Linear(n_heads * dim_head, d_model)

    def build(width: int, dim_head: int = 16) -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, width), Attention(width, 4, dim_head), nn.Linear(width, 3)
        )

    base, size = {"width": 32, "dim_head": 16}, "1.q_proj.weight"
    assert parametrize(build, base, {"width": 512})[size].multiplier == 1
    assert parametrize(build, base, {"width": 512, "dim_head": 64})[size].multiplier == 0.5


def test_lists_side_by_side() -> None:
    """Norms in a list of their own have no branch that could end in them."""

    def build(depth: int) -> nn.Module:
        lists = {
            "norms": (nn.LayerNorm(4) for _ in range(depth)),
            "layers": (nn.Linear(4, 4) for _ in range(depth)),
        }
        return nn.ModuleDict({name: nn.ModuleList(each) for name, each in lists.items()})

    made = parametrize(build, {"depth": 2}, {"depth": 4}, rule="completep", branches=["layers.*"])
    assert made["layers.3.weight"].multiplier == 0.5
    assert made["norms.3.weight"].multiplier == 1
    with pytest.raises(ValueError, match="blocks of Linear"):
        parametrize(build, {"depth": 2}, {"depth": 4}, rule="completep")
