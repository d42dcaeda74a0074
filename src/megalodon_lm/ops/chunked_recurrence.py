"""Recurrences of matrices in chunks: what the delta rules and state space duality have in common.

The state of a head is a matrix that decays at each token. Inside a chunk all is matrix products with the
decays between its tokens; over a whole chunk the state changes by an affine map, so that a short loop over chunks is
all that runs one after another.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .boundaries import Boundaries, Strips, cut_into_strips
from .finite import is_finite

CHUNK_SIZE = 64
NOTHING = -60.0  # logarithm of a decay after which nothing is left; so sums over a chunk are small enough for float32
_LARGEST = 30.0  # logarithm of any factor


def in_chunks(
    run: Callable[[Strips], tuple[Tensor, Tensor]], x: Tensor, boundaries: Boundaries | None, size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """Output and exit state of a piece cut into chunks.

    What is not finite would reach the earlier tokens of its chunk: then the chunks are single tokens.

    Args:
        run: the recurrence over strips.
        x: (B, L, ...), any of its inputs.
        boundaries: of the piece.
        size: tokens of a chunk.
    """
    batch, length = x.shape[:2]
    y, leaving = run(cut_into_strips(batch, length, size, boundaries, x.device))
    where = boundaries or Boundaries()
    since = where.since_start(torch.zeros(batch, dtype=torch.int64), length)
    if where.lengths is not None:
        since = torch.where(where.valid(length), since, -1)
    if is_finite(y, since) and is_finite(leaving[:, None], torch.zeros(batch, 1, dtype=torch.int64)):
        return y, leaving
    return run(cut_into_strips(batch, length, 1, boundaries, x.device))


def sums_of_logs(log_decay: Tensor) -> Tensor:
    """(..., T): logarithms of the decays from the entry of a chunk to each token, that token's own included."""
    return log_decay.clamp(min=NOTHING).cumsum(-1)


def between(arriving: Tensor, leaving: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(arriving_i - leaving_j) for j up to i, zero for later j, which may be out of range: (..., T, T).

    Cut to a range, because exponentials that vanish or overflow take ten times as long as others.
    """
    logs = arriving[..., None] - leaving[..., None, :]
    return logs.clamp_(NOTHING, _LARGEST).exp_().to(dtype).tril_()


def by_heads(x: Tensor, strips: Strips) -> Tensor:
    """(B, L, H, ...) to (M, H, T, ...), zero in empty slots."""
    return strips.gather(x).transpose(1, 2)


def carry(
    change: Tensor, added: Tensor, entry: Tensor | None, strips: Strips, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """States at the entry of each strip and at the exit of each row; over a strip, S becomes change S + added.

    Args:
        change: (M, H, N, N) matrices; or factors, (M, H, 1, 1).
        added: (M, H, N, P), like change and entry in float32 or better.
        entry: (B, H, N, P) at the entry of the piece, or None for zero.
        strips: of the piece.
        dtype: of the former result; what is carried on is not rounded to it.

    Returns:
        (M, H, N, P) and (B, H, N, P).
    """
    rows = strips.shape[0]
    if strips.index is None:  # rows cut evenly: strip j of each is that of a view
        first = added.new_zeros(rows, *added.shape[1:]) if entry is None else entry
        return _Carry.apply(change, added, first, None, [rows] * (len(added) // rows), dtype)

    # Segments in the order of their lengths, so that those which go on are always the first ones.
    (heads,) = strips.first.nonzero(as_tuple=True)
    segment = strips.first.cumsum(0) - 1
    place = torch.arange(len(segment), device=segment.device) - heads[segment]
    longest_first = torch.bincount(segment).argsort(descending=True, stable=True)
    rank = longest_first.argsort()
    order = (place * len(heads) + rank[segment]).argsort()
    begins = heads[longest_first]
    first = added.new_zeros(len(heads), *added.shape[1:])
    if entry is not None:
        carried = strips.carries[begins].view(-1, 1, 1, 1)
        first = torch.where(carried, entry.index_select(0, strips.row[begins]), first)
    before, ends = _Carry.apply(change, added, first, order, torch.bincount(place).tolist(), dtype)
    leaving = ends.index_select(0, rank[segment[strips.last.clamp(min=0)]])
    nothing = torch.zeros_like(leaving) if entry is None else entry
    return before, torch.where((strips.last >= 0).view(-1, 1, 1, 1), leaving, nothing)


class _Carry(torch.autograd.Function):
    """The loop over strips: before each one, and after the last of each segment.

    Strips come in steps: the first one of every segment, then the second of every segment that has one, and so on;
    `order` has their numbers, None where segments have equally many strips that follow each other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        change: Tensor,
        added: Tensor,
        first: Tensor,
        order: Tensor | None,
        counts: list[int],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        state, before = first.clone(), added.new_empty(added.shape, dtype=dtype)
        given = (x if order is None else x.index_select(0, order) for x in (change, added))
        steps = (_step_by_step(x, order, counts) for x in (*given, before))
        for factor, add, kept in zip(*steps, strict=True):
            kept.copy_(state[: len(kept)])
            _change(factor, state[: len(kept)], add)
        before = before if order is None else before.index_select(0, order.argsort())
        ctx.save_for_backward(change, before)
        ctx.order, ctx.counts = order, counts
        return before, state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        change, before = ctx.saved_tensors
        order, counts = ctx.order, ctx.counts
        to_state, to_added = grads[1].clone(), grads[1].new_empty(before.shape)
        given = (x if order is None else x.index_select(0, order) for x in (change, grads[0]))
        steps = zip(*(_step_by_step(x, order, counts) for x in (*given, to_added)), strict=True)
        for factor, to_before, kept in reversed(list(steps)):
            kept.copy_(to_state[: len(kept)])
            _change(factor.mT, to_state[: len(kept)], to_before)
        to_added = to_added if order is None else to_added.index_select(0, order.argsort())
        if change.shape[-1] == 1:
            to_change = (to_added * before).sum((-2, -1), keepdim=True)
        else:
            to_change = to_added @ before.to(to_added.dtype).mT
        return to_change, to_added, to_state, None, None, None


def _change(factor: Tensor, state: Tensor, add: Tensor) -> None:
    """state = factor state + add, in place."""
    if factor.shape[-1] == 1:
        state.mul_(factor).add_(add)
    else:
        state.copy_((factor @ state).add_(add))


def _step_by_step(x: Tensor, order: Tensor | None, counts: list[int]) -> tuple[Tensor, ...]:
    """Views of the strips of each step, from strips in the order of steps, or as they are where none is given."""
    return x.unflatten(0, (counts[0], -1)).unbind(1) if order is None else x.split(counts)
