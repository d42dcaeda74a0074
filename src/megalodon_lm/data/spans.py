"""A long text in spans, whose tokens one after the other are those of the whole text."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from ..errors import InputError

SPAN = 1 << 16  # characters encoded at a time
MARGIN = 256  # characters on either side that a token at a cut may depend on
PATIENCE = 16  # spans without any place to cut at which a text is given up
TRIES = 256  # places looked at for a cut


def encode_in_spans(parts: Iterable[str], encode: Callable[[str], list[int]]) -> Iterator[list[int]]:
    """The tokens of a text that comes in parts, in constant memory.

    A span is encoded behind the end of the span before it, whose tokens are then left out: what a tokenizer does to
    the beginning of a text, such as putting a space there, happens to the whole text once.

    Args:
        parts: of the text; the tokens do not depend on how it is parted.
        encode: of the tokenizer.

    Raises:
        InputError: a text that cannot be cut anywhere without changing a token.
    """

    def is_exact(text: str, at: int) -> bool:
        """Whether a token ends at a place, from wherever one reads: in a long run of one character it depends."""
        for start in (max(0, at - MARGIN), max(0, at - MARGIN + 1)):
            before = encode(text[start:at])
            if encode(text[start : at + MARGIN])[: len(before)] != before:
                return False
        return True

    for before, span in spans(parts, is_exact):
        known = encode(before)
        found = encode(before + span)
        if found[: len(known)] != known:
            raise _uncuttable(span)
        yield found[len(known) :]


def spans(
    parts: Iterable[str], may_cut: Callable[[str, int], bool] = lambda text, at: True
) -> Iterator[tuple[str, str]]:
    """A text in spans, cut before a single space between words if that may be.

    Args:
        parts: of the text; the cuts do not depend on them.
        may_cut: whether a text may be cut at a place.

    Yields:
        The end of the text before the span, MARGIN characters if there are so many; and the span.

    Raises:
        InputError: no place to cut in PATIENCE spans.
    """
    before, held, length = "", "", SPAN
    for part in _short(parts):
        held += part
        while len(held) >= length + MARGIN:
            text = before + held[: length + MARGIN]
            at = next((at for at in _places(text, len(before)) if may_cut(text, at)), None)
            if at is None:
                length += SPAN
                if length > PATIENCE * SPAN:
                    raise _uncuttable(held)
                continue
            yield before, text[len(before) : at]
            before, held, length = text[max(0, at - MARGIN) : at], held[at - len(before) :], SPAN
    if held:
        yield before, held


def _uncuttable(text: str) -> InputError:
    return InputError(
        f"{len(text):,} characters of the text, from {text[:20]!r} on, cannot be cut without changing a token; put "
        "spaces into them, or leave them out"
    )


def _short(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        yield from (part[at : at + SPAN] for at in range(0, len(part), SPAN))


def _places(text: str, start: int) -> Iterator[int]:
    """Where a text may be cut, behind `start` and MARGIN before its end: single spaces first, the last ones first."""
    places = range(len(text) - MARGIN, max(start, len(text) - MARGIN - SPAN // 2), -1)
    yield from islice((at for at in places if text[at] == " " and text[at - 1] != " " != text[at + 1]), TRIES)
    yield from islice(places, TRIES)
