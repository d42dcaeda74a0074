"""Tokenizers of subwords: tokenizer.json of the `tokenizers` library, and SentencePiece models."""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import write_atomically

PIECE = 1 << 16  # characters encoded at a time
SPACE = "\u2581"  # for a space, in vocabularies of SentencePiece's kind
BEGIN_NAMES = ("<|begin|>", "<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>", "</s>")
END_NAMES = ("<|end|>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[SEP]")


class _Subwords(ABC):
    """What both kinds share: streams, bytes and special tokens. The subclass gives encode and the vocabulary."""

    content: bytes
    vocab_size: int
    begin: int
    end: int
    prefixed: bool  # whether a space is put before every text
    _bytes: list[bytes | None]  # None for special tokens

    @property
    def fingerprint(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.content).hexdigest()[:32]

    @abstractmethod
    def _ids(self, text: str) -> list[int]:
        """The tokens of a piece of text."""

    def encode(self, text: str | bytes, begin: bool = False) -> np.ndarray:
        """Text to int64 tokens (L,); bytes are UTF-8, and what is not valid becomes U+FFFD."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        parts = [np.array(self._ids(piece), np.int64) for piece in pieces([text], self.prefixed)]
        return np.concatenate([np.array([self.begin] * begin, np.int64), *parts])

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The tokens of a text that comes in blocks, in constant memory, however it is cut into blocks."""
        texts = codecs.iterdecode(blocks, "utf-8", "replace")
        yield from (np.array(self._ids(piece), np.int64) for piece in pieces(texts, self.prefixed))

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of the tokens, without special tokens and those that only a larger model's vocabulary has."""
        return b"".join(self._bytes[int(t)] or b"" for t in tokens if int(t) < self.vocab_size)

    def decode(self, tokens: Iterable[int]) -> str:
        """As decode_bytes, as a string, without the space that was put before the text."""
        text = self.decode_bytes(tokens).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.prefixed else text


class SubwordTokenizer(_Subwords):
    """A tokenizer.json.

    Args:
        content: of the file.
        path: for messages.

    Raises:
        InputError: malformed, or without a special token for the beginning of a document.
    """

    def __init__(self, content: bytes, path: str | Path = "tokenizer.json"):
        import tokenizers

        self.content = content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            description = json.loads(content)
        except Exception as error:  # the library raises nothing more special
            raise InputError(f"{path} is not a tokenizer of the tokenizers library: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|end|>" in a text is text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.begin = _special(path, vocabulary, BEGIN_NAMES)
        self.end = _special(path, vocabulary, END_NAMES)
        added = {t["id"] for t in description.get("added_tokens", ()) if t.get("special")}
        before = json.dumps([description.get(part) for part in ("normalizer", "pre_tokenizer")])
        by_bytes = '"ByteLevel"' in before + json.dumps(description.get("decoder"))
        marks = ('"Prepend"', '"add_prefix_space": true', '"prepend_scheme": "a')
        self.prefixed = any(mark in before for mark in marks)
        self._bytes = [b""] * self.vocab_size
        for piece, number in vocabulary.items():
            self._bytes[number] = None if number in added else _byte_level(piece) if by_bytes else _spaced(piece)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def save(self, folder: Path) -> None:
        """Put tokenizer.json beside a model."""
        write_atomically(folder / "tokenizer.json", self.content)


class SentencePieceTokenizer(_Subwords):
    """A SentencePiece model; needs the package sentencepiece.

    Args:
        content: of the file.
        path: for messages.

    Raises:
        InputError: malformed file, or the package is not installed.
    """

    def __init__(self, content: bytes, path: str | Path):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise InputError(f"{path} is a SentencePiece model; install sentencepiece to read it") from None
        self.content = content
        try:
            self._model: Any = SentencePieceProcessor(model_proto=content)
        except Exception as error:
            raise InputError(f"{path} is not a SentencePiece model: {error}") from None
        model = self._model
        self.vocab_size, self.begin, self.end = model.vocab_size(), model.bos_id(), model.eos_id()
        if self.begin < 0:
            self.begin = self.end
        if self.begin < 0:
            raise InputError(f"the tokenizer {path} has neither a begin nor an end token")
        self.prefixed = model.encode("a") != model.encode(" a") or model.id_to_piece(model.encode("a")[0])[0] == SPACE
        self._bytes = [
            None if model.is_control(i) or model.is_unknown(i) else _spaced(model.id_to_piece(i))
            for i in range(self.vocab_size)
        ]

    def _ids(self, text: str) -> list[int]:
        return self._model.encode(text)

    def save(self, folder: Path) -> None:
        """Put tokenizer.model beside a model."""
        write_atomically(folder / "tokenizer.model", self.content)


def pieces(parts: Iterable[str], prefixed: bool) -> Iterator[str]:
    """A text in pieces that give the same tokens as the whole: cut before a single space between words.

    Args:
        parts: of the text; the cuts do not depend on them.
        prefixed: the tokenizer puts a space before each piece, so that of the cut is left out.
    """
    held = ""
    for part in parts:
        held += part
        while len(held) > PIECE:
            at = _cut(held)
            yield held[:at]
            held = held[at + (prefixed and held[at] == " ") :]
    if held:
        yield held


def _cut(text: str) -> int:
    """Place of the last single space in the first PIECE characters; where there is none, their end."""
    at = text.rfind(" ", 1, PIECE)
    while at > 0 and (text[at - 1].isspace() or text[at + 1].isspace()):
        at = text.rfind(" ", 1, at)
    return at if at > 0 else PIECE


def _special(path: str | Path, vocabulary: dict[str, int], names: tuple[str, ...]) -> int:
    found = next((vocabulary[name] for name in names if name in vocabulary), None)
    if found is None:
        raise InputError(f"the tokenizer {path} has none of the special tokens {', '.join(names)}; add one")
    return found


def _spaced(piece: str) -> bytes:
    """Bytes of a piece of SentencePiece's kind."""
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def _byte_level(piece: str) -> bytes:
    """Bytes of a piece that spells each byte as one printable character."""
    table = _byte_alphabet()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters of byte-level BPE: printable Latin-1 for itself, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train byte-level BPE with the tokens <|begin|>, <|end|> and <|pad|>.

    Args:
        texts: what to learn from.
        vocab_size: of all tokens, at least 259.

    Returns:
        The content of a tokenizer.json.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 259:
        raise InputError(f"vocab_size = {vocab_size} must be at least 259: all bytes and three special tokens")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode()
