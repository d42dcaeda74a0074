"""From logits to a token."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    Raises:
        InputError: naming the setting, its value and its range.
    """

    max_tokens: int = 500
    """Tokens to write at most."""
    temperature: float = 1.0
    """0 takes the most likely token each time; higher is wilder."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together hold this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this fraction of the most likely one."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens written before by this and multiply negative ones; the prompt does not count."""
    stop: tuple[str, ...] = ()
    """Stop before any of these strings."""
    seed: int = 0
    """The same seed gives the same text."""

    def __post_init__(self) -> None:
        for name, low, high, meaning in (
            ("max_tokens", 0, math.inf, "0 writes nothing"),
            ("temperature", 0, math.inf, "0 takes the most likely token"),
            ("top_k", 0, math.inf, "0 keeps every token"),
            ("min_p", 0, 1, "0 keeps every token"),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                limit = f"at least {low}" + (f" and at most {high}" if high < math.inf else "")
                raise InputError(f"{name} = {value} must be {limit}; {meaning}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p} must be above 0 and at most 1; 1 keeps every token")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty = {self.repetition_penalty} must be positive; 1 changes nothing")
        if "" in self.stop:
            raise InputError("a stop string is empty; it would stop before the first token")


def sample(logits: Tensor, sampling: Sampling, draws: Tensor, written: Tensor | None = None) -> Tensor:
    """Choose one token a row.

    A row's token depends on its own logits and draw alone.

    Args:
        logits: (B, vocabulary).
        sampling: the settings.
        draws: (B,) float64, uniform in [0, 1).
        written: (B, vocabulary) bool, tokens already written, for the repetition penalty.

    Returns:
        (B,) int64 on the CPU.
    """
    logits = logits.double().cpu()
    if sampling.repetition_penalty != 1 and written is not None:
        factor = torch.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits = torch.where(written, logits * factor, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -math.inf)
    if sampling.min_p:
        least = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    heaps = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(heaps, draws[:, None] * heaps[:, -1:], right=True)[:, 0]


class Draws:
    """Uniform numbers for B rows, each from a seed of its own, so that a row draws the same in any batch."""

    def __init__(self, seeds: list[int]):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self) -> Tensor:
        """(B,) float64 in [0, 1)."""
        return torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in self._generators])
