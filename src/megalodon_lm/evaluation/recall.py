"""Recall: a model reads something that it is to know, and is asked for it some chunks later.

What is read and asked are tasks, behind one interface. The synthetic ones (recall_tasks) are learnt from scratch by any
architecture; those in prose (recall_prose) are put to a trained language model as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..model.language_model import LanguageModel
from ..training.precision import Precision, autocast, choose_precision
from .intervals import wilson

Question = Literal["after", "before"]
"""Where a model is told what it will be asked for: after the content that holds the answer, or before it."""
BLOCK_TOKENS = 1 << 16  # read at a time when a model is asked
PIECE_TOKENS = 1 << 13  # of a row in one call
BLOCK_LOGITS = 1 << 26  # at a time


class Sequences(NamedTuple):
    """Rows of one distance, as a model takes them; where rows differ in length, the shorter ones end in any tokens."""

    tokens: Tensor
    """(rows, L) int64."""
    targets: Tensor
    """(rows, L) int64: at each place that is asked the answer, elsewhere 0."""
    learnt: Tensor
    """(rows, L) bool: the places that are asked, which alone count."""
    choices: int = 1
    """Rows in succession that share all tokens up to the first answer: that with the right answer, then others."""


class RecallTask(Protocol):
    """What is asked, at distances counted in chunks of `chunk_size` tokens, whatever chunks a model may have.

    At distance 0 what is to be known and its question stand in one chunk; at distance d the question (its cue, if it
    came before) stands at the beginning of the d-th chunk after that.
    """

    @property
    def chunk_size(self) -> int: ...
    @property
    def question(self) -> Question: ...
    @property
    def title(self) -> str:
        """In a few words, unlike that of another task."""

    @property
    def chance(self) -> float:
        """Fraction that is right of one who knows which answers there may be, and no more."""

    def fits(self, distance: int) -> bool:
        """Whether there are sequences of a distance."""

    def sequences(self, rows: int, distance: int, seed: Sequence[int]) -> Sequences:
        """Rows of a distance, drawn from a seed."""

    def settings(self) -> dict[str, Any]:
        """All that decides the sequences, for JSON."""


@dataclass(frozen=True)
class Recalled:
    """How much a model recalls at one distance."""

    distance: int
    """In chunks."""
    right: int
    """Answers."""
    answers: int
    """All of them."""
    state_bytes: int
    """Of a row's State where the answers begin, without the unused part of caches: all that they can be answered
    from."""

    @property
    def accuracy(self) -> float:
        """Fraction of the answers that are right."""
        return self.right / self.answers

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, 95 %, for other sequences of the same kind."""
        return wilson(self.right, self.answers)


class Answers(NamedTuple):
    """What a model makes of rows, at the places from the first answer on."""

    hits: Tensor
    """(rows, places) bool: the answer is the likeliest token of the whole vocabulary; False where none is asked."""
    nats: Tensor
    """(rows, places) float64: minus the log-likelihood of the answer; 0 where none is asked."""
    state_bytes: int
    """See Recalled."""


@torch.no_grad()
def answer(model: LanguageModel, sequences: Sequences, precision: Precision) -> Answers:
    """Let a model, which is in evaluation mode then, read what comes before the first answer, and answer.

    Args:
        model: of any training.
        sequences: rows that share their choices are read once.
        precision: of matrix products.
    """
    model.eval()
    device = model.device
    tokens, targets, learnt, choices = sequences
    begin, length = int(learnt.any(0).int().argmax()), tokens.shape[1]
    assert begin > 0
    logits_of_row = choices * (length - begin) * model.config.vocab_size
    at_once = max(1, min(BLOCK_TOKENS // length, BLOCK_LOGITS // logits_of_row))
    hits, nats, size = [], [], 0
    for first in torch.arange(0, len(tokens), choices).split(at_once):
        rows = (first[:, None] + torch.arange(choices)).flatten()
        state = None
        with autocast(choose_precision(precision, device), device):
            for piece in tokens[first, :begin].split(PIECE_TOKENS, 1):
                _, state = model(piece.to(device), state, logits_to_keep=0)
            assert state is not None
            size = sum(t.nbytes for t in state.used().values()) // len(first)
            state = state if choices == 1 else state.select(torch.arange(len(first)).repeat_interleave(choices))
            logits, _ = model(tokens[rows, begin:].to(device), state)
        wanted, asked = targets[rows, begin:].to(device), learnt[rows, begin:].to(device)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        hits.append(((logits.argmax(-1) == wanted) & asked).cpu())
        nats.append(torch.where(asked, losses.view_as(wanted), 0.0).double().cpu())
    return Answers(torch.cat(hits), torch.cat(nats), size)


def ask(
    model: LanguageModel, task: RecallTask, distance: int, rows: int, seed: Sequence[int], precision: Precision
) -> Recalled:
    """How many answers are the likeliest token of the whole vocabulary.

    Args:
        model: of any training; in evaluation mode then.
        task: one of those that are learnt.
        distance: in chunks.
        rows: sequences, drawn from the seed.
        seed: unlike any that was trained on.
        precision: of matrix products.
    """
    sequences = task.sequences(rows, distance, seed)
    hits, _, size = answer(model, sequences, precision)
    return Recalled(distance, int(hits.sum()), int(sequences.learnt.sum()), size)
