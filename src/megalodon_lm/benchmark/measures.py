"""What is timed: one training step, reading a prompt, writing tokens, and the CEMA operation alone.

A training step is the forward pass, the loss and the backward pass; no model takes an optimiser step, whose cost
depends on the number of parameters alone. Tokens are random. Every contender reads the same number of them.
"""

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from ..pairs import Timer

Measure = Literal["training", "prefill", "decode", "cema"]
Numbers = Literal["bf16", "float32"]
STEPS = 64  # tokens written in one run of decode
CPU = torch.device("cpu")


class Contender(Protocol):
    """Something that can be timed at a measure."""

    def settle(self, measure: Measure, batch: int, length: int) -> str:
        """Compile, and choose the fastest settings; returns them in a few words."""

    def timer(self, measure: Measure, batch: int, length: int) -> Timer:
        """The work at full size."""


def timed(work: Callable[[], Any]) -> Timer:
    """Measure the seconds of a call."""

    def timer() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return timer


def random_tokens(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """(batch, length) int64, the same in every process."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
