"""Recurrences of matrices in chunks: what the gated delta rule and state space duality have in common.

The state of a head is a matrix that decays by a factor at each token. Inside a chunk all is matrix products with the
decays between its tokens; over a whole chunk the state changes by an affine map, so that a short loop over chunks is
all that runs one after another.
"""

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .boundaries import Strips

CHUNK_SIZE = 64


def decays(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Products of decays within chunks, from logarithms of at most 0: no exponential exceeds 1.

    Args:
        log_decay: (..., T), of each token.

    Returns:
        From each token to each later one, which is the row, and 1 to itself: (..., T, T), zero above the diagonal; and
        from the entry of the chunk to each token, that token's own decay included: (..., T).
    """
    sums = log_decay.double().cumsum(-1)  # a decay between two tokens is what two sums over the chunk differ by
    later = torch.ones(2 * log_decay.shape[-1:], dtype=torch.bool, device=log_decay.device).triu_(1)
    between = (sums[..., None] - sums[..., None, :]).to(log_decay.dtype)
    return between.masked_fill_(later, -torch.inf).exp_(), sums.exp().to(log_decay.dtype)


def to_log_decay(to_between: Tensor, to_since: Tensor | None = None) -> Tensor:
    """The gradient of the logarithms, (..., T), from those of the results of `decays`, each times that result."""
    to_sums = to_between.sum(-1) - to_between.sum(-2)
    if to_since is not None:
        to_sums += to_since
    return to_sums.flip(-1).cumsum(-1).flip(-1)


def by_heads(x: Tensor, strips: Strips) -> Tensor:
    """(B, L, H, ...) to (M, H, T, ...), zero in empty slots."""
    return strips.gather(x).transpose(1, 2)


def carry(change: Tensor, added: Tensor, entry: Tensor | None, strips: Strips) -> tuple[Tensor, Tensor]:
    """States at the entry of each strip and at the exit of each row; over a strip, S becomes change S + added.

    Args:
        change: (M, ..., N, N) matrices; or factors, whose last dimension is 1.
        added: (M, ..., N, P).
        entry: (B, ..., N, P) at the entry of the piece, or None for zero.
        strips: of the piece.

    Returns:
        (M, ..., N, P) and (B, ..., N, P).
    """
    if strips.index is None:  # rows cut evenly
        changes, additions = (x.unflatten(0, (strips.shape[0], -1)).unbind(1) for x in (change, added))
        states, leaving = [torch.zeros_like(additions[0]) if entry is None else entry], additions[0]
        for j, (factor, add) in enumerate(zip(changes, additions, strict=True)):
            if j:
                states.append(leaving)
            if j or entry is not None:
                leaving = _changed(factor, states[-1], add)
        return torch.stack(states, 1).flatten(0, 1), leaving

    steps = _steps(strips)
    shape = (-1,) + (1,) * (added.dim() - 1)
    first = steps[0][0]
    state = torch.zeros_like(added.index_select(0, first))
    if entry is not None:
        carried = strips.carries[first].view(shape)
        state = torch.where(carried, entry.index_select(0, strips.row[first]), state)
    states = [state]
    for (strip, _), (_, going_on) in pairwise(steps):
        leaving = _changed(change.index_select(0, strip), states[-1], added.index_select(0, strip))
        states.append(leaving.index_select(0, going_on))
    before = torch.cat(states).index_select(0, torch.cat([strip for strip, _ in steps]).argsort())
    last = strips.last.clamp(min=0)
    leaving = _changed(*(x.index_select(0, last) for x in (change, before, added)))
    nothing = torch.zeros_like(leaving) if entry is None else entry
    return before, torch.where((strips.last >= 0).view(shape), leaving, nothing)


def _changed(change: Tensor, state: Tensor, added: Tensor) -> Tensor:
    return (change * state if change.shape[-1] == 1 else change @ state) + added


def _steps(strips: Strips) -> list[tuple[Tensor, Tensor]]:
    """For each place in a segment, the strips there, and which of those one place before they follow."""
    strip = torch.arange(len(strips.first), device=strips.first.device)
    place = strip - torch.where(strips.first, strip, 0).cummax(0).values
    counts = torch.bincount(place).tolist()
    order = place.argsort(stable=True)
    rank = order.argsort() - torch.tensor([0, *accumulate(counts)], device=strip.device)[place]  # within its place
    return [(at, rank[at - 1]) for at in order.split(counts)]
