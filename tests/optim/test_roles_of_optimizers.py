"""What optimizers make of roles: stacks, warnings of guessed axes, states with other groups."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest import TEON, Muon, Shampoo, Signum, roles
from steepest.diagnosis import Plan
from steepest.optim.stored_groups import override_for
from steepest.transfer import parametrize


class Attention(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)


def _layers(count: int, width: int = 16) -> nn.ModuleList:
    return nn.ModuleList([nn.ModuleDict({"attn": Attention(width)}) for _ in range(count)])


def _queries(model: nn.Module) -> list[tuple[str, ...]]:
    stacks = TEON(model).stacks
    return [
        tuple(re.sub("[.]weight$", "", name) for name in stack)
        for stack in stacks
        if stack[0].endswith("q_proj.weight")
    ]


def _dict(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


def _stages() -> nn.Module:
    return _dict(stages=nn.ModuleList([_dict(blocks=_layers(2, width)) for width in (8, 16)]))


def _attention_and_feed_forward() -> nn.Module:
    pairs = [nn.ModuleList([Attention(), nn.Linear(16, 16)]) for _ in range(2)]
    return _dict(block=nn.ModuleList(pairs))


def _heads_side_by_side() -> nn.Module:
    layers = [_dict(heads=nn.ModuleList([Attention(), Attention()])) for _ in range(2)]
    return _dict(layers=nn.ModuleList(layers))


@pytest.mark.parametrize(
    ("model", "stacks"),
    [
        (_stages, ["stages.0.blocks.{}.attn", "stages.1.blocks.{}.attn"]),
        (_attention_and_feed_forward, ["block.{}.0"]),
        (lambda: _dict(coder=_layers(2), decoder=_layers(3)), ["coder.{}.attn", "decoder.{}.attn"]),
        (_heads_side_by_side, ["layers.{}.heads.0", "layers.{}.heads.1"]),
        (lambda: nn.Sequential(*_layers(2)), ["{}.attn"]),
    ],
)
def test_stacks_are_of_layers_in_one_list(model: Any, stacks: list[str]) -> None:
    layers = [tuple(f"{name.format(i)}.q_proj" for i in (0, 1)) for name in stacks]
    assert _queries(model()) == layers


class Product(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: int = 0, **sizes: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))
        if bias:
            self.bias = nn.Parameter(torch.randn(bias))
        for name, size in sizes.items():
            setattr(self, name, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kernel


def _with_body(product: nn.Module) -> nn.Module:
    return nn.Sequential(product, nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Muon(model),
        lambda model: TEON(model, stack=1),
        lambda model: Muon(roles(model), scale="original"),
        lambda model: steepest.SpectralDescent(model),
    ],
)
def test_guessed_axes_that_matter_are_warned_of_by_name(make: Any) -> None:
    with pytest.warns(UserWarning, match=r"0\.kernel, .*example"):
        make(_with_body(Product(400, 16)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Muon(_with_body(Product(40, 16))),
        lambda: Muon(_with_body(Product(400, 16)), scale="match-rms-adamw"),
        lambda: Signum(_with_body(Product(400, 16))),
        lambda: Muon(_with_body(Product(400, 16, bias=16))),
        lambda: Muon(_with_body(Product(400, 16, in_features=400, out_features=16))),
        lambda: Muon(roles(_with_body(Product(400, 16)), {"0.kernel": "transposed"})),
        lambda: Muon(roles(_with_body(Product(400, 16)), example=torch.randn(2, 400))),
        lambda: Muon(nn.Sequential(nn.Linear(400, 16), nn.Linear(16, 16), nn.Linear(16, 3))),
    ],
)
def test_no_warning_where_axes_are_known_or_do_not_matter(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()


def test_the_bias_and_the_sizes_of_a_module_say_which_axis_is_the_input() -> None:
    for product in (Product(40, 16, bias=16), Product(40, 16, in_features=40, out_features=16)):
        row = roles(_with_body(product))["0.kernel"]
        assert (str(row.view), row.axes_known) == ("(16, 40)", True)
        assert row.reason.endswith("a guess")
    other = Product(16, 40, bias=16)
    assert str(roles(nn.Sequential(other, nn.Linear(16, 3)))["0.kernel"].view) == "(16, 40)"


# ------------------------------------------------------------------------- states of other groups


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)
    )


@pytest.mark.parametrize("kind", [Muon, Shampoo, Signum])
def test_a_state_with_other_groups_names_the_roles_to_load_it_with(kind: Any) -> None:
    before = kind(roles(_convolutions(), {"4.weight": "conv", "0.weight": "vector"}))
    now = kind(model := _convolutions())
    with pytest.raises(ValueError, match=r"steepest\.roles\(model, ") as info:
        now.load_state_dict(before.state_dict())
    call = re.search(r"steepest\.roles\(.*\)", str(info.value))
    assert call is not None
    table = eval(call[0], {"steepest": steepest, "model": model})
    kind(table).load_state_dict(before.state_dict())


def test_overrides_for_other_views_where_they_matter() -> None:
    now = Shampoo(_convolutions()).param_groups
    fused = roles(_convolutions(), {"2.weight": steepest.MatrixView(1, 8, 72, False, (4, 4))})
    before = Shampoo(fused).param_groups
    assert override_for(now, before) is None
    assert override_for(now, now, views=True) is None
    said = override_for(now, before, views=True)
    assert said == (
        'steepest.roles(model, {"2.weight": steepest.MatrixView(1, 8, 72, False, (4, 4))})'
    )


# ------------------------------------------------------------------------ plans and other sizes


def test_a_plan_keeps_how_the_example_showed_a_matrix(tmp_path: Any) -> None:
    model, x = _with_body(Product(40, 16)), torch.randn(2, 40)
    Plan.default(roles(model, example=x)).save(tmp_path / "plan.toml")
    plan = Plan.load(tmp_path / "plan.toml")
    assert [row.parameter for row in plan if row.view is not None] == ["0.kernel"]
    group = plan.optimizer(model, lr=0.1).param_groups[0]
    assert group["views"][group["param_names"].index("0.kernel")] == (1, 40, 16, True, ())
    text = (tmp_path / "plan.toml").read_text()
    (tmp_path / "plan.toml").write_text(text.replace('"rows": 40', "").replace("rows = 40,", ""))
    with pytest.raises(ValueError, match=r"view=.* for 0\.kernel"):
        Plan.load(tmp_path / "plan.toml")


class Deep(nn.Module):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.readout = nn.Parameter(torch.randn(width, 3) / width)
        self.start = nn.Parameter(torch.randn(5, width))
        self.layers = nn.ModuleList([Product(width, 2 * width) for _ in range(depth)])
        self.back = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.start
        for there, back in zip(self.layers, self.back, strict=True):
            x = x + back(torch.relu(there(x)))
        return x @ self.readout


def test_parametrize_knows_inputs_and_outputs_of_bare_parameters_by_an_example() -> None:
    x = torch.randn(4, 5)
    made = parametrize(
        Deep, {"width": 8, "depth": 1}, {"width": 32, "depth": 3}, optimizer="adamw", example=x
    )
    kinds = {row.name: (row.kind, row.lr) for row in made.rows}
    assert kinds["readout"] == ("output", 0.25)
    assert kinds["start"] == ("input", 1.0)
    assert kinds["layers.0.kernel"] == kinds["layers.2.kernel"] == ("hidden", 0.25)
    muon = parametrize(
        Deep, {"width": 8, "depth": 1}, {"width": 32, "depth": 3}, optimizer="muon", example=x
    )
    groups = muon.optimizer(0.1).param_groups
    views = {
        name: view
        for group in groups
        if "views" in group
        for name, view in zip(group["param_names"], group["views"], strict=True)
    }
    assert views["layers.2.kernel"] == (1, 32, 64, True, ())


def test_parametrize_with_an_example_is_the_users_model_at_the_base() -> None:
    size = {"width": 8, "depth": 2}
    torch.manual_seed(0)
    own = Deep(**size)
    torch.manual_seed(0)
    made = parametrize(Deep, size, size, example=torch.randn(4, 5, generator=torch.Generator()))
    for a, b in zip(own.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(a, b)
