"""From a batch and the State before it to gradients: the part of a training step that runs the model."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..data.batches import Batch
from ..model.language_model import LanguageModel
from ..parallel.ranks import Ranks
from ..state import State
from .precision import autocast


class Passed(NamedTuple):
    """What a batch gave beside gradients.

    Attributes:
        loss: its share of the step's loss, in nats per target learnt in the step: shares add up.
        state: after its last token, without a graph; None where nothing is carried.
    """

    loss: float
    state: State | None


class Pass(Protocol):
    """One batch forward and backward."""

    def __call__(self, batch: Batch, state: State | None, learnt: int) -> Passed:
        """Add a batch's share of the gradients of the step's loss to those of the parameters.

        Args:
            batch: of tokens on the CPU.
            state: before its first token, without a graph; None for nothing.
            learnt: targets learnt in the whole step, in all its batches: what its nats are divided by.
        """


@dataclass(frozen=True)
class Forward:
    """A model run forward over batches, with or without a graph; ranks that share a batch stand behind this.

    Args:
        model: to run.
        precision: of its products.
        device: where it is.
        in_step: with ranks of other rows: each runs every pass forward and back, whether its own rows have something to
            learn or not, since gradients and shares of weights are exchanged meanwhile.
    """

    model: LanguageModel
    precision: Literal["bf16", "float32"]
    device: torch.device
    in_step: bool = False

    def loss(self, batch: Batch, state: State | None) -> tuple[Tensor, State]:
        """The mean over the targets that are learnt, in nats, and the State after the batch."""
        if self._is_padding(batch):
            return self._nothing(batch), self._unchanged(batch, state)
        inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        with autocast(self.precision, self.device):
            return self.model(
                inputs, state, targets=targets, learnt=batch.learnt, document_starts=batch.starts, mask=batch.mask
            )

    def state(self, batch: Batch, state: State | None) -> State:
        """The State after the batch alone, without what the head would make of it."""
        if self._is_padding(batch):
            self._nothing(batch)
            return self._unchanged(batch, state)
        inputs = batch.inputs.to(self.device)
        with autocast(self.precision, self.device):
            return self.model(inputs, state, logits_to_keep=0, document_starts=batch.starts, mask=batch.mask)[1]

    def _is_padding(self, batch: Batch) -> bool:
        """Whether other ranks may have tokens and this one has none."""
        return self.in_step and batch.mask is not None and not bool(batch.mask.any())

    def _nothing(self, batch: Batch) -> Tensor:
        """A loss of 0, with a gradient of 0 for each parameter, by the blocks that the other ranks run."""
        some = batch.inputs[:, :1].to(self.device)
        with autocast(self.precision, self.device):
            return self.model(some, targets=some, learnt=torch.zeros_like(some, dtype=torch.bool))[0]

    def _unchanged(self, batch: Batch, state: State | None) -> State:
        return self.model.empty_state(len(batch.inputs)) if state is None else state


@dataclass(frozen=True)
class OnePass:
    """All tokens of a batch at once.

    Args:
        forward: over the model to train.
    """

    forward: Forward

    def __call__(self, batch: Batch, state: State | None, learnt: int) -> Passed:
        """See Pass."""
        share = batch.num_learnt / learnt
        if not share and not self.forward.in_step:
            with torch.no_grad():
                return Passed(0.0, self.forward.state(batch, state))
        loss, after = self.forward.loss(batch, state)
        (loss * share).backward()
        return Passed(loss.item() * share, after.detach())


@dataclass(frozen=True)
class SharedPass:
    """A pass over this rank's rows of a batch; all ranks together make that of the whole.

    Args:
        own: over any rows.
        ranks: that share the batch.
    """

    own: Pass
    ranks: Ranks

    def __call__(self, batch: Batch, state: State | None, learnt: int) -> Passed:
        """See Pass; the State is that of this rank's rows."""
        loss, after = self.own(batch.of_rows(self.ranks.rows(len(batch.inputs))), state, learnt)
        return Passed(self.ranks.total(loss), after)


def shared(own: Pass, ranks: Ranks) -> Pass:
    """A pass over whole batches, of one over any rows."""
    return own if ranks.ranks == 1 else SharedPass(own, ranks)
