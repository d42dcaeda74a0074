"""Associative recall: a model reads keys with their values and is asked for the values some chunks later.

Multi-query associative recall after Zoology (Arora et al. 2023, arXiv 2312.04927), in sequences of our own: the
distance is counted in chunks of attention, so that one can see what each part of a model carries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..model.language_model import LanguageModel
from ..training.precision import Precision, autocast, choose_precision

SYMBOLS = 64
"""Keys there are, and values, and tokens of filler: three parts of the vocabulary, in this order."""
VOCAB_SIZE = 3 * SYMBOLS
BLOCK_TOKENS = 1 << 16  # read at a time when a model is asked


class Sequences(NamedTuple):
    """Rows of one distance, as a model takes them."""

    tokens: Tensor
    """(rows, L) int64."""
    targets: Tensor
    """(rows, L) int64: at a query the value that goes with its key, elsewhere 0."""
    learnt: Tensor
    """(rows, L) bool: the queries, which alone count."""


@dataclass(frozen=True)
class RecallTask:
    """So many pairs, asked for at a distance.

    A sequence is one document. It begins with the pairs, key, value, key, value, in one chunk. At distance 0 the
    queries follow at once, in the same chunk; at distance d > 0 filler follows, and the queries are the first tokens of
    the d-th chunk after that of the pairs. The queries are all keys, once each, in random order; the sequence ends with
    them. Answers are never read, so no query helps with another.

    The keys of a sequence differ, and so do its values. Filler is drawn anew for each place, as in Zoology, but from a
    part of the vocabulary of its own, where Zoology's may look like keys and values.

    Raises:
        InputError: pairs that the vocabulary or a chunk cannot hold.
    """

    pairs: int
    """In a sequence."""
    chunk_size: int
    """Of the model's attention: the unit of distance."""

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= SYMBOLS:
            raise InputError(f"{self.pairs} pairs must be at least 1 and at most the {SYMBOLS} keys there are")
        if 2 * self.pairs > self.chunk_size:
            raise InputError(
                f"{self.pairs} pairs take {2 * self.pairs} tokens, more than a chunk of {self.chunk_size}; take fewer "
                "pairs or a larger chunk_size"
            )

    def fits(self, distance: int) -> bool:
        """Whether there are sequences of a distance: at distance 0 pairs and queries must share a chunk."""
        return distance > 0 or (distance == 0 and 3 * self.pairs <= self.chunk_size)

    def queries_begin(self, distance: int) -> int:
        """Tokens of a sequence before its first query."""
        assert self.fits(distance)
        return distance * self.chunk_size or 2 * self.pairs

    def sequences(self, rows: int, distance: int, seed: Sequence[int]) -> Sequences:
        """Rows of a distance, drawn from a seed."""
        begin, shape = self.queries_begin(distance), (rows, SYMBOLS)
        random = np.random.default_rng(list(seed))
        every = np.broadcast_to(np.arange(SYMBOLS), shape)
        keys = random.permuted(every, axis=1)[:, : self.pairs]
        values = random.permuted(every, axis=1)[:, : self.pairs] + SYMBOLS
        order = random.permuted(np.broadcast_to(np.arange(self.pairs), keys.shape), axis=1)
        tokens = random.integers(2 * SYMBOLS, VOCAB_SIZE, (rows, begin + self.pairs))
        tokens[:, 0 : 2 * self.pairs : 2] = keys
        tokens[:, 1 : 2 * self.pairs : 2] = values
        tokens[:, begin:] = np.take_along_axis(keys, order, axis=1)
        targets = np.zeros_like(tokens)
        targets[:, begin:] = np.take_along_axis(values, order, axis=1)
        learnt = torch.zeros(tokens.shape, dtype=torch.bool)
        learnt[:, begin:] = True
        return Sequences(torch.from_numpy(tokens), torch.from_numpy(targets), learnt)


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
    """Of a row's State where its queries begin, without the unused part of caches: all that they can be answered
    from."""

    @property
    def accuracy(self) -> float:
        """Fraction of the answers that are right."""
        return self.right / self.answers

    @property
    def error(self) -> float:
        """Standard error of the accuracy, as of a binomial distribution."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.answers)


@torch.no_grad()
def ask(
    model: LanguageModel, task: RecallTask, distance: int, rows: int, seed: Sequence[int], precision: Precision
) -> Recalled:
    """Ask a model, which is in evaluation mode then; the likeliest token of the whole vocabulary is its answer.

    Args:
        model: of any training.
        task: with its chunk size.
        distance: in chunks.
        rows: sequences, drawn from the seed.
        seed: unlike any that was trained on.
        precision: of matrix products.
    """
    model.eval()
    device = next(model.parameters()).device
    begin = task.queries_begin(distance)
    tokens, targets, _ = task.sequences(rows, distance, seed)
    answers = targets[:, begin:]
    right = size = 0
    for part in torch.arange(rows).split(max(1, BLOCK_TOKENS // tokens.shape[1])):
        with autocast(choose_precision(precision, device), device):
            _, state = model(tokens[part, :begin].to(device), logits_to_keep=0)
            logits, _ = model(tokens[part, begin:].to(device), state)
        right += int((logits.argmax(-1).cpu() == answers[part]).sum())
        size = sum(t.nbytes for t in state.used().values()) // len(part)
    return Recalled(distance, right, answers.numel(), size)
