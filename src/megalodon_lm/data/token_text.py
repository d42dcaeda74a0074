"""Text of tokens, one after the other: each gives what it adds to the text of the tokens before it."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from ..errors import InputError

_TOKENWISE = {"ByteLevel", "WordPiece", "Metaspace", "BPEDecoder", "Replace", "ByteFallback", "Strip", "Fuse"}
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Pieces(Protocol):
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


def text_of(pieces: Pieces, after: int | None) -> Callable[[int], bytes]:
    """Take the tokens of a text one by one.

    The text of a token depends on the one before it, and on whether any text is before it at all: many decoders leave
    out a space there.

    Args:
        pieces: of the tokenizer.
        after: the token before; None where a text begins.

    Returns:
        A function from the next token to the bytes it adds.
    """
    head: list[int] | None = None  # tokens that gave no text yet, at the beginning of a text
    before: list[int] = []  # the token before, in the midst of a text
    if after is None or after in pieces.ends:
        head = []
    elif not pieces.is_silent(after) and pieces.byte(after) is None:
        before = [after]

    def add(token: int) -> bytes:
        nonlocal head, before
        if pieces.is_silent(token):
            if token in pieces.ends:
                head = []
            return b""
        raw = pieces.byte(token)
        if raw is not None:
            head, before = None, []
            return raw
        if head is not None:
            text = pieces.text([*head, token])
            head = None if text else [*head, token]
        else:
            window = [*pieces.anchor, *before]
            known = pieces.text(window) if window else ""
            text = pieces.text([*window, token])
            assert text.startswith(known)
            text = text[len(known) :]
        before = [token]
        return text.encode()

    return add


def check_decoder(decoder: dict[str, Any] | None, path: object) -> set[str]:
    """The kinds of decoders that a tokenizer.json puts in a row.

    Raises:
        InputError: one whose text of a token depends on more than the token before it.
    """
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder] if decoder else []
    kinds = [step["type"] for step in steps]
    unknown = sorted(set(kinds) - _TOKENWISE)
    joined = kinds[kinds.index("Fuse") + 1 :] if "Fuse" in kinds else []
    ends = [step for step in steps if step["type"] == "Strip" and step.get("stop") and joined]
    if unknown or ends or set(joined) - {"Strip"} or ("ByteLevel" in kinds and len(kinds) > 1):
        raise InputError(f"the tokenizer {path} decodes by {', '.join(kinds)}, which cannot be done token by token")
    return set(kinds)


def byte_of(piece: str) -> bytes | None:
    """The byte of a piece such as <0x0A>; None of other pieces."""
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
