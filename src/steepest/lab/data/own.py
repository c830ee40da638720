"""Batches of the user's own, by import path: a list, a dataset, a loader, or any iterable."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset, default_collate

from steepest.lab.data.documents import VALIDATION_SHARE
from steepest.lab.data.permutations import Permutations, generator_at
from steepest.lab.data.protocols import TrainingBatches
from steepest.lab.errors import InputError
from steepest.lab.imports import called, imported
from steepest.lab.user_code import guarded, sentences_for_errors
from steepest.random_numbers import seed_of, seeded

Take = Callable[[NDArray[np.int64]], Any]
_LOOKED_AT = 32
"""Of the examples of a dataset, to tell it from another one."""


def own_batches(path: str, validation: str | None = None) -> OwnData:
    """Return the data at an import path, `my_package.module:batches`, or of the function there.

    A list has batches, and each epoch is a permutation of them. A dataset with `len` and indices,
    such as torch's, has examples: each epoch is a permutation of them, and torch's default function
    collates them to batches. Any other iterable, such as a `DataLoader`, is gone through in its
    order, and started anew when it ends.

    Random numbers in the user's code are a function of the seed and the position, so a run that is
    resumed sees the same batches. To go on in the middle of an iterable, a run goes through it
    again from its beginning, which takes the time of loading. A list and a dataset need no time.

    Args:
        path: of the batches, or of a function without arguments that returns them.
        validation: the same, to judge by. Of a list or a dataset, a twentieth is held out by
            default; for other iterables it must be given.

    Raises:
        InputError: for what is none of these, and for what goes wrong in the user's code.
    """
    judge = None if validation is None else _Source(validation)
    return OwnData(_Source(path), judge)


class OwnData:
    """A user's own batches, of which nothing is known.

    Attributes:
        name: the import path.
        description: what is there, in a sentence.
        sha256: of the paths, and of some entries of what is there.
        unit: "examples".
    """

    unit = "examples"
    bytes_per_token: float | None = None

    def __init__(self, source: _Source, judge: _Source | None):
        self.name, self._source, self._judge = source.path, source, judge or source
        order = generator_at(0, 0).permutation(source.count)
        held_out = 0
        if judge is None:
            if source.take is None:
                raise InputError(
                    f"got {source.path}, which is gone through in its order, so no part of it can "
                    "be held out; name batches to judge by: --validation my_package:batches"
                )
            held_out = max(1, round(VALIDATION_SHARE * source.count))
            if held_out == source.count:
                raise InputError(
                    f"got {source.path}, which has one {source.noun} only; expected two or more, "
                    "to hold one out"
                )
            end = f"{held_out} of them held out"
        else:
            end = f"judged by {judge.path}"
        self._train, self._held_out = np.sort(order[held_out:]), np.sort(order[:held_out])
        if judge is not None:
            self._held_out = np.arange(judge.count)
        self.description = f"{source.description}, {end}"
        facts = [source.path, source.fingerprint(), judge and (judge.path, judge.fingerprint())]
        self.sha256 = hashlib.sha256(repr(facts).encode()).hexdigest()

    def __str__(self) -> str:
        """Return what it is, and what was held out of it."""
        return self.description

    def shape(self, context: int | None) -> None:
        """Return None: nothing is known of a user's own batches."""

    def training(
        self, *, batch: int, context: int | None, seed: int, parts: int = 1
    ) -> TrainingBatches:
        """Return batches; of a dataset `batch` examples each, else as the user made them."""
        source = self._source
        if source.take is None:
            return OrderedBatches(source.path, source.iterator, seed, parts)
        return PermutedBatches(source.take, self._train, source.batch_size(batch), seed, parts)

    def validation(self, *, batch: int, context: int | None, count: int) -> Iterator[Any]:
        """Yield batches to judge by, until they have `count` examples."""
        judge = self._judge
        examples = 0
        for part in judge.batches(self._held_out, batch, count):
            if examples >= count:
                return
            examples += examples_in(part)
            yield part

    def decode(self, tokens: Sequence[int]) -> str:
        """Refuse: nothing is known of them."""
        self._no_text()

    def encode(self, text: str) -> list[int]:
        """Refuse: nothing is known of them."""
        self._no_text()

    def _no_text(self) -> NoReturn:
        raise InputError(f"got batches of your own ({self.name}), of which no tokenizer is known")


class PermutedBatches:
    """Batches of which each epoch is a permutation: a function of seed, step and part."""

    def __init__(self, take: Take, index: NDArray[np.int64], size: int, seed: int, parts: int):
        self.take, self.index, self.size, self.seed, self.parts = take, index, size, seed, parts
        self.order = Permutations(len(index), seed)

    def batch(self, step: int, part: int = 0) -> Any:
        """Return the batch of a part of a step."""
        position = step * self.parts + part
        places = self.index[self.order.window(position * self.size, self.size)]
        with seeded(_seed(self.seed, position)):
            return self.take(places)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: seed and step say all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


class OrderedBatches:
    """Batches of an iterable in its order, which starts anew when it ends.

    Args:
        path: the import path, for errors.
        start: returns an iterator over the batches of an epoch.
        seed: of the random numbers in the user's code.
        parts: batches in each step.
    """

    def __init__(self, path: str, start: Callable[[], Iterator[Any]], seed: int, parts: int):
        self.path, self.start, self.seed, self.parts = path, start, seed, parts
        self._restart()

    def batch(self, step: int, part: int = 0) -> Any:
        """Return the batch of a part of a step; a step back goes through all from the beginning."""
        self._go_to(step * self.parts + part)
        return self._next()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches so far, and a number that tells the last one."""
        return {"batches": self._position, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go through the iterable up to a position.

        Raises:
            InputError: where the last batch is another one than it was.
        """
        self._restart()
        self._go_to(state["batches"])
        if self._last != state["last"]:
            raise InputError(
                f"{self.path} gives another batch number {state['batches']} than before the "
                "interruption, so this run cannot go on as it was; make its order a function of "
                "the global random generators, or start again"
            )

    def first_epoch(self) -> Iterator[Any]:
        """Yield the batches from here to the end of the iterable."""
        yield self._next()
        while (batch := self._following()) is not _END:
            yield batch

    def _go_to(self, position: int) -> None:
        if position < self._position:
            self._restart()
        while self._position < position:
            self._next()

    def _restart(self) -> None:
        self._position, self._last = 0, 0
        self._iterator: Iterator[Any] | None = None

    def _next(self) -> Any:
        batch = _END if self._iterator is None else self._following()
        if batch is _END:
            with seeded(_seed(self.seed, self._position)), sentences_for_errors():
                self._iterator = self.start()
            batch = self._following()
        if batch is _END:
            raise InputError(f"{self.path} has no batches, expected some")
        return batch

    def _following(self) -> Any:
        """The next batch of this epoch, or `_END`."""
        assert self._iterator is not None
        with seeded(_seed(self.seed, self._position)), sentences_for_errors():
            batch = guarded(self.path, next)(self._iterator, _END)
        if batch is not _END:
            self._position, self._last = self._position + 1, _fingerprint(batch)
        return batch


class _Source:
    """What is at an import path.

    Attributes:
        count: of batches or examples; 0 where nobody knows.
        noun: "batch" or "example".
        take: from places to a batch; None for what is gone through in its order.
        iterator: starts an epoch.
    """

    def __init__(self, path: str):
        self.path = path
        value = imported(path)
        function = value if callable(value) else None
        if function is not None:
            with seeded(0):
                value = called(path, function, "batches")
        self.count, self.noun = 0, "batch"
        self.take: Take | None = None
        self.iterator: Callable[[], Iterator[Any]]
        if isinstance(value, list | tuple):
            self._listed(value)
        elif _is_indexed(value):
            self._examples(value)
        else:
            self._in_order(value, function)

    def _listed(self, batches: Sequence[Any]) -> None:
        if not batches:
            raise InputError(f"{self.path} has no batches, expected some")
        self.count, self.take = len(batches), lambda places: batches[int(places[0])]
        self.description = f"{self.count} batches of {self.path}"

    def _examples(self, dataset: Any) -> None:
        entry = guarded(self.path, dataset.__getitem__)
        with sentences_for_errors():
            self.count = guarded(self.path, len)(dataset)
        if not self.count:
            raise InputError(f"{self.path} has no examples, expected some")

        def collated(places: NDArray[np.int64]) -> Any:
            with sentences_for_errors():
                return default_collate([entry(place) for place in places.tolist()])

        self.noun, self.take = "example", collated
        self.description = f"{self.count:,} examples of {self.path}"

    def _in_order(self, value: Any, function: Callable[..., Any] | None) -> None:
        if isinstance(value, IterableDataset):
            raise InputError(
                f"got {self.path}, which is an IterableDataset; wrap it: DataLoader(dataset, "
                "batch_size=32) if it yields examples, batch_size=None if it yields batches"
            )
        if not isinstance(value, Iterable) or isinstance(value, Mapping | str | bytes):
            raise InputError(
                f"got {self.path}, which gives a {type(value).__name__}; expected a list of "
                "batches, a dataset, a DataLoader or another iterable, or a function that returns "
                "one"
            )
        if function is None and isinstance(value, Iterator):
            raise InputError(
                f"got {self.path}, which is an iterator, and ends for good; give a function that "
                "returns a new one"
            )

        def started() -> Iterator[Any]:
            again = value if function is None else called(self.path, function, "batches")
            generator = getattr(again, "generator", None)  # a loader's own, which goes on for ever
            if isinstance(generator, torch.Generator):
                generator.manual_seed(int(torch.randint(2**31, ())))
            return guarded(self.path, iter)(again)

        self.iterator = started
        self.description = f"batches of {self.path}, in their order"

    def batch_size(self, examples: int) -> int:
        """Return how many places make up a batch."""
        return examples if self.noun == "example" else 1

    def batches(self, places: NDArray[np.int64], batch: int, count: int) -> Iterator[Any]:
        """Yield batches of some places in their order, or all of an iterable."""
        if self.take is None:
            epoch = OrderedBatches(self.path, self.iterator, seed=0, parts=1)
            yield from epoch.first_epoch()
            return
        size = self.batch_size(batch)
        places = places[:count] if self.noun == "example" else places
        for start in range(0, len(places), size):
            with seeded(_seed(0, start)):
                taken = self.take(places[start : start + size])
            yield taken

    def fingerprint(self) -> tuple[int, ...]:
        """Return numbers that tell these batches from others."""
        if self.take is None:
            with seeded(0):
                first = OrderedBatches(self.path, self.iterator, seed=0, parts=1).batch(0)
            return (_fingerprint(first),)
        step = 1 if self.noun == "batch" else -(-self.count // _LOOKED_AT)
        with seeded(0):
            entries = [self.take(np.array([i])) for i in range(0, self.count, step)]
        return (self.count, *map(_fingerprint, entries))


_END = object()


def _is_indexed(value: Any) -> bool:
    if isinstance(value, IterableDataset | Mapping | str | bytes):
        return False
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")


def examples_in(batch: Any) -> int:
    """Return how many examples a batch has: the first size of its first tensor, else 1.

    >>> import torch
    >>> examples_in({"x": torch.zeros(5, 2), "y": torch.zeros(5)}), examples_in("a text")
    (5, 1)
    """
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _fingerprint(batch: Any) -> int:
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return seed_of([leaf for leaf in leaves if isinstance(leaf, Tensor | int | float | str)])


def _seed(seed: int, position: int) -> int:
    return zlib.crc32(f"{seed} {position}".encode())
