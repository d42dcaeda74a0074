"""State space duality: a state space model with one decay a head, computed as attention within chunks (Mamba-2).

Source: Dao & Gu 2024 (arXiv 2405.21060).
"""

import math
from typing import Any

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries, Strips
from .chunked_recurrence import between, by_heads, carry, in_chunks, sums_of_logs


@op(rounded=3)
def state_space_duality(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    step: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = alpha_t S_{t-1} + step_t b_t x_t^T; y_t = S_t^T c_t + skip x_t, with alpha = exp(log_decay), one a head.

    Args:
        x: (B, L, H, P), L at least 1.
        b, c: (B, L, G, N); H / G heads after each other share those of a group.
        log_decay: (B, L, H), at most 0.
        step: (B, L, H), at least 0.
        skip: (H,).
        state: (B, H, N, P) at the entry, or None for zero.
        boundaries: documents begin with zero; padding yields 0 and leaves S alone.

    Returns:
        y (B, L, H, P) in the type of x, and S at the exit, in float32 or better.
    """
    return in_chunks(lambda strips: _over_strips(x, b, c, log_decay, step, skip, state, strips), x, boundaries)


def _over_strips(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    step: Tensor,
    skip: Tensor,
    state: Tensor | None,
    strips: Strips,
) -> tuple[Tensor, Tensor]:
    groups, wide = b.shape[2], torch.promote_types(x.dtype, torch.float32)
    xs, b, c = (by_heads(t, strips).contiguous() for t in (x, b, c))  # (M, H, T, P) and (M, G, T, N)
    step, log_decay = (by_heads(t.to(wide), strips) for t in (step, log_decay))  # (M, H, T)
    step = torch.where(torch.isinf(step), math.nan, step)  # its logarithm below would be cut to a range
    sums = sums_of_logs(log_decay)

    left = ((sums[..., -1:] - sums).exp() * step).to(x.dtype)[..., None]  # of each token at the end of its chunk
    kept = (b[:, :, None] * left.unflatten(1, (groups, -1))).flatten(1, 2)  # (M, H, T, N)
    added = (kept.mT @ xs).to(wide)
    entry = None if state is None else state.to(wide)
    before, leaving = carry(sums[..., -1:, None].exp(), added, entry, strips, x.dtype)
    y = _Read.apply(c @ b.mT, c, sums, step, skip.to(wide), xs, before)
    return strips.scatter(y.transpose(1, 2)), leaving


class _Read(torch.autograd.Function):
    """What tokens read of their chunk, of the state before it and of themselves, in one product for each head.

    Its factors are what a token takes of each token and of each state (T, T + N), and tokens above states (T + N, P).
    By hand, because autograd would keep and pass over several times as many matrices (T, T).
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, c: Tensor, sums: Tensor, step: Tensor, skip: Tensor, x: Tensor, before: Tensor
    ) -> Tensor:
        count, groups, size, states = c.shape
        heads = x.shape[1]
        weights = between(sums, sums - step.log(), x.dtype)
        since = sums.exp().to(x.dtype)
        taken = x.new_empty(count, heads, size, size + states)
        by_group = taken.unflatten(1, (groups, -1))
        torch.mul(scores[:, :, None], weights.unflatten(1, (groups, -1)), out=by_group[..., :size])
        torch.mul(c[:, :, None], since.unflatten(1, (groups, -1))[..., None], out=by_group[..., size:])
        taken[..., :size].diagonal(dim1=-2, dim2=-1).add_(skip[:, None])
        given = torch.cat([x, before], -2)
        ctx.save_for_backward(c, weights, since, step, skip, taken, given)
        return taken @ given

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        c, weights, since, step, skip, taken, given = ctx.saved_tensors
        groups, size, states = c.shape[1:]
        wide = step.dtype
        to_taken, to_given = grads[0] @ given.mT, taken.mT @ grads[0]
        of_taken = to_taken * taken  # that of the logarithms of what is taken, but for the token itself
        leaving = of_taken[..., :size].sum(-2, dtype=wide)
        to_sums = of_taken.sum(-1, dtype=wide) - leaving
        to_tokens, to_states = to_taken.split([size, states], -1)
        to_self = to_tokens.diagonal(dim1=-2, dim2=-1).to(wide)
        to_step = (leaving - to_self * skip[:, None]) / step.clamp(min=torch.finfo(wide).tiny)
        to_scores = (to_tokens * weights).unflatten(1, (groups, -1)).sum(2)
        to_c = (to_states * since[..., None]).unflatten(1, (groups, -1)).sum(2)
        to_x, to_before = to_given.split([size, states], -2)
        return to_scores, to_c, to_sums, to_step, to_self.sum((0, 2)), to_x, to_before
