"""Batches for training: rows that read long documents in order, step after step, so that the State can be carried."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tokenizer import ByteTokenizer


class Batch(NamedTuple):
    """inputs and targets (B, L) int64; starts (B, L) bool, or None where no document starts."""

    inputs: Tensor
    targets: Tensor
    starts: Tensor | None


class Stream:
    """All documents in a row, each behind a begin token, read by B rows from B evenly spaced places.

    A row continues where it stopped at the step before; the end joins the beginning. The same seed gives the same
    order of documents.
    """

    def __init__(self, documents: list[bytes], tokenizer: ByteTokenizer, batch_size: int, length: int, seed: int = 0):
        order = np.random.default_rng(seed).permutation(len(documents))
        tokens = np.concatenate([tokenizer.encode(documents[i], begin=True) for i in order])
        if len(tokens) <= length:
            raise ValueError(f"the text has {len(tokens)} tokens; length {length} needs at least {length + 1}")
        self.tokens = tokens.astype(np.int16)
        self.begin = tokenizer.begin
        self.length = length
        self.at = np.arange(batch_size) * (len(tokens) // batch_size)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens in their order."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()

    def place(self) -> list[int]:
        """Where each row reads next."""
        return self.at.tolist()

    def seek(self, place: list[int]) -> None:
        """Go on from a place."""
        self.at = np.array(place)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            index = (self.at[:, None] + np.arange(self.length + 1)) % len(self.tokens)
            piece = torch.from_numpy(self.tokens[index].astype(np.int64))
            starts = piece[:, :-1] == self.begin
            self.at = (self.at + self.length) % len(self.tokens)
            yield Batch(piece[:, :-1], piece[:, 1:], starts if bool(starts.any()) else None)
