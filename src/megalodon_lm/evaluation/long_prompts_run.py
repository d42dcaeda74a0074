"""A model asked about long prompts: by kind, length and depth, with the question after the document or before it."""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError, nearest
from ..generation.context import Context
from ..training.memory import forget_peak, resident
from .intervals import wilson
from .long_prompts import LONG_TASKS, MOST_NEEDLES, Haystack, LongDocument, LongQuestion
from .read_once import Reader, Work, window_of
from .recall import Question
from .recall_prose import Prose
from .results import Score, TaskResult

VERSION = "1"
"""Of the prompts."""
SHORTEST = 512  # tokens of a document


@dataclass
class Tally:
    """How many were right, of how many."""

    right: int = 0
    of: int = 0

    @property
    def share(self) -> float:
        """Part that was right."""
        return self.right / self.of

    def figures(self) -> dict[str, Any]:
        """For JSON, with the 95 % interval by Wilson's score."""
        return asdict(self) | {"share": self.share, "interval": wilson(self.right, self.of)}


@dataclass
class Found:
    """What was found at one depth, or all over."""

    contained: Tally = field(default_factory=Tally)
    """Answers that the written text contains."""
    chosen: Tally = field(default_factory=Tally)
    """Questions whose right choice was the likeliest; none where there are no choices."""


@dataclass(frozen=True)
class LongRun:
    """A model on one kind of prompts.

    Raises:
        InputError: no such task, or numbers that cannot be.
    """

    task: str
    """In LONG_TASKS."""
    prose: Prose
    """As the model's tokenizer cuts it."""
    length: int
    """Tokens of a document; its question and answer come on top."""
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Parts of a document before what is asked for, of the kinds that have such a place."""
    samples: int = 4
    """Drawn documents, or sets of them with one for each depth."""
    seed: int = 0
    """Of everything that is drawn."""
    question: Question = "after"
    """Where the model is told what it will be asked for; its answer stands at the end either way."""

    def __post_init__(self) -> None:
        if self.task not in LONG_TASKS:
            raise InputError(f"no task {self.task!r}{nearest(self.task, LONG_TASKS)}; tasks: {', '.join(LONG_TASKS)}")
        if self.length < SHORTEST:
            raise InputError(f"a length of {self.length} tokens must be at least {SHORTEST}")
        if self.samples < 1 or self.seed < 0:
            raise InputError(f"{self.samples} samples must be at least 1, and the seed {self.seed} not negative")
        if not 1 <= len(set(self.depths)) == len(self.depths) <= MOST_NEEDLES:
            raise InputError(f"depths must differ, and be 1 to {MOST_NEEDLES}, not {list(self.depths)}")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"depths {list(self.depths)} must be parts of a document, from 0 to 1")

    def documents(self, sample: int) -> Iterable[LongDocument]:
        """Those of a sample, from the seed, one at a time."""
        kind = list(LONG_TASKS).index(self.task)
        random = np.random.default_rng([self.seed, kind, self.length, sample])
        return LONG_TASKS[self.task](Haystack(self.prose, self.length, random), self.depths)

    def asked(self, reader: Reader, document: LongDocument) -> Iterator[tuple[LongQuestion, Context]]:
        """Each question of a document, and what has read all that comes before its answer."""
        encode, begins = self.prose.tokenizer.encode, self.prose.tokenizer.begins
        if self.question == "before":
            for question in document.questions:
                told = reader.read(encode(f"{question.text}\n\n", begin=begins))
                yield question, reader.read(encode(f"\n\n{question.cue}"), reader.read(document.tokens, told))
        else:
            whole = reader.read(document.tokens, reader.read(encode("", begin=begins)))
            tails = [encode(f"\n\n{question.text} {question.cue}") for question in document.questions]
            for number, context in reader.each(tails, whole):
                yield document.questions[number], context

    def result(self, reader: Reader, watch: Callable[[int], None] = lambda done: None) -> TaskResult:
        """Ask everything.

        Args:
            reader: of the model; its count of work begins anew.
            watch: called with the number of samples that are done.
        """
        began, reader.work = time.perf_counter(), Work()
        forget_peak()
        found: dict[float | None, Found] = {}
        for sample in range(self.samples):
            for document in self.documents(sample):
                for question, context in self.asked(reader, document):
                    self._ask(reader, context, question, found.setdefault(question.depth, Found()))
            watch(sample + 1)
        return self._summary(reader, found, time.perf_counter() - began)

    def _ask(self, reader: Reader, context: Context, question: LongQuestion, found: Found) -> None:
        encode = reader.tokenizer.encode
        if question.choices:
            right, *others = reader.score(context, [encode(choice) for choice in question.choices])
            found.chosen.right += all(right.log_likelihood > other.log_likelihood for other in others)
            found.chosen.of += 1
        most = 2 * len(encode(" " + ", ".join(question.answers))) + 8
        [said] = reader.write([context], most, ("\n",))
        found.contained.right += sum(bool(re.search(rf"\b{answer}\b", said)) for answer in question.answers)
        found.contained.of += len(question.answers)

    def _summary(self, reader: Reader, found: dict[float | None, Found], seconds: float) -> TaskResult:
        scores: dict[str, Score] = {}
        notes: dict[str, Any] = {"length": self.length, "question": self.question}
        for name in ("contained", "chosen"):
            tallies = [getattr(each, name) for each in found.values()]
            if total := sum(t.of for t in tallies):
                share = sum(t.right for t in tallies) / total
                scores[name] = Score(share, math.sqrt(share * (1 - share) / total))
                notes[f"{name}_interval"] = wilson(sum(t.right for t in tallies), total)
        notes["depths"] = [
            {"depth": depth}
            | {name: tally.figures() for name in ("contained", "chosen") if (tally := getattr(each, name)).of}
            for depth, each in sorted(found.items(), key=lambda pair: (pair[0] is None, pair[0]))
        ]
        if (window := window_of(reader.model)) is not None:
            notes["window"] = window  # nothing is cut: what was read longer ago is forgotten
        order = ", question before" if self.question == "before" else ""
        questions = sum((each.chosen.of or each.contained.of) for each in found.values())
        return TaskResult(
            f"{self.task} {self.length}{order}", VERSION, 0, questions, scores, "contained", seconds,
            reader.work.computed, reader.work.anew, notes, resident(peak=True),
        )  # fmt: skip
