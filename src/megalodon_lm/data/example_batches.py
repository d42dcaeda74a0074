"""Batches of examples with classes, the same after every restart."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from .augmentation import Augmentation
from .examples import Examples, Form, size_of, values
from .pictures import PictureFile

SORTED_BATCHES = 16  # whose examples are put together by length, so that little is padding


class ExampleBatch(NamedTuple):
    """Sequences with a class each.

    Attributes:
        inputs: (B, L) int64 or float32, or (B, L, patch_dim) float32; of pairs (B, 2, L).
        targets: (B,) int64 classes.
        mask: (B, L) bool, or (B, 2, L) of pairs, False at padding; None where there is none.
        cursor: from which to go on after it.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None
    cursor: Any = None

    @property
    def num_read(self) -> int:
        """Steps of the sequences."""
        patches = self.inputs.is_floating_point() and self.inputs.dim() == 3
        return self.inputs.shape[:2].numel() if patches else self.inputs.numel()

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
        seed: of the orders and of what is changed.
        augmentation: how examples are changed, if they are.

    Raises:
        InputError: fewer examples than a batch has.
    """

    def __init__(
        self, examples: Examples, form: Form, batch_size: int, seed: int, augmentation: Augmentation | None = None
    ):
        if len(examples.raw) < batch_size:
            raise InputError(f"batch_size = {batch_size} is more than the {len(examples.raw)} examples")
        self.examples, self.form, self.batch_size, self.seed = examples, form, batch_size, seed
        self.augmentation = None if augmentation == Augmentation() else augmentation
        self._order: tuple[int, list[NDArray[np.int64]]] = (-1, [])

    def begin(self) -> list[int]:
        """The epoch, and the batch in it."""
        return [0, 0]

    def read(self, cursor: list[int]) -> ExampleBatch:
        """The batch at a cursor."""
        epoch, at = cursor
        order = self._batches(epoch)
        after = [epoch, at + 1] if at + 1 < len(order) else [epoch + 1, 0]
        taken = self.examples.take(order[at])
        if self.augmentation is not None:
            numbers = order[at].tolist()
            raw = [self._changed(raw, epoch, i) for raw, i in zip(taken.raw, numbers, strict=True)]
            taken = taken._replace(raw=raw)
        return batch_of(taken, self.form)._replace(cursor=after)

    def _changed(self, raw: Any, epoch: int, number: int) -> NDArray[Any]:
        """An example as it is in an epoch, whatever was asked for before."""
        assert self.augmentation is not None
        draw = np.random.default_rng([self.seed, epoch, number, 1])
        return self.augmentation(values(raw), self.examples.kind, self.examples.rate, draw)

    @property
    def fingerprint(self) -> str:
        """Of all examples and their order."""
        found = hashlib.sha256(self.examples.labels.tobytes())
        for raw in self.examples.raw:
            for part in raw if self.form.kind == "texts" else (raw,):
                found.update(_identity(part))
        return f"{found.hexdigest()}, examples {self.seed}"

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The numbers of the examples of each batch."""
        if self._order[0] != epoch:
            draw, size = np.random.default_rng([self.seed, epoch]), self.batch_size
            order = draw.permutation(len(self.examples.raw))
            lengths = np.array([size_of(raw) for raw in self.examples.raw])
            stretch = SORTED_BATCHES * size
            parts = [order[i : i + stretch] for i in range(0, len(order), stretch)]
            parts = [part[np.argsort(lengths[part], kind="stable")] for part in parts]
            batches = [part[i : i + size] for part in parts for i in range(0, len(part) - size + 1, size)]
            self._order = epoch, [batches[i] for i in draw.permutation(len(batches))]
        return self._order[1]


def _identity(raw: Any) -> bytes:
    """What a fingerprint knows of an example: all of it, or the name and the bytes of its file."""
    if isinstance(raw, PictureFile):
        return f"{raw.path.name}{raw.path.stat().st_size}{raw[1:]}".encode()
    return f"{raw.shape}{raw.dtype}".encode() + np.ascontiguousarray(raw).tobytes()


def batch_of(examples: Examples, form: Form) -> ExampleBatch:
    """Examples side by side, those that are shorter padded."""
    inputs, mask = inputs_of(examples.raw, form)
    return ExampleBatch(inputs, torch.from_numpy(examples.labels), mask)


def inputs_of(raw: Sequence[Any], form: Form) -> tuple[Tensor, Tensor | None]:
    """Examples as an encoder takes them, and their mask; see ExampleBatch."""
    if form.kind != "texts":
        return padded([form.steps(values(r)) for r in raw])
    inputs, mask = padded([form.steps(text) for pair in raw for text in pair])
    return inputs.unflatten(0, (-1, 2)), None if mask is None else mask.unflatten(0, (-1, 2))


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
    order = np.argsort([size_of(raw) for raw in examples.raw], kind="stable")
    for i in range(0, len(order), batch_size):
        which = order[i : i + batch_size]
        yield which, batch_of(examples.take(which), form)
