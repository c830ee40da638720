"""The coordinate check passes where theory says so, and fails where it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.transfer import CoordinateCheck, coordinate_check

WIDTHS = [{"width": width} for width in (64, 256, 1024)]


def mlp(width: int) -> nn.Module:
    """The small readout keeps the first steps free of what the initialization says by chance."""
    sizes = ((64, width), (width, width), (width, 10))
    layers = [nn.Linear(n, m, bias=False) for n, m in sizes]
    for layer, gain in zip(layers, (1.0, 2**0.5, 1 / 8), strict=True):
        nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def _digits(n: int = 256) -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return torch.tensor(x[:n] / 8 - 1).float(), torch.tensor(y[:n])


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _check(seeds: int = 2, **settings: Any) -> CoordinateCheck:
    return coordinate_check(mlp, WIDTHS, _digits(), _loss, steps=(5,), seeds=seeds, **settings)


def _steepest(found: CoordinateCheck) -> float:
    """What one seed, or two at two widths, say of themselves; their intervals are wide."""
    assert found.passed is not False, str(found)  # two seeds may not be enough to be sure
    return max(abs(row.slope) for row in found.rows)


@pytest.mark.parametrize(
    ("optimizer", "lr", "seeds"),
    [("sgd", 0.5, 4), ("adamw", 0.01, 2), ("signum", 0.005, 2), ("muon", 0.1, 2)],
)
def test_mup_passes(optimizer: Any, lr: float, seeds: int) -> None:
    found = _check(optimizer=optimizer, lr=lr, seeds=seeds)
    assert found.passed, str(found)
    assert "passed" in found.verdict


@pytest.mark.parametrize("optimizer", ["shampoo", "kl-shampoo"])
def test_only_blocks_of_one_size_pass(optimizer: Any) -> None:
    """Bare, the stable rank of an update grows with the width, and the length from Adam is shared
    by more directions: the literature's drift."""
    settings: list[dict[str, Any]] = [{"block": 32}, {}]
    fixed, bare = (
        coordinate_check(
            mlp, [{"width": 128}, {"width": 512}], _digits(512), _loss, steps=(20,), seeds=1,
            optimizer=optimizer, lr=0.01, settings=each,
        )
        for each in settings
    )  # fmt: skip
    assert _steepest(fixed) <= 0.1, str(fixed)
    assert bare["4", 20].slope > 0.2


def test_soap_stays_within_the_limit_in_its_first_steps() -> None:
    found = coordinate_check(
        mlp, [{"width": 64}, {"width": 256}], _digits(512), _loss, steps=(5,), seeds=2,
        optimizer="soap", lr=0.01,
    )  # fmt: skip
    assert _steepest(found) <= 0.1, str(found)
    assert found.passed is not False, str(found)  # two seeds may not be enough to be sure


def test_ntp_freezes_its_hidden_layers() -> None:
    found = _check(rule="ntp", optimizer="sgd", lr=0.1)
    assert not found.passed
    assert found["0", 5].slope < -0.4
    assert found["2", 5].slope < -0.4
    assert "at fault is" in found.verdict


def test_sp_lets_logits_grow() -> None:
    found = _check(rule="sp", optimizer="sgd", lr=0.05)
    assert found["4", 5].slope > 0.25
    assert found.worst.layer in ("4", "output")
    assert f"at fault is {found.worst.layer} after 5 steps" in found.verdict


def gpt(width: int = 32, depth: int = 2) -> nn.Module:
    return GPT(GPTConfig(width=width, depth=depth, heads=2, context=8), vocabulary=20)


class Branch(nn.Module):
    """Two layers, tanh before each."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(2))
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(self.first(x.tanh()).tanh()) / 2
        return out


class Residual(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.input = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Branch(64) for _ in range(depth))
        self.head = nn.Linear(64, 10, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def test_depth() -> None:
    """1/L keeps blocks of two layers learning, 1/sqrt(L) lets them freeze, and neither explodes."""
    found = {
        rule: coordinate_check(
            Residual, [{"depth": 2}, {"depth": 8}, {"depth": 32}], _digits(), _loss,
            rule=rule, lr=0.003, steps=(20,), seeds=1, branches=["blocks.*.second"],
        )
        for rule in ("completep", "depth-mup", "mup")
    }  # fmt: skip
    assert _steepest(found["completep"]) <= 0.1, str(found["completep"])
    assert found["completep"].against == "depth"
    names = ["input", "blocks.*.first", "blocks.*.second", "head", "output"]
    assert [row.layer for row in found["completep"].rows] == names
    assert found["depth-mup"].worst.layer == "blocks.*.second"
    assert found["depth-mup"].worst.slope < -0.2
    assert abs(found["depth-mup"]["head", 20].slope) < 0.1
    assert found["mup"]["head", 20].slope > 0.3


@pytest.mark.parametrize("optimizer", ["muon", "teon"])
def test_a_transformer_with_stacks_passes(optimizer: Any) -> None:
    def build(width: int) -> nn.Module:
        model = gpt(width)
        nn.init.zeros_(model.get_parameter("head.weight"))
        return model

    def loss(model: Any, batch: Tensor) -> Tensor:
        return model.loss(batch[:, :-1], batch[:, 1:])

    tokens = torch.randint(20, (8, 9))
    found = coordinate_check(
        build, [{"width": 64}, {"width": 256}], tokens, loss,
        optimizer=optimizer, lr=0.03, steps=(5,), seeds=2,
    )  # fmt: skip
    assert _steepest(found) <= 0.1, str(found)


def test_what_is_folded_in_is_no_fault() -> None:
    """Queries carry the attention scale, so their outputs shrink as 1/sqrt(d) by themselves."""
    tokens = torch.randint(20, (8, 9))

    def loss(model: Any, batch: Tensor) -> Tensor:
        return model.loss(batch[:, :-1], batch[:, 1:])

    sizes = [{"width": 32}, {"width": 128}]
    found = coordinate_check(gpt, sizes, tokens, loss, lr=0.01, steps=(3,), seeds=2)
    assert abs(found["blocks.1.attention.query", 3].slope) < 0.15


def test_it_says_what_it_measured() -> None:
    found = _check(optimizer="sgd", lr=0.5)
    row = found["2", 5]
    assert len(row.changes) == 3
    assert row.error > 0
    again = _check(optimizer="sgd", lr=0.5)
    assert found == again  # seeds are its own
    assert json.loads(json.dumps(found.as_dict()))["passed"] == found.passed
    assert "coordinate check: mup, sgd" in str(found)


@pytest.mark.parametrize(
    ("sizes", "lr", "message"),
    [
        (WIDTHS[:1], 0.1, "expected at least two"),
        ([{"width": 64}, {"width": 64}], 0.1, "expected at least two"),
        (WIDTHS[:2], 1e20, "not finite"),
    ],
)
def test_bad_arguments(sizes: Any, lr: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coordinate_check(mlp, sizes, _digits(), _loss, optimizer="sgd", lr=lr, steps=(3,), seeds=1)


def test_a_layer_that_does_not_move_is_no_fault() -> None:
    def build(width: int) -> nn.Module:
        model = mlp(width)
        model.get_parameter("0.weight").requires_grad_(False)
        return model

    found = coordinate_check(
        build, WIDTHS[:2], _digits(), _loss, optimizer="adamw", lr=0.003, steps=(3,), seeds=1
    )
    assert found["0", 3].passed
    assert found["0", 3].slope != found["0", 3].slope  # NaN
    assert found["2", 3].changes[0] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator() -> None:
    with torch.device("cuda"):
        x, y = _digits()
        found = coordinate_check(
            mlp, WIDTHS, (x.cuda(), y.cuda()), _loss, optimizer="muon", lr=0.1, steps=(5,), seeds=1
        )
    assert found.passed, str(found)


class Encoder(nn.Module):
    """torch's own layers, whose attention keeps the query, key and value in itself."""

    def __init__(self, width: int, depth: int = 2, dropout: float = 0.0):
        super().__init__()
        self.input = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 2, 2 * width, dropout=dropout, norm_first=True, batch_first=True
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.input(x.unflatten(1, (8, 8)))
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ([{"width": width} for width in (32, 128, 256)], "mup"),
        ([{"width": 32, "depth": depth} for depth in (4, 16)], "completep"),
    ],
    ids=["width", "depth"],
)
def test_attention_of_torch_is_not_at_fault(sizes: Any, rule: Any) -> None:
    """Its query's scale is taken back by its output layer, and a branch's is that layer's."""
    found = coordinate_check(
        Encoder, sizes, _digits(32), _loss, lr=0.02, rule=rule, optimizer="muon", steps=(5,),
        seeds=2,
    )  # fmt: skip
    slopes = [row.slope for row in found.rows if row.layer.endswith("self_attn")]
    assert slopes
    assert max(map(abs, slopes)) < 0.1, str(found)


def test_dropout_hides_no_layer_that_freezes() -> None:
    def dropped(width: int) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.1), *mlp(width))

    plain, noisy = (
        coordinate_check(
            build, WIDTHS, _digits(), _loss, lr=0.1, rule="ntp", optimizer="sgd", steps=(5,),
            seeds=2,
        )
        for build in (mlp, dropped)
    )  # fmt: skip
    assert not noisy.passed
    for before, after in (("0", "1"), ("2", "3")):
        assert plain[before, 5].slope < -0.4
        assert noisy[after, 5].slope == pytest.approx(plain[before, 5].slope, abs=0.05)


class Routed(nn.Module):
    """Two experts, each called on the tokens that choose it, if there are any."""

    def __init__(self, width: int):
        super().__init__()
        self.input = nn.Linear(64, width)
        self.router = nn.Linear(width, 2, bias=False)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.input(x)
        scores = self.router(h).softmax(-1)
        chosen = scores.argmax(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate((self.first, self.second)):
            if (mine := chosen == i).any():
                out[mine] = scores[mine, i, None] * expert(h[mine])
        return self.head(h + out)


def test_experts_whose_tokens_are_chosen_are_named_and_left_out() -> None:
    sizes = [{"width": 16}, {"width": 64}]
    found = coordinate_check(
        Routed, sizes, _digits(64), _loss, lr=0.05, steps=(5, 20), seeds=2, optimizer="adamw"
    )
    assert set(found.skipped) == {"first", "second"}
    assert "not always called alike: first, second" in found.verdict
    assert {row.layer for row in found.rows} == {"input", "router", "head", "output"}
    assert found.as_dict()["skipped"] == found.skipped


def test_nothing_that_moves_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no layer moves .* lr=0 "):
        _check(optimizer="adamw", lr=0.0)


def test_runs_on_another_batch_are_other_runs(tmp_path: Path) -> None:
    x, y = _digits(64)
    how: dict[str, Any] = {"lr": 0.01, "steps": (2,), "seeds": 1, "path": tmp_path / "runs.jsonl"}
    sizes = [{"width": 16}, {"width": 32}]
    first, other, again = (
        coordinate_check(mlp, sizes, (x * scale, y), _loss, **how) for scale in (1, 4, 1)
    )
    assert first == again != other
    assert len(how["path"].read_text().splitlines()) == 4
