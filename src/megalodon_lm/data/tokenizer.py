"""Tokenizers: what all have in common, the one of bytes, and loading."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from ..errors import InputError

BEGIN, END, PAD = 256, 257, 258


class Tokenizer(Protocol):
    """A map between text and tokens. `begin` stands before every document; `end` ends what a model writes."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """Identifies the map."""

    def encode(self, text: str | bytes, begin: bool = False) -> np.ndarray:
        """Text to int64 tokens (L,), the begin token first if asked for; bytes are UTF-8."""

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The tokens of a text that comes in blocks of bytes, in constant memory, however it is cut into blocks."""

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of the tokens, special tokens left out."""

    def decode(self, tokens: Iterable[int]) -> str:
        """As decode_bytes, as a string; what is not valid UTF-8 becomes U+FFFD."""

    def save(self, folder: Path) -> None:
        """Put what load_tokenizer needs beside a model."""


class ByteTokenizer:
    """Tokens 0-255 are bytes; then begin of document, end of document, padding. Every file is valid input."""

    vocab_size = 259
    begin, end, pad = BEGIN, END, PAD
    specials: ClassVar[dict[str, int]] = {"<|begin|>": BEGIN, "<|end|>": END, "<|pad|>": PAD}

    @property
    def fingerprint(self) -> str:
        """Identifies the map between text and tokens."""
        return "bytes-259"

    def encode(self, text: str | bytes, begin: bool = False) -> np.ndarray:
        """Text to int64 tokens (L,).

        Args:
            text: a string is taken as UTF-8.
            begin: put the begin token first.
        """
        raw = text.encode("utf-8") if isinstance(text, str) else text
        tokens = np.frombuffer(raw, np.uint8).astype(np.int64)
        return np.concatenate([[BEGIN], tokens]) if begin else tokens

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The tokens of a text that comes in blocks."""
        return map(self.encode, blocks)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of the tokens, special tokens left out."""
        return bytes(int(t) for t in tokens if int(t) < 256)

    def decode(self, tokens: Iterable[int]) -> str:
        """As decode_bytes, as a string; what is not valid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Bytes need no file."""


def load_tokenizer(name: str | Path) -> Tokenizer:
    """A tokenizer by its name.

    Args:
        name: "bytes"; a tokenizer.json of the `tokenizers` library; a SentencePiece model, *.model; or a folder that
            holds tokenizer.json or tokenizer.model. A model folder with neither is one of bytes.

    Raises:
        InputError: missing or unreadable file.
    """
    if str(name) == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        found = [path / file for file in ("tokenizer.json", "tokenizer.model") if (path / file).exists()]
        if not found:
            return ByteTokenizer()
        path = found[0]
    from .subword import SentencePieceTokenizer, SubwordTokenizer

    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    return SubwordTokenizer(content, path) if path.suffix == ".json" else SentencePieceTokenizer(content, path)
