"""Tokenizers: bytes, a byte-pair encoding that is trained here, GPT-2's, or one from a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steepest.lab.data.documents import SEPARATOR


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        name: what was asked for.
        vocabulary: number of different tokens.
        end: the end-of-text token, which stands between documents.
    """

    name: str
    vocabulary: int
    end: int

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; of a character that was cut, a replacement character."""

    def joined(self, documents: Iterable[bytes]) -> NDArray[Any]:
        """Return the tokens of documents, with an end-of-text token between them."""


class Bytes:
    """Each byte of UTF-8 is a token, and 0 stands between documents.

    >>> Bytes().encode("né"), Bytes().decode([110, 195, 169])
    ([110, 195, 169], 'né')
    """

    name, vocabulary, end = "bytes", 256, 0

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of bytes."""
        return bytes(tokens).decode(errors="replace")

    def joined(self, documents: Iterable[bytes]) -> NDArray[Any]:
        """Return the bytes of documents, with a zero between them."""
        return np.frombuffer(SEPARATOR.join(documents), dtype=np.uint8)
