"""Normalisation with the statistics of the last chunks: how the authors evaluate long texts.

The model as trained normalises with statistics that run from the first token on. The authors' long evaluation replaces
them: from time to time the last chunks are read again from an empty state, and the statistics of every TimestepNorm
after that take the place of the running ones; the CEMA states stay. Perplexities beyond the first chunks then rest on
recent statistics, at the cost of reading most tokens several times.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import InputError
from ..model.language_model import LanguageModel
from ..state import State
from ..training.precision import Precision, autocast, choose_precision

MAX_TOKENS = 8192  # read at a time


@dataclass(frozen=True)
class NormSchedule:
    """When statistics are replaced, counted in chunks; as the authors do by default.

    Raises:
        InputError: a count below 1, or a window longer than what has been read by then.
    """

    first: int = 8
    """Chunks read before the first replacement."""
    every: int = 2
    """Chunks from one replacement to the next."""
    length: int = 6
    """Chunks read again."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise InputError(f"window {field.name} = {value} must be at least 1 chunk")
        if self.length > self.first:
            raise InputError(
                f"window length = {self.length} must be at most first = {self.first}, the chunks read then"
            )


class WindowedStatistics:
    """Replaces the statistics while a text is read piece by piece.

    Args:
        model: that reads.
        schedule: when.
        precision: of matrix products.

    Raises:
        InputError: the model has no norms over time.
    """

    def __init__(self, model: LanguageModel, schedule: NormSchedule, precision: Precision = "float32"):
        if not any("norm" in layer for layer in model.state_spec["layers"]) and not model.state_spec["norm"]:
            raise InputError(f"{model.summary} has no statistics of norms to replace; use cumulative ones")
        self.model, self.schedule = model, schedule
        self.device = next(model.parameters()).device
        self.precision = choose_precision(precision, self.device)
        self.chunk = model.config.reading_unit
        self.unit = self.chunk * math.gcd(schedule.first, schedule.every)
        """Tokens from where a replacement may be due to where the next may; no piece of the text may go past one."""
        self._recent = torch.zeros(1, 0, dtype=torch.int64)

    def after(self, tokens: Tensor, state: State) -> State:
        """Go on after a piece.

        Args:
            tokens: (B, L) of the piece, within a unit; a piece at position 0 begins a new text.
            state: after it.

        Returns:
            The state to read on from.
        """
        position, size = int(state.position[0]), tokens.shape[1]
        seen = tokens if position == size else torch.cat([self._recent, tokens], 1)
        self._recent = seen[:, -self.schedule.length * self.chunk :]
        chunks, rest = divmod(position, self.chunk)
        if rest or chunks < self.schedule.first or (chunks - self.schedule.first) % self.schedule.every:
            return state
        recent = None
        for part in self._recent.split(min(self.unit, MAX_TOKENS), dim=1):
            with autocast(self.precision, self.device):
                _, recent = self.model(part.to(self.device), recent, logits_to_keep=0)
        assert recent is not None
        pairs = zip(state.parts["layers"], recent.parts["layers"], strict=True)
        layers = tuple({**old, "norm": new["norm"]} if "norm" in new else old for old, new in pairs)
        return State({**state.parts, "layers": layers, "norm": recent.parts["norm"]}, state.spec, state.model)
