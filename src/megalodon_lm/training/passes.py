"""From a batch and the State before it to gradients: the part of a training step that runs the model."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from ..data.batches import Batch
from ..model.language_model import LanguageModel
from ..state import State
from .precision import autocast


class Passed(NamedTuple):
    """What a batch gave beside gradients.

    Attributes:
        loss: its share of the step's loss, in nats per target learnt in the step: shares add up.
        state: after its last token, without a graph.
    """

    loss: float
    state: State


class Pass(Protocol):
    """One batch forward and backward; who trains on many devices puts one around another."""

    def __call__(self, batch: Batch, state: State | None, learnt: int) -> Passed:
        """Add a batch's share of the gradients of the step's loss to those of the parameters.

        Args:
            batch: of tokens on the CPU.
            state: before its first token, without a graph; None for nothing.
            learnt: targets learnt in the whole step, in all its batches: what its nats are divided by.
        """


@dataclass(frozen=True)
class OnePass:
    """All tokens of a batch at once.

    Args:
        model: to train.
        precision: of its products.
        device: where it is.
    """

    model: LanguageModel
    precision: Literal["bf16", "float32"]
    device: torch.device

    def __call__(self, batch: Batch, state: State | None, learnt: int) -> Passed:
        """See Pass."""
        inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        share = batch.num_learnt / learnt
        with autocast(self.precision, self.device), torch.set_grad_enabled(share > 0):
            loss, after = self.model(inputs, state, targets=targets, learnt=batch.learnt, document_starts=batch.starts)
        if not share:
            return Passed(0.0, after.detach())
        (loss * share).backward()
        return Passed(loss.item() * share, after.detach())
