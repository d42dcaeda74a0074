"""Tasks of recall that are learnt from scratch: associative recall, selective copying, induction.

They share one vocabulary, so that one model fits all, and one frame: what is to be known in the first chunk, filler,
and questions some chunks later. The sequences are our own; the distance is counted in chunks, so that one can see what
each part of a model carries.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, get_args

import numpy as np
import torch

from ..errors import InputError, nearest
from .recall import Question, Sequences

SYMBOLS = 64
"""Keys there are, and values, and tokens of filler: three parts of the vocabulary, in this order."""
VOCAB_SIZE = 3 * SYMBOLS
CUE = VOCAB_SIZE - 1
"""Asks for the next answer where the question came before; no filler then."""
KINDS = (VOCAB_SIZE - 3, VOCAB_SIZE - 2)
"""Name the keys and the values, where they are copied; no filler then."""
NOTHING = -1  # in contents: a place for filler


class Drawn(NamedTuple):
    """Rows of a task before they are framed."""

    content: np.ndarray
    """(rows, width) with the answers, and NOTHING where filler may stand."""
    questions: np.ndarray
    """(rows, answers), or (rows, 1) where one question has many answers."""
    answers: np.ndarray
    """(rows, answers)."""


@dataclass(frozen=True)
class SyntheticTask(ABC):
    """The frame: a sequence is one document.

    Question after: it begins with the content, in one chunk. At distance 0 the questions follow at once, in the same
    chunk; at distance d > 0 filler follows, and the questions are the first tokens of the d-th chunk after that of the
    content. Question before: the sequence begins with the question, the content follows, and where the questions would
    be stands a cue for each answer, which does not say what is asked. The sequence ends with them. Answers are never
    read, so none helps with another.

    Filler is drawn anew for each place, from a part of the vocabulary of its own.

    Raises:
        InputError: content that the vocabulary or a chunk cannot hold.
    """

    pairs: int
    """Of key and value in a sequence, or what the task has in their place."""
    chunk_size: int
    """Tokens, the unit of distance."""
    question: Question = "after"
    """See Question."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.question not in get_args(Question):
            raise InputError(f"question {self.question!r} must be one of {', '.join(get_args(Question))}")
        if not 1 <= self.pairs <= self.most:
            limit = f"the {SYMBOLS} keys there are" if self.most == SYMBOLS else f"{self.most} for {self.name}"
            raise InputError(f"{self.pairs} pairs must be at least 1 and at most {limit}")
        if self.told + self.width > self.chunk_size:
            raise InputError(
                f"{self.pairs} pairs take {self.told + self.width} tokens, more than a chunk of {self.chunk_size}; "
                "take fewer pairs or a larger chunk_size"
            )

    @property
    def most(self) -> int:
        """Pairs that the vocabulary allows."""
        return SYMBOLS

    @property
    def width(self) -> int:
        """Least tokens of the content."""
        return 2 * self.pairs

    @property
    def answers(self) -> int:
        """In a sequence: all pairs are asked for, in random order, but one alone if the question comes before."""
        return self.pairs if self.question == "after" else 1

    @property
    def told(self) -> int:
        """Tokens of the question before the content."""
        return int(self.question == "before")

    @property
    def reserved(self) -> int:
        """Tokens at the end of the vocabulary that are no filler."""
        return self.told

    @property
    def chance(self) -> float:
        """See RecallTask."""
        return 1 / self.pairs

    @property
    def title(self) -> str:
        """See RecallTask."""
        return f"{self.name}, {self.pairs} pairs" + (", question before" if self.question == "before" else "")

    def room(self, distance: int) -> int:
        """Tokens that the content takes in a sequence of a distance."""
        return self.width

    @abstractmethod
    def draw(self, rows: int, room: int, random: np.random.Generator) -> Drawn:
        """Contents of `room` tokens, with questions and answers."""

    def fits(self, distance: int) -> bool:
        """Whether there are sequences of a distance: at distance 0 all must share a chunk."""
        return distance > 0 or (distance == 0 and self.told + self.width + self.answers <= self.chunk_size)

    def answers_begin(self, distance: int) -> int:
        """Tokens of a sequence before the first place that is asked."""
        assert self.fits(distance)
        return distance * self.chunk_size or self.told + self.room(0)

    def sequences(self, rows: int, distance: int, seed: Sequence[int]) -> Sequences:
        """Rows of a distance, drawn from a seed."""
        begin = self.answers_begin(distance)
        random = np.random.default_rng(list(seed))
        drawn = self.draw(rows, self.room(distance), random)
        tokens = random.integers(2 * SYMBOLS, VOCAB_SIZE - self.reserved, (rows, begin + self.answers))
        inside = tokens[:, self.told : self.told + drawn.content.shape[1]]
        np.copyto(inside, drawn.content, where=drawn.content != NOTHING)
        if self.question == "before":
            tokens[:, : self.told], tokens[:, begin:] = drawn.questions, CUE
        else:
            tokens[:, begin:] = drawn.questions
        targets = np.zeros_like(tokens)
        targets[:, begin:] = drawn.answers
        learnt = torch.zeros(tokens.shape, dtype=torch.bool)
        learnt[:, begin:] = True
        return Sequences(torch.from_numpy(tokens), torch.from_numpy(targets), learnt)

    def settings(self) -> dict[str, Any]:
        """See RecallTask."""
        return {"task": self.name, "pairs": self.pairs, "chunk_size": self.chunk_size, "question": self.question}


class AssociativeRecall(SyntheticTask):
    """Multi-query associative recall, MQAR, after Zoology (Arora et al. 2023, arXiv 2312.04927).

    The content is key, value, key, value; the keys of a sequence differ, and so do its values. The questions are keys.
    Zoology's filler may look like keys and values; here it has tokens of its own.
    """

    name = "mqar"

    def draw(self, rows: int, room: int, random: np.random.Generator) -> Drawn:
        """Pairs side by side."""
        keys, values = (some_of(SYMBOLS, self.pairs, rows, random) + first for first in (0, SYMBOLS))
        order = some_of(self.pairs, self.pairs, rows, random)[:, : self.answers]
        asked, answers = (np.take_along_axis(of, order, axis=1) for of in (keys, values))
        return Drawn(np.stack([keys, values], 2).reshape(rows, -1), asked, answers)


class SelectiveCopying(SyntheticTask):
    """Copying what matters out of what does not, after Mamba (Gu and Dao 2023, arXiv 2312.00752).

    Keys and values, as many of each, stand in random places of the chunk among filler. The question names one of the
    two kinds; the answers are all symbols of that kind, in their order. With the question after, it is asked again for
    every answer, and both kinds must be kept. The symbols of a sequence differ. Mamba's has one kind.
    """

    name = "copying"

    @property
    def answers(self) -> int:
        """All symbols of a kind."""
        return self.pairs

    @property
    def reserved(self) -> int:
        """The names of the kinds too."""
        return VOCAB_SIZE - KINDS[0]

    def room(self, distance: int) -> int:
        """What is left of the first chunk."""
        return self.chunk_size - self.told - (self.answers if distance == 0 else 0)

    def draw(self, rows: int, room: int, random: np.random.Generator) -> Drawn:
        """Both kinds scattered over the room."""
        content = np.full((rows, room), NOTHING)
        places = some_of(room, 2 * self.pairs, rows, random).reshape(rows, 2, self.pairs)
        places.sort(axis=2)
        items = [some_of(SYMBOLS, self.pairs, rows, random) + first for first in (0, SYMBOLS)]
        for number, of_kind in enumerate(items):
            np.put_along_axis(content, places[:, number], of_kind, axis=1)
        kind = random.integers(0, 2, (rows, 1))
        return Drawn(content, np.array(KINDS)[kind], np.where(kind == 0, *items))


class Induction(SyntheticTask):
    """Induction heads (Olsson et al. 2022, arXiv 2209.11895): name what came after a token where it stood before.

    The content is 2 pairs + 1 different tokens, keys and values mixed, so that a token may be a key or an answer, and
    nothing but the token before it tells. Every second one is asked for, from the first or from the second on, so that
    no answer is read as a question either.
    """

    name = "induction"

    @property
    def most(self) -> int:
        """The content has one token more."""
        return SYMBOLS - 1

    @property
    def width(self) -> int:
        """One token is neither a key nor an answer."""
        return 2 * self.pairs + 1

    @property
    def chance(self) -> float:
        """Any other token of the content may be the answer."""
        return 1 / (2 * self.pairs)

    def draw(self, rows: int, room: int, random: np.random.Generator) -> Drawn:
        """Tokens in a row."""
        content = some_of(2 * SYMBOLS, self.width, rows, random)
        order = some_of(self.pairs, self.pairs, rows, random)[:, : self.answers]
        places = random.integers(0, 2, (rows, 1)) + 2 * order
        asked, answers = (np.take_along_axis(content, places + after, axis=1) for after in (0, 1))
        return Drawn(content, asked, answers)


TASKS: dict[str, type[SyntheticTask]] = {task.name: task for task in (AssociativeRecall, SelectiveCopying, Induction)}


def some_of(count: int, wanted: int, rows: int, random: np.random.Generator) -> np.ndarray:
    """Different numbers below `count`, in random order, (rows, wanted)."""
    return random.permuted(np.broadcast_to(np.arange(count), (rows, count)), axis=1)[:, :wanted]


def find_task(name: str, pairs: int, chunk_size: int, question: Question = "after") -> SyntheticTask:
    """A task by its name.

    Raises:
        InputError: no such task, or see SyntheticTask.
    """
    if name not in TASKS:
        raise InputError(f"no task {name!r}{nearest(name, TASKS)}; tasks: {', '.join(TASKS)}")
    return TASKS[name](pairs, chunk_size, question)
