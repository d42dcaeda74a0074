"""Long documents and what is asked of them: the tasks of SCROLLS, each document read once for all its questions.

The document stands first and the question after it, in the words of lm-evaluation-harness, since the paper gives none:
that is what lets several questions share one reading. Solved examples, where a task has them, stand before the first
document and are read once for all. Nothing is cut for a model without a window. For one with a window, what comes
before the question is cut at its beginning, so that the longest question of the document and its answer still fit.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..data.token_text import without_halves
from ..errors import InputError, nearest
from ..generation.context import Context
from ..training.memory import forget_peak, resident
from .read_once import ROWS, Reader, reading_order, window_of
from .results import Score, TaskResult
from .text_metrics import Rouge, f1, geometric_mean, mean, rouge

VERSION = "1"
"""Of the prompts and metrics."""


@dataclass(frozen=True)
class Question:
    """What is asked of a document."""

    id: str
    text: str
    """Empty where the task asks the same of each document."""
    references: tuple[str, ...]
    """Right answers."""
    choices: tuple[str, ...] = ()
    """Of which the first reference is one; empty where the answer is written."""


@dataclass(frozen=True)
class Document:
    """A text and its questions."""

    text: str
    questions: list[Question]


@dataclass(frozen=True)
class DocumentTask:
    """A task over documents."""

    name: str
    hub_name: str
    """In tau/scrolls; empty for one that is not there."""
    metric: Literal["f1", "rouge", "acc"]
    shots: int = 0
    """Solved examples, as the paper has them."""
    answer_bytes: int = 0
    """Most that is written."""
    ask: str = "\n\nQuestion: {}\nAnswer:"
    """What follows the document; {} is the question."""
    silence: str = ""
    """What is taken for the answer of one who says nothing."""


_SUMMARY = "\n\nQuestion: What is a summary of the preceding text?\nAnswer:"
TASKS = {
    task.name: task
    for task in (
        DocumentTask("narrativeqa", "narrative_qa", "f1", answer_bytes=200),
        DocumentTask("qasper", "qasper", "f1", shots=2, answer_bytes=400, silence="Unanswerable"),
        DocumentTask("qmsum", "qmsum", "rouge", shots=1, answer_bytes=800),
        DocumentTask("govreport", "gov_report", "rouge", answer_bytes=4000, ask=_SUMMARY),
        DocumentTask("summscreen", "summ_screen_fd", "rouge", answer_bytes=1200, ask=_SUMMARY),
        DocumentTask("quality", "quality", "acc"),
        DocumentTask("contractnli", "contract_nli", "acc", ask="\n\nHypothesis: {}\nConclusion:"),
        DocumentTask("fairytaleqa", "", "f1", answer_bytes=200),
    )
}
"""By name. FairytaleQA is none of SCROLLS; it is asked as NarrativeQA is."""


def find_task(name: str) -> DocumentTask:
    """A task by its name.

    Raises:
        InputError: no such task.
    """
    if name not in TASKS:
        raise InputError(f"no task {name!r}{nearest(name, TASKS)}; tasks: {', '.join(TASKS)}")
    return TASKS[name]


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    id: str
    said: str
    """The text, or the choice that was likeliest for its length."""
    scores: dict[str, float]
    """By metric."""
    log_likelihoods: tuple[float, ...] = ()
    """Of the choices."""


@dataclass
class _Cut:
    """What a window left out."""

    documents: int = 0
    tokens: int = 0


@dataclass
class DocumentRun:
    """A model on one task.

    Args:
        task: which.
        reader: the model.
        examples: solved before the first document, each a document with one question.
        anew: read everything again for each question, as a check: the answers are the same to the last bit, and the
            work is what a harness does that knows of no state.
    """

    task: DocumentTask
    reader: Reader
    examples: Sequence[Document] = ()
    anew: bool = False
    _cut: _Cut = field(default_factory=_Cut)

    def __post_init__(self) -> None:
        solved = ""
        for document in self.examples:
            question = document.questions[0]
            solved += f"{document.text}{self._asked(question)} {question.references[0]}\n\n\n"
        self._before = self.reader.tokenizer.encode(solved, begin=self.reader.tokenizer.begins)
        self._read_before: Context | None = None

    def result(
        self, documents: Iterable[Document], watch: Callable[[Document], None] = lambda document: None
    ) -> tuple[TaskResult, list[Answer]]:
        """Ask all questions of all documents.

        Args:
            documents: with one question or more each.
            watch: called after each document.

        Raises:
            InputError: no document, or a window too narrow for the questions.
        """
        began, answers, number = time.perf_counter(), [], 0
        forget_peak()
        for document in documents:
            answers += self.answers(document)
            number += 1
            watch(document)
        if not answers:
            raise InputError(f"{self.task.name}: no document with a question was found")
        scores = {name: Score(*mean([a.scores[name] for a in answers])) for name in answers[0].scores}
        if self.task.metric == "rouge":
            scores["rouge"] = Score(*geometric_mean([Rouge(**answer.scores) for answer in answers]))
        headline = "acc_norm" if self.task.metric == "acc" else self.task.metric
        notes: dict[str, Any] = {"documents": number}
        if (window := window_of(self.reader.model)) is not None:
            notes |= {"window": window, "documents_cut": self._cut.documents, "tokens_cut": self._cut.tokens}
        return TaskResult(
            self.task.name, VERSION, len(self.examples), len(answers), scores, headline,
            seconds=time.perf_counter() - began, tokens_computed=self.reader.work.computed,
            tokens_reread=self.reader.work.anew, notes=notes, peak_memory=resident(peak=True),
        ), answers  # fmt: skip

    def answers(self, document: Document) -> list[Answer]:
        """To each question of a document, in their order."""
        encode, task = self.reader.tokenizer.encode, self.task
        text, tails = encode(document.text), [encode(self._asked(question)) for question in document.questions]
        bytes_per_token = max(1, len(without_halves(document.text).encode())) / max(1, len(text))
        written = round(task.answer_bytes / bytes_per_token)
        choices = [[encode(f" {choice}") for choice in question.choices] for question in document.questions]
        longest = max(written, *(len(choice) for each in choices for choice in each), 1)
        shared, after = self._fitted(text, max(map(len, tails)) + longest)
        answered: dict[int, Answer] = {}
        waiting: list[tuple[int, Context]] = []
        for number, context in self._each(shared, tails, after):
            if task.metric == "acc":
                answered[number] = self._chosen(document.questions[number], context, choices[number])
                continue
            waiting.append((number, context))
            if len(waiting) in (ROWS, len(tails) - len(answered)):
                texts = self.reader.write([each for _, each in waiting], max(1, written), ("\n",))
                for (place, _), said in zip(waiting, texts, strict=True):
                    answered[place] = self._judged(document.questions[place], said.strip())
                waiting = []
        return [answered[number] for number in range(len(tails))]

    def _asked(self, question: Question) -> str:
        return self.task.ask.format(question.text)

    def _fitted(self, text: np.ndarray, room: int) -> tuple[np.ndarray, Context | None]:
        """What comes before the questions, cut at the window, and what of it was read before."""
        window, before = window_of(self.reader.model), self._before
        if window is not None and (over := len(before) + len(text) + room - window) > 0:
            if over >= len(before) + len(text):
                raise InputError(
                    f"a window of {window:,} tokens has no room for a document beside its question and answer, which "
                    f"take up to {room:,}; take a model with a longer one"
                )
            self._cut.documents += 1
            self._cut.tokens += over
            return np.concatenate([before[:1], np.concatenate([before[1:], text])[over:]]), None
        if self.anew or len(before) == 1:
            return np.concatenate([before, text]), None
        if self._read_before is None:
            self._read_before = self.reader.read(before)
        return text, self._read_before

    def _each(
        self, shared: np.ndarray, tails: list[np.ndarray], after: Context | None
    ) -> Iterable[tuple[int, Context]]:
        if self.anew:  # in the same order, so that the same answers are written side by side
            return ((n, self.reader.read(np.concatenate([shared, tails[n]]))) for n in reading_order(tails))
        return self.reader.each(tails, self.reader.read(shared, after))

    def _chosen(self, question: Question, context: Context, choices: list[np.ndarray]) -> Answer:
        likelihoods = [score.log_likelihood for score in self.reader.score(context, choices)]
        by_length = [
            v / max(1, len(without_halves(c).encode())) for v, c in zip(likelihoods, question.choices, strict=True)
        ]
        right = question.choices.index(question.references[0])
        scores = {"acc": float(np.argmax(likelihoods) == right), "acc_norm": float(np.argmax(by_length) == right)}
        return Answer(question.id, question.choices[int(np.argmax(by_length))], scores, tuple(likelihoods))

    def _judged(self, question: Question, said: str) -> Answer:
        said = said or self.task.silence
        scores = rouge(said, question.references)._asdict() if self.task.metric == "rouge" else {}
        return Answer(question.id, said, scores or {"f1": f1(said, question.references)})
