"""The runs of a sweep: what tells them apart, where they are kept, what they leave alone."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.files import read_lines
from steepest.transfer import parametrize
from steepest.transfer.runs import Finished, batch_fingerprint, named, torch_seeded, training


@pytest.mark.parametrize(
    "text", ['{"important": 1}', "my notes", '["a", "b"]', '{"a": 1}\n{"b": 2}\n', "[1, 2]\n"]
)
def test_a_file_of_something_else_stays_as_it_is(text: str, tmp_path: Path) -> None:
    path = tmp_path / "precious.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"precious\.json, .* line"):
        Finished(path)
    assert path.read_text() == text


def test_a_folder_is_made_with_the_first_result(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    finished = Finished(path)
    assert not path.parent.exists()
    assert finished("a", lambda: 1.5) == 1.5
    path.write_text(path.read_text() + '["b", 2')  # killed while it was writing
    assert Finished(path)("a", lambda: 2.5) == 1.5
    assert read_lines(path) == ([{"name": "a", "result": 1.5}], [])


def test_functions_with_arguments_are_told_apart() -> None:
    def build(scale: float) -> float:
        return scale

    one, nine = (named("rate", functools.partial(build, scale=scale)) for scale in (1, 9))
    again = named("rate", functools.partial(build, scale=1))
    assert one == again != nine
    assert named("rate", functools.partial(build, 1)) != one


def test_batches_are_told_apart_by_all_that_is_in_them() -> None:
    x, y = torch.arange(4.0), torch.tensor([1, 2])
    whole = batch_fingerprint((x, {"labels": y}))
    assert batch_fingerprint((x.clone(), {"labels": y.clone()})) == whole
    others: list[Any] = [
        (x + 1e-6, {"labels": y}), (x, {"labels": y + 1}), (x.view(2, 2), {"labels": y}),
        (x.view(torch.int32), {"labels": y}), (x, {"labels": y}, 3),
    ]  # fmt: skip
    assert len({batch_fingerprint(each) for each in others} | {whole}) == 1 + len(others)
    assert batch_fingerprint(torch.ones((), dtype=torch.bfloat16)) != batch_fingerprint(
        torch.ones(())
    )


def test_random_numbers_go_on_as_they_were() -> None:
    torch.manual_seed(7)
    expected = [torch.rand(3) for _ in range(2)]
    torch.manual_seed(7)
    first = torch.rand(3)
    inside = []
    for seed in (0, 0, 1):
        with torch_seeded(seed):
            inside.append(torch.rand(3))
    assert torch.equal(first, expected[0])
    assert torch.equal(torch.rand(3), expected[1])
    assert torch.equal(inside[0], inside[1])
    assert not torch.equal(inside[0], inside[2])


def _line(width: int) -> nn.Module:
    return nn.Linear(width, 1, bias=False)


@pytest.mark.parametrize(("shift", "after"), [(-1e3, "0 steps"), (-0.01, r"\d+ steps")])
def test_a_loss_below_zero_is_refused(shift: float, after: str) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean() + shift

    torch.manual_seed(0)
    made = parametrize(_line, {"width": 4}, {"width": 4}, optimizer="sgd")
    with pytest.raises(ValueError, match=rf"width 4 after {after}, "):
        list(training(made, 0.2, lambda i: x, loss, 40))


def test_batches_are_a_function() -> None:
    made = parametrize(_line, {"width": 4}, {"width": 4}, optimizer="sgd")
    with pytest.raises(TypeError, match="batches of type list"):
        next(training(made, 0.2, [torch.ones(1, 4)], lambda model, x: model(x).mean(), 4))
