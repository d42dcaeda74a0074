"""Recall in prose, for a language model as it is: a pass key, a needle, several needles, in a novel it never read.

A needle is a sentence that says something which the novel does not. The model reads it among prose, and is asked. What
counts is whether it holds the right answer for likelier than seven others of the same kind, so that a small model that
would rather write something else altogether still shows what it remembers. Each text is read eight times, with each of
the choices as the answer, so that what a model likes better anyway falls out of the mean.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from ..data.tokenizer import Tokenizer
from ..errors import InputError, nearest
from .recall import Question, Sequences

CHOICES = 8
"""Answers that are compared; in as many sequences, the same but for it, each is the right one once."""


class Wording(NamedTuple):
    """How needles of one kind are worded; {} is the subject."""

    subjects: tuple[str, ...]
    statement: str
    """Up to the answer; a full stop follows."""
    question: str
    cue: str
    """Begins the answer, whatever the question was."""
    answers: tuple[str, ...]
    """None of them in the novel, one of them in each needle."""


PASSKEY = Wording(
    ("pass key",), " The {} is", "What is the {}?", "The pass key is",
    tuple(f" {number}" for number in range(10_007, 100_000, 89)),
)  # fmt: skip
THINGS = (
    "violin", "telescope", "umbrella", "cradle", "drum", "flute", "helmet", "necklace", "piano", "portrait", "vase",
    "banner", "dagger", "guitar", "pitcher", "sceptre",
)  # fmt: skip
PLACES = (
    "orchard", "barracks", "gallery", "pantry", "cloister", "monastery", "pavilion", "tavern", "treasury", "warehouse",
    "palace", "barn", "garret", "parsonage", "dungeon", "summerhouse", "vineyard", "infirmary", "hermitage", "workshop",
)  # fmt: skip
HIDDEN = Wording(
    THINGS, " The {} is hidden in the", "Where is the {} hidden?", "It is hidden in the",
    tuple(f" {place}" for place in PLACES),
)  # fmt: skip
PROSE_TASKS = {"passkey": PASSKEY, "needle": HIDDEN, "needles": HIDDEN}


class Prose:
    """A text as tokens, cut where sentences begin.

    Args:
        texts: UTF-8.
        tokenizer: of the model.
    """

    def __init__(self, texts: Iterable[bytes], tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        sentences = [tokenizer.encode(s) for text in texts for s in re.split(rb"(?<=[.!?])(?=\s)", text) if s]
        self.tokens = np.concatenate(sentences)
        self.starts = np.cumsum([0, *map(len, sentences)])

    @cached_property
    def words(self) -> list[str]:
        """Those of five to nine letters, in lower case wherever they stand."""
        return sorted(set(re.findall(r"\b[a-z]{5,9}\b", self.tokenizer.decode(self.tokens))))

    def sentence(self, before: int, after: int, random: np.random.Generator) -> int:
        """Where a sentence begins that has so many tokens before and after its beginning.

        Raises:
            InputError: the text is too short.
        """
        low, high = np.searchsorted(self.starts, [before, len(self.tokens) - after + 1])
        if low >= high:
            raise InputError(
                f"{before + after:,} tokens of prose are more than the {len(self.tokens):,} there are around a "
                "sentence; take smaller distances or depths"
            )
        return int(self.starts[random.integers(low, high)])

    def woven(self, begin: int, end: int, needles: Sequence[np.ndarray], random: np.random.Generator) -> np.ndarray:
        """A stretch of the text with needles before random sentences of it, or at its end where none begins."""
        low, high = np.searchsorted(self.starts, [begin, end + 1])
        places = self.starts[low:high] if high > low else np.array([end])
        cuts = np.sort(random.choice(places, len(needles)))
        return spliced(self.tokens[begin:end], cuts - begin, needles)

    def stretch(self, length: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """So many tokens from the beginning of a sentence on, and where in them sentences begin.

        Where the text ends before, it goes on from its beginning, as often as need be.
        """
        begin = int(self.starts[random.integers(len(self.starts) - 1)])
        rounds = range(0, begin + length, len(self.tokens))  # where in it the text begins
        starts = np.concatenate([self.starts[:-1] + at for at in rounds]) - begin
        tokens = [self.tokens[max(0, begin - at) : begin + length - at] for at in rounds]
        return np.concatenate(tokens), starts[(starts >= 0) & (starts < length)]


def spliced(tokens: np.ndarray, cuts: np.ndarray, inserts: Sequence[np.ndarray]) -> np.ndarray:
    """Tokens with others put in before some of them.

    Args:
        tokens: (L,).
        cuts: in ascending order, one for each insert.
        inserts: (l,) each.
    """
    parts = np.split(tokens, cuts)
    return np.concatenate([parts[0], *(t for pair in zip(inserts, parts[1:], strict=True) for t in pair)])


@dataclass(frozen=True)
class ProseTask:
    """Needles in prose, asked for at a distance.

    A sequence is one document: a begin token, prose, the needle that is asked for, prose, the question, a cue, the
    answer. Before the needle stand whole chunks, so many that they are the wanted part of all prose, or none; the
    question begins the d-th chunk after that of the needle. At distance 0 it follows at once, and all from the needle
    to the answer stands in one chunk. With the question before, it opens the document, and at the end stands the cue
    alone. Other needles stand before random sentences of the prose, or where it has no room, right before the one.

    Raises:
        InputError: no such task, or a number of needles that it has not.
    """

    name: str
    """In PROSE_TASKS."""
    prose: Prose | None
    """As the model's tokenizer cuts it; None where no sequences are made."""
    chunk_size: int
    """Tokens, the unit of distance."""
    needles: int = 1
    """In a sequence."""
    question: Question = "after"
    """See Question."""

    def __post_init__(self) -> None:
        if self.name not in PROSE_TASKS:
            raise InputError(f"no task {self.name!r}{nearest(self.name, PROSE_TASKS)}; tasks: {', '.join(PROSE_TASKS)}")
        if self.question not in get_args(Question):
            raise InputError(f"question {self.question!r} must be one of {', '.join(get_args(Question))}")
        most = CHOICES if self.name == "needles" else 1
        if not 1 <= self.needles <= most:
            raise InputError(f"{self.needles} needles must be at least 1 and at most {most} for {self.name}")

    @property
    def wording(self) -> Wording:
        """Of the needles."""
        return PROSE_TASKS[self.name]

    @property
    def chance(self) -> float:
        """See RecallTask."""
        return 1 / CHOICES

    @property
    def title(self) -> str:
        """See RecallTask."""
        number = f", {self.needles} needles" if self.name == "needles" else ""
        return f"{self.name}{number}" + (", question before" if self.question == "before" else "")

    def settings(self) -> dict[str, Any]:
        """See RecallTask."""
        return {
            "task": self.name,
            "needles": self.needles,
            "chunk_size": self.chunk_size,
            "question": self.question,
            "tokenizer": self.prose and self.prose.tokenizer.fingerprint,
        }

    @cached_property
    def _words(self) -> "_Words":
        assert self.prose is not None
        return _Words(self.wording, self.prose.tokenizer, self.question)

    def begins_at(self, distance: int, depth: float) -> int:
        """Tokens before the chunk of the needle."""
        return round(depth / (1 - depth) * max(distance, 1)) * self.chunk_size

    def context(self, distance: int, depth: float) -> int:
        """Tokens before the chunk of the question."""
        return self.begins_at(distance, depth) + distance * self.chunk_size

    def fits(self, distance: int, depth: float = 0.0) -> bool:
        """Whether there are sequences: room in a chunk for what must share it, and in the prose for other needles."""
        if distance < 0:
            return False
        words, begin = self._words, self.begins_at(distance, depth)
        chunk = words.longest_needle + (0 if begin else words.longest_head)
        room = max(begin - words.longest_head, 0) + max(distance * self.chunk_size - chunk, 0)
        if begin == distance == 0:
            chunk += (self.needles - 1) * words.longest_needle
        elif self.needles > 1 and (self.needles + 1) * words.longest_needle > room:  # one may be left on each side
            return False
        chunk += words.longest_tail if distance == 0 else 0
        return chunk <= self.chunk_size and (begin == 0 or words.longest_head <= begin)

    def sequences(self, rows: int, distance: int, seed: Sequence[int], depth: float = 0.0) -> Sequences:
        """Rows of a distance, drawn from a seed, each with all its choices.

        Args:
            rows: a multiple of CHOICES; CHOICES times as many are given.
            distance: in chunks.
            seed: of everything.
            depth: part of the prose that stands before the needle, at least 0 and below 1.

        Raises:
            InputError: more prose than there is.
        """
        assert self.fits(distance, depth)
        assert rows % CHOICES == 0
        seeds = np.random.default_rng(list(seed)).integers(0, 1 << 62, rows // CHOICES).tolist()
        drawn = []
        for each in seeds:
            for turn in range(CHOICES):
                text, answers = self._text(distance, depth, turn, np.random.default_rng(each))
                drawn += [(text, answer) for answer in answers]
        longest = max(len(text) + len(answer) for text, answer in drawn) - 1
        tokens = np.zeros((len(drawn), longest), np.int64)
        targets, learnt = np.zeros_like(tokens), np.zeros(tokens.shape, np.bool_)
        for row, (text, answer) in enumerate(drawn):
            whole, first = np.concatenate([text, answer]), len(text) - 1
            tokens[row, : len(whole) - 1] = whole[:-1]
            targets[row, first : len(whole) - 1] = answer
            learnt[row, first : len(whole) - 1] = True
        return Sequences(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(learnt), CHOICES)

    def _text(
        self, distance: int, depth: float, turn: int, random: np.random.Generator
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """A text up to its answer, and the choices, the right one first; in each turn it is another one of the same."""
        words, prose = self._words, self.prose
        assert prose is not None
        subjects = random.permutation(len(words.statements))[: self.needles]
        answers = [words.answers[a] for a in np.roll(random.permutation(len(words.answers))[:CHOICES], -turn)]
        needle, *others = (
            np.concatenate([words.statements[s], answer, words.stop])
            for s, answer in zip(subjects, answers, strict=False)
        )
        head, tail = words.heads[subjects[0]], words.tails[subjects[0]]
        begin = self.begins_at(distance, depth)
        end = begin + distance * self.chunk_size
        at = prose.sentence(begin, end - begin, random)
        room = [max(begin - len(head), 0), max(end - max(begin, len(head)) - len(needle), 0)]
        woven: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])  # before the needle, after it
        if end > 0:
            for other in others:
                free = np.maximum(np.array(room) - len(other), 0)
                side = int(random.choice(2, p=free / free.sum()))
                woven[side].append(other)
                room[side] -= len(other)
        before = prose.woven(at - room[0], at, woven[0], random)
        after = prose.woven(at, at + room[1], woven[1], random)
        beside = others if end == 0 else []
        text = np.concatenate([head, before, *beside, needle, after, tail])
        assert distance == 0 or len(text) == end + len(tail)
        return text, answers


class _Words:
    """A wording in tokens, piece by piece, so that an answer has the same tokens in its needle and behind the cue."""

    def __init__(self, wording: Wording, tokenizer: Tokenizer, question: Question):
        before = question == "before"
        self.statements = [tokenizer.encode(wording.statement.format(s)) for s in wording.subjects]
        self.answers = [tokenizer.encode(a) for a in wording.answers]
        self.stop = tokenizer.encode(".")
        asked = [wording.question.format(s) for s in wording.subjects]
        self.heads = [tokenizer.encode(f"{q}\n\n" if before else "", begin=tokenizer.begins) for q in asked]
        self.tails = [tokenizer.encode(f"\n\n{wording.cue if before else f'{q} {wording.cue}'}") for q in asked]
        longest_answer = max(map(len, self.answers))
        self.longest_needle = max(map(len, self.statements)) + longest_answer + len(self.stop)
        self.longest_head = max(map(len, self.heads))
        self.longest_tail = max(map(len, self.tails)) + longest_answer
