"""Batches of examples with classes, the same after every restart."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from .examples import Examples, Form

SORTED_BATCHES = 16  # whose examples are put together by length, so that little is padding


class ExampleBatch(NamedTuple):
    """Sequences with a class each.

    Attributes:
        inputs: (B, L) int64 or float32, or (B, L, patch_dim) float32.
        targets: (B,) int64 classes.
        mask: (B, L) bool, False at padding; None where there is none.
        cursor: from which to go on after it.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None
    cursor: Any = None

    @property
    def num_learnt(self) -> int:
        """Examples."""
        return len(self.targets)


class ExampleBatches:
    """Examples in an order of its own in each epoch, in batches of similar lengths; what fills no batch waits.

    Args:
        examples: to learn from.
        form: of them.
        batch_size: examples of a batch.
        seed: of the orders.

    Raises:
        InputError: fewer examples than a batch has.
    """

    def __init__(self, examples: Examples, form: Form, batch_size: int, seed: int):
        if len(examples.raw) < batch_size:
            raise InputError(f"batch_size = {batch_size} is more than the {len(examples.raw)} examples")
        self.examples, self.form, self.batch_size, self.seed = examples, form, batch_size, seed
        self._order: tuple[int, list[NDArray[np.int64]]] = (-1, [])

    def begin(self) -> list[int]:
        """The epoch, and the batch in it."""
        return [0, 0]

    def read(self, cursor: list[int]) -> ExampleBatch:
        """The batch at a cursor."""
        epoch, at = cursor
        order = self._batches(epoch)
        after = [epoch, at + 1] if at + 1 < len(order) else [epoch + 1, 0]
        return batch_of(self.examples.take(order[at]), self.form)._replace(cursor=after)

    @property
    def fingerprint(self) -> str:
        """Of all examples and their order."""
        found = hashlib.sha256(self.examples.labels.tobytes())
        for raw in self.examples.raw:
            found.update(f"{raw.shape}{raw.dtype}".encode() + np.ascontiguousarray(raw).tobytes())
        return f"{found.hexdigest()}, examples {self.seed}"

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The numbers of the examples of each batch."""
        if self._order[0] != epoch:
            draw, size = np.random.default_rng([self.seed, epoch]), self.batch_size
            order = draw.permutation(len(self.examples.raw))
            lengths = np.array([raw.size for raw in self.examples.raw])
            stretch = SORTED_BATCHES * size
            parts = [order[i : i + stretch] for i in range(0, len(order), stretch)]
            parts = [part[np.argsort(lengths[part], kind="stable")] for part in parts]
            batches = [part[i : i + size] for part in parts for i in range(0, len(part) - size + 1, size)]
            self._order = epoch, [batches[i] for i in draw.permutation(len(batches))]
        return self._order[1]


def batch_of(examples: Examples, form: Form) -> ExampleBatch:
    """Examples side by side, those that are shorter padded."""
    inputs, mask = padded([form.steps(raw) for raw in examples.raw])
    return ExampleBatch(inputs, torch.from_numpy(examples.labels), mask)


def padded(sequences: Sequence[NDArray[Any]]) -> tuple[Tensor, Tensor | None]:
    """Sequences (L, ...) as (B, longest L, ...), and their mask, None where all are as long."""
    lengths = [len(s) for s in sequences]
    longest = max(lengths)
    first = sequences[0]
    inputs = torch.zeros(len(sequences), longest, *first.shape[1:], dtype=torch.from_numpy(first[:0]).dtype)
    for row, sequence in zip(inputs, sequences, strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence)
    if min(lengths) == longest:
        return inputs, None
    return inputs, torch.arange(longest) < torch.tensor(lengths)[:, None]


def in_order(examples: Examples, form: Form, batch_size: int) -> Iterator[tuple[NDArray[np.int64], ExampleBatch]]:
    """All examples once, in batches of similar lengths, each with the numbers of its examples."""
    order = np.argsort([raw.size for raw in examples.raw], kind="stable")
    for i in range(0, len(order), batch_size):
        which = order[i : i + batch_size]
        yield which, batch_of(examples.take(which), form)
