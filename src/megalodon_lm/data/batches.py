"""Batches for training, the same after every restart: rows that read on step by step, or windows in random order."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .mixture import Mixture
from .sequence import Sequence, Stretch

AHEAD = 2  # batches read before they are asked for


class Batch(NamedTuple):
    """One step's tokens.

    Attributes:
        inputs, targets: (B, L) int64.
        starts: (B, L) bool, inputs at which a document starts; None where none does.
        learnt: (B, L) bool, targets that count in the loss; None where all do.
        cursor: from which to go on after it.
        mask: (B, L) bool, False at padding, whose targets do not count; None where there is none.
    """

    inputs: Tensor
    targets: Tensor
    starts: Tensor | None
    learnt: Tensor | None
    cursor: Any
    mask: Tensor | None = None

    def of_rows(self, rows: range) -> "Batch":
        """Those rows of it alone."""
        if len(rows) == len(self.inputs):
            return self
        some = slice(rows.start, rows.stop)
        starts, learnt, mask = (None if t is None else t[some] for t in (self.starts, self.learnt, self.mask))
        return Batch(self.inputs[some], self.targets[some], starts, learnt, self.cursor, mask)

    @property
    def num_read(self) -> int:
        """Inputs."""
        return self.inputs.numel()

    @property
    def num_learnt(self) -> int:
        """Targets that count in the loss."""
        counted = self.learnt if self.mask is None else self.mask if self.learnt is None else self.learnt & self.mask
        return self.targets.numel() if counted is None else int(counted.sum())


class Batches(Protocol):
    """An endless source of batches. A cursor is a value for JSON from which it goes on."""

    mixture: Mixture

    def begin(self) -> Any:
        """The cursor of the first batch."""

    def read(self, cursor: Any) -> Batch:
        """The batch at a cursor."""

    @property
    def fingerprint(self) -> str:
        """Of all tokens and their order."""


class SequentialBatches:
    """B rows that read the documents in order from B evenly spaced positions, so that the State can be carried.

    A row begins with the document at its position, unless the row before it reads that one: rows of documents of one
    length then come to the ends of documents and of chunks at the same steps. A row continues where it stopped at the
    step before. With several sequences it changes between documents; where it comes to one for the first time in
    mid-document, a start is marked: the State is that of another document.

    Args:
        mixture: what to read.
        batch_size: rows of all ranks together.
        length: tokens a row reads in a step.
        rank, ranks: which share of the rows to give, of how many.

    Raises:
        InputError: less text than one step needs.
    """

    def __init__(self, mixture: Mixture, batch_size: int, length: int, rank: int = 0, ranks: int = 1):
        _check_length(mixture, length)
        self.mixture, self.length, self.batch_size = mixture, length, batch_size
        self.rows = range(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)
        self.fingerprint = mixture.fingerprint

    def begin(self) -> list[dict[str, Any]]:
        """Of each row: the sequence it reads, its position in each, and what it took from each."""
        none = [0] * len(self.mixture.sequences)
        first = self.mixture.furthest_behind(none)
        return [
            {"reads": first, "at": [self._first(s, row) for s in self.mixture.sequences], "taken": none}
            for row in self.rows
        ]

    def _first(self, sequence: Sequence, row: int) -> int:
        """Where a row begins."""
        apart = len(sequence) // self.batch_size
        document = sequence.start_of_document(row * apart)
        return document if document > (row - 1) * apart else row * apart

    def read(self, cursor: list[dict[str, Any]]) -> Batch:
        """The batch at a cursor."""
        rows, after = [], []
        for row in cursor:
            stretch, row = self._take(row, self.length)
            rows.append(_joined([stretch, self._take(row, 1)[0]]))
            after.append(row)
        return _batch(rows, after)

    def _take(self, row: dict[str, Any], count: int) -> tuple[Stretch, dict[str, Any]]:
        reads, at, taken = row["reads"], list(row["at"]), list(row["taken"])
        if len(at) == 1:
            stretch = self.mixture.sequences[0].read(at[0], count)
            return stretch, {"reads": 0, "at": [(at[0] + count) % len(self.mixture.sequences[0])], "taken": taken}
        parts = []
        while count:
            sequence = self.mixture.sequences[reads]
            rest = sequence.rest_of_document(at[reads])
            some = min(rest, count)
            stretch = sequence.read(at[reads], some)
            stretch.starts[0] |= taken[reads] == 0
            parts.append(stretch)
            at[reads] = (at[reads] + some) % len(sequence)
            taken[reads] += some
            count -= some
            if some == rest:
                reads = self.mixture.furthest_behind(taken)
        return _joined(parts), {"reads": reads, "at": at, "taken": taken}


class ShuffledBatches:
    """Windows of L tokens in random order, cut from the documents in a row; each begins from an empty state.

    Documents that share a window are told apart by `starts`. Every epoch has an order of its own.

    Args:
        mixture, batch_size, length, rank, ranks: as for SequentialBatches.
        seed: of the orders.
    """

    def __init__(self, mixture: Mixture, batch_size: int, length: int, seed: int, rank: int = 0, ranks: int = 1):
        _check_length(mixture, length)
        self.mixture, self.length, self.batch_size, self.seed = mixture, length, batch_size, seed
        self.rows = range(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)
        self.fingerprint = f"{mixture.fingerprint}, windows {seed}"
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def begin(self) -> list[int]:
        """How many windows were taken of each sequence."""
        return [0] * len(self.mixture.sequences)

    def read(self, cursor: list[int]) -> Batch:
        """The batch at a cursor."""
        taken, rows = list(cursor), []
        for row in range(self.batch_size):
            number = self.mixture.furthest_behind(taken)
            if row in self.rows:
                at = self._window(number, taken[number])
                rows.append(self.mixture.sequences[number].read(at, self.length + 1))
            taken[number] += 1
        return _batch(rows, taken)

    def _window(self, number: int, count: int) -> int:
        """Where the window is that comes after `count` others."""
        windows = len(self.mixture.sequences[number]) // self.length
        epoch, index = divmod(count, windows)
        if (number, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != number}
            self._orders[number, epoch] = np.random.default_rng([self.seed, number, epoch]).permutation(windows)
        return int(self._orders[number, epoch][index]) * self.length


def prefetched(batches: Batches, cursor: Any) -> Generator[Batch]:
    """Batches from a cursor on, read in a thread of its own a little before they are asked for."""

    def after(before: Future[Batch]) -> Batch:
        return batches.read(before.result().cursor)

    with ThreadPoolExecutor(1, "batches") as thread:
        waiting = deque([thread.submit(batches.read, cursor)])
        while True:
            while len(waiting) < AHEAD:
                waiting.append(thread.submit(after, waiting[-1]))
            yield waiting.popleft().result()


def _check_length(mixture: Mixture, length: int) -> None:
    shortest = min(len(s) for s in mixture.sequences)
    if shortest <= length:
        raise InputError(f"the text has {shortest} tokens; length {length} needs at least {length + 1}")


def _joined(parts: list[Stretch]) -> Stretch:
    return Stretch(*(np.concatenate(p) for p in zip(*parts, strict=True)))


def _batch(rows: list[Stretch], cursor: Any) -> Batch:
    """A batch of stretches of L + 1 tokens."""
    tokens, starts, learnt = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    starts, learnt = starts[:, :-1], learnt[:, 1:]
    return Batch(
        tokens[:, :-1], tokens[:, 1:], starts if bool(starts.any()) else None,
        None if bool(learnt.all()) else learnt, cursor,
    )  # fmt: skip
