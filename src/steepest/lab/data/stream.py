"""Text that is read on the way: documents to tokens to windows, from a position."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steepest.lab.data.permutations import generator_at
from steepest.lab.data.sampler import validation_batches
from steepest.lab.data.shapes import TextShape
from steepest.lab.data.text import context_of_text
from steepest.lab.data.tokenizers import Tokenizer
from steepest.lab.errors import InputError


@dataclass(frozen=True)
class Shards:
    """Documents in several files, each of which can be read from a document on.

    Attributes:
        name: what to call them in an error.
        count: number of files.
        read: from a file and a number of documents to skip, to the others.
        lines: whether documents are lines of a text, with no end-of-text token between them.
    """

    name: str
    count: int
    read: Callable[[int, int], Iterator[bytes]]
    lines: bool = False

    def all(self) -> Iterator[bytes]:
        """Yield all documents."""
        return itertools.chain.from_iterable(self.read(shard, 0) for shard in range(self.count))

    def without_first(self, documents: int) -> Shards:
        """Return these without the first documents of the first file."""
        return Shards(
            self.name,
            self.count,
            lambda shard, start: self.read(shard, start + (documents if shard == 0 else 0)),
            self.lines,
        )


@dataclass(frozen=True)
class Stream:
    """Training text that is streamed, and validation tokens in memory.

    Attributes:
        name: what was asked for.
        description: what it is, in a sentence.
        sha256: of its name, revision and settings.
        shards: the training documents.
        validation_tokens: tokens to judge by.
        bytes_per_token: of the validation text, in which an end-of-text token counts as a byte.
        tokenizer: from text to tokens and back.
    """

    name: str
    description: str
    sha256: str
    shards: Shards
    validation_tokens: NDArray[Any]
    bytes_per_token: float
    tokenizer: Tokenizer
    unit: str = "tokens"

    def __str__(self) -> str:
        """Return what it is, and what was held out of it."""
        return self.description

    def shape(self, context: int | None) -> TextShape:
        """Return the vocabulary, and the context, which must be given."""
        return TextShape(self.tokenizer.vocabulary, context_of_text(context))

    def training(
        self, *, batch: int, context: int | None, seed: int, parts: int = 1
    ) -> StreamBatches:
        """Return windows in the order of the documents; the seed gives the order of the files."""
        return StreamBatches(
            self.shards, self.tokenizer, batch, context_of_text(context), seed, parts
        )

    def validation(
        self, *, batch: int, context: int | None, count: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield at most `count` windows without overlap, spread over the validation text."""
        return validation_batches(
            self.validation_tokens, batch, context_of_text(context), windows=count
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self.tokenizer.decode(tokens)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return self.tokenizer.encode(text)


@dataclass(frozen=True)
class _Document:
    tokens: NDArray[Any]
    place: dict[str, int]
    sha256: str


class StreamBatches:
    """Windows of `context` tokens, packed across documents, in the order of the stream.

    Each token is predicted once an epoch. A position names the document in which the next window
    begins, so nothing but this document is read a second time, after any number of resumptions.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        size: int,
        context: int,
        seed: int,
        parts: int,
    ):
        self.shards, self.tokenizer, self.size, self.context = shards, tokenizer, size, context
        self.seed, self.parts = seed, parts
        self._start({"batches": 0, "epoch": 0, "shard": 0, "document": 0, "token": 0})

    def batch(self, step: int, part: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, `(batch, context)` each, for the next part of a step.

        Raises:
            InputError: for a part that is not the next one, and where the stream cannot be read.
        """
        if step * self.parts + part != self._batches:
            raise InputError(
                f"got batch {step * self.parts + part} of the stream {self.shards.name}, expected "
                f"number {self._batches}; a stream is read in order"
            )
        row = torch.from_numpy(self._next(self.size * self.context + 1).astype(np.int64))
        self._batches += 1
        both = row.unfold(0, self.context + 1, self.context)
        return both[:, :-1], both[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Return the document and the token where the next window begins."""
        if not self._queue:  # before the first batch
            return {**self._place, "batches": self._batches, "sha256": None}
        first = self._queue[0]
        return {
            "batches": self._batches,
            **first.place,
            "token": self._token,
            "sha256": first.sha256,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Raises:
            InputError: where another document is there than before.
        """
        self._start(state)
        if state["sha256"] is None:
            return
        self._queue.append(next(self._documents))
        if self._queue[0].sha256 != state["sha256"]:
            raise InputError(
                f"the stream {self.shards.name} has another document at this run's position "
                f"(file {state['shard']}, document {state['document']}) than before; it cannot go "
                "on as it was, so start again"
            )

    def _start(self, state: dict[str, Any]) -> None:
        self._place = {key: state[key] for key in ("epoch", "shard", "document", "token")}
        self._batches, self._token = state["batches"], state["token"]
        self._queue: deque[_Document] = deque()
        self._documents = self._read(state["epoch"], state["shard"], state["document"])

    def _read(self, epoch: int, shard: int, document: int) -> Iterator[_Document]:
        """All documents from a position on, for ever; the files of each epoch in another order."""
        end = np.array([] if self.shards.lines else [self.tokenizer.end], dtype=np.int64)
        while True:
            order = generator_at(self.seed, epoch).permutation(self.shards.count).tolist()
            size = 0
            for k in range(shard, len(order)):
                texts = self.shards.read(order[k], document)
                for text, tokens in self.tokenizer.encoded(texts):
                    place = {"epoch": epoch, "shard": k, "document": document}
                    row = np.concatenate([tokens, end])
                    yield _Document(row, place, hashlib.sha256(text).hexdigest())
                    document += 1
                    size += len(row)
                document = 0
            if not size and not shard:
                raise InputError(f"the stream {self.shards.name} has no text to train on")
            epoch, shard = epoch + 1, 0

    def _next(self, count: int) -> NDArray[Any]:
        """The next tokens; the last one of them stays, as the first of the next batch."""
        ahead = sum(len(document.tokens) for document in self._queue) - self._token
        while ahead < count:
            self._queue.append(next(self._documents))
            ahead += len(self._queue[-1].tokens)
        parts, missing, start = [], count, self._token
        for document in self._queue:
            parts.append(document.tokens[start : start + missing])
            missing, start = missing - len(parts[-1]), 0
        self._token += count - 1
        while self._token >= len(self._queue[0].tokens):
            self._token -= len(self._queue.popleft().tokens)
        return np.concatenate(parts)
