"""Tokenizers of subwords: tokenizer.json of the `tokenizers` library, and SentencePiece models."""

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import write_atomically
from .spans import encode_in_spans
from .token_text import byte_level, byte_of, text_of, without_halves
from .tokenizer_json import BEGIN_NAMES, END_NAMES, Description
from .tokenizer_record import write_record


class _Subwords(ABC):
    """What both kinds share. The subclass gives the vocabulary, and what its library makes of a text and of tokens."""

    begins = True
    named: dict[str, Any]  # what the file does not say
    file: str  # its name beside a model
    content: bytes
    vocab_size: int
    begin: int
    end: int
    _silent: frozenset[int]  # tokens without a text
    _unwritten: frozenset[int]  # and those that stand for what no token can spell

    @property
    def fingerprint(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.content).hexdigest()[:32]

    @property
    def ends(self) -> frozenset[int]:
        """The tokens at which a text is over."""
        return frozenset({self.begin, self.end})

    @abstractmethod
    def _ids(self, text: str) -> list[int]:
        """The tokens of a text, by the library."""

    @abstractmethod
    def text(self, tokens: list[int]) -> str:
        """The text of tokens that have one, by the library."""

    @abstractmethod
    def byte(self, token: int) -> bytes | None:
        """Of a token that stands for bytes, whatever is around it."""

    def is_silent(self, token: int) -> bool:
        """Whether a token has no text: special ones, and those that only a larger model's vocabulary has."""
        return token >= self.vocab_size or token in self._silent

    def writable(self, vocab_size: int) -> np.ndarray:
        """Which tokens of a vocabulary (vocab_size,) bool a model may write: text, and the ends of it."""
        found = np.arange(vocab_size) < self.vocab_size
        found[[*self._unwritten]] = False
        found[list(self.ends)] = True
        return found

    def encode(self, text: str | bytes, begin: bool = False) -> np.ndarray:
        """Text to int64 tokens (L,); bytes are UTF-8, and what is not valid becomes U+FFFD."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else without_halves(text)
        parts = [np.array(ids, np.int64) for ids in encode_in_spans([text], self._ids)]
        return np.concatenate([np.array([self.begin] * begin, np.int64), *parts])

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The tokens of a text that comes in blocks, in constant memory, however it is cut into blocks."""
        texts = codecs.iterdecode(blocks, "utf-8", "replace")
        yield from (np.array(ids, np.int64) for ids in encode_in_spans(texts, self._ids))

    @cached_property
    def anchor(self) -> list[int]:
        """A token that is a word or part of one, if there is any."""
        tokens = (t for t in range(self.vocab_size) if not self.is_silent(t) and self.byte(t) is None)
        return next(([t] for t in tokens if self.text([t]).isalnum()), [])

    def decoder(self, after: int | None = None) -> Callable[[int], bytes]:
        """From each next token to the bytes it adds; see Tokenizer."""
        return text_of(self, after)

    def decode_bytes(self, tokens: Iterable[int], after: int | None = None) -> bytes:
        """The bytes of the tokens; see Tokenizer."""
        add = self.decoder(after)
        return b"".join(add(int(t)) for t in tokens)

    def decode(self, tokens: Iterable[int], after: int | None = None) -> str:
        """As decode_bytes, as a string; what is not valid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(tokens, after).decode("utf-8", errors="replace")

    def save(self, folder: Path, file: str | None = None) -> None:
        """Put the file beside a model, under a name if one is given, and the record that it belongs there."""
        file = file or self.file
        write_atomically(folder / file, self.content)
        write_record(folder, file, self.fingerprint, self.named | ({} if self.begins else {"begins": False}))


class SubwordTokenizer(_Subwords):
    """A tokenizer.json.

    Args:
        content: of the file.
        path: for messages.
        begin: the name of the token before every document, where the file has none of the usual names or another one.
        end: that of the token behind it.
        begins: whether the begin token stood before every text in training.

    Raises:
        InputError: malformed, without a special token for the beginning of a document, or with a decoder that cannot
            go token by token.
    """

    file = "tokenizer.json"

    def __init__(
        self,
        content: bytes,
        path: str | Path = "tokenizer.json",
        begin: str | None = None,
        end: str | None = None,
        begins: bool = True,
    ):
        import tokenizers

        self.content, self.begins = content, begins
        self.named = {name: token for name, token in (("begin", begin), ("end", end)) if token}
        try:
            description = Description(tokenizers.Tokenizer.from_buffer(content))
        except Exception as error:  # the library raises nothing more special
            raise InputError(f"{path} is not a tokenizer of the tokenizers library: {error}") from None
        description.check_tokenwise(path)
        self.begin = description.special((begin,) if begin else BEGIN_NAMES, path)
        self.end = description.special((end,) if end else END_NAMES, path)
        self._tokenizer = description.unspellable()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|end|>" in a text is text
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # it draws tokens at random, in training alone
        vocabulary = {token: piece for piece, token in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(vocabulary) + 1
        missing = frozenset(range(self.vocab_size)) - vocabulary.keys()
        self._silent = self._unwritten = missing | frozenset(description.specials.values())
        self._bytes = {}
        if description.spells_bytes:
            self._bytes = {token: byte_level(piece) for token, piece in vocabulary.items()}
            for added in description.added:
                text = self.text([added["id"]])  # the library may take letters of added words for bytes
                self._bytes[added["id"]] = (added["content"] if "\ufffd" in text else text).encode()
        elif description.falls_back_to_bytes:
            self._bytes = {token: raw for token, piece in vocabulary.items() if (raw := byte_of(piece)) is not None}

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, tokens: list[int]) -> str:
        """The text of tokens that have one, by the library."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def byte(self, token: int) -> bytes | None:
        """Of a token that stands for bytes, whatever is around it."""
        return self._bytes.get(token)


class SentencePieceTokenizer(_Subwords):
    """A SentencePiece model; needs the package sentencepiece.

    Args:
        content: of the file.
        path: for messages.

    Raises:
        InputError: malformed file, or the package is not installed.
    """

    file = "tokenizer.model"

    def __init__(self, content: bytes, path: str | Path):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise InputError(f"{path} is a SentencePiece model; install sentencepiece to read it") from None
        self.content, self.named = content, {}
        try:
            self._model: Any = SentencePieceProcessor(model_proto=content)
        except Exception as error:
            raise InputError(f"{path} is not a SentencePiece model: {error}") from None
        model = self._model
        self.vocab_size, self.begin, self.end = model.vocab_size(), model.bos_id(), model.eos_id()
        self.begin, self.end = (first if first >= 0 else other for first, other in
                                ((self.begin, self.end), (self.end, self.begin)))  # fmt: skip
        if self.begin < 0:
            raise InputError(f"the tokenizer {path} has neither a begin nor an end token")
        self._silent = frozenset(t for t in range(self.vocab_size) if model.is_control(t))
        self._unwritten = self._silent | {model.unk_id()}

    def _ids(self, text: str) -> list[int]:
        return self._model.encode(text)

    def text(self, tokens: list[int]) -> str:
        """The text of tokens that have one, by the library."""
        return self._model.decode(tokens)

    def byte(self, token: int) -> bytes | None:
        """Of a token that stands for bytes, whatever is around it."""
        return byte_of(self._model.id_to_piece(token)) if self._model.is_byte(token) else None


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
