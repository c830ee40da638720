from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from steepest.lab.data import own_batches
from steepest.lab.errors import InputError

numbers = itertools.count()
Module = Callable[[str], str]

KINDS = {
    "listed": "batches = [(torch.full((3, 2), float(i)), torch.full((3,), i)) for i in range(20)]",
    "dataset": "batches = TensorDataset(torch.arange(50).float()[:, None], torch.arange(50))",
    "random_dataset": """
class Noisy(Dataset):
    def __len__(self): return 40
    def __getitem__(self, i): return torch.rand(2) + i, random.random() + np.random.rand()
batches = Noisy
""",
    "loader": """
def batches():
    data = TensorDataset(torch.arange(30).float()[:, None], torch.arange(30))
    return DataLoader(data, batch_size=4, shuffle=True)
""",
    "loader_itself": """
data = TensorDataset(torch.arange(30).float()[:, None], torch.arange(30))
batches = DataLoader(data, batch_size=4, shuffle=True)
""",
    "loader_with_a_generator": """
data = TensorDataset(torch.arange(30).float()[:, None], torch.arange(30))
batches = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator())
""",
    "generator": """
def batches():
    for i in range(7):
        yield torch.rand(3, 2) + i, torch.randint(5, (3,)), random.random()
""",
}
JUDGE = "\njudge = [(torch.zeros(5, 1), torch.zeros(5)) for _ in range(4)]\n"
HEADER = """
import random
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(source: str) -> str:
        name = f"batches_of_a_user_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(HEADER + source + JUDGE)
        return name

    return written


def _same(first: object, second: object) -> bool:
    return all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(first, second, strict=True)  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_three_interruptions_change_no_batch_and_no_generator(kind: str, module: Module) -> None:
    names = [module(KINDS[kind]) for _ in range(4)]  # as if in a new process each time
    own = [own_batches(f"{name}:batches", f"{name}:judge") for name in names]
    through = own[0].training(batch=6, context=None, seed=3, parts=2)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    expected = [through.batch(step, part) for step in range(13) for part in range(2)]
    resumed = own[1].training(batch=6, context=None, seed=3, parts=2)
    k = 1
    for step in range(13):
        if step in (2, 3, 9):
            torch.rand(5)  # what else draws random numbers plays no part
            state = json.loads(json.dumps(resumed.state_dict()))
            k += 1
            resumed = own[min(k, 3)].training(batch=6, context=None, seed=3, parts=2)
            resumed.load_state_dict(state)
        for part in range(2):
            assert _same(resumed.batch(step, part), expected[2 * step + part])
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    other = own[0].training(batch=6, context=None, seed=4, parts=2)
    later = [other.batch(step, part) for step in range(13) for part in range(2)]
    assert not all(_same(a, b) for a, b in zip(expected, later, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_in_the_same_process_has_the_same_batches(kind: str, module: Module) -> None:
    name = module(KINDS[kind])
    own = own_batches(f"{name}:batches", f"{name}:judge")
    runs = []
    for _ in range(2):
        batches = own.training(batch=6, context=None, seed=0)
        runs.append([batches.batch(step) for step in range(12)])
    assert all(_same(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", ["generator", "loader"])
def test_a_step_back_gives_the_same_batch_again(kind: str, module: Module) -> None:
    name = module(KINDS[kind])
    batches = own_batches(f"{name}:batches", f"{name}:judge").training(
        batch=1, context=None, seed=0
    )
    first = [batches.batch(step) for step in range(12)]
    assert _same(batches.batch(3), first[3])
    assert _same(batches.batch(11), first[11])


def test_of_a_list_a_twentieth_is_held_out_and_epochs_are_permutations(module: Module) -> None:
    own = own_batches(f"{module(KINDS['listed'])}:batches")
    assert own.unit == "examples"
    assert own.shape(None) is None
    assert own.description.startswith("20 batches of batches_of_a_user")
    assert own.description.endswith(", 1 of them held out")
    [held_out] = own.validation(batch=1, context=None, count=99)
    batches = own.training(batch=1, context=None, seed=0)
    for epoch in range(3):
        seen = {int(batches.batch(step)[1][0]) for step in range(19 * epoch, 19 * epoch + 19)}
        assert seen == set(range(20)) - {int(held_out[1][0])}


def test_of_a_dataset_a_twentieth_is_held_out_and_batches_are_collated(module: Module) -> None:
    own = own_batches(f"{module(KINDS['dataset'])}:batches")
    held_out = torch.cat([y for _, y in own.validation(batch=2, context=None, count=99)])
    assert len(held_out) == 2
    inputs, targets = own.training(batch=48, context=None, seed=0).batch(0)
    assert inputs.shape == (48, 1)
    assert set(targets.tolist()) == set(range(50)) - set(held_out.tolist())


def test_validation_batches_are_the_same_at_every_call(module: Module) -> None:
    name = module(KINDS["generator"] + "\nnoisy = batches\n")
    own = own_batches(f"{name}:batches", f"{name}:noisy")
    first, again = (list(own.validation(batch=1, context=None, count=10)) for _ in range(2))
    assert len(first) == 4  # of three examples each
    assert all(_same(a, b) for a, b in zip(first, again, strict=True))
    assert len(list(own.validation(batch=1, context=None, count=10**6))) == 7


def test_the_hash_tells_data_apart_and_is_the_same_in_another_process(module: Module) -> None:
    name = module(KINDS["listed"] + "\nmore = [*batches, batches[0]]\n")
    hashes = [own_batches(f"{name}:batches").sha256 for _ in range(2)]
    assert hashes[0] == hashes[1]
    assert own_batches(f"{name}:more").sha256 != hashes[0]
    assert own_batches(f"{name}:batches", f"{name}:judge").sha256 != hashes[0]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (KINDS["loader_itself"], "name batches to judge by: --validation"),
        ("batches = []", "no batches"),
        ("batches = [(torch.zeros(1), torch.zeros(1))]", "one batch only"),
        ("batches = TensorDataset(torch.zeros(1, 2))", "one example only"),
        ("batches = 5", "gives a int; expected a list of batches"),
        ("batches = {'train': []}", "gives a dict"),
        ("batches = iter([1, 2])", "ends for good"),
        (
            "class Rows(IterableDataset):\n    __iter__ = None\nbatches = Rows()",
            "wrap it: DataLoader",
        ),
        ("def batches(): raise KeyError('lost')", "lost"),
        ("def batches(path): return []", "path"),
        ("class Broken(Dataset):\n    def __len__(self): return 9\nbatches = Broken()", "failed"),
    ],
)
def test_what_are_no_batches_gets_a_sentence(source: str, sentence: str, module: Module) -> None:
    with pytest.raises(InputError, match=sentence):
        own_batches(f"{module(source)}:batches")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def batches():\n    yield 1\n    raise ValueError('torn file')", "torn file"),
        ("def batches(): return iter(())", "has no batches"),
    ],
)
def test_what_goes_wrong_on_the_way_gets_a_sentence(
    source: str, sentence: str, module: Module
) -> None:
    name = module(source)
    with pytest.raises(InputError, match=sentence):
        list(
            own_batches(f"{name}:batches", f"{name}:batches").validation(
                batch=1, context=None, count=9
            )
        )


def test_batches_that_are_others_after_a_resume_are_noticed(module: Module) -> None:
    name = module("start = 0\ndef batches():\n    return iter(range(start, start + 9))\n")
    own = own_batches(f"{name}:batches", f"{name}:judge")
    batches = own.training(batch=1, context=None, seed=0)
    batches.batch(0)
    state = batches.state_dict()
    __import__(name).start = 5
    with pytest.raises(InputError, match="another batch number 1"):
        own.training(batch=1, context=None, seed=0).load_state_dict(state)
