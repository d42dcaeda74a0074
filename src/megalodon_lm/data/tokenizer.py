"""Tokenizers: what all have in common, the one of bytes, and loading."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from ..architectures import load_config
from ..errors import InputError
from .token_text import without_halves
from .tokenizer_record import RECORD, read_record, write_record

BEGIN, END, PAD = 256, 257, 258


class Tokenizer(Protocol):
    """A map between text and tokens. `begin` stands before every document; `end` ends a message of a chat."""

    begins: bool
    """Whether the begin token stood before every text in training; in models of other programs it may not have."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def ends(self) -> frozenset[int]:
        """The tokens at which a text is over: `end`, and `begin`, since a document is followed by the next one's."""

    @property
    def fingerprint(self) -> str:
        """Identifies the map."""

    def encode(self, text: str | bytes, begin: bool = False) -> np.ndarray:
        """Text to int64 tokens (L,), none of them special, but the begin token first if asked for.

        Bytes are UTF-8. A string may hold half a character, which becomes U+FFFD.
        """

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The tokens of a text that comes in blocks of bytes, in constant memory, however it is cut into blocks."""

    def decoder(self, after: int | None = None) -> Callable[[int], bytes]:
        """From each next token to the bytes it adds; none of a special one.

        Args:
            after: the token before the first one; None where a text begins.
        """

    def decode_bytes(self, tokens: Iterable[int], after: int | None = None) -> bytes:
        """The bytes of the tokens, special tokens left out, behind the token `after`."""

    def decode(self, tokens: Iterable[int], after: int | None = None) -> str:
        """As decode_bytes, as a string; what is not valid UTF-8 becomes U+FFFD."""

    def writable(self, vocab_size: int) -> np.ndarray:
        """Which tokens of a model's vocabulary (vocab_size,) bool it may write: text, and the ends of it."""

    def save(self, folder: Path) -> None:
        """Put what load_tokenizer needs beside a model."""


class ByteTokenizer:
    """Tokens 0-255 are bytes; then begin of document, end of document, padding. Every file is valid input."""

    vocab_size = 259
    begin, end, pad = BEGIN, END, PAD
    begins = True
    ends = frozenset({BEGIN, END})
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
        raw = without_halves(text).encode("utf-8") if isinstance(text, str) else text
        tokens = np.frombuffer(raw, np.uint8).astype(np.int64)
        return np.concatenate([[BEGIN], tokens]) if begin else tokens

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The tokens of a text that comes in blocks."""
        return map(self.encode, blocks)

    def decoder(self, after: int | None = None) -> Callable[[int], bytes]:
        """From each next token to the bytes it adds."""
        return lambda token: bytes([token]) if token < 256 else b""

    def decode_bytes(self, tokens: Iterable[int], after: int | None = None) -> bytes:
        """The bytes of the tokens, special tokens left out."""
        return bytes(int(t) for t in tokens if int(t) < 256)

    def decode(self, tokens: Iterable[int], after: int | None = None) -> str:
        """As decode_bytes, as a string; what is not valid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def writable(self, vocab_size: int) -> np.ndarray:
        """Bytes, begin and end."""
        return np.arange(vocab_size) < PAD

    def save(self, folder: Path) -> None:
        """Bytes need no file; that they are the tokens is recorded."""
        write_record(folder, None, self.fingerprint)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """A tokenizer by its name.

    Args:
        name: "bytes"; a tokenizer.json of the `tokenizers` library; a SentencePiece model, *.model; or a folder with a
            tokenizer: of a model, a checkpoint of a run, or prepared text.

    Raises:
        InputError: missing or unreadable file, or another one than the model in the folder was trained with.
    """
    if str(name) == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if not path.is_dir():
        return _from_file(path)
    if path.parent.name == "checkpoints" and not (path / RECORD).exists():
        path = path.parent.parent  # the run keeps it
    record = read_record(path)
    if record is None:
        return _unrecorded(path)
    file = record.get("file")
    tokenizer = ByteTokenizer() if file is None else _from_file(path / str(file), record.get("named", {}))
    if tokenizer.fingerprint != record.get("fingerprint"):
        raise InputError(
            f"{path / str(file or RECORD)} is not the tokenizer the model was trained with; put that one there"
        )
    return tokenizer


def _unrecorded(folder: Path) -> Tokenizer:
    """The tokenizer of a folder without a record, as older ones are."""
    found = next((folder / file for file in ("tokenizer.json", "tokenizer.model") if (folder / file).exists()), None)
    if found is None and not any((folder / file).exists() for file in ("config.json", "prepared.json")):
        raise InputError(f"the folder {folder} holds no tokenizer: no tokenizer.json or tokenizer.model")
    tokenizer = _from_file(found) if found else ByteTokenizer()
    if (folder / "config.json").exists():
        size = load_config(folder / "config.json").vocab_size
        padded = size % 64 == 0 and size < tokenizer.vocab_size + max(128, tokenizer.vocab_size // 32)
        if size < tokenizer.vocab_size or not (size == tokenizer.vocab_size or padded):
            raise InputError(
                f"the model in {folder} has {size} tokens, "
                + (f"{found.name} {tokenizer.vocab_size}" if found else f"bytes have {tokenizer.vocab_size}")
                + "; put the tokenizer.json or tokenizer.model of the model into the folder"
            )
    return tokenizer


def _from_file(path: Path, named: dict[str, Any] | None = None) -> Tokenizer:
    from .subword import SentencePieceTokenizer, SubwordTokenizer

    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    if path.suffix == ".json":
        return SubwordTokenizer(content, path, **(named or {}))
    return SentencePieceTokenizer(content, path)
