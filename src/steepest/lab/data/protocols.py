"""What a run asks of data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from steepest.lab.data.shapes import Shape


class TrainingBatches(Protocol):
    """Training batches, and the position in them where they are read in order."""

    def batch(self, step: int, part: int = 0) -> Any:
        """Return `(inputs, targets)`, or the user's batch, for a part of a step; CPU tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON; `{}` where a batch is a function of seed and step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position that `state_dict` returned."""


class Data(Protocol):
    """Data to train on, and data to judge by.

    Attributes:
        name: what was asked for.
        description: what it is, in a sentence.
        sha256: of the data; of a stream, of its name, revision and settings.
        unit: "tokens", "images" or "examples".
        bytes_per_token: of the validation text; None where it is unknown, or where there is no
            text. Bits per byte are nats / ln 2 / bytes_per_token.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def description(self) -> str: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102
    @property
    def unit(self) -> str: ...  # noqa: D102
    @property
    def bytes_per_token(self) -> float | None: ...  # noqa: D102

    def shape(self, context: int | None) -> Shape:
        """Return what a model must know; `context` is for text only."""

    def training(
        self, *, batch: int, context: int | None, seed: int, parts: int = 1
    ) -> TrainingBatches:
        """Return training batches; `parts` are the forward passes in each update."""

    def validation(self, *, batch: int, context: int | None, count: int) -> Iterator[Any]:
        """Yield the same batches at every call, of at most `count` windows, images or examples."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; an `InputError` where there is no tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; an `InputError` where there is no tokenizer."""
