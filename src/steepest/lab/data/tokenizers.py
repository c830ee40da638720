"""Tokenizers: bytes, a byte-pair encoding that is trained here, GPT-2's, or one from a file."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steepest.lab.data.cache import cached
from steepest.lab.data.hub_access import hub_answers
from steepest.lab.data.token_files import Tokens
from steepest.lab.errors import InputError
from steepest.lab.memory import readable

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""How tokenizers call their end-of-text token; the first of these that one has is taken."""
_GPT2 = "openai-community/gpt2"
_LONG = 2**20
_AT_ONCE = 2**18


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        name: what was asked for.
        vocabulary: number of different tokens.
        end: the end-of-text token, which stands between documents.
        dtype: of tokens.
        sha256: of all that tokens depend on.
    """

    name: str
    vocabulary: int
    end: int
    dtype: Any
    sha256: str

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; of a character that was cut, a replacement character."""

    def encoded(self, documents: Iterable[bytes]) -> Iterator[tuple[bytes, NDArray[Any]]]:
        """Yield documents and their tokens; some are read ahead."""


def joined(tokenizer: Tokenizer, documents: Iterable[bytes]) -> NDArray[Any]:
    """Return the tokens of documents, with an end-of-text token between them.

    >>> joined(Bytes(), [b"one", b"two"]).tobytes()
    b'one\\x00two'
    """
    end = np.array([tokenizer.end], dtype=tokenizer.dtype)
    rows = [row for _, tokens in tokenizer.encoded(documents) for row in (tokens, end)]
    return np.concatenate(rows[:-1]) if rows else end[:0]


class Bytes:
    """Each byte of UTF-8 is a token, and 0 stands between documents.

    >>> Bytes().encode("né"), Bytes().decode([110, 195, 169])
    ([110, 195, 169], 'né')
    """

    name, vocabulary, end, dtype, sha256 = "bytes", 256, 0, np.uint8, "bytes"

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of bytes."""
        return bytes(tokens).decode(errors="replace")

    def encoded(self, documents: Iterable[bytes]) -> Iterator[tuple[bytes, NDArray[Any]]]:
        """Yield documents, and as arrays."""
        return ((text, np.frombuffer(text, dtype=np.uint8)) for text in documents)


class LibraryTokenizer:
    """A tokenizer of the library `tokenizers`.

    The name of a special token in a text is plain text, so no document can end itself. Documents of
    over a megabyte are cut at ends of lines, where that changes no token.

    Raises:
        InputError: for a tokenizer without an end-of-text token.
    """

    def __init__(self, name: str, library: Any):
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True
        tokens = library.get_vocab()
        ends = [tokens[end] for end in ENDS if end in tokens]
        if not ends:
            raise InputError(
                f"the tokenizer {name} has no end-of-text token, expected one of {', '.join(ENDS)}"
            )
        self.name, self.end, self.vocabulary = name, ends[0], 1 + max(tokens.values())
        self.dtype = np.uint16 if self.vocabulary <= 2**16 else np.uint32
        version = _library().__version__
        self.sha256 = hashlib.sha256(f"{version} {library.to_str()}".encode()).hexdigest()
        self._library = library
        words = library.pre_tokenizer
        self._can_be_cut = (
            library.normalizer is None
            and isinstance(words, _library().pre_tokenizers.ByteLevel)
            and not words.add_prefix_space
        )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._library.decode(list(map(int, tokens)), skip_special_tokens=False)

    def encoded(self, documents: Iterable[bytes]) -> Iterator[tuple[bytes, NDArray[Any]]]:
        """Yield documents and their tokens; about a quarter of a megabyte is read ahead."""
        texts: list[bytes] = []
        size = 0
        for text in documents:
            texts.append(text)
            size += len(text)
            if size >= _AT_ONCE:
                yield from zip(texts, self._tokens(texts), strict=True)
                texts, size = [], 0
        yield from zip(texts, self._tokens(texts), strict=True)

    def _tokens(self, texts: list[bytes]) -> list[NDArray[Any]]:
        pieces = [self._pieces(text) for text in texts]
        encodings = iter(
            self._library.encode_batch_fast(
                list(itertools.chain.from_iterable(pieces)), add_special_tokens=False
            )
        )
        return [
            np.concatenate([np.array(next(encodings).ids, dtype=self.dtype) for _ in part])
            for part in pieces
        ]

    def _pieces(self, document: bytes) -> list[str]:
        text = whole_characters(document)
        return list(cut_at_lines(text)) if self._can_be_cut else [text]


def whole_characters(document: bytes) -> str:
    """Return a document as text, without the bytes of a character that the split has cut."""
    return document.decode(errors="ignore")


def cut_at_lines(text: str, longest: int = _LONG) -> Iterator[str]:
    """Yield a text in pieces that end with a line, between two characters that are no space.

    Byte-level encodings split text into words first, and never across such a place.

    >>> list(cut_at_lines("one\\ntwo\\n\\nthree", longest=4))
    ['one\\n', 'two\\n\\nthree']
    """
    start = 0
    for place in re.finditer(r"(?<=\S)\n(?=\S)", text):
        if place.end() - start >= longest:
            yield text[start : place.end()]
            start = place.end()
    yield text[start:]


def tokenizer_for(name: str, documents: Sequence[bytes]) -> Tokenizer:
    """Return the tokenizer of a name.

    Args:
        name: "bytes"; "bpe:N", a byte-level byte-pair encoding of N tokens (Sennrich et al., 2016;
            Radford et al., 2019), trained on the documents and kept in the cache; "gpt2", from the
            hub; a folder with `vocab.json` and `merges.txt`; or a `tokenizer.json`.
        documents: to train "bpe:N" on.

    Raises:
        InputError: for other names, for files that are no tokenizer, without network where it is
            needed, and where the library `tokenizers` is not installed.
    """
    if name == "bytes":
        return Bytes()
    if name.startswith("bpe:"):
        return _trained(name, documents)
    library = _library()
    if name == "gpt2":
        return LibraryTokenizer(name, _from_hub())
    path = Path(name).expanduser()
    try:
        if path.is_dir() and (path / "vocab.json").exists():
            model = library.models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
            tokenizer = library.Tokenizer(model)
            missing = set(library.pre_tokenizers.ByteLevel.alphabet()) - set(tokenizer.get_vocab())
            if missing:  # the library would leave them out of every text
                raise InputError(
                    f"{path / 'vocab.json'} has no token for {len(missing)} of the 256 bytes; "
                    "expected the vocabulary of a byte-level encoding, such as GPT-2's"
                )
            return LibraryTokenizer(name, _byte_level(tokenizer))
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            return LibraryTokenizer(name, library.Tokenizer.from_file(str(file)))
    except InputError:
        raise
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"could not read a tokenizer from {path}: {error}") from error
    raise InputError(
        f"got the tokenizer {name!r}, expected bytes, bpe:4096 (or another number of tokens), "
        "gpt2, a folder with vocab.json and merges.txt, or the path of a tokenizer.json"
    )


def bytes_of_tokens(tokenizer: Tokenizer, tokens: Tokens, pieces: int = 64) -> float:
    """Return the mean number of bytes of a token; an end-of-text token counts as one byte.

    Of long arrays it decodes 64 pieces of 65,536 tokens, evenly spaced.
    """
    size = 2**16
    starts = range(0, len(tokens), max(size, -(-len(tokens) // pieces)))
    total = count = 0
    for start in starts:
        piece = tokens[start : start + size]
        text = piece[piece != tokenizer.end]
        total += len(tokenizer.decode(text.tolist()).encode()) + len(piece) - len(text)
        count += len(piece)
    return total / count


def _trained(name: str, documents: Sequence[bytes]) -> LibraryTokenizer:
    library = _library()
    size = name.removeprefix("bpe:")
    if not size.isdecimal() or not 257 <= int(size) <= 2**20:
        raise InputError(
            f"got the tokenizer {name!r}, expected bpe: and a number of tokens from 257 (256 bytes "
            "and the end of text) to 1048576, such as bpe:4096"
        )

    def trained() -> dict[str, NDArray[Any]]:
        tokenizer = _byte_level(library.Tokenizer(library.models.BPE()))
        trainer = library.trainers.BpeTrainer(
            vocab_size=int(size),
            special_tokens=[ENDS[0]],
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        pieces = (piece for text in documents for piece in cut_at_lines(whole_characters(text)))
        tokenizer.train_from_iterator(pieces, trainer)
        return {"tokenizer": np.frombuffer(tokenizer.to_str().encode(), dtype=np.uint8)}

    digest = hashlib.sha256()
    for text in documents:
        digest.update(f"{len(text)} ".encode())
        digest.update(text)
    read = readable(sum(map(len, documents)))
    purpose = f"training a tokenizer of {int(size):,} tokens on {read} of text"
    key = f"{library.__version__} {size} {digest.hexdigest()}"
    arrays = cached("bpe", key, purpose, trained)
    return LibraryTokenizer(name, library.Tokenizer.from_str(bytes(arrays["tokenizer"]).decode()))


def _byte_level(tokenizer: Any) -> Any:
    library = _library()
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    if tokenizer.token_to_id(ENDS[0]) is not None:
        tokenizer.add_special_tokens([ENDS[0]])
    return tokenizer


def _from_hub() -> Any:
    try:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(_GPT2, "tokenizer.json", local_files_only=not hub_answers())
        return _library().Tokenizer.from_file(path)
    except Exception as error:  # of the network or of the hub: there are dozens of kinds
        raise InputError(
            f"could not get GPT-2's tokenizer from huggingface.co ({type(error).__name__}); name a "
            "folder with its vocab.json and merges.txt, or train one: --tokenizer bpe:4096"
        ) from error


def _library() -> ModuleType:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise InputError(
            "this tokenizer needs the library tokenizers, which is not installed; install it with: "
            "pip install 'steepest[data]'; or use --tokenizer bytes"
        ) from error
    return tokenizers
