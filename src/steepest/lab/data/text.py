"""Text as a stream of tokens, split into training and validation documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steepest.lab.data.cache import cached
from steepest.lab.data.documents import SEPARATOR, VALIDATION_SHARE, Split
from steepest.lab.data.sampler import Sampler, validation_batches
from steepest.lab.data.shapes import TextShape
from steepest.lab.data.token_files import JoinedTokens, Tokens, pieces, read_tokens
from steepest.lab.data.tokenizers import (
    Tokenizer,
    bytes_of_tokens,
    joined,
    tokenizer_for,
    whole_characters,
)
from steepest.lab.errors import InputError
from steepest.lab.memory import readable


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, and what is known of them.

    Attributes:
        name: what was asked for.
        description: what it is, in a sentence.
        train_tokens, validation_tokens: as one array each; no text is in both.
        vocabulary: number of different tokens.
        documents: number of documents.
        sha256: of all tokens and of the split; two runs compare only if it is equal.
        bytes_per_token: of the validation text, in which each end-of-text token counts as a byte;
            None where the tokenizer is unknown.
        tokenizer: from text to tokens and back; None where it is unknown.
    """

    name: str
    description: str
    train_tokens: Tokens
    validation_tokens: Tokens
    vocabulary: int
    documents: int
    sha256: str
    bytes_per_token: float | None
    tokenizer: Tokenizer | None
    unit: str = "tokens"

    def __str__(self) -> str:
        """Return what it is, what was left out of it, and how much it is."""
        return f"{self.description}; {len(self.train_tokens):,} tokens to train on"

    def shape(self, context: int | None) -> TextShape:
        """Return the vocabulary, and the context, which must be given."""
        return TextShape(self.vocabulary, context_of_text(context))

    def training(self, *, batch: int, context: int | None, seed: int, parts: int = 1) -> Sampler:
        """Return random windows, `(batch, context)` each: a function of seed, step and part."""
        return Sampler(self.train_tokens, batch, context_of_text(context), seed)

    def validation(
        self, *, batch: int, context: int | None, count: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield at most `count` windows without overlap, spread over the validation text."""
        return validation_batches(
            self.validation_tokens, batch, context_of_text(context), windows=count
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._tokenizer().decode(tokens)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return self._tokenizer().encode(text)

    def judged_by(self, documents: list[bytes], name: str) -> Corpus:
        """Return the same tokens to train on, and other documents to judge by."""
        tokens = joined(self._tokenizer(), documents)
        return replace(
            self,
            description=f"{self.description}; judged by {name}",
            validation_tokens=tokens,
            sha256=_sha256([self.train_tokens, tokens]),
            bytes_per_token=_size(documents) / len(tokens),
        )

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                f"got tokens without a tokenizer in {self.name}, so their text is unknown; name "
                "the tokenizer that wrote them, such as --tokenizer gpt2"
            )
        return self.tokenizer


def context_of_text(context: int | None) -> int:
    """Return the context, or say that text needs one."""
    if context is None:
        raise InputError("got no context for text, expected a number of tokens, such as 256")
    return context


def corpus_of_documents(
    source: str, description: str, parts: Split, tokenizer_name: str = "bytes"
) -> Corpus:
    """Return documents as tokens; those of other tokenizers than bytes are kept in the cache."""
    tokenizer = tokenizer_for(tokenizer_name, parts.training)
    train, validation = _tokens(tokenizer, parts)
    size, kind = _size(parts.validation), ""
    if tokenizer_name == "bytes":
        size = len(validation)  # which may have half a character, where a document was cut
    else:
        kind = f"; a vocabulary of {tokenizer.vocabulary:,} by {tokenizer.name}"
    return Corpus(
        name=source,
        description=f"{description}, {parts.sentence}{kind}",
        train_tokens=train,
        validation_tokens=validation,
        vocabulary=tokenizer.vocabulary,
        documents=parts.documents,
        sha256=_sha256([train, validation]),
        bytes_per_token=size / len(validation),
        tokenizer=tokenizer,
    )


def _size(documents: list[bytes]) -> int:
    """How many bytes of text there are, with one between documents."""
    return len(SEPARATOR.join(whole_characters(text).encode() for text in documents))


def _megabytes(parts: Split) -> str:
    return readable(sum(map(len, (*parts.training, *parts.validation))))


def _tokens(tokenizer: Tokenizer, parts: Split) -> tuple[Tokens, Tokens]:
    def made() -> dict[str, NDArray[Any]]:
        both = {"train": parts.training, "validation": parts.validation}
        return {name: joined(tokenizer, texts) for name, texts in both.items()}

    if tokenizer.name == "bytes":
        arrays = made()
    else:
        digest = hashlib.sha256()
        for texts in (parts.training, parts.validation):
            for text in texts:
                digest.update(hashlib.sha256(text).digest())
            digest.update(b"end of part")
        key = f"{tokenizer.sha256} {digest.hexdigest()}"
        purpose = f"turning {_megabytes(parts)} of text into tokens of {tokenizer.name}"
        arrays = cached("tokens", key, purpose, made)
    return arrays["train"], arrays["validation"]


def corpus_of_token_files(
    source: str,
    files: list[Path],
    notes: Iterable[str] = (),
    tokenizer_name: str = "bytes",
    judge: list[Path] | None = None,
) -> Corpus:
    """Files of tokens, mapped into memory, not read into it.

    Those named val or valid are held out, or else the last twentieth of all, unless `judge` has
    the files to judge by.

    Of tokens that no named tokenizer has written, "bytes" says that it is unknown.

    Raises:
        InputError: where all files are for validation, and for a tokenizer of fewer tokens.
    """
    validation = judge or [p for p in files if _is_validation(p)]
    train = [p for p in files if p not in validation]
    if not train:
        raise InputError(f"got only validation files in {source}, expected training tokens too")
    parts: list[Tokens] = [_joined(group) for group in (train, validation) if group]
    description = f"{len(train)} token files, {len(validation)} more held out"
    if not validation:
        joined = JoinedTokens([read_tokens(p) for p in train])
        parts = list(joined.split(len(joined) - max(1, round(VALIDATION_SHARE * len(joined)))))
        description = f"{len(files)} token files, the last twentieth held out"
    if tokenizer_name.startswith("bpe:"):
        raise InputError(
            f"got {source}, which has tokens, and the tokenizer {tokenizer_name}, which is trained "
            "on text; name the tokenizer that wrote them"
        )
    bits = 8 * parts[0].dtype.itemsize
    vocabulary = 1 + max(int(piece.max()) for part in parts for piece in pieces(part))
    tokenizer = None
    if tokenizer_name == "bytes":
        notes = [*notes, "no bits per byte, as the tokenizer is unknown"]
    else:
        tokenizer = tokenizer_for(tokenizer_name, [])
        if vocabulary > tokenizer.vocabulary:
            raise InputError(
                f"{source} has a token {vocabulary - 1}, but the tokenizer {tokenizer_name} has "
                f"{tokenizer.vocabulary}; name the tokenizer that wrote the tokens"
            )
        vocabulary = tokenizer.vocabulary
    return Corpus(
        name=source,
        description="; ".join([f"{description}, {bits} bits each", *notes]),
        train_tokens=parts[0],
        validation_tokens=parts[1],
        vocabulary=vocabulary,
        documents=len(files),
        sha256=_sha256(parts),
        bytes_per_token=None if tokenizer is None else bytes_of_tokens(tokenizer, parts[1]),
        tokenizer=tokenizer,
    )


def _is_validation(path: Path) -> bool:
    return bool(re.search(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", path.stem))


def _joined(files: list[Path]) -> Tokens:
    arrays = [read_tokens(p) for p in files]
    return arrays[0] if len(arrays) == 1 else JoinedTokens(arrays)


def _sha256(parts: Iterable[Tokens]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype} {len(part)} ".encode())
        for piece in pieces(part):
            digest.update(np.ascontiguousarray(piece).data)
    return digest.hexdigest()
