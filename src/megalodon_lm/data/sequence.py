"""Documents in a row: one long sequence of tokens, in an order given by a seed, read from anywhere."""

import hashlib
from collections.abc import Sequence as Several
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..errors import InputError


class Stretch(NamedTuple):
    """Tokens (L,) int64; where among them a document starts (L,) bool; which of them are to be learnt (L,) bool."""

    tokens: np.ndarray
    starts: np.ndarray
    learnt: np.ndarray


class Sequence:
    """The documents of one or more arrays of tokens; the end joins the beginning.

    Args:
        tokens: arrays or memory maps of tokens.
        ends: for each, where its documents end; the last is its length.
        seed: of the order of the documents.
        fingerprint: of the tokens; None to compute it from them.
        learnt: which tokens are to be learnt, bool arrays like `tokens`; None for all.
        section: cut longer documents into sections of so many tokens, which count as documents; 0 for none.

    Raises:
        InputError: no tokens at all.
    """

    def __init__(
        self,
        tokens: Several[np.ndarray],
        ends: Several[np.ndarray],
        seed: int,
        fingerprint: str | None = None,
        learnt: Several[np.ndarray] | None = None,
        section: int = 0,
    ):
        self._tokens, self._learnt = tokens, learnt
        stops = [np.asarray(e, np.int64) for e in ends]
        begin = np.concatenate([np.concatenate([np.zeros(1, np.int64), e])[:-1] for e in stops])
        array = np.repeat(np.arange(len(tokens), dtype=np.int32), [len(e) for e in stops])
        length = np.concatenate(stops) - begin
        into = np.zeros_like(length)
        if section:
            document, into = _sections(length, section)
            array, begin = array[document], begin[document] + into
            length = np.minimum(length[document] - into, section)
        order = np.random.default_rng(seed).permutation(len(array))
        self._array, self._begin, self._ends = array[order], begin[order], np.cumsum(length[order])
        self._torn = into[order] > 0  # nothing before its first token tells of it
        self._given, self._seed = fingerprint, f"{seed}/{section}" if section else str(seed)
        if len(self) == 0:
            raise InputError("the text has no tokens")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokens and their order."""
        whole = hashlib.sha256(self._seed.encode())
        if self._given is not None:
            whole.update(self._given.encode())
        else:
            for tokens in self._tokens:
                whole.update(tokens.tobytes())
        return whole.hexdigest()

    @property
    def of_chats(self) -> bool:
        """Whether some tokens alone are to be learnt, as the answers of chats are."""
        return self._learnt is not None

    def _document(self, at: int) -> tuple[int, int, int]:
        """Of a position: the number of its document, and where that starts and ends."""
        number = int(np.searchsorted(self._ends, at, "right"))
        return number, int(self._ends[number - 1]) if number else 0, int(self._ends[number])

    def start_of_document(self, at: int) -> int:
        """Where the document of a position starts."""
        return self._document(at)[1]

    def rest_of_document(self, at: int) -> int:
        """Tokens from a position to the end of its document."""
        at %= len(self)
        return self._document(at)[2] - at

    def read(self, at: int, count: int) -> Stretch:
        """So many tokens from a position on."""
        tokens, starts, learnt = np.empty(count, np.int64), np.zeros(count, np.bool_), np.ones(count, np.bool_)
        done = 0
        while done < count:
            position = (at + done) % len(self)
            document, start, end = self._document(position)
            into = position - start
            taken = min(end - position, count - done)
            begin, array = int(self._begin[document]) + into, self._array[document]
            tokens[done : done + taken] = self._tokens[array][begin : begin + taken]
            if self._learnt is not None:
                learnt[done : done + taken] = self._learnt[array][begin : begin + taken]
            starts[done] = into == 0
            learnt[done] &= into > 0 or not self._torn[document]
            done += taken
        return Stretch(tokens, starts, learnt)


def _sections(length: np.ndarray, section: int) -> tuple[np.ndarray, np.ndarray]:
    """The document of each section, and where in it the section begins; a document has at least one."""
    count = np.maximum(-(-length // section), 1)
    document = np.repeat(np.arange(len(length)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    return document, number * section
