"""Byte-level tokenizer: every file is valid input, one token a byte, and a few special tokens above them."""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

BEGIN, END, PAD = 256, 257, 258


class ByteTokenizer:
    """Tokens 0-255 are bytes; then begin of document, end of document, padding."""

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

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of the tokens, special tokens left out."""
        return bytes(int(t) for t in tokens if int(t) < 256)

    def decode(self, tokens: Iterable[int]) -> str:
        """As decode_bytes, as a string; what is not valid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")
