"""From logits to a token."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

_LARGEST = torch.finfo(torch.float64).max


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
    """Draw from the k most likely tokens, of equal ones from the first; 0 for all."""
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
        for name in ("max_tokens", "top_k", "seed"):
            if not isinstance(value := getattr(self, name), int):
                raise InputError(f"{name} = {value!r} must be a whole number")
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
        if isinstance(self.stop, str):
            raise InputError(f"stop = {self.stop!r} must be a list of strings")
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

    Raises:
        InputError: logits that are not finite; -inf leaves a token out.
    """
    logits = logits.double().cpu()
    check_finite(logits)
    if sampling.repetition_penalty != 1 and written is not None:
        penalty = sampling.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(written, penalised.clamp(-_LARGEST, _LARGEST), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # From the most likely one down, of equal ones the first, so that a count is a count and equal logits are no trap.
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    out = ordered == -math.inf  # and stays so at any temperature
    ordered = ((ordered - ordered[:, :1]) / sampling.temperature).masked_fill(out, -math.inf)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = -math.inf
    if sampling.top_p < 1:
        before = F.pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        ordered = ordered.masked_fill(before >= sampling.top_p, -math.inf)
    if sampling.min_p:
        ordered = ordered.masked_fill(ordered < math.log(sampling.min_p), -math.inf)
    heaps = ordered.softmax(-1).gather(-1, order.argsort(-1)).cumsum(-1)
    return torch.searchsorted(heaps, draws[:, None] * heaps[:, -1:], right=True)[:, 0]


def check_finite(logits: Tensor) -> None:
    """Refuse logits that come of a broken model or of an overflow.

    Args:
        logits: (B, vocabulary).

    Raises:
        InputError: a row with NaN or infinity, or of nothing but -inf.
    """
    if not bool(logits.amax(-1).isfinite().all()):
        raise InputError(
            "the model's logits are not finite: its weights hold NaN or infinity, or a product overflowed; try "
            "another checkpoint, or float32 precision"
        )


class Draws:
    """Uniform numbers for B rows, each from a seed of its own, so that a row draws the same in any batch."""

    def __init__(self, seeds: list[int]):
        self._generators = [torch.Generator().manual_seed(seed % 2**64) for seed in seeds]

    def next(self) -> Tensor:
        """(B,) float64 in [0, 1)."""
        return torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in self._generators])
