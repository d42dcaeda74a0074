"""Text of tokens, one after the other: each gives what it adds to the text of the tokens before it."""

import re
from collections.abc import Callable
from functools import cache
from typing import Protocol

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Subwords(Protocol):
    """What the text of tokens is made from."""

    @property
    def anchor(self) -> list[int]:
        """A token that is a word or part of one, if there is any."""

    def byte(self, token: int) -> bytes | None:
        """Of a token that stands for bytes, whatever is around it."""

    def text(self, tokens: list[int]) -> str:
        """Of ordinary tokens, as the tokenizer's own library decodes them."""

    def is_silent(self, token: int) -> bool:
        """Whether a token has no text, such as a special one."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens behind which a text begins anew."""


def text_of(subwords: Subwords, after: int | None) -> Callable[[int], bytes]:
    """Take the tokens of a text one by one.

    The text of a token depends on the one before it, and on whether any text is before it at all: many decoders leave
    out a space there.

    Args:
        subwords: of the tokenizer.
        after: the token before; None where a text begins.

    Returns:
        A function from the next token to the bytes it adds.
    """
    head: list[int] | None = None  # tokens that gave no text yet, at the beginning of a text
    before: list[int] = []  # the token before, in the midst of a text
    if after is None or after in subwords.ends:
        head = []
    elif not subwords.is_silent(after) and subwords.byte(after) is None:
        before = [after]

    def add(token: int) -> bytes:
        nonlocal head, before
        if subwords.is_silent(token):
            if token in subwords.ends:
                head = []
            return b""
        raw = subwords.byte(token)
        if raw is not None:
            head, before = None, []
            return raw
        if head is not None:
            text = subwords.text([*head, token])
            head = None if text else [*head, token]
        else:
            window = [*subwords.anchor, *before]
            known = subwords.text(window) if window else ""
            text = subwords.text([*window, token])
            assert text.startswith(known)
            text = text[len(known) :]
        before = [token]
        return text.encode()

    return add


def without_halves(text: str) -> str:
    """A text with U+FFFD for lone surrogates: halves of characters, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def byte_of(piece: str) -> bytes | None:
    """The byte of a piece such as <0x0A>; None of other subwords."""
    found = _BYTE.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else None


def byte_level(piece: str) -> bytes:
    """Bytes of a piece that spells each byte as one printable character."""
    table = _byte_alphabet()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters of byte-level BPE: printable Latin-1 for itself, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
