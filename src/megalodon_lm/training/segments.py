"""Gradients through a batch of any length, exactly, in the memory of one segment of it.

A first pass reads the segments in order and keeps nothing but the State before each. Then, from the last to the first,
each is read once more with its entry State as a leaf: its own loss and the gradient of its exit State, which the
segment after it has handed on, go back together, to the weights and to the entry State. All that crosses a cut is in
the State, so the sum over segments is the gradient of one pass; documents packed into a row part by themselves.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batches import Batch
from ..state import State
from .passes import Forward, OnePass, Pass, Passed
from .recipe import TrainingRecipe

Gradients = dict[str, Tensor]
"""Of the tensors of a State, by name; those without any are left out."""


@dataclass(frozen=True)
class SegmentedPass:
    """A batch segment by segment, twice forward and once backward, with the gradients of one pass.

    Args:
        forward: over the model to train.
        length: tokens of a segment.
    """

    forward: Forward
    length: int

    def __call__(self, batch: Batch, state: State | None, learnt: int) -> Passed:
        """See Pass."""
        return self.through(list(cut(batch, self.length)), state, learnt)

    def through(self, segments: Sequence[Batch], state: State | None, learnt: int) -> Passed:
        """As one batch, segments that follow each other.

        Args:
            segments: of any lengths.
            state, learnt: see Pass.
        """
        entries, shelf = [state], _Shelf(len(segments))
        numbers = [_RandomNumbers.now(self.forward.device).map(shelf.put)]
        with torch.no_grad():
            for segment in segments[:-1]:
                entries.append(self.forward.state(segment, _whole(entries[-1])).compacted().map(shelf.put))
                numbers.append(_RandomNumbers.now(self.forward.device).map(shelf.put))
        loss, gradients = 0.0, Gradients()
        for at in reversed(range(len(segments))):
            numbers[at].put_back()
            share, after, gradients = self._back(segments[at], _whole(entries.pop()), at > 0, learnt, gradients)
            loss += share
            if at == len(segments) - 1:
                passed, leaving = after, _RandomNumbers.now(self.forward.device)
        leaving.put_back()
        return Passed(loss, passed)

    def _back(
        self, segment: Batch, entry: State | None, differentiate: bool, learnt: int, gradients: Gradients
    ) -> tuple[float, State, Gradients]:
        """A segment forward and backward.

        Args:
            segment: the tokens.
            entry: the State before them.
            differentiate: by that State too.
            learnt: see Pass.
            gradients: of the State after them.

        Returns:
            Its share of the loss, the State after it, and the gradients of that before it.
        """
        share = segment.num_learnt / learnt
        learns = bool(share) or self.forward.in_step
        if not learns and not gradients:
            with torch.no_grad():
                return 0.0, self.forward.state(segment, entry), {}
        if entry is not None and differentiate:
            entry = entry.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
        if learns:
            loss, after = self.forward.loss(segment, entry)
        else:
            loss, after = torch.zeros(()), self.forward.state(segment, entry)
        leaving = {name: t for name, t in after.tensors().items() if name in gradients and t.requires_grad}
        ends = [loss * share] if learns else []
        torch.autograd.backward(
            [*ends, *leaving.values()], [*map(torch.ones_like, ends), *(gradients[name] for name in leaving)]
        )
        before = {} if entry is None else entry.tensors()
        return loss.item() * share, after.detach(), {n: t.grad for n, t in before.items() if t.grad is not None}


class _Shelf:
    """Small tensors that come once for each segment, side by side: each by itself would lie where activations do, which
    then find gaps too small for them in a process that keeps freed memory.

    Args:
        count: of segments.
    """

    def __init__(self, count: int):
        self.count = count
        self._free: dict[tuple[torch.dtype, torch.device, torch.Size], list[Tensor]] = {}

    def put(self, t: Tensor) -> Tensor:
        """A copy in its place."""
        kind = (t.dtype, t.device, t.shape)
        if not self._free.get(kind):
            self._free[kind] = list(t.new_empty(self.count, *t.shape).unbind())
        return self._free[kind].pop().copy_(t)


@dataclass(frozen=True)
class _RandomNumbers:
    """Where the random numbers of the CPU and of a device are, so that dropout can be drawn once more."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "_RandomNumbers":
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda)

    def map(self, change: Callable[[Tensor], Tensor]) -> "_RandomNumbers":
        return _RandomNumbers(self.device, change(self.cpu), None if self.cuda is None else change(self.cuda))

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu.clone())  # which takes no part of a larger tensor
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda.clone(), self.device)


def build_pass(forward: Forward, recipe: TrainingRecipe) -> Pass:
    """What a recipe asks for.

    Args:
        forward: over the model to train.
        recipe: says how much is in memory at a time.
    """
    return SegmentedPass(forward, recipe.segment) if recipe.segment else OnePass(forward)


def cut(batch: Batch, length: int) -> Iterator[Batch]:
    """A batch in segments."""
    for at in range(0, batch.inputs.shape[1], length):
        some = slice(at, at + length)
        starts, learnt, mask = (None if t is None else t[:, some] for t in (batch.starts, batch.learnt, batch.mask))
        yield Batch(
            batch.inputs[:, some], batch.targets[:, some], None if starts is None or not bool(starts.any()) else starts,
            learnt, batch.cursor, mask,
        )  # fmt: skip


def _whole(state: State | None) -> State | None:
    return None if state is None else state.filled_up()
